"""Things of the reader's own, by name: ``mypkg.methods:MyMethod``, or ``./my_method.py:MyMethod`` for a file."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from cl_lib.errors import InputError, nearest


def is_named(text) -> bool:
    """Whether a text names something in a module, as :func:`resolve` takes it."""
    return isinstance(text, str) and ":" in text


def resolve(text: str):
    """What ``module:Name`` or ``path/to/file.py:Name`` names; modules are also looked for in the current folder.

    Raises InputError where there is no such module or name, and where the module cannot be imported.
    """
    place, _, name = text.rpartition(":")
    module = _of_file(Path(place)) if place.endswith(".py") else _of_name(place)
    if hasattr(module, name):
        return getattr(module, name)
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    known = [key for key in vars(module) if not key.startswith("_")]
    defined = f" It defines {', '.join(sorted(own)[:12])}." if own else ""
    raise InputError(f"{place} has no {name!r}.{nearest(name, known)}{defined}")


def _of_file(path: Path) -> ModuleType:
    """A file as the module that its name says, so that other processes can import it too."""
    if not path.is_file():
        others = [other.name for other in path.parent.glob("*.py")]
        raise InputError(f"There is no file {path}.{nearest(path.name, others)}")
    module = _import(path.stem, path.resolve().parent, str(path))
    if Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise InputError(f"{path} cannot be imported: another module is named {path.stem!r}. Rename the file.")
    return module


def _of_name(place: str) -> ModuleType:
    if not place or place.startswith("."):
        raise InputError(
            f"{place!r} is no module: give module:Name, such as mypkg.methods:MyMethod or ./my.py:MyMethod."
        )
    return _import(place, Path.cwd(), place)


def _import(name: str, folder: Path, told: str) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that nothing of the folder stands in for a library
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"There is no module {error.name!r}, seen from {folder}: install it, or give a file."
            ) from None
        raise InputError(f"{told} cannot be imported: it needs {error.name}, which is not installed.") from error
    except InputError:
        raise
    except Exception as error:  # whatever the reader's own code does when it is imported
        raise InputError(
            f"{told} cannot be imported ({type(error).__name__}: {error}): mend it and try again."
        ) from error
