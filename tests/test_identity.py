"""A run is known by what it does: settings by name, code by all that it reaches."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import cl_lib
from cl_lib import run
from cl_lib.identity import code, digest, file_name, identify, made
from cl_lib.methods import er, lwf
from cl_lib.methods._base import REGISTERED
from cl_lib.methods._registry import make, registry
from cl_lib.nets import losses
from cl_lib.training import loop, request
from cl_lib.training.learner import Learner
from cl_lib.training.options import Options


def reached(method, stream, options):
    return request.reached(method, stream, options, Learner)


def configuration(method, stream, options):
    return request.configuration(method, stream, options, reached(method, stream, options)[0])


QUICK = {"epochs": 1, "batch_size": 8, "hidden": (8,), "lr": 0.02}


def stream(**options):
    return cl_lib.split("digits", **{"per_class": 6, "tasks": 2, **options})


# --- a file of the user's own, and edits of it -----------------------------------------------------------------

MINE = '''
"""A method and a network of one's own."""

import functools
from dataclasses import dataclass

import torch
from torch import nn

import cl_lib
import near
from folder import deep

WIDTH = 32
RATES = {"head": 0.1, "body": [0.01, {"bias": 0.02}]}
TABLE = torch.tensor([1.0, 2.0])
NAMES = frozenset({"weight", "bias"})


class Scale:
    unit = 1

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x * self.by * self.unit


twice = Scale(2)


def weighted(factor):
    def weigh(x):
        return factor * x

    return weigh


triple = weighted(3)
halved = functools.partial(torch.mul, 0.5)


def squared(x):
    """The square."""
    return x * x  # not more


@functools.cache
def power(n):
    return n + 1


def counted(x):
    return x

counted.calls = 1


def unrelated(x):
    return x + 1


class Base(cl_lib.Method, registered=False):
    """What my methods share."""

    share = 0.5

    def penalty(self, net, batch, state):
        return self.share * self.pull(net, scale=self.size) + self.of(1)

    @staticmethod
    def pull(net, power=2, *, scale=1.0):
        return scale * sum((p.abs() ** power).sum() for p in net.params.values())

    @classmethod
    def of(cls, n):
        return n * 1e-9

    @property
    def size(self):
        return 0.01


@dataclass
class Mine(Base, key="mine"):
    """My method."""

    strength: float = 1.0

    def task(self, net, batch):
        loss = super().task(net, batch) + len(NAMES) * 1e-9
        loss = twice(loss) + squared(loss) + triple(loss) + halved(loss) + counted(loss) * power(1)
        many = [i * 7 for i in range(3)]
        return loss * RATES["head"] * TABLE.sum() + near.shrink(loss) + deep.layer.sunk(loss) + sum(many)

    @torch.no_grad()
    def after_task(self, net, task, state):
        import late

        late.write(net)
        return state


class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), Bend(0.1), nn.Linear(WIDTH, outputs))

    def forward(self, x):
        return self.layers(x)


class Bend(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, x):
        return torch.where(x > 0, x, self.slope * x)


def network(shape, outputs):
    return Net(outputs)


