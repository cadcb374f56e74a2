"""What a pass through a network takes, and that work in parts gives what it gives as a whole."""

import pytest
import torch
from torch import nn

import cl_lib
from cl_lib.methods import gem, gpm
from cl_lib.methods.recl import reconstruction
from cl_lib.nets import memory, networks
from cl_lib.seeds import Bag
from cl_lib.training import needs

from helpers import QUICK, net_of, random, stream


def test_bytes_of_a_sample_by_hand():
    net = net_of(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    size = memory.of_a_sample(net, torch.zeros(1, 4, dtype=torch.double))
    assert size.kept == 8 * (8 + 8 + 3)  # what is computed, in double precision
    assert size.passing == 3 * 8 * 8


def learner(**more):
    return cl_lib.Learner("er", stream(), seeds=2, memory=100, **QUICK | more)


def test_what_is_needed_grows_with_what_needs_it():
    plain = learner().needs()
    assert learner(batch_size=80).needs()["a step"] == 10 * plain["a step"]
    assert learner(seeds_at_once=2).needs()["a step"] == 2 * plain["a step"]
    trained = plain["networks"]
    assert learner(momentum=0.9).needs()["optimiser"] - plain["optimiser"] == trained
    assert learner(optimizer="adam").needs()["optimiser"] - plain["optimiser"] == 2 * trained


def test_ten_resnets_with_replay_fit_the_memory_of_a_usual_card():
    x = torch.zeros(100, 3, 32, 32, dtype=torch.uint8)
    data = cl_lib.Dataset("grey", x, torch.arange(100), x, torch.arange(100), [str(i) for i in range(100)])
    options = QUICK | {"network": "resnet18", "batch_size": 32, "hidden": (1,)}
    made = cl_lib.Learner("er", cl_lib.split(data, tasks=10), seeds=10, seeds_at_once=10, memory=2000, **options)
    assert sum(made.needs().values()) < 24 * 2**30


def test_a_run_that_cannot_fit_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with pytest.raises(
        cl_lib.InputError, match=r"er needs about .* KiB of memory \(networks .*\), and cpu has 1000 by"
    ):
        cl_lib.run("er", stream(), memory=20, **QUICK)


def test_a_large_run_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(needs, "LARGE", 0)
    cl_lib.run("finetune", stream(), **QUICK | {"progress": True})
    assert "finetune: about" in capsys.readouterr().err


def test_a_test_set_in_parts_is_tested_as_a_whole(monkeypatch):
    whole = cl_lib.run("finetune", stream(), **QUICK)
    monkeypatch.setattr(memory, "BOUND", 5000)
    one = cl_lib.Learner("finetune", stream(), **QUICK)
    assert one.room(gradients=False) < 40
    assert (cl_lib.run("finetune", stream(), **QUICK).R == whole.R).all()


@pytest.mark.parametrize("part", [1, 2, 3])
def test_gem_reads_its_memory_in_parts(part):
    net = net_of(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    state = Bag(x=random(2, 5, 4), y=torch.tensor([[0, 1, 2, 0, 1], [2, 1, 0, 0, 0]]), held=torch.tensor([5, 3]))
    rows = torch.tensor([[True, True, True], [True, False, True]])
    state.y[1] = torch.tensor([2, 0, 0, 0, 0])
    whole, parts = (gem.gradients(net, state, rows, p) for p in (None, part))
    for name, g in whole.items():
        torch.testing.assert_close(parts[name], g, rtol=1e-12, atol=1e-14)


def test_gpm_reads_its_samples_in_parts():
    layer, a = nn.Conv2d(2, 3, 2), torch.rand(7, 2, 4, 4)
    whole, R = gpm.columns(layer, a), None
    for piece in a.split(3):
        R = gpm.columns(layer, piece, R)
    torch.testing.assert_close(R.mT @ R, whole.mT @ whole)


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("G", [1, 3])
def test_recl_reconstructs_in_parts(averaged, G):
    torch.manual_seed(0)
    module = networks.homogeneous_mlp((1, 3, 3), 4, hidden=(6, 5)).double()
    params = {k: torch.stack([p.detach() + 0.1 * i for i in range(G)]) for k, p in module.named_parameters()}
    buffers = {k: torch.stack([b] * G) for k, b in module.named_buffers()}
    x, c = random(G, 7, 1, 3, 3).requires_grad_(), torch.rand(G, 7, dtype=torch.double).requires_grad_()
    y, rows = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.tensor([True, True, True, False])
    settings = reconstruction.Settings(averaged=averaged)
    arguments = module, params, buffers, x, c, y, rows, settings
    loss, gradients = reconstruction.descent(*arguments)
    for part in (1, 3, 4):
        own, in_parts = reconstruction.descent(*arguments, part)
        torch.testing.assert_close(own, loss.detach(), rtol=1e-10, atol=0)
        for a, b in zip(in_parts, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
