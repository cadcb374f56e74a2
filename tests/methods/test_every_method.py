"""One suite over every registered method: a new one is tested the moment it is registered."""

import warnings

import numpy as np
import pytest
import torch

import cl_lib
from cl_lib.methods._base import REGISTERED, SCENARIOS, Method, fields_of
from cl_lib.methods._registry import make, registry
from cl_lib.nets import networks
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint
from cl_lib.training.learner import Learner
from cl_lib.training.runs import run

METHODS = sorted(registry())
NEUTRAL = [k for k in METHODS if registry()[k].neutral is not None]
HELPS = [k for k in METHODS if registry()[k].helps]
QUICK = {"epochs": 2, "batch_size": 8, "hidden": (20,), "lr": 0.02}
pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")


def stream(scenario="class", **options):
    return cl_lib.split("digits", scenario=scenario, **{"per_class": 12, **options})


def brief(key):
    """The method at its defaults, but for those that would take minutes."""
    return make(key, **{"recl": {"samples": 20, "steps": 10}}.get(key, {}))


def served(key):
    return registry()[key].scenarios[-1]


def weights(result, seed):
    at = result.seeds.index(seed)
    return {name: w[at] for name, w in result.weights.items()}


def assert_same(a, b, exact=False):
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], **({"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4})
        )


@pytest.mark.parametrize("key", METHODS)
def test_name_is_key_is_file(key):
    cls = registry()[key]
    assert cls.key == key
    if cls.__name__.lower() == key:
        assert cls.__module__ in (f"cl_lib.methods.{key}", f"cl_lib.methods.{key}.method")
    assert cls.__doc__ and ".. math::" in cls.__doc__ and cls.citation and cls.cost
    assert set(cls.scenarios) <= set(SCENARIOS) and cls.scenarios
    assert not set(fields_of(cls)) & set(cl_lib.Options.__dataclass_fields__), "a parameter hides a training option"


@pytest.mark.parametrize("key", NEUTRAL)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_neutral_setting_is_fine_tuning_bit_for_bit(key, scenario):
    if scenario not in registry()[key].scenarios:
        pytest.skip("not served")
    plain = run("finetune", stream(scenario), **QUICK)
    neutral = run(make(key, **registry()[key].neutral), stream(scenario), **QUICK)
    assert_same(weights(plain, 0), weights(neutral, 0), exact=True)
    np.testing.assert_array_equal(plain.R, neutral.R)
    if key != "finetune":
        usual = run(brief(key), stream(scenario), **QUICK).weights
        assert any(not torch.equal(plain.weights[k], w) for k, w in usual.items())


@pytest.mark.parametrize("key", METHODS)
def test_same_seed_same_bits(key):
    first, again = (run(brief(key), stream(served(key)), seeds=(4,), **QUICK) for _ in "ab")
    assert_same(weights(first, 4), weights(again, 4), exact=True)
    other = run(brief(key), stream(served(key)), seeds=(5,), **QUICK)
    assert any(not torch.equal(first.weights[k], other.weights[k]) for k in first.weights)


@pytest.mark.parametrize("at_once", [3, 2, 1])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("key", METHODS)
def test_seed_alone_equals_seed_among_others(key, scenario, at_once):
    """Unequal tasks: the class order is drawn per seed, and digits' classes are not equally large."""
    if scenario not in registry()[key].scenarios or (at_once > 1 and not registry()[key].stacked):
        pytest.skip("not served")
    unequal = stream(scenario, order="per-seed", per_class=None)
    how = QUICK | {"epochs": 1, "batch_size": 32}
    together = run(brief(key), unequal, seeds=(0, 1, 2), seeds_at_once=at_once, **how)
    alone = run(brief(key), unequal, seeds=(1,), **how)
    assert_same(weights(together, 1), weights(alone, 1))
    np.testing.assert_allclose(together.R[1], alone.R[0], atol=0.02)


@pytest.mark.parametrize("key", METHODS)
def test_seed_alone_equals_seed_among_others_with_adam_and_early_stopping(key):
    """Adam counts its steps per tensor, and a seed that stopped must not count the others'."""
    if not registry()[key].stacked:
        pytest.skip("seeds run one after another")
    unequal = stream(served(key), tasks=2, order="per-seed", per_class=None, validation=0.2)
    how = QUICK | {"optimizer": "adam", "lr": 0.003, "epochs": 4, "patience": 1, "batch_size": 64}
    how["dtype"] = "float64"  # Adam divides by the gradient's size, rounding included
    together = run(brief(key), unequal, seeds=(0, 1, 2), seeds_at_once=3, **how)
    for i, seed in enumerate((0, 1, 2)):
        alone = run(brief(key), unequal, seeds=(seed,), **how)
        assert_same(weights(together, seed), weights(alone, seed))
        np.testing.assert_allclose(together.losses[i], alone.losses[0], rtol=1e-4)


@pytest.mark.parametrize("killed_after", [0, 2])
@pytest.mark.parametrize("key", METHODS)
def test_killed_and_resumed_equals_uninterrupted(key, killed_after, tmp_path):
    source, seeds = stream(served(key)), (0, 3)
    learner = Learner(brief(key), source, seeds=seeds, **QUICK)
    for _ in range(killed_after + 1):
        learner.learn()
    save_checkpoint(learner, tmp_path / "state")
    resumed = Learner(brief(key), source, seeds=seeds, **QUICK)
    load_checkpoint(resumed, tmp_path / "state")
    for task in range(killed_after + 1, source.tasks):
        resumed.learn(task)
    whole = run(brief(key), source, seeds=seeds, **QUICK)
    for seed in seeds:
        assert_same(weights(resumed.result(), seed), weights(whole, seed), exact=True)
    np.testing.assert_array_equal(resumed.result().R, whole.R)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("key", METHODS)
def test_scenarios_served_or_refused(key, scenario):
    if scenario in registry()[key].scenarios:
        result = run(brief(key), stream(scenario), **QUICK)
        assert np.isfinite(np.diagonal(result.R, axis1=1, axis2=2)).all()
    else:
        with pytest.raises(cl_lib.InputError, match=f"{scenario}-incremental"):
            run(brief(key), stream(scenario), **QUICK)


@pytest.mark.parametrize("key", HELPS)
def test_beats_fine_tuning_where_its_paper_says(key):
    """Domain-incremental: on digits turned further with each task; otherwise: on their classes in pairs."""
    for scenario, parameters in registry()[key].helps.items():
        source = (
            cl_lib.rotated("digits", tasks=4, per_class=60) if scenario == "domain" else stream(scenario, per_class=60)
        )
        how = {"seeds": (0, 1), "epochs": 5, "batch_size": 10, "lr": 0.01, "hidden": (64,)}
        accuracy = {
            k: run(m, source, **how).metrics()["acc"].mean()
            for k, m in {"finetune": "finetune", key: make(key, **parameters)}.items()
        }
        assert 1 - accuracy[key] < 0.93 * (1 - accuracy["finetune"]), accuracy


@pytest.mark.parametrize(
    "name, network",
    [
        ("cnn", "cnn"),
        ("batch-norm ResNet", lambda shape, outputs: networks.resnet18(shape, outputs, width=4)),
    ],
)
@pytest.mark.parametrize("key", METHODS)
def test_networks(key, name, network):
    source = stream(served(key), tasks=2, per_class=4)
    how = {"network": network, "epochs": 1, "batch_size": 16, "lr": 0.01, "dtype": "float64"}
    together = run(brief(key), source, seeds=(0, 1), seeds_at_once=2 if registry()[key].stacked else 1, **how)
    alone = run(brief(key), source, seeds=(1,), **how)
    assert_same(weights(together, 1), weights(alone, 1))
    assert np.isfinite(together.R).all()


def test_poor_pairing_warns_once_before_training():
    poor = [(k, s) for k in METHODS for s in registry()[k].poor]
    assert poor
    for key, scenario in poor:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Learner(brief(key), stream(scenario), **QUICK)
        assert [w.category for w in caught] == [cl_lib.PoorPairing]


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
        "from cl_lib.methods._base import Method\n\n\n"
        "@dataclass\n"
        "class HalfStep(Method):\n"
        "    share: float = 0.5\n\n"
        "    def direct(self, grads, net, batch, memory):\n"
        "        return {k: self.share * g for k, g in grads.items()}\n"
    )
    monkeypatch.setattr(cl_lib.methods, "__path__", [*cl_lib.methods.__path__, str(tmp_path)])
    try:
        assert "halfstep" in registry()
        half = run("halfstep", stream(), share=0.5, **QUICK)
        slow = run("finetune", stream(), **QUICK | {"lr": QUICK["lr"] / 2})
        assert_same(weights(half, 0), weights(slow, 0))
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