def rate(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, near.STEP)
'''
OTHERS = {
    "near.py": "STEP = 5\n\n\ndef shrink(x):\n    return 0.1 * x\n\n\ndef other(x):\n    return -x\n",
    "late.py": "def write(net):\n    return 1\n",
    "folder/__init__.py": "",
    "folder/deep/__init__.py": "",
    "folder/deep/layer.py": "from near import shrink\n\n\ndef sunk(x):\n    return shrink(x) - 1\n",
}
OTHERS["folder/deep/__init__.py"] = "from . import layer\n"

NOTICED = {
    "a number": ("WIDTH = 32", "WIDTH = 64", "network"),
    "a value in a container": ('"head": 0.1', '"head": 0.2', "method"),
    "a value deep in a container": ('"bias": 0.02', '"bias": 0.03', "method"),
    "a tensor": ("tensor([1.0, 2.0])", "tensor([1.0, 3.0])", "method"),
    "a set": ('{"weight", "bias"}', '{"weight", "biases"}', "method"),
    "what an object holds": ("Scale(2)", "Scale(5)", "method"),
    "what an object does": ("x * self.by *", "x + self.by *", "method"),
    "an attribute of an object's class": ("unit = 1", "unit = 2", "method"),
    "what a closure holds": ("weighted(3)", "weighted(4)", "method"),
    "what a closure does": ("factor * x", "factor + x", "method"),
    "an argument given before": ("torch.mul, 0.5", "torch.mul, 0.6", "method"),
    "which function is given": ("torch.mul, 0.5", "torch.add, 0.5", "method"),
    "a helper": ("x * x  #", "x * x * x  #", "method"),
    "a cached helper": ("n + 1", "n + 2", "method"),
    "a function's attribute": ("calls = 1", "calls = 2", "method"),
    "a base class": ("self.share * self.pull", "2 * self.share * self.pull", "method"),
    "an attribute of a base class": ("share = 0.5", "share = 0.6", "method"),
    "a default": ("power=2", "power=3", "method"),
    "a default by keyword": ("scale=1.0", "scale=2.0", "method"),
    "a static method": ("p.abs() **", "(p + 1) **", "method"),
    "a class method": ("n * 1e-9", "n * 2e-9", "method"),
    "a property": ("return 0.01", "return 0.02", "method"),
    "a decorator": ("@torch.no_grad()", "@torch.enable_grad()", "method"),
    "a number in a comprehension": ("i * 7", "i * 8", "method"),
    "the file beside": ("0.1 * x", "0.2 * x", "method"),
    "a file in a folder": ("shrink(x) - 1", "shrink(x) - 2", "method"),
    "a file that is imported later": ("return 1\n", "return 2\n", "method"),
    "a layer": ("self.slope * x)", "self.slope + x)", "network"),
    "how a layer is made": ("Bend(0.1)", "Bend(0.2)", "network"),
    "a schedule": ("STEP = 5", "STEP = 6", "schedule"),
}
UNNOTICED = {
    "a comment": ("# not more", "# not more than that"),
    "a docstring": ('"""The square."""', '"""x², the square."""'),
    "a docstring less": ('    """What my methods share."""\n', ""),
    "a docstring more": ("def other(x):\n", 'def other(x):\n    """Nothing."""\n'),
    "a docstring of a function more": ("    def penalty(self", '    """More."""\n\n    def penalty(self'),
    "an unrelated function": ("x + 1", "x + 2"),
    "an unrelated function of the file beside": ("return -x", "return -x + 3"),
    "where a line stands": ("WIDTH = 32", "\n\n\nWIDTH = 32"),
}


@pytest.fixture
def told(tmp_path):
    """The function (before, after) -> the configuration's ``code`` with that edit in the user's files."""
    made = []

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "near", "late", "folder")]:
            del sys.modules[name]

    def digests(before="", after=""):
        folder = tmp_path / str(len(made))
        made.append(folder)
        texts, found = {"mine.py": MINE, **OTHERS}, 0
        for name, text in texts.items():
            found += text.count(before) if before else 0
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text.replace(before, after) if before else text, "utf-8")
        assert found == bool(before), f"{before!r} stands {found} times"
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        forget()  # another test's files may have had these names
        try:
            mine = importlib.import_module("mine")
            options = Options(network=mine.network, schedule=mine.rate)
            found, uncovered = reached(mine.Mine(), stream(), options)
            assert uncovered == []
            return found
        finally:
            sys.path.remove(str(folder))
            forget()
            REGISTERED.pop("mine", None)

    return digests


@pytest.mark.parametrize("edit", NOTICED)
def test_an_edit_of_what_a_run_reaches_is_noticed(told, edit):
    before, after, part = NOTICED[edit]
    was, now = told(), told(before, after)
    differing = {name for name in was if was[name] != now[name]}
    assert part in differing
    assert differing <= {"method", "network", "schedule"}, "and no other part seems to have changed"


@pytest.mark.parametrize("edit", UNNOTICED)
def test_an_edit_that_changes_nothing_is_no_change(told, edit):
    assert told() == told(*UNNOTICED[edit])


def test_a_module_is_told_by_its_classes_its_weights_and_its_attributes():
    class Shift(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x):
            return x + self.by

    def network(by=1.0):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Shift(by))

    config = lambda module: configuration(make("er"), stream(), Options(network=module))
    first, again, shifted, trained = network(), network(), network(2.0), network()
    trained[1].weight.data += 1
    assert config(first) == config(again)
    assert config(first)["network"] == config(shifted)["network"] and config(first) != config(shifted)
    assert config(first)["network"] != config(trained)["network"]
    was = config(first)
    Shift.forward = lambda self, x: x - self.by
    assert config(first)["code"]["network"] != was["code"]["network"]


# --- the library's own code ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "name", "part"),
    [
        (loop, "clip_norm", "training"),
        (loop.Loop, "_descend", "training"),
        (cl_lib.nets.net.Net, "__call__", "training"),
        (er, "draw_replay", "method"),
        (er.ER, "penalty", "method"),
        (cl_lib.nets.networks, "_start", "network"),
        (cl_lib.data.stream.Stream, "batch", "stream"),
        (cl_lib.data.views.Permuted, "inputs", "stream"),
    ],
)
def test_an_edit_of_the_library_is_noticed(monkeypatch, where, name, part):
    tasks = cl_lib.permuted("digits", tasks=2)
    was = configuration(make("er"), tasks, Options())["code"]
    monkeypatch.setattr(where, name, lambda *a: None)
    now = configuration(make("er"), tasks, Options())["code"]
    assert {k for k in was if was[k] != now[k]} == {part}


def test_other_methods_and_networks_do_not_count(monkeypatch):
    was = configuration(make("er"), stream(), Options())
    monkeypatch.setattr(lwf.LwF, "penalty", lambda *a: 0.0)
    monkeypatch.setattr(cl_lib.nets.networks, "cnn", lambda *a: None)
    monkeypatch.setitem(cl_lib.nets.networks.NETWORKS, "cnn", lambda *a: None)
    assert configuration(make("er"), stream(), Options()) == was
    assert configuration(make("er+lwf"), stream(), Options())["code"]["method"] != was["code"]["method"]


def test_a_host_and_the_parts_of_a_sum_count(monkeypatch):
    kinds = make("er+lwf"), make("recl", host="lwf")
    was = [configuration(kind, stream(), Options())["code"]["method"] for kind in kinds]
    monkeypatch.setattr(lwf, "distillation", losses.cross_entropy)
    assert not {configuration(kind, stream(), Options())["code"]["method"] for kind in kinds} & {*was}


def test_functions_that_a_stream_or_a_run_is_given_count():
    def brighter(by):
        return lambda x: x + by

    def descent(rate):
        return lambda parameters: torch.optim.SGD(parameters, lr=rate)

    told = [
        configuration(make("er"), stream(augment=brighter(by)), Options(optimizer=descent(rate)))["code"]
        for by, rate in ((0.1, 0.1), (0.2, 0.1), (0.1, 0.2))
    ]
    differing = lambda one: {name for name in one if one[name] != told[0][name]}
    assert [differing(one) for one in told] == [set(), {"stream"}, {"optimizer"}]
    assert configuration(make("er"), stream(), Options())["code"].keys() == {"method", "network", "stream", "training"}


def test_what_a_method_without_fields_is_made_with_counts():
    class Loose(cl_lib.Method, registered=False):
        def __init__(self, width):
            self.width = width

    assert len({configuration(Loose(n), stream(), Options())["code"]["method"] for n in (1, 2, 1)}) == 2


def test_two_processes_give_the_same_digests():
    ask = (
        "import json, cl_lib\n"
        "from cl_lib.methods._registry import registry\n"
        "from cl_lib.training.learner import Learner\n"
        "from cl_lib.training.request import reached\n"
        "from cl_lib.training.options import Options\n"
        "stream = cl_lib.split('digits')\n"
        "print(json.dumps({key: reached(kind(), stream, Options(), Learner) for key, kind in registry().items()}))\n"
    )
    told = []
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        told.append(
            subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, check=True).stdout
        )
    assert told[0] == told[1]
    assert all(uncovered == [] for _, uncovered in json.loads(told[0]).values())
    here = {key: [reached(kind(), stream(), Options())[0]["method"]] for key, kind in registry().items()}
    assert all(digests["method"] == here[key][0] for key, (digests, _) in json.loads(told[0]).items())


def test_settings_have_the_name_that_they_always_had_and_code_another():
    config = {"method": "er", "lr": 0.1}
    assert digest(config, (0,)) == digest({**config, "code": {"method": "1"}}, (0,)) == "18597ac36f24"
    names = {file_name("er", {**config, "code": {"method": kind}}, (0,)) for kind in "12"}
    assert len(names) == 2 and all(name.startswith("er-18597ac36f24-") for name in names)


# --- what cannot be covered ------------------------------------------------------------------------------------


def test_circles_end_and_what_cannot_be_read_is_named(tmp_path):
    circle = {}
    circle["self"] = [circle]
    lock, lines = threading.Lock(), (line for line in "ab")
    log = open(tmp_path / "log", "w")  # noqa: SIM115

    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    def reading(n):
        print(lock, next(lines), file=log)
        return circle, even(n)

    digest, uncovered = code(reading)
    assert digest == code(reading)[0]
    assert [name.rpartition(".")[2] for name in uncovered] == [
        "lines (generator)", "lock (lock)", "log (TextIOWrapper)"
    ]  # fmt: skip
    log.close()


def test_what_is_imported_and_not_there_is_known_by_its_name():
    def one():
        import nowhere_to_be_found.below

        return nowhere_to_be_found.below

    def other():
        import nowhere_to_be_found.above

        return nowhere_to_be_found.above

    assert code(one)[1] == [] and code(one) != code(other)


def test_what_a_method_holds_and_cannot_be_read_is_named():
    class Writing(cl_lib.Method, registered=False):
        def __init__(self, *locks):
            self.held = {"by": locks}

    _, uncovered = reached(Writing(threading.Lock()), stream(), Options())
    assert [name.rpartition("<locals>.")[2] for name in uncovered] == ["Writing.held.by (lock)"]


def test_a_great_deal_is_not_looked_at(monkeypatch):
    many = [[i] for i in range(1000)]
    monkeypatch.setattr("cl_lib.identity.MOST", 100)
    assert code(lambda: many)[1] == ["what comes after the first 100 values"]


def test_settings_are_plain_and_functions_named():
    assert identify({"rate": torch.tensor(0.5), "widths": (1, 2)}) == {"rate": 0.5, "widths": [1, 2]}
    assert identify(nn.functional.relu) == "torch.nn.functional.relu"
    assert identify(threading.Lock()) == "_thread.lock"


# --- recognised, or said why not -------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path):
    """The function (text) -> the class in a copy of a method's file, elsewhere, registered under a key of its own."""
    source = Path(lwf.__file__).read_text("utf-8").replace("class LwF(Method)", 'class Copied(Method, key="copied")')

    def load(before="", after=""):
        assert before in source
        (tmp_path / "copied.py").write_text(source.replace(before, after), "utf-8")
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        sys.modules.pop("copied", None)
        REGISTERED.pop("copied", None)
        importlib.invalidate_caches()
        return importlib.import_module("copied").Copied

    sys.path.insert(0, str(tmp_path))
    yield load
    sys.path.remove(str(tmp_path))
    sys.modules.pop("copied", None)
    REGISTERED.pop("copied", None)


def test_an_edited_method_is_run_again_and_says_why(copied, tmp_path, capfd):
    out = tmp_path / "results"
    first = run(copied(), stream(), out=out, **QUICK)
    assert "reused" not in capfd.readouterr().err
    again = run(copied(), stream(), out=out, **QUICK)
    (file,) = out.iterdir()
    assert capfd.readouterr().err == (
        f"reused {file}, {made(first.provenance, 0)}; fresh=True (--fresh) runs it again\n"
    )
    assert again.config == first.config
    edited = run(copied("return self.strength *", "return 3 * self.strength *"), stream(), out=out, **QUICK)
    assert f"{file} is not reused but kept: {made(first.provenance, 0)}, and the code of its method differs\n" == (
        capfd.readouterr().err
    )
    assert len(list(out.iterdir())) == 2 and (edited.losses != first.losses).any()


def test_a_result_from_before_code_was_told_is_not_taken(tmp_path, capfd):
    result = run("er", stream(), out=tmp_path, **QUICK)
    (file,) = tmp_path.iterdir()
    old = file.with_name(f"{file.name.rpartition('-')[0]}.safetensors")
    result.config = {name: value for name, value in result.config.items() if name != "code"}
    result.save(old)
    file.unlink()
    run("er", stream(), out=tmp_path, **QUICK)
    told = capfd.readouterr().err
    assert told.startswith(f"{old} is not reused but kept: made ") and told.endswith("before results told their code\n")
    run("er", stream(), out=tmp_path, fresh=True, **QUICK)
    assert capfd.readouterr().err == "" and len(list(tmp_path.iterdir())) == 2


def test_what_is_not_covered_is_said_where_results_are_kept(tmp_path):
    lock = threading.Lock()

    class Locked(cl_lib.Method, registered=False):
        def penalty(self, net, batch, state):
            return 0.0 * bool(lock)

    run(Locked(), stream(), **QUICK)
    with pytest.warns(UserWarning, match=r"A change in .*lock \(lock\) is not noticed") as told:
        run(Locked(), stream(), out=tmp_path, **QUICK)
        run(Locked(), stream(), out=tmp_path, **QUICK)
    assert len(told) == 2, "also where it is loaded, for then it may be stale"


def test_words_for_where_a_result_comes_from():
    assert made({"commit": "1a2b3c4d5e", "dirty": True, "date": "2026-03-01T10:00:00+00:00"}, 0) == (
        "made by commit 1a2b3c4 (with changes) on 2026-03-01"
    )
    assert made({"commit": None}, 0) == "made on 1970-01-01"


def test_a_run_does_not_change_what_it_is_known_by():
    """torch writes to classes of its own that we derive from, where they are first used."""
    code = "import cl_lib as c; go = lambda: c.run('ewc', c.split('digits', per_class=4), epochs=1, progress=False)"
    code += "; print(go().config['code'] == go().config['code'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr
