"""ReCL: the method and its parts."""

from cl_lib.methods.recl import homogeneity, reconstruction, similarity
from cl_lib.methods.recl.method import ReCL

__all__ = ["ReCL", "homogeneity", "reconstruction", "similarity"]
