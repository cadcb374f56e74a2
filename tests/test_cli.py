"""The command line: what is asked, run, told and refused."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

import cl_lib
from cl_lib import signatures
from cl_lib.cli import caption, main, rows
from cl_lib.data import kinds
from cl_lib.training.request import Execution

QUICK = ["--per-class", "8", "--epochs", "1", "--hidden", "16", "--tasks", "5"]


OWN = """
from dataclasses import dataclass

import torch

import cl_lib
from cl_lib.seeds import Bag


@dataclass
class Pull(cl_lib.Method):
    strength: float = 1.0

    def penalty(self, net, batch, state):
        if not state:
            return 0.0
        return self.strength * sum((p - state.anchor[k]).square().sum() for k, p in net.params.items())

    def after_task(self, net, task, state):
        return Bag(anchor=Bag(net.params))


def network(shape, outputs):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, outputs))


def few():
    d = cl_lib.load("digits")
    return cl_lib.Dataset("few", d.x[:400], d.y[:400], d.x_test, d.y_test, d.classes)


def halves(data, scenario="domain", loud: bool = False, **options):
    return cl_lib.split(data, tasks=2, scenario=scenario, **options)


def whole():
    return cl_lib.split("digits", tasks=1)
"""


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


BAD = [
    ([], "COMMAND"),
    (["frobnicate"], "frobnicate"),
    (["comparre", "er"], "Did you mean 'compare'"),
    (["run"], "METHOD"),
    (["run", "err"], "Did you mean 'er'"),
    (["run", "er", "ewc"], "use compare"),
    (["run", "memory=3"], "before any method"),
    (["run", "er", "--epo", "3"], "Did you mean '--epochs'"),
    (["run", "er", "--epochs", "1", "ewc"], "put it before"),
    (["run", "er", "--epochs"], "expected one argument"),
    (["run", "er", "--dataset", "mnits"], "Did you mean 'mnist'"),
    (["run", "er", "--stream", "splt"], "Did you mean 'split'"),
    (["run", "er", "--scenario", "klass"], "Did you mean 'class'"),
    (["run", "er", "memry=3"], "Did you mean 'memory'"),
    (["run", "er", "memory=abc"], "memory='abc'"),
    (["run", "er", "seeds=3"], "'seeds' is not a parameter"),
    (["run", "er", "lr=-1"], "lr=-1"),
    (["run", "er", "--set", "memry=3"], "Did you mean 'memory'"),
    (["run", "er", "--set", "memory"], "name=value"),
    (["run", "er", "--set", "=3"], "name=value"),
    (["run", "er", "--set", "ewc.strength=3"], "Did you mean 'strength'"),
    (["run", "er", "--set", "memory=abc"], "memory='abc'"),
    (["compare", "er", "er"], "asked for twice"),
    (["compare", "er", "memory=5", "er", "memory=5"], "asked for twice"),
    (["compare", "er", "ewc", "--set", "stength=3"], "Did you mean 'er.strength'"),
    (["run", "er", "--tasks", "3"], "divided"),
    (["run", "er", "--tasks", "0"], "tasks=0"),
    (["run", "er", "--tasks", "2.5"], "tasks=2.5"),
    (["run", "er", "--per-class", "0"], "per_class=0"),
    (["run", "er", "--validation", "2"], "validation=2"),
    (["run", "er", "--order", "0,1"], "order"),
    (["run", "er", "--stream", "permuted", "--first", "3"], "first is an option of split, not of permuted"),
    (["run", "er", "--stream", "shifted", "--tasks", "2"], "tasks is an option of split, permuted, rotated"),
    (["run", "er", "--angles", "0,10"], "angles is an option of rotated"),
    (["run", "er", "--data", "/no/such/folder", "--dataset", "mnist"], "/no/such/folder"),
    (["run", "er", "--seeds", "-2"], "seeds=-2"),
    (["run", "er", "--seeds", "0"], "seeds=0"),
    (["run", "er", "--seeds", "two"], "seeds='two'"),
    (["run", "er", "--seeds", "1,1"], "different"),
    (["run", "er", "--seeds", str(2**70)], "seeds="),
    (["run", "er", "--hidden", "a"], "hidden=('a',)"),
    (["run", "er", "--hidden", "100,0"], "hidden=(100, 0)"),
    (["run", "er", "--epochs", "1.5"], "epochs=1.5"),
    (["run", "er", "--epochs", str(2**70)], "below 2⁶³"),
    (["run", "er", "--batch-size", "none"], "batch_size=None"),
    (["run", "er", "--lr", "-1"], "lr=-1"),
    (["run", "er", "--lr", "fast"], "lr='fast'"),
    (["run", "er", "--momentum", "5"], "from 0 to below 1"),
    (["run", "er", "--optimizer", "adm"], "Did you mean 'adam'"),
    (["run", "er", "--optimizer", "adam", "--momentum", "0.9"], "belongs to sgd"),
    (["run", "er", "--schedule", "cosin"], "Did you mean 'cosine'"),
    (["run", "er", "--schedule", "{'milestones': ['abc']}"], "milestones"),
    (["run", "er", "--schedule", "{'milestones': [1], 'gamma': -1}"], "gamma']=-1"),
    (["run", "er", "--network", "resnet"], "resnet18"),
    (["run", "er", "--loss-over", "sean"], "Did you mean 'seen'"),
    (["run", "er", "--dtype", "float16"], "'float16'"),
    (["run", "er", "--jobs", "0"], "jobs=0"),
    (["run", "er", "--seeds-at-once", "0"], "seeds_at_once=0"),
    (["run", "er", "--device", "gpu"], "gpu"),
    (["run", "er", "--device", "mps"], "auto, cpu, cuda"),
    (["run", "er", "--device", "meta"], "auto, cpu, cuda"),
    (["run", "er", "--device", "cpu", "--capture"], "capture=True"),
    (["run", "er", "--figure", "."], "--figure"),
    (["run", "er", "--figure", "er.txt"], ".png or .svg or .pdf"),
    (["run", "er", "--out", "/dev/null/results"], "/dev/null/results"),
    (["run", "./none.py:Own"], "There is no file none.py"),
    (["run", "nowhere:Own"], "There is no module 'nowhere'"),
    (["run", "er", "--network", "math:pii"], "Did you mean 'pi'"),
    (["run", "er", "--dataset", "math:pi"], "math:pi is no data set"),
    (["run", "er", "--stream", "math:pi"], "math:pi is no stream"),
    (["run", "er", "--stream", "builtins:dict"], "not a stream"),
    (["notebook", "missing.ipynb"], "missing.ipynb"),
    (["notebook"], "notebook"),
    (["study", "missing.yaml"], "missing.yaml"),
    (["study", "missing.yaml", "--jobs", "0"], "--jobs"),
    (["study", "missing.yaml", "--jobs", "two"], "two"),
    (["methods", "--jsn"], "Did you mean '--json'"),
]


@pytest.mark.parametrize("words, what", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_ends_with_2_and_one_sentence(capsys, tmp_path, monkeypatch, words, what):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, *words)
    assert status == 2 and what in err and "Traceback" not in err and out == ""
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: ") and err.strip().endswith((".", "?"))
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


def test_a_failed_run_ends_with_1(capsys, tmp_path):
    status, _, err = call(capsys, "run", "finetune", *QUICK, "--lr", "1e30", "--out", tmp_path)
    assert status == 1 and "the loss became" in err and "Traceback" not in err
    with pytest.raises(cl_lib.Diverged):
        main(["run", "finetune", *QUICK, "--lr", "1e30", "--out", str(tmp_path), "--traceback"])


def test_a_reader_who_has_seen_enough_is_no_error():
    writer = "import sys; from cl_lib.cli import main; sys.exit(main(['methods']))"
    listing = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listing.stdout.close()
    assert listing.wait() == 1 and listing.stderr.read() == b""
    listing.stderr.close()


def test_an_unforeseen_error_is_one_sentence_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("cl_lib.cli.run", lambda *a, **k: {}["lost"])
    status, _, err = call(capsys, "run", "er", "--out", tmp_path)
    assert status == 1 and "KeyError" in err and "--traceback" in err and len(err.strip().splitlines()) == 1


def test_every_option_is_on_the_command_line_and_nothing_else(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    defined = {f.name for f in fields(cl_lib.Options)} | set(signatures.options(Execution)) | set(kinds.all_options())
    told = {name.replace("-", "_") for name in re.findall(r"^  (?:-\w, )?--([\w-]+)", text, re.MULTILINE)}
    assert told == defined | {"dataset", "stream", "data", "seeds", "set", "best", "figure", "help", "traceback"}
    for about in (
        "learning rate (a number from 0 up; default: 0.01)",
        "split, permuted, rotated: number of tasks",
        "rotated: even",
    ):
        assert about in " ".join(text.split())


def test_what_is_not_given_is_left_to_the_defaults(capsys, tmp_path):
    status, _, _ = call(capsys, "run", "finetune", "--out", tmp_path)
    (saved,) = tmp_path.glob("*.safetensors")
    assert status == 0
    assert cl_lib.Result.load(saved).config == cl_lib.Learner("finetune", cl_lib.split("digits")).config()


def test_every_kind_of_value_is_understood(capsys, tmp_path):
    words = [
        *["--hidden", "16,8", "--lr", "1e-3", "--optimizer", "sgd", "--momentum", "0.5", "--patience", "2"],
        *["--schedule", "{'milestones': [1], 'gamma': 0.5}", "--clip", "none", "--validation", "0.2", "--augment"],
        *["--order", "9,8,7,6,5,4,3,2,1,0", "--normalise", "none", "--epochs", "2", "--seeds", "4,2"],
    ]
    status, _, err = call(capsys, "run", "er", "memory=20", *words, "--out", tmp_path)
    assert (status, err) == (0, "")
    (saved,) = tmp_path.glob("*.safetensors")
    result = cl_lib.Result.load(saved)
    config, stream = result.config, result.config["stream"]
    assert result.seeds == (4, 2) and config["hidden"] == [16, 8] and config["lr"] == 1e-3 and config["clip"] is None
    assert config["schedule"] == {"milestones": [1], "gamma": 0.5} and config["patience"] == 2
    assert stream["order"] == [*range(9, -1, -1)] and stream["normalise"] == "none" and stream["augment"]


def test_a_study_refuses_an_option_of_another_stream(capsys, tmp_path):
    cells = [{"method": "finetune", "dataset": "digits", "angles": [0, 10]}]
    (tmp_path / "wrong.yaml").write_text(json.dumps({"studies": {"s": {"methods": cells}}}))
    status, _, err = call(capsys, "study", tmp_path / "wrong.yaml", "--out", tmp_path)
    assert status == 2 and "angles is an option of rotated, not of split" in err


def test_a_switch_that_is_on_can_be_turned_off(capsys, tmp_path):
    status, _, err = call(capsys, "run", "finetune", *QUICK, "--no-boundaries", "--out", tmp_path)
    assert (status, err) == (0, "")
    (saved,) = tmp_path.glob("*.safetensors")
    assert cl_lib.Result.load(saved).config["stream"]["boundaries"] is False


def test_rows():
    assert rows(["er", "memory=5", "buffer=balanced", "ewc"]) == [
        ("er", {"memory": 5, "buffer": "balanced"}),
        ("ewc", {}),
    ]
    assert rows(["er", "ewc"], ["strength=2"]) == [("er", {"strength": 2}), ("ewc", {"strength": 2})]
    assert rows(["er", "er", "memory=7"], ["er.memory=5"]) == [("er", {"memory": 5}), ("er", {"memory": 7})]
    assert rows(["recl", "host=ewc", "host.strength=3"]) == [("recl", {"host": "ewc", "host.strength": 3})]
    assert rows(["recl"], ["host.strength=3"]) == [("recl", {"host.strength": 3})]
    assert rows(["er+lwf", "lwf.strength=3", "memory=4"]) == [("er+lwf", {"lwf.strength": 3, "memory": 4})]


def test_one_method_in_several_rows(capsys, tmp_path):
    words = ["compare", "er", "memory=20", "er", "memory=50", "er", "memory=50", "lr=0.1", "finetune"]
    status, out, err = call(capsys, *words, *QUICK, "--seeds", "2", "--out", tmp_path, "--figure", tmp_path / "er.svg")
    assert (status, err) == (0, "")
    for row in ("er memory=20 ", "er memory=50 ", "er memory=50 lr=0.1 ", "finetune "):
        assert len(re.findall(rf"^{row} +0\.\d+ ± 0\.\d+", out, re.MULTILINE)) == 1
    configs = [cl_lib.Result.load(file).config for file in tmp_path.glob("er-*.safetensors")]
    assert sorted((c["parameters"]["memory"], c["lr"]) for c in configs) == [(20, 0.01), (50, 0.01), (50, 0.1)]
    assert "er memory=50 lr=0.1" in (tmp_path / "er.svg").read_text("utf-8")


def test_the_caption_says_what_the_numbers_are_and_which_seeds_are_missing(capsys, tmp_path):
    def result(seeds, lost=()):
        R = np.full((len(seeds), 2, 2), 0.5)
        R[[seeds.index(s) for s in lost]] = np.nan
        return cl_lib.Result(config={"method": "er"}, seeds=seeds, R=R)

    assert caption({"er": result((0, 1, 2))}).startswith("mean ± standard deviation over n = 3 seeds\n")
    assert caption({"er": result((4,))}).startswith("n = 1, seed 4: no ±\n")
    told = caption({"er": result((0, 1, 2)), "ewc": result((0, 1, 2), lost=(0, 2))})
    assert told.endswith("\newc: n = 1 of 3 seeds, dropped seed 0: it was not measured; seed 2: it was not measured")


@pytest.mark.filterwarnings("ignore:.*answers nan")
@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_dropped_seed_is_named_however_seeds_are_spread_and_when_it_is_read_again(
    capsys, tmp_path, monkeypatch, jobs
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wild.py").write_text(
        "import torch\ndef network(shape, outputs):\n    net = torch.nn.Sequential(torch.nn.Flatten(), "
        "torch.nn.Linear(64, outputs))\n    if torch.initial_seed() == 1:\n        "
        "net[1].weight.data.fill_(float('inf'))\n    return net\n"
    )
    words = ["run", "finetune", *QUICK, "--seeds", "3", "--network", "wild:network", "--on-divergence", "drop"]
    why = "n = 2 of 3 seeds, dropped seed 1: the loss became nan in task 0, epoch 0, step 0"
    for _ in range(2):
        status, out, err = call(capsys, *words, "--jobs", jobs)
        assert status == 0 and "seed 1" in err and "nan" not in out.replace(why, "")
        assert f"finetune: {why}" in out and "mean over seeds, n = 2" in out
        assert re.search(r"^finetune .* 2 +\d+\.\d +0\.00 MB$", out, re.MULTILINE)
    (file,) = (tmp_path / "results").glob("finetune-*.safetensors")
    result = cl_lib.Result.load(file)
    assert result.dropped == {1: why.partition("seed 1: ")[2]}
    assert why in repr(result) and why in result._repr_html_()


def test_things_of_ones_own(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "theirs.py").write_text(OWN)
    own = "mine/theirs.py"
    quick = ["--per-class", "8", "--epochs", "1"]
    words = ["compare", f"./{own}:Pull", "strength=0.5", "er+mine.theirs:Pull", *quick, "--network", f"{own}:network"]
    try:
        status, out, err = call(capsys, *words, "--dataset", f"{own}:few", "--stream", f"{own}:halves", "--loud")
        assert (status, err) == (0, ""), err
        assert "split-few, domain-incremental: 2 tasks" in out and re.search(r"^pull +0\.", out, re.MULTILINE)
        assert re.search(r"^er\+pull +0\.", out, re.MULTILINE)
        result = cl_lib.Result.load(next((tmp_path / "results").glob("pull-*.safetensors")))
        assert result.config["parameters"] == {"strength": 0.5} and result.config["network"].startswith(
            "theirs.network"
        )
        assert result.parameters == 64 * 5 + 5
        status, out, _ = call(capsys, "run", "finetune", "--stream", f"{own}:whole", "--epochs", "1")
        assert status == 0 and "1 tasks" in out
        assert call(capsys, "run", "finetune", "--stream", f"{own}:whole", "--dataset", "digits")[0] == 2
        cells = [{"method": f"./{own}:Pull", "stream": f"{own}:halves", "dataset": f"{own}:few", "per_class": 8}]
        (tmp_path / "mine.yaml").write_text(json.dumps({"studies": {"s": {"methods": cells}}}))
        status, out, err = call(capsys, "study", "mine.yaml", "--out", "studies")
        assert status == 0 and "acc 0." in out and "[1 of 1, 00:00 left]" in out, err
    finally:
        cl_lib.methods._base.REGISTERED.pop("pull", None)
