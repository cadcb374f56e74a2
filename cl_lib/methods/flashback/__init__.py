"""Flashback learning: the method, its parts, and the settings of the paper's scripts."""

from cl_lib.methods.flashback import knowledge, published
from cl_lib.methods.flashback.method import Flashback

__all__ = ["Flashback", "knowledge", "published"]
