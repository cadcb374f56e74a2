"""Streams made from words: by kind, with the options that the kind's own function has."""

import inspect
import sys

import pytest

import cl_lib
from cl_lib.data import kinds

OWN = """
import cl_lib

def quarter(data, scenario="domain", part: int = 4, **options):
    '''A part.

    Arguments:
        part: which.
    '''
    return cl_lib.split(data, tasks=1, scenario=scenario, **options)

def alone(tasks=5):
    return cl_lib.split("digits", tasks=tasks)

ready = cl_lib.split("digits", tasks=2)
table = cl_lib.load("digits")

def nothing():
    return None
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "streams_of_ones_own.py").write_text(OWN)
    yield lambda name: f"./streams_of_ones_own.py:{name}"
    sys.modules.pop("streams_of_ones_own", None)


def test_what_a_kind_may_be_told_is_its_functions_signature():
    for kind, make in kinds.KINDS.items():
        own = {p.name for p in inspect.signature(make).parameters.values() if p.default is not p.empty}
        assert own <= set(kinds.options_of(kind))
    assert "first" not in kinds.options_of("permuted") and "angles" in kinds.options_of("rotated")
    for kind in kinds.KINDS:
        assert {"per_class", "normalise", "validation", "augment"} <= set(kinds.options_of(kind))
        assert not {"data", "view", "options"} & set(kinds.options_of(kind))
    assert kinds.options_of("split")["per_class"].help == kinds.options_of("shifted")["per_class"].help != ""


def test_a_stream_made_from_words_is_the_one_made_in_python():
    assert kinds.make_stream().config() == cl_lib.split("digits").config()
    made = kinds.make_stream("rotated", "digits", tasks=3, per_class=5)
    assert made.config() == cl_lib.rotated("digits", tasks=3, per_class=5).config()


def test_kinds_of_ones_own(own):
    assert set(kinds.options_of(own("quarter"))) >= {"scenario", "part", "per_class"}
    assert kinds.options_of(own("quarter"))["part"].help == "which"
    assert kinds.make_stream(own("quarter"), "digits", per_class=3).tasks == 1
    assert kinds.make_stream(own("quarter"), own("table"), per_class=3).tasks == 1
    assert kinds.make_stream(own("alone"), tasks=2).tasks == 2
    assert kinds.make_stream(own("ready")).tasks == 2 and kinds.options_of(own("ready")) == {}


@pytest.mark.parametrize(
    ("kind", "dataset", "given", "told"),
    [
        ("splitt", None, {}, "Did you mean 'split'"),
        ("permuted", None, {"first": 3}, "first is an option of split, not of permuted"),
        ("split", None, {"taks": 3}, "Did you mean 'tasks'"),
        ("split", "mnits", {}, "Did you mean 'mnist'"),
        ("alone", "digits", {}, "takes no data set"),
        ("alone", None, {"per_class": 3}, "per_class is an option of split, permuted"),
        ("ready", None, {"part": 3}, "it has none"),
        ("table", None, {}, "is no stream but Dataset"),
        ("nothing", None, {}, "gives NoneType, not a stream"),
        ("split", "nothing", {}, "is no data set but NoneType"),
        ("split", "quarter", {}, "is no data set but function"),
    ],
)
def test_what_cannot_be_meant_is_refused(own, kind, dataset, given, told):
    kind = own(kind) if kind in ("alone", "ready", "table", "nothing") else kind
    dataset = own(dataset) if dataset in ("nothing", "quarter") else dataset
    with pytest.raises(cl_lib.InputError, match=told):
        kinds.make_stream(kind, dataset, **given)
