"""Settings are tuned on held-out images of the first tasks, kept in one file a stream, and used by ``--best``."""

import shutil

import pytest
import yaml

import cl_lib
from cl_lib.bounds import allows
from cl_lib.cli import main
from cl_lib.methods._registry import registry
from cl_lib.search import is_range
from cl_lib.studies import best
from cl_lib.studies.cells import MethodCell
from cl_lib.studies.spaces import SPACES, space
from cl_lib.training.request import separate

QUICK = ["per_class=10", "epochs=2", "hidden=10,"]


def tune(tmp_path, *words, status=0):
    where = ["--out", tmp_path / "results", "--best", tmp_path / "best"]
    assert main([str(word) for word in ("tune", *words, *where)]) == status
    return yaml.safe_load((tmp_path / "best" / "digits.yaml").read_text("utf-8")) if status == 0 else None


def test_every_method_has_ranges_that_it_can_take():
    own = {key for key, cls in registry().items() if cls.__module__.startswith("cl_lib.")}
    assert set(SPACES) == own
    for method in own:
        for value in space(method).values():
            assert is_range(value)
        scenario = registry()[method].scenarios[0]
        MethodCell({"method": method, "dataset": "digits", "scenario": scenario, **space(method)}).check()
        hints = cl_lib.bounds.hints(registry()[method])
        for name, ((kind, ends),) in ((name, tuple(span.items())) for name, span in space(method).items()):
            assert kind and all(allows(hints.get(name, float), end) for end in ends), (method, name)


def test_a_search_is_kept_and_used(tmp_path, capsys, monkeypatch):
    found = tune(tmp_path, "er", *QUICK, "--scenario", "domain", "--trials", 3)["domain"]["er"]
    assert set(found["settings"]) == {"lr", "strength"} and found["trials"] == 3 and 0 <= found["score"] <= 1
    assert found["fixed"] == {"epochs": 2, "hidden": [10]} and found["stream"] == {"per_class": 10}
    again = found["command"].split()[4:]
    capsys.readouterr()
    monkeypatch.setattr(cl_lib.Learner, "learn", None)  # every trial is there already
    assert tune(tmp_path, *again)["domain"]["er"] == found
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    shutil.copytree("best", best.FOLDER)
    stream = cl_lib.split("digits", scenario="domain", per_class=10)
    settings = cl_lib.best("er", stream)
    assert settings == {**found["settings"], "epochs": 2, "hidden": [10]}
    result = cl_lib.run("er", stream, **settings | {"lr": 0.5})
    words = ["run", "er", "--best", "--scenario", "domain", "--per-class", "10", "--lr", "0.5"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "best settings of er: epochs=2 hidden=[10] lr=" in said and "3 trials" in said
    (saved,) = (tmp_path / "results").glob("er-*.safetensors")
    assert (cl_lib.Result.load(saved).R == result.R).all(), "and what is given is not taken from there"
    assert main(["run", "ewc", "--best", "--scenario", "domain"]) == 2
    assert "tune ewc --dataset digits --scenario domain" in capsys.readouterr().err


def test_a_trial_sees_held_out_images_of_the_first_tasks_only(tmp_path, monkeypatch):
    seen, real = [], cl_lib.Learner.accuracy
    monkeypatch.setattr(cl_lib.Learner, "accuracy", lambda *a: seen.append(a[1:]) or real(*a))
    tune(tmp_path, "finetune", *QUICK, "--trials", 1, "--tasks", 2)
    assert seen == [(0, "valid"), (0, "valid"), (1, "valid")]
    assert main(["tune", "er", "--trials", "0"]) == 2 and main(["tune", "er", "lr"]) == 2


def test_all_methods_get_as_many_trials_and_one_file_holds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(cl_lib.studies.spaces, "registry", lambda: {k: registry()[k] for k in ("er", "hat")})
    found = tune(tmp_path, "all", *QUICK, "--scenario", "all", "--trials", 2, "--tasks", 1)
    assert {s: sorted(each) for s, each in found.items()} == {"class": ["er"], "domain": ["er"], "task": ["er", "hat"]}
    assert {entry["trials"] for each in found.values() for entry in each.values()} == {2}


def test_a_file_keeps_its_first_comment(tmp_path):
    place = tmp_path / "digits.yaml"
    best.write(place, "split-digits", "task", "er", {"settings": {"lr": 0.1}})
    place.write_text("# a note\n" + place.read_text("utf-8"), "utf-8")
    best.write(place, "split-digits", "task", "si", {"settings": {"lr": 0.2}})
    text = place.read_text("utf-8")
    assert text.startswith("# a note\n" + best.HEAD.format(stream="split-digits"))
    assert set(best.read(place)["task"]) == {"er", "si"}


def test_a_stream_that_nobody_searched_and_a_damaged_file_are_told(tmp_path):
    stream = cl_lib.split("digits", scenario="task")
    with pytest.raises(cl_lib.InputError, match="tune er --dataset digits --scenario task"):
        cl_lib.best("er", stream, tmp_path)
    for text in ("task: {er: 3}", "[", "task: 3", "- 1"):
        (tmp_path / "digits.yaml").write_text(text)
        with pytest.raises(cl_lib.InputError, match="cannot be read as best settings"):
            cl_lib.best("er", stream, tmp_path)


@pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
@pytest.mark.parametrize("path", sorted(best.CHECKOUT.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_ships_can_be_used_and_was_found_with_equal_trials(path):
    found = best.read(path)
    assert set(found) <= {"task", "domain", "class"}
    for scenario, methods in found.items():
        for method, entry in methods.items():
            assert scenario in registry()[method].scenarios and set(entry["settings"]) == set(space(method))
            assert f"tune {method} " in entry["command"] and f"--scenario {scenario}" in entry["command"]
            separate(method, best.settings_of(entry))
    assert len({entry["trials"] for methods in found.values() for entry in methods.values()}) == 1
