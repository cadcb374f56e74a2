import json
import re

import pytest

import cl_lib
from cl_lib.cli import main, numbers, seeds_of, settings

QUICK = ["--per-class", "8", "--epochs", "1", "--hidden", "16", "--tasks", "5"]


def call(capsys, *words):
    status = main([str(w) for w in words])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_methods(capsys):
    status, out, _ = call(capsys, "methods")
    assert status == 0
    for entry in cl_lib.methods():
        assert entry["key"] in out
    status, out, _ = call(capsys, "methods", "--json")
    listed = json.loads(out)
    assert [e["key"] for e in listed] == [e["key"] for e in cl_lib.methods()]
    assert {"key", "family", "scenarios", "citation", "parameters"} <= set(listed[0])


def test_run_prints_saves_and_draws(capsys, tmp_path):
    words = [
        "run",
        "er",
        *QUICK,
        "--seeds",
        "2",
        "--set",
        "memory=20",
        "strength=0.5",
        "--out",
        tmp_path,
        "--figure",
        tmp_path / "er.png",
    ]
    status, out, err = call(capsys, *words)
    assert (
        (status, err) == (0, "") and "split-digits, class-incremental" in out and re.search(r"er +0\.\d+ ± 0\.\d+", out)
    )
    (saved,) = tmp_path.glob("*.safetensors")
    result = cl_lib.Result.load(saved)
    assert result.seeds == (0, 1) and result.config["parameters"]["memory"] == 20
    assert (tmp_path / "er.png").stat().st_size > 5000
    before = saved.stat().st_mtime_ns
    assert call(capsys, *words)[0] == 0 and saved.stat().st_mtime_ns == before


@pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
def test_compare_sets_parameters_of_each(capsys, tmp_path):
    status, out, _ = call(
        capsys,
        "compare",
        "ewc",
        "er",
        *QUICK,
        "--scenario",
        "domain",
        "--seeds",
        "3,",
        "--out",
        tmp_path,
        "--set",
        "strength=2",
        "ewc.fisher_samples=20",
        "er.memory=12",
    )
    assert status == 0 and "ewc" in out and "er" in out
    configs = {r.method: r for r in map(cl_lib.Result.load, tmp_path.glob("*.safetensors"))}
    assert configs["ewc"].config["parameters"]["strength"] == 2 == configs["er"].config["parameters"]["strength"]
    assert (
        configs["ewc"].config["parameters"]["fisher_samples"] == 20
        and configs["er"].config["parameters"]["memory"] == 12
    )
    assert configs["er"].seeds == (3,)


@pytest.mark.parametrize("name", ["permuted", "rotated", "shifted"])
def test_streams(capsys, tmp_path, name):
    words = ["run", "finetune", "--stream", name, "--per-class", 4, "--epochs", 1, "--hidden", 8, "--out", tmp_path]
    status, out, err = call(capsys, *words, *([] if name == "shifted" else ["--tasks", 2]))
    assert (status, err) == (0, "") and f"{name}-digits, domain-incremental" in out


@pytest.mark.parametrize(
    "words, what",
    [
        (["run", "err"], "Did you mean 'er'"),
        (["run", "er", "--dataset", "mnits"], "Did you mean 'mnist'"),
        (["run", "er", "--stream", "splt"], "Did you mean 'split'"),
        (["run", "er", "--scenario", "klass"], "Did you mean 'class'"),
        (["run", "er", "--set", "memry=3"], "Did you mean 'memory'"),
        (["run", "er", "--set", "memory"], "name=value"),
        (["run", "er", "--set", "ewc.strength=3"], "Did you mean 'strength'"),
        (["run", "er", "--tasks", "3"], "divided"),
        (["run", "er", "--tasks", "0"], "tasks=0"),
        (["run", "er", "--per-class", "0"], "per_class=0"),
        (["run", "er", "--set", "memory=abc"], "memory='abc'"),
        (["run", "er", "--seeds", "-2"], "--seeds -2"),
        (["run", "er", "--seeds", "0"], "--seeds 0"),
        (["run", "er", "--seeds", "two"], "two"),
        (["run", "er", "--seeds", "1,1"], "different"),
        (["run", "er", "--hidden", "a"], "--hidden"),
        (["run", "er", "--lr", "-1"], "lr=-1"),
        (["run", "er", "--data", "/no/such/folder", "--dataset", "mnist"], "/no/such/folder"),
        (["run", "er", "--stream", "permuted", "--first", "3"], "--first"),
        (["run", "er", "--stream", "shifted", "--tasks", "2"], "--tasks"),
        (["run", "er", "--device", "gpu"], "gpu"),
        (["run", "er", "--order", "0,1"], "order"),
        (["notebook", "missing.ipynb"], "missing.ipynb"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(capsys, tmp_path, monkeypatch, words, what):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, *words)
    assert status == 2 and what in err and "Traceback" not in err and out == ""
    assert len(err.strip().splitlines()) == 1 and err.strip().startswith("error: ")


def test_a_failed_run_ends_with_1(capsys, tmp_path):
    status, _, err = call(capsys, "run", "finetune", *QUICK, "--lr", "1e30", "--out", tmp_path)
    assert status == 1 and "the loss became" in err and "Traceback" not in err
    with pytest.raises(cl_lib.Diverged):
        main(["run", "finetune", *QUICK, "--lr", "1e30", "--out", str(tmp_path), "--traceback"])


def test_an_unforeseen_error_is_one_sentence_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("cl_lib.cli.run", lambda *a, **k: {}["lost"])
    status, _, err = call(capsys, "run", "er", "--out", tmp_path)
    assert status == 1 and "KeyError" in err and "--traceback" in err and len(err.strip().splitlines()) == 1


def test_no_abbreviated_flags_and_help_for_newcomers(capsys):
    for words in (["run", "er", "--epo", "3"], ["run"], ["frobnicate"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for flag in [
        "dataset",
        "stream",
        "scenario",
        "tasks",
        "seeds",
        "network",
        "hidden",
        "epochs",
        "batch-size",
        "lr",
        "optimizer",
        "momentum",
        "weight-decay",
        "device",
        "data",
        "out",
        "set",
    ]:
        assert f"--{flag} " in text


def test_small_readers():
    assert seeds_of("5") == (0, 1, 2, 3, 4) and seeds_of("3,4") == (3, 4) and seeds_of("3,") == (3,)
    assert numbers("1,2", "x") == [1, 2]
    assert settings(["memory=5", "buffer=balanced"], ["er"]) == {"er": {"memory": 5, "buffer": "balanced"}}
