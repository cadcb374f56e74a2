"""What cannot be mapped over seeds is said in a sentence, and ``stacked = False`` cures it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cl_lib import InputError, Method, run

from helpers import QUICK, close, of_seed, stream


def method_of(function, hook="penalty", **attributes):
    """A method whose only hook is the given function of (net, batch), or has it beside what is usual."""
    hooks = {
        "penalty": lambda self, net, batch, state: function(net, batch),
        "task": lambda self, net, batch: F.cross_entropy(net(batch.x), batch.y) + function(net, batch),
        "direct": lambda self, grads, net, batch, state: {k: g + 0 * function(net, batch) for k, g in grads.items()},
        "predict": lambda self, net, x, state, task: net(x) + 0 * function(net, {"x": x}),
    }
    return type("Mine", (Method,), {hook: hooks[hook], **attributes}, registered=False)()


def logits(net, batch):
    return net(batch["x"])


def draws(net, batch):
    return (logits(net, batch) * torch.rand(10)).sum()


def written(net, batch):
    total = torch.zeros(10)
    total += logits(net, batch)[0]
    return total.sum()


CANNOT = {
    "item": (lambda n, b: 1e-3 * logits(n, b).sum().item(), r"reads a tensor's value \(.item"),
    "float": (lambda n, b: 1e-3 * float(logits(n, b).sum().detach()), r"reads a tensor's value"),
    "tolist": (lambda n, b: 1e-3 * sum(logits(n, b)[0].tolist()), r"reads a tensor's values \(.tolist"),
    "numpy": (lambda n, b: 1e-3 * float(logits(n, b).detach().numpy().sum()), r"reads a tensor's values"),
    "branch": (lambda n, b: logits(n, b).sum() if logits(n, b).sum() > 0 else 0.0, "branches on a tensor"),
    "random": (draws, r"draws random numbers: .*learner\.draws\(batch\.positions\)"),
    "dropout": (lambda n, b: F.dropout(logits(n, b)).sum(), "draws random numbers"),
    "mask": (lambda n, b: logits(n, b)[logits(n, b) > 0].sum(), "a shape that depends on a tensor's values"),
    "in place": (written, "writes into a tensor"),
}


@pytest.mark.parametrize("function, what", CANNOT.values(), ids=CANNOT)
def test_what_vmap_cannot_carry_is_said_in_a_sentence(function, what):
    with pytest.raises(InputError, match=rf"mine cannot be mapped .*{what}.*stacked = False in the class") as said:
        run(method_of(function), stream(), seeds=2, seeds_at_once=2, **QUICK)
    assert "vmap" not in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize("hook", ["task", "direct", "predict"])
def test_in_every_hook_that_is_mapped(hook):
    with pytest.raises(InputError, match="reads a tensor's value"):
        run(method_of(CANNOT["item"][0], hook), stream(), seeds=2, seeds_at_once=2, **QUICK)


@pytest.mark.parametrize("function, what", CANNOT.values(), ids=CANNOT)
def test_seeds_run_one_after_another_where_the_class_says_so(function, what):
    alone = method_of(function, stacked=False)
    both, one = (run(alone, stream(), seeds=seeds, **QUICK) for seeds in ((0, 1), (1,)))
    close(of_seed(both, 1), of_seed(one, 1), rtol=0, atol=0)
    with pytest.raises(InputError, match="seeds_at_once=2 is not possible: mine trains each seed in a loop of its own"):
        run(alone, stream(), seeds=2, seeds_at_once=2, **QUICK)


def test_what_vmap_has_no_name_for_is_told_in_its_own_words(monkeypatch):
    monkeypatch.setattr("cl_lib.training.lift.CAUSES", {})
    with pytest.raises(InputError, match=r"is refused by torch\.func\.vmap \(vmap: .*\.item\(\).*stacked = False"):
        run(method_of(CANNOT["item"][0]), stream(), seeds=2, seeds_at_once=2, **QUICK)


def test_a_mistake_that_one_seed_makes_too_stays_what_it_is():
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(8x10 and 3x3\)"):
        run(method_of(lambda n, b: (n(b.x) @ torch.zeros(3, 3)).sum()), stream(), seeds=2, seeds_at_once=2, **QUICK)


def test_what_it_can_carry_is_mapped():
    weighted = method_of(lambda n, b: 1e-3 * torch.where(n(b.x) > 0, n(b.x), 0).sum())
    both = run(weighted, stream(), seeds=2, seeds_at_once=2, **QUICK)
    alone = run(weighted, stream(), seeds=(1,), **QUICK)
    close(of_seed(both, 1), of_seed(alone, 1), rtol=1e-3, atol=1e-4)
    assert not np.array_equal(alone.losses, run("finetune", stream(), seeds=(1,), **QUICK).losses)
