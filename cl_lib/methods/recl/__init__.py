"""ReCL: the method and its parts."""

from cl_lib.methods.recl.method import ReCL

__all__ = ["ReCL"]
