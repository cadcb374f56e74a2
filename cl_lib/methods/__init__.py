"""One file a method, or one folder. What lies here is found by itself: nothing else has to name it.

The folder answers when it is called: ``cl_lib.methods()`` describes every method in it. A file of it is at hand by its
name: ``cl_lib.methods.gem.project``.
"""

import importlib
import pkgutil
import sys
import types

from cl_lib.methods import _sum  # noqa: F401, gives + its meaning


class _Methods(types.ModuleType):
    def __call__(self) -> list[dict]:
        """Every registered method: key, family, scenarios, citation, cost, parameters."""
        from cl_lib.methods._registry import described

        return described()

    def __getattr__(self, name: str):
        if name.startswith("_") or name not in {part.name for part in pkgutil.iter_modules(self.__path__)}:
            raise AttributeError(f"There is no file {name} in cl_lib.methods: see cl_lib.methods() for what there is.")
        return importlib.import_module(f"{self.__name__}.{name}")


sys.modules[__name__].__class__ = _Methods
