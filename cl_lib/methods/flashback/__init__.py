"""Flashback learning: the method and its parts."""

from cl_lib.methods.flashback.method import Flashback

__all__ = ["Flashback"]
