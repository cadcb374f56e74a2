"""One file a method, or one folder. What lies here is found by itself: nothing else has to name it.

The folder answers when it is called: ``cl_lib.methods()`` describes every method in it.
"""

import sys
import types

from cl_lib.methods import _sum  # noqa: F401, gives + its meaning


class _Methods(types.ModuleType):
    def __call__(self) -> list[dict]:
        """Every registered method: key, family, scenarios, citation, cost, parameters."""
        from cl_lib.methods._registry import described

        return described()


sys.modules[__name__].__class__ = _Methods
