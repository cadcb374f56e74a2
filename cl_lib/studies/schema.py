"""What a file of studies may say, checked before anything is imported or run: file, line, field, nearest right name."""

import re
from pathlib import Path
from typing import Annotated, Any

import yaml

from cl_lib.bounds import Bound, Count, Natural, allows, describe, told
from cl_lib.errors import InputError, nearest

SEARCH = {
    "trials": Count,
    "validation": Annotated[float, Bound(0, 1, True, True)],
    "seed": Natural,
    "tasks": Count,
}
STUDY = {
    "about": str,
    "seeds": Annotated[int, Bound(1, 10**6)],
    "search": SEARCH,
    "common": dict,
    "vary": dict,
    "methods": list,
    "notebooks": list,
}
CELLS = {
    "methods": "methods, a list of mappings such as {method: ewc}",
    "notebooks": "notebooks, a list of mappings such as {notebook: 05_replay}",
}
MOST = 100_000  # values in a file, each alias counted as what it stands for


def read(path) -> dict:
    """The studies in a YAML file, ``{common: {…}, studies: {name: {…}}}``. Raises InputError for any other file."""
    try:
        text = Path(path).read_text("utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        if tree is not None:
            _size(tree, path, {})
        found = yaml.safe_load(text)
    except (OSError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}): give a file of notebooks/experiments.") from error
    if not isinstance(found, dict) or not isinstance(found.get("studies"), dict) or not found["studies"]:
        raise InputError(f"{path} names no studies: give it a mapping `studies:`.")
    _fields(found, {"common": dict, "studies": dict}, tree, path, ())
    for name, study in found["studies"].items():
        here = ("studies", name)
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise _error(path, tree, here, f"{name!r} is no name for a study: use letters, digits, - and _")
        _fields(study, STUDY, tree, path, here)
        named = {kind: study[kind] for kind in CELLS if kind in study}
        if not named or not all(each and all(isinstance(m, dict) and m for m in each) for each in named.values()):
            raise _error(path, tree, here, f"a study needs {' or '.join(CELLS.values())}")
        for one in study.get("notebooks", []):
            if not isinstance(one.get("notebook"), str):
                raise _error(path, tree, (*here, "notebooks"), f"{told(one)} names no notebook: {CELLS['notebooks']}")
        for axis, values in study.get("vary", {}).items():
            if not isinstance(values, list) or not values:
                raise _error(path, tree, (*here, "vary", axis), f"vary needs a list of values, not {told(values)}")
    return found


def _fields(mapping, known: dict[str, Any], tree, path, above: tuple) -> None:
    """Refuse a field that is not known, or holds what its type does not allow."""
    if not isinstance(mapping, dict):
        raise _error(path, tree, above, f"{above[-1]} must be a mapping, not {told(mapping)}")
    for name, value in mapping.items():
        at = (*above, name)
        if name not in known:
            raise _error(path, tree, at, f"there is no field {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
        if isinstance(known[name], dict):
            _fields(value, known[name], tree, path, at)
        elif not allows(known[name], value):
            wanted = {dict: "a mapping", list: "a list"}.get(known[name]) or describe(known[name])
            raise _error(path, tree, at, f"{name} cannot be {told(value)}: give {wanted}")


def _error(path, tree, keys: tuple, what: str) -> InputError:
    """The error with the line of what it is about."""
    line = tree.start_mark.line
    for key in keys:
        pairs = tree.value if isinstance(tree, yaml.MappingNode) else []
        found = next(((k, v) for k, v in pairs if k.value == str(key)), None)
        if found is None:
            break
        line, tree = found[0].start_mark.line, found[1]
    return InputError(f"{path}, line {line + 1}: {what}.")


def _size(node, path, known: dict) -> int:
    """How many values a part of the file stands for. Raises InputError for too many, and for a key given twice."""
    if id(node) in known:
        if known[id(node)] is None:
            raise InputError(f"{path}, line {node.start_mark.line + 1}: this holds itself.")
        return known[id(node)]
    known[id(node)], total = None, 1
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{path}, line {node.start_mark.line + 1}: {twice[0]!r} is given twice: take one out.")
        total += sum(_size(part, path, known) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_size(part, path, known) for part in node.value)
    if total > MOST:
        raise InputError(f"{path}, line {node.start_mark.line + 1}: more than {MOST:,} values: write fewer.")
    known[id(node)] = total
    return total
