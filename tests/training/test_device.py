"""What a GPU would do with the library, shown on a second device that keeps its numbers on the CPU."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import cl_lib
from cl_lib.methods._registry import registry
from cl_lib.seeds import Draws, keys
from cl_lib.training import loop

emulator = pytest.importorskip("emulator", exc_type=(ImportError, AttributeError))

pytestmark = [
    pytest.mark.skipif(
        not torch.__version__.startswith(emulator.KNOWN),
        reason=f"the second device uses inner parts of torch {emulator.KNOWN[0]}, and this is {torch.__version__}",
    ),
    pytest.mark.filterwarnings("ignore::cl_lib.errors.PoorPairing", "ignore::UserWarning"),
]

SETTINGS = {
    "recl": {"iterations": 8, "samples": 10},
    "eidetic": {"step": 0.3, "recovery": 1, "router_epochs": 1, "wait": 0, "tolerance": 0.99, "hidden": (20,)},
    "gdumb": {"passes": 2, "memory": 20, "cutmix": 0.5},
    "ewc_topk": {"k": 3},
    "dgr": {"width": 8, "latent": 4},
    "ranpac": {"width": 20},
    "lucir": {"balanced_epochs": 1},
    "mer": {"batches": 2, "length": 2},
    "oml": {"meta_steps": 4, "inner_steps": 2},
}
QUICK = {"epochs": 2, "batch_size": 5, "hidden": (12,), "lr": 0.02, "seeds": 2, "progress": False}
KEYS = sorted(registry())


def options_of(key):
    room = {"memory": 20} if "memory" in getattr(registry()[key], "__dataclass_fields__", {}) else {}
    return QUICK | room | SETTINGS.get(key, {})


def streams(key, **more):
    # supermasks infer a task by forward-mode derivatives, at which the second device's tensors end the process
    scenario = "task" if key == "supsup" else registry()[key].scenarios[-1]
    return cl_lib.split("digits", scenario=scenario, **{"per_class": 6, "tasks": 5, "augment": True} | more)


def learned(method, stream, device="cpu", tasks=2, **options):
    stacked = 1 if str(method) in registry() and not registry()[method].stacked else 2
    options = {"seeds_at_once": stacked} | options
    learner = cl_lib.Learner(method, stream, device=device, capture=device != "cpu" or None, **options)
    for _ in range(tasks):
        learner.learn()
    return learner


def numbers(learner):
    host = lambda t: getattr(t, "host", t).double()
    return {k: host(t) for k, t in {**learner.params, **learner.buffers}.items()}


@pytest.fixture
def device(monkeypatch):
    """The second device; a step that is not recorded is an error."""
    with emulator.second_device(monkeypatch) as there, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not recorded.*")
        yield there


def equal(method, stream, monkeypatch, tolerance=1e-6, **options):
    """Train on both devices; compare the weights, and give the learner of the second one and the device."""
    here = learned(method, stream, **options)
    with emulator.second_device(monkeypatch) as device, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not recorded.*")
        there = learned(method, stream, emulator.NAME, **options)
        other = numbers(there)
    for name, value in numbers(here).items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=tolerance, equal_nan=True)
    return there, device


@pytest.mark.parametrize("key", KEYS)
def test_every_method_is_the_cpus_and_is_recorded(key, monkeypatch):
    there, _ = equal(key, streams(key), monkeypatch, **options_of(key))
    recorder = there.recorder
    assert recorder.replayed > 0 and not recorder.refused
    for of_one_shape in recorder.kinds.values():
        assert sum(kind.graph is not None for kind in of_one_shape) <= 2


@pytest.mark.parametrize("host", ["si", "lwf_mc", "lucir", "derpp", "xder"])
def test_flashback_round_other_hosts(host, monkeypatch):
    """Both phases are recorded, and what goes back between them lies where it lay."""
    own = {f"host.{name}": value for name, value in options_of(host).items() if name == "memory"}
    options = QUICK | {"host": host, "primary_epochs": 1, "flashback_epochs": 1, **own}
    there, _ = equal("flashback", streams(host), monkeypatch, tolerance=1e-5, **options, tasks=3)
    assert there.recorder.replayed > 0 and not there.recorder.refused


OTHERS = {
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-3},
    "adam": {"optimizer": "adam", "lr": 1e-3},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
    "cosine": {"schedule": "cosine", "momentum": 0.5},
    "milestones": {"schedule": {"milestones": [1], "gamma": 0.1}, "epochs": 3},
    "adam on a schedule": {"optimizer": "adam", "lr": 1e-3, "schedule": "cosine"},
    "a schedule of one's own": {"schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)},
    "one's own": {"optimizer": lambda p: torch.optim.RMSprop(p, lr=1e-3), "schedule": "cosine"},
    "clip": {"clip": 0.1},
    "groups": {"groups": {"*.bias": {"lr": 0.1}}, "momentum": 0.9},
    "moments kept": {"optimizer": "adam", "lr": 1e-3, "optimizer_state": "keep"},
    "steps": {"steps": 9, "epochs": None, "schedule": "cosine"},
    "double": {"dtype": "float64"},
}


@pytest.mark.parametrize("method", ["finetune", "er"])
@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_every_way_to_train_is_the_cpus(method, options, monkeypatch):
    there, _ = equal(method, streams(method), monkeypatch, **options_of(method) | options, tasks=3)
    assert there.recorder.replayed > 0


def normed():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 10)
    )


@pytest.mark.parametrize("method", ["er", "gpm", "mir", "ewc"])
def test_batch_norm_dropout_and_a_short_last_batch(method, monkeypatch):
    equal(method, streams(method), monkeypatch, **options_of(method) | {"network": normed, "batch_size": 7})


@pytest.mark.parametrize("method", ["er+ewc", "er+der", "lwf+agem"])
def test_sums(method, monkeypatch):
    equal(method, streams("er"), monkeypatch, **QUICK)


def test_wrapped_hosts(monkeypatch):
    options = options_of("recl") | {"host": "er"}
    equal("recl", streams("recl"), monkeypatch, **options)


@pytest.mark.parametrize("method", ["finetune", "er", "si"])
def test_unequal_lengths_and_seeds_that_stop(method, monkeypatch):
    """Groups with a hole: the middle seed has fewer images, or has had enough."""
    stream = cl_lib.split("digits", scenario="class", order="per-seed", tasks=5)
    options = options_of(method) | {"seeds": 3, "seeds_at_once": 3, "batch_size": 64, "tasks": 2}
    equal(method, stream, monkeypatch, **options)
    stream = streams(method, validation=0.3, per_class=12)
    there, _ = equal(method, stream, monkeypatch, **options | {"patience": 1, "epochs": 5, "batch_size": 8})
    assert there.recorder.replayed > 0


def test_a_seed_that_is_dropped(monkeypatch):
    """Some seeds' networks begin with weights that are not finite."""

    def network():
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        if torch.rand(()) < 0.5:
            module[1].weight.data.fill_(torch.inf)
        return module

    options = QUICK | {"network": network, "on_divergence": "drop", "seeds": 5, "seeds_at_once": 5}
    there, _ = equal("er", streams("er"), monkeypatch, memory=20, **options)
    assert 0 < len(there.active) < 5


