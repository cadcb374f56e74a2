"""One file a method. A file in this folder is found by itself: nothing else has to name it.

The folder answers when it is called: ``cl_lib.methods()`` describes every method in it.
"""

import sys
import types

from cl_lib.method import described


class _Methods(types.ModuleType):
    def __call__(self) -> list[dict]:
        """Every registered method: key, family, scenarios, citation, cost, parameters."""
        return described()


sys.modules[__name__].__class__ = _Methods
