"""Eidetic learning: the method and its parts."""

from cl_lib.methods.eidetic import apprentice, ownership, structure, widening
from cl_lib.methods.eidetic.method import Eidetic

__all__ = ["Eidetic", "apprentice", "ownership", "structure", "widening"]