# --- waiting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [k for k in KEYS if k != "eidetic"])
def test_waits_do_not_grow_with_the_steps(key, monkeypatch, device):
    def waits(batch_size):
        device.waits.clear()
        learned(key, streams(key), emulator.NAME, **options_of(key) | {"batch_size": batch_size})
        return device.waits.copy()

    few, many = waits(12), waits(4)
    more = {line: (n, few[line]) for line, n in many.items() if n > few[line]}
    assert not more, f"the device is waited for more often in three times as many steps: {more}"


@pytest.mark.parametrize("key", [k for k in KEYS if k not in ("eidetic", "recl")])
def test_an_epoch_waits_at_most_once_for_each_group_and_once_for_its_losses(key, device):
    def waits(epochs):
        device.waits.clear()
        options = {"passes" if key == "gdumb" else "epochs": epochs} | ({"retrain": 0.0} if key == "packnet" else {})
        learned(key, streams(key), emulator.NAME, tasks=1, **options_of(key) | options)
        return device.waits.total()

    assert waits(7) - waits(4) <= 3 * 2


def test_seeds_with_a_hole_wait_no_more(monkeypatch, device):
    stream = cl_lib.split("digits", scenario="class", order="per-seed", tasks=5)
    options = options_of("er") | {"seeds": 3, "seeds_at_once": 3, "tasks": 1}

    def waits(batch_size):
        device.waits.clear()
        learned("er", stream, emulator.NAME, **options | {"batch_size": batch_size})
        return device.waits.total()

    assert waits(16) == waits(64)


@pytest.mark.parametrize("key", ["er", "derpp", "agem", "gem", "mir", "ewc", "si", "upgd"])
def test_few_launches_a_step(key, device):
    """A recorded step is one launch; what is around it makes the batch."""

    def launches(epochs):
        device.launches = 0
        learned(
            key,
            streams(key),
            emulator.NAME,
            tasks=1,
            **options_of(key) | {"epochs": epochs, "seeds": 10, "seeds_at_once": 10},
        )
        return device.launches

    steps_more = 4 * 3  # of 12 images in batches of 5
    assert (launches(7) - launches(3)) / steps_more <= 25 + 8  # with the epoch's own


# --- memory -------------------------------------------------------------------------------------------------


