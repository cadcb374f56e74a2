"""The house: who may import whom, held over every import in the code."""

import ast
from pathlib import Path

import pytest

import cl_lib

HOUSE = Path(cl_lib.__file__).parent
GROUND = [
    "errors", "files", "places", "search", "seeds", "identity", "bounds", "naming", "signatures", "extras",
    "_torchvision",
]  # fmt: skip
#: each room, and what it may look into besides itself and the ground
MAY = {
    "data": [],
    "nets": [],
    "curvature": ["nets"],
    "replay": ["nets"],
    "methods": ["nets", "curvature", "replay"],
    "results": ["nets", "methods"],
    "training": ["data", "nets", "methods", "results"],
    "report": ["results"],
    "testing": ["data", "nets", "methods", "results", "training"],
    "studies": ["data", "nets", "methods", "results", "training", "report"],
}
FILES = sorted(HOUSE.rglob("*.py"))


def imported(path):
    """Full names of everything a file imports from the library, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out"
            if (node.module or "").split(".")[0] == "cl_lib":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "cl_lib")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_point_one_way(path):
    room, *inside = path.relative_to(HOUSE).with_suffix("").parts
    allowed = {*GROUND, room, *MAY.get(room, [])} if inside else {*GROUND, *MAY, "training"}
    if room in GROUND:
        allowed = {*GROUND}
    reached = {name.split(".")[1] for name in imported(path) if "." in name}
    if room not in ("__init__", "__main__", "cli"):
        assert reached <= allowed, f"{room} may look into {sorted(allowed)}, not {sorted(reached - allowed)}"


def test_every_room_is_in_the_rule():
    rooms = {path.name for path in HOUSE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(MAY)


def test_no_circle():
    """Modules by what they import, taken away from the bottom up until none is left."""
    known = {
        ".".join(("cl_lib", *p.relative_to(HOUSE).with_suffix("").parts)).removesuffix(".__init__"): p for p in FILES
    }

    def modules(path):
        for name in imported(path):
            yield name if name in known else name.rpartition(".")[0]

    left = {name: {m for m in modules(path) if m in known and m != name} for name, path in known.items()}
    # a package's own face names its parts, and the package's name alone is no dependency of theirs
    left = {name: {m for m in needs if not name.startswith(f"{m}.")} for name, needs in left.items()}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


def test_methods_see_the_learner_through_its_face_only():
    from cl_lib.methods._base import Trainer

    face = {name for name in vars(Trainer) if not name.startswith("_")} | set(Trainer.__annotations__)
    for path in (HOUSE / "methods").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                of = node.value
                name = of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else None
                if name == "learner":
                    assert node.attr in face, f"{path.name}:{node.lineno}: learner.{node.attr} is not in Trainer"
