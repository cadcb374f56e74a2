"""The methods by name: which there are, how one is made from its parameters, what it says of itself."""

import dataclasses
import importlib
import inspect
import pkgutil
import sys

from cl_lib.bounds import check_fields
from cl_lib.errors import InputError, suggest
from cl_lib.methods._base import REGISTERED, Method, fields_of
from cl_lib.naming import is_named, resolve

PACKAGE = __name__.rpartition(".")[0]


def registry() -> dict[str, type[Method]]:
    """Key -> class of every registered method, the folder ``cl_lib/methods`` scanned."""
    for module in pkgutil.iter_modules(sys.modules[PACKAGE].__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{PACKAGE}.{module.name}")
    return dict(sorted(REGISTERED.items()))


def find(name: str) -> type[Method]:
    """The method of a registry key, or of ``module:Name``. Raises ``InputError`` for a name that is none."""
    if is_named(name):
        found = resolve(name)
        if not isinstance(found, Method) and not (inspect.isclass(found) and issubclass(found, Method)):
            raise InputError(f"{name} is no method: derive the class from cl_lib.Method.")
        return found
    known = registry()
    if name not in known:
        raise suggest(name, known, "method")
    return known[name]


def make(method, **parameters) -> Method:
    """The method object for a registry key, ``module:Name``, a class or an object, with the given parameters.

    ``"er+lwf"`` is a sum; the parameters of its parts are named ``**{"lwf.strength": 2}``, or plainly where one
    part alone has them. A wrapper's host is named by ``host="ewc"`` and its parameters by ``host.strength``.
    Raises ``InputError`` for an unknown key or parameter, naming the nearest right one.
    """
    if isinstance(method, str) and "+" in method:
        keys = [find(part).key for part in method.split("+")]
        shares = share_out(keys, parameters)
        return sum((make(key, **shares[key]) for key in keys[1:]), start=make(keys[0], **shares[keys[0]]))
    if isinstance(method, str):
        method = find(method)
    if isinstance(method, Method):
        if not parameters:
            return method
        cls, given = type(method), {f: getattr(method, f) for f in fields_of(type(method))}
    elif inspect.isclass(method) and issubclass(method, Method):
        cls, given = method, {}
    else:
        raise InputError(f"{method!r} is not a method: give a registry key, a Method class or a Method.")

    known = fields_of(cls)
    below = {name.removeprefix("host."): v for name, v in parameters.items() if name.startswith("host.")}
    own = {name: v for name, v in parameters.items() if not name.startswith("host.")}
    for name in own:
        if not known:
            raise InputError(f"{cls.key} has no parameters to set here, so {name!r} cannot be one of them.")
        if name not in known:
            raise suggest(name, known, f"parameter of {cls.key}")
    given |= own
    if "host" in known and (below or isinstance(given.get("host"), str)):
        given["host"] = make(given.get("host", known["host"].default), **below)
    elif below:
        raise InputError(f"{cls.key} wraps no other method, so host.{next(iter(below))} cannot be set.")
    try:
        return cls(**given)
    except TypeError as error:
        raise InputError(f"{cls.key}: {error}.") from None


def from_config(key: str, parameters: dict) -> Method:
    """The method that a run's configuration names: the other way of :meth:`Method.parameters`.

    Raises InputError for a class of the user's own that this process does not know.
    """
    if "+" in key:
        first, *others = (from_config(part, parameters.get(part, {})) for part in key.split("+"))
        return sum(others, start=first)
    if key not in registry():
        raise InputError(f"The method {key!r} is not one that this process knows: import its class, or pass method=….")
    host = lambda value: from_config(value["method"], {k: v for k, v in value.items() if k != "method"})
    named = {k: host(v) if isinstance(v, dict) and "method" in v else v for k, v in parameters.items()}
    return make(key, **named)


def check_parameters(method: Method) -> None:
    """Refuse a parameter that its hint does not allow, before any training; in a sum's parts and in a host too."""
    for member in method.members():
        if fields_of(type(member)):
            check_fields(member, member.key)


def parameter_names(method) -> list[str]:
    """What :func:`make` takes for a method: the names of its parameters; for a sum also ``key.name`` of its parts."""
    parts = [find(part) for part in method.split("+")] if isinstance(method, str) else [method]
    classes = [part if isinstance(part, type) else type(part) for part in parts]
    keys, each = [cls.key for cls in classes], [list(fields_of(cls)) for cls in classes]
    names = [name for own in each for name in own]
    if len(keys) == 1:
        return names
    alone = [name for name in names if names.count(name) == 1]
    return [f"{key}.{name}" for key, own in zip(keys, each, strict=True) for name in own] + alone


def share_out(keys: list[str], parameters: dict) -> dict[str, dict]:
    """The parameters of each part of a sum, from ``key.name`` or a ``name`` that one part alone has."""
    shares: dict[str, dict] = {key: {} for key in keys}
    for name, value in parameters.items():
        owner, dot, rest = name.partition(".")
        if dot:
            if owner not in shares:
                raise suggest(owner, keys, "method of this sum")
            shares[owner][rest] = value
            continue
        having = [key for key in keys if key in registry() and name in fields_of(registry()[key])]
        if len(having) != 1:
            parts = " and ".join(having) or "none of " + ", ".join(keys)
            raise InputError(f"{name!r} is a parameter of {parts}: name it with its method, such as {keys[0]}.{name}.")
        shares[having[0]][name] = value
    return shares


def describe(cls: type[Method]) -> dict:
    """Key, family, scenarios, citation and parameters (name -> default) of a method, as plain values."""

    def default(field):
        value = field.default if field.default is not dataclasses.MISSING else None
        return value.key if isinstance(value, Method) else value

    return {
        "key": cls.key,
        "family": cls.family,
        "scenarios": list(cls.scenarios),
        "citation": cls.citation,
        "cost": cls.cost,
        "parameters": {name: default(f) for name, f in fields_of(cls).items()},
    }


def described() -> list[dict]:
    """Every registered method described: key, family, scenarios, citation, cost, parameters."""
    return [describe(cls) for cls in registry().values()]