def test_what_a_task_needed_is_let_go(monkeypatch, device):
    loops = weakref.WeakSet()
    init = loop.Loop.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        loops.add(self)

    monkeypatch.setattr(loop.Loop, "__init__", noted)
    gc.disable()  # nothing waits for the collector of cycles
    try:
        learner = learned("ewc", streams("ewc"), emulator.NAME, tasks=4, **options_of("ewc"))
        assert not loops
        assert len(emulator.Graph.alive) <= 4  # with and without a penalty, whole batches and the last
        del learner
        gc.collect()
        assert not emulator.Graph.alive
    finally:
        gc.enable()


# --- what is read on the host --------------------------------------------------------------------------------


def test_a_number_read_on_the_host_asks_for_another_recording(monkeypatch):
    class Fading(cl_lib.Method, registered=False):
        def penalty(self, net, batch, state):
            return 0.1 / (1 + batch.epoch) * sum(p.square().sum() for p in net.params.values())

    there, _ = equal(Fading(), streams("finetune"), monkeypatch, **QUICK | {"epochs": 4}, tasks=1)
    assert {kind.read.get("epoch") for kinds in there.recorder.kinds.values() for kind in kinds} == {0, 1, 2, 3}


def test_a_step_that_reads_what_always_changes_runs_as_it_is_and_says_so(monkeypatch):
    class Counting(cl_lib.Method, registered=False):
        def penalty(self, net, batch, state):
            return 0.01 * batch.epoch * sum(p.square().sum() for p in net.params.values())

    options = QUICK | {"epochs": 12, "batch_size": 12}
    here = learned(Counting(), streams("finetune"), tasks=1, **options)
    with emulator.second_device(monkeypatch), pytest.warns(UserWarning, match=r"not recorded .* \(epoch\)"):
        other = numbers(learned(Counting(), streams("finetune"), emulator.NAME, tasks=1, **options))
    for name, value in numbers(here).items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)


def test_hooks_with_host_state_are_not_recorded(monkeypatch):
    """A class that does not say that its hooks are arithmetic on tensors has them called at every step."""

    class Host(registry()["er"], registered=False):
        calls = 0

        def before_step(self, learner, batch, state):
            Host.calls += 1
            super().before_step(learner, batch, state)

    _, _ = equal(Host(memory=20), streams("er"), monkeypatch, **QUICK, tasks=1)
    assert Host.calls == 2 * 2 * 3  # both devices, two epochs, three steps


def test_callbacks_see_every_step_whole(monkeypatch):
    seen = {"cpu": [], emulator.NAME: []}

    class Look(cl_lib.Callback):
        def on_step(self, moment):
            seen[moment.learner.device.type].append(moment.loss.clone())

    for name in seen:
        with emulator.second_device(monkeypatch):
            learned("er", streams("er"), name, tasks=2, memory=20, callbacks=[Look()], **QUICK)
    assert len(seen["cpu"]) == len(seen[emulator.NAME]) == 12
    for a, b in zip(*seen.values(), strict=True):
        torch.testing.assert_close(getattr(b, "host", b), a, rtol=0, atol=1e-6)


# --- the same numbers ----------------------------------------------------------------------------------------


def test_numbers_of_a_step_are_the_same_on_both_and_apart_for_seed_purpose_and_time(monkeypatch):
    make = lambda device, *seeds: Draws(
        keys(seeds, "a", device), torch.zeros(len(seeds), dtype=torch.int64).to(device), tuple(range(len(seeds)))
    )
    here = make("cpu", 3, 4)
    first, second = here.integers(50), here.normal(50)
    with emulator.second_device(monkeypatch):
        there = make(emulator.NAME, 3, 4)
        assert torch.equal(there.integers(50).host, first) and torch.equal(there.normal(50).host, second)
    assert torch.equal(make("cpu", 4).integers(50)[0], first[1])
    columns = [
        first[0],
        first[1],
        here.integers(50)[0],
        Draws(keys((3,), "b", "cpu"), torch.zeros(1).long(), (0,)).integers(50)[0],
    ]
    assert len({tuple(c.tolist()) for c in columns}) == 4


def test_a_checkpoint_moves_between_kinds_of_devices(tmp_path, monkeypatch):
    from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint

    options = options_of("er") | {"momentum": 0.9, "optimizer_state": "keep"}
    whole = learned("er", streams("er"), tasks=3, **options)
    for begin, end in (("cpu", emulator.NAME), (emulator.NAME, "cpu")):
        with emulator.second_device(monkeypatch):
            save_checkpoint(learned("er", streams("er"), begin, tasks=2, **options), tmp_path / "half")
            learner = learned("er", streams("er"), end, tasks=0, **options)
            load_checkpoint(learner, tmp_path / "half")
            learner.learn()
            after = numbers(learner)
        for name, value in numbers(whole).items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
