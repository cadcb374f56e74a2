"""The promises of ``cl_lib.testing`` held to every registered method, and what is about the registry itself."""

import functools

import pytest

import cl_lib
from cl_lib import Method, run
from cl_lib.methods._base import REGISTERED
from cl_lib.methods._registry import registry
from cl_lib.testing import PROMISES, Candidate, DoesNotApply

from helpers import QUICK, close, stream

METHODS = sorted(registry())
CASES = {f"{p.name}{list(case.values()) or ''}": (p, case) for p in PROMISES for case in p.cases}
BRIEF = {  # defaults would take minutes
    "recl": {"samples": 20, "iterations": 10},
    "mer": {"length": 2},
    "gdumb": {"passes": 4},
    "eidetic": {"step": 0.1, "router_epochs": 3},
    "oml": {"meta_steps": 10, "inner_steps": 2},
    "flashback": {"primary_epochs": 1, "flashback_epochs": 1},  # one epoch cannot be divided
}
OWNED = ("eidetic", "packnet", "pnn", "hat", "adapters", "supsup")  # what is frozen is owned by task
REFUSES = {(key, "goes_on_when_a_task_is_appended") for key in OWNED} | {
    (key, "works_with_networks") for key in ("hat", "supsup")
}


@functools.cache
def candidate(key):
    return Candidate(key, BRIEF.get(key))


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("promise, case", CASES.values(), ids=CASES)
def test_promise(promise, case, key):
    try:
        promise(candidate(key), **case)
    except DoesNotApply as why:
        assert "it refuses" not in str(why) or (key, promise.name) in REFUSES, why
        pytest.skip(str(why))


@pytest.mark.parametrize("key", METHODS)
def test_name_is_key_is_file(key):
    cls = registry()[key]
    assert cls.key == key
    if cls.__name__.lower() == key:
        assert cls.__module__ in (f"cl_lib.methods.{key}", f"cl_lib.methods.{key}.method")


def test_methods_list():
    entries = cl_lib.methods()
    assert [e["key"] for e in entries] == METHODS
    for entry in entries:
        assert {"key", "family", "scenarios", "citation", "parameters"} <= set(entry)


def test_one_file_adds_a_method(tmp_path, monkeypatch):
    """A file in the methods folder is all there is to do."""
    import cl_lib.methods

    (tmp_path / "halfstep.py").write_text(
        "from dataclasses import dataclass\n"
        "from cl_lib import Method\n\n\n"
        "@dataclass\n"
        "class HalfStep(Method):\n"
        "    share: float = 0.5\n\n"
        "    def direct(self, grads, net, batch, state):\n"
        "        return {k: self.share * g for k, g in grads.items()}\n"
    )
    monkeypatch.setattr(cl_lib.methods, "__path__", [*cl_lib.methods.__path__, str(tmp_path)])
    try:
        assert "halfstep" in registry()
        half = run("halfstep", stream(), share=0.5, **QUICK)
        slow = run("finetune", stream(), **QUICK | {"lr": QUICK["lr"] / 2})
        close(half.weights, slow.weights)
        assert "halfstep" in [e["key"] for e in cl_lib.methods()]
    finally:
        REGISTERED.pop("halfstep", None)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(cl_lib.InputError, match="'ewc'"):
        run("ewcc", stream())
    with pytest.raises(cl_lib.InputError, match="'strength'"):
        run("ewc", stream("domain"), strenght=3)
    with pytest.raises(cl_lib.InputError, match="'epochs'"):
        run("ewc", stream("domain"), epoch=3)


def test_key_of_the_library_cannot_be_taken():
    with pytest.raises(cl_lib.InputError, match="ewc"):
        type("EWC", (Method,), {"__module__": "elsewhere"})
