"""Eidetic learning: the method and its parts."""

from cl_lib.methods.eidetic.method import Eidetic

__all__ = ["Eidetic"]
