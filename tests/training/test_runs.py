"""Groups of seeds, finished runs recognised, killed runs resumed, nothing lost."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cl_lib
from cl_lib import Learner, Result, files, run
from cl_lib.identity import code, file_name
from cl_lib.methods.recl.method import ReCL
from cl_lib.seeds import flatten, unflatten
from cl_lib.training import runs
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint

QUICK = {"epochs": 1, "batch_size": 8, "hidden": (16,), "lr": 0.02}


def stream(**options):
    return cl_lib.split("digits", **{"per_class": 12, **options})


def same(a, b):
    np.testing.assert_array_equal(a.R, b.R)
    np.testing.assert_array_equal(a.losses, b.losses)
    assert a.seeds == b.seeds and a.config == b.config
    for name in a.weights:
        assert torch.equal(a.weights[name], b.weights[name])


def test_runs_of_single_seeds_add_up(tmp_path, capfd):
    whole = run("er", stream(), seeds=3, memory=30, **QUICK)
    for seed in (2, 0):
        run("er", stream(), seeds=(seed,), out=tmp_path, memory=30, **QUICK)
    capfd.readouterr()
    same(run("er", stream(), seeds=3, out=tmp_path, memory=30, **QUICK), whole)
    assert capfd.readouterr().err.count("reused") == 2
    run("er", stream(), seeds=(1,), out=tmp_path, memory=30, **QUICK)
    for path in tmp_path.glob("*.safetensors"):
        if len(Result.load(path).seeds) == 3:
            path.unlink()
    same(run("er", stream(), seeds=3, out=tmp_path, memory=30, jobs=2, **QUICK), whole)
    assert not list(tmp_path.glob("*.checkpoint"))


def test_numbers_do_not_depend_on_jobs(tmp_path):
    one = run("er", stream(order="per-seed"), seeds=3, **QUICK)
    many = run("er", stream(order="per-seed"), seeds=3, jobs=2, out=tmp_path, **QUICK)
    assert many.seeds == (0, 1, 2)
    np.testing.assert_allclose(many.R, one.R, atol=0.02)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"], "checkpoints go when the result is there"


def test_a_finished_run_is_recognised_and_not_repeated(tmp_path, monkeypatch):
    first = run("er", stream(), seeds=2, out=tmp_path, memory=30, **QUICK)
    counted = []
    monkeypatch.setattr(runs, "run_group", lambda *a, real=runs.run_group: counted.append(1) or real(*a))
    same(run("er", stream(), seeds=2, out=tmp_path, memory=30, **QUICK), first)
    assert not counted
    run("er", stream(), seeds=2, out=tmp_path, memory=30, fresh=True, **QUICK)
    assert len(counted) == 1
    for change in ({"memory": 31}, {"memory": 30, "lr": 0.03}, {"memory": 30, "seeds": 3}):
        run("er", stream(), out=tmp_path, **{"seeds": 2, **QUICK, **change})
    run("er", stream(per_class=11), seeds=2, out=tmp_path, memory=30, **QUICK)
    assert len(counted) == 5


@pytest.mark.parametrize(
    "network",
    [
        lambda shape, outputs: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, outputs)),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
    ],
)
def test_networks_of_the_users_own_are_recognised_too(tmp_path, network):
    for _ in range(2):
        run("finetune", stream(), network=network, out=tmp_path, **{**QUICK, "hidden": ()})
    run(
        "finetune",
        stream(),
        network=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
        out=tmp_path,
        **{**QUICK, "hidden": ()},
    )
    assert len(list(tmp_path.iterdir())) == 2


def deep():
    layers = [torch.nn.Linear(64, 64) for _ in range(2)]
    return torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(64, 10))


def test_a_network_made_by_code_within_code_is_the_same_in_every_process():
    result = run("finetune", stream(), seeds=2, jobs=2, network=lambda: deep().append((lambda: torch.nn.ReLU())()))
    assert result.R.shape == (2, 5, 5)
    assert code(lambda: [i + 1 for i in (1, 2)]) != code(lambda: [i + 2 for i in (1, 2)])


def test_a_recognised_run_still_gives_the_users_network(tmp_path):
    dropping = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10))
    first, again = (run("finetune", stream(), network=dropping, out=tmp_path, **QUICK) for _ in range(2))
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(again.model(0)(x), first.model(0)(x))
    (file,) = tmp_path.iterdir()
    torch.testing.assert_close(Result.load(file).model(0, network=dropping)(x), first.model(0)(x))


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "as a host"])
def test_a_users_method_is_recognised_by_its_code(tmp_path, wrapped):
    def define(sign):
        class Pulling(cl_lib.Method):
            def penalty(self, net, batch, memory):
                return 0.01 * sum(p.square().sum() for p in net.params.values()) * sign

        return Pulling

    class Pushing(cl_lib.Method, key="pulling"):
        def penalty(self, net, batch, memory):
            return 0.0

    try:
        for method in (define(1.0), Pushing, Pushing):
            own = ReCL(host=method(), samples=0) if wrapped else method
            run(own, stream(), out=tmp_path, **QUICK)
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        cl_lib.methods._base.REGISTERED.pop("pulling")


@pytest.mark.filterwarnings("ignore:.*answers nan")
@pytest.mark.parametrize("jobs", [1, 3])
def test_seeds_that_diverge_are_dropped_however_they_are_spread(jobs):
    def network():
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        if torch.initial_seed() == 1:
            module[1].weight.data.fill_(float("inf"))
        return module

    result = run("er", stream(), seeds=3, jobs=jobs, network=network, on_divergence="drop", **QUICK)
    assert np.isnan(result.R[1, -1]).all() and np.isfinite(result.R[[0, 2]]).all()
    with pytest.raises(cl_lib.Diverged, match="seed 1"):
        run("er", stream(), seeds=3, jobs=jobs, network=network, **QUICK)


def test_a_place_that_cannot_be_written_to_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(runs, "run_group", lambda *a: pytest.fail("trained"))
    with pytest.raises(cl_lib.InputError, match="another folder"):
        run("finetune", stream(), out=tmp_path / "file" / "below", **QUICK)


def _run_and_wait(folder):
    def stop(learner, path, real=runs.save_checkpoint):
        real(learner, path)
        if learner.done == 2:
            (folder / "two tasks done").touch()
            time.sleep(60)

    runs.save_checkpoint = stop
    torch.set_num_threads(1)
    run("er", stream(), seeds=2, out=folder, **QUICK)


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    process = multiprocessing.get_context("spawn").Process(target=_run_and_wait, args=(tmp_path,))
    process.start()
    deadline = time.time() + 90
    while not (tmp_path / "two tasks done").exists() and time.time() < deadline and process.is_alive():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list(tmp_path.glob("*.checkpoint"))) == 1
    saved = []
    keep = lambda learner, path, real=runs.save_checkpoint: saved.append(learner.done) or real(learner, path)
    monkeypatch.setattr(runs, "save_checkpoint", keep)
    resumed = run("er", stream(), seeds=2, out=tmp_path, **QUICK)
    assert saved == [3, 4]
    monkeypatch.undo()
    same(resumed, run("er", stream(), seeds=2, **QUICK))


def test_workers_find_a_module_that_came_after_they_were_started(tmp_path, monkeypatch):
    run("finetune", stream(), seeds=2, jobs=2, **QUICK)
    (tmp_path / "made_later.py").write_text(
        "import torch\ndef network():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import made_later

    result = run("finetune", stream(), seeds=2, jobs=2, network=made_later.network, **QUICK)
    assert np.isfinite(result.R).all()


def test_a_worker_whose_parent_died_before_it_could_watch_ends():
    start = multiprocessing.get_context("spawn").Process
    gone = start(target=os.getpid)
    gone.start()
    gone.join()
    for parent, status in ((gone.pid, 1), (1, 0)):  # the latter lives, and is no parent of the worker
        worker = start(target=runs.follow, args=(parent,))
        worker.start()
        worker.join()
        assert worker.exitcode == status


def test_a_full_disk_loses_no_checkpoint(tmp_path, monkeypatch):
    learner = Learner("er", stream(), **QUICK)
    learner.learn()
    save_checkpoint(learner, tmp_path / "c")
    learner.learn()
    before = (tmp_path / "c").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", full)
        with pytest.raises(cl_lib.InputError, match="No space left"):
            save_checkpoint(learner, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    again = Learner("er", stream(), **QUICK)
    load_checkpoint(again, tmp_path / "c")
    assert again.done == 1


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    learner = Learner("er", stream(), **QUICK)
    learner.learn()
    save_checkpoint(learner, tmp_path / "c")
    for other, what in (
        (Learner("er", stream(), **QUICK | {"lr": 0.03}), "lr differ"),
        (Learner("er", stream(), memory=70, **QUICK), "parameters differ"),
        (Learner("finetune", stream(), **QUICK), "method"),
        (Learner("er", stream(), seeds=2, **QUICK), "seeds differ"),
        (Learner("er", stream(per_class=11), **QUICK), "stream differ"),
    ):
        with pytest.raises(cl_lib.InputError, match=what):
            load_checkpoint(other, tmp_path / "c")
    (tmp_path / "c").write_bytes(b"nonsense")
    with pytest.raises(cl_lib.InputError, match="delete it"):
        load_checkpoint(learner, tmp_path / "c")


def test_diverged_run_keeps_its_finished_tasks(tmp_path):
    class Later(cl_lib.Method):
        def task(self, net, batch):
            return net(batch.x).sum() * (float("nan") if batch.task_index == 2 else 0.0)

    try:
        with pytest.raises(cl_lib.Diverged, match="task 2"):
            run("later", stream(), out=tmp_path, **QUICK)
        (file,) = tmp_path.iterdir()
        learner = Learner("later", stream(), **QUICK)
        load_checkpoint(learner, file)
        assert learner.done == 2 and np.isfinite(learner.result().R[0, 1]).all()
    finally:
        cl_lib.methods._base.REGISTERED.pop("later")


def test_results_come_back_from_their_file(tmp_path):
    result = run("er", stream(), seeds=2, out=tmp_path, **QUICK)
    (file,) = tmp_path.iterdir()
    loaded = Result.load(file)
    same(loaded, result)
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(loaded.model(1)(x), result.model(1)(x))


def test_state_is_a_tree_of_tensors_and_back():
    learner = Learner("er", stream(), **QUICK)
    learner.learn()
    state = learner.state_dict()
    flat = dict(flatten(state))
    assert all(isinstance(t, torch.Tensor) for t in flat.values())
    rebuilt = dict(flatten(unflatten(flat)))
    assert flat.keys() == rebuilt.keys()


def test_a_result_under_the_name_of_another_is_not_taken_for_it(tmp_path):
    other = run("er", stream(), out=tmp_path, memory=30, **QUICK)
    (given,) = tmp_path.iterdir()
    run("er", stream(), out=tmp_path, memory=31, **QUICK)
    (asked,) = set(tmp_path.iterdir()) - {given}
    asked.write_bytes(given.read_bytes())
    with pytest.raises(cl_lib.InputError, match=r"holds another run, whose parameters differ: move it"):
        run("er", stream(), out=tmp_path, memory=31, **QUICK)
    same(Result.load(asked), other)
    given.write_bytes(run("er", stream(), seeds=(1,), memory=30, **QUICK).save(tmp_path / "one").read_bytes())
    with pytest.raises(cl_lib.InputError, match="whose seeds differ"):
        run("er", stream(), out=tmp_path, memory=30, **QUICK)
    again = run("er", stream(), out=tmp_path, memory=30, fresh=True, **QUICK)
    same(Result.load(given), again)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    script = (
        "import os, pathlib, sys, time\n"
        "import joblib\n"
        "from cl_lib.training.runs import processes\n"
        "def work(folder):\n"
        "    pathlib.Path(folder, str(os.getpid())).touch()\n"
        "    time.sleep(60)\n"
        "processes(2)(joblib.delayed(work)(sys.argv[1]) for _ in range(2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.time() + 120
    while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2 and time.time() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert len(workers) == 2
    deadline = time.time() + 10
    while (alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.time() < deadline:
        time.sleep(0.1)
    assert not alive


def test_a_run_in_processes_goes_on_where_one_process_left_it(tmp_path):
    """Whoever trains a group, the method's code has one digest."""

    class Pausing(cl_lib.Method):
        def penalty(self, net, batch, state):
            return 0.001 * sum(p.square().sum() for p in net.params.values())

    try:
        whole = run("pausing", stream(), seeds=2, out=tmp_path / "whole", **QUICK)
        for seed in (0, 1):
            learner = Learner("pausing", stream(), seeds=(seed,), **QUICK)
            learner.learn()
            name = file_name("pausing", learner.config(), (seed,))
            save_checkpoint(learner, tmp_path / "two" / f"{name}.checkpoint")
        spread = run(Pausing, stream(), seeds=2, jobs=2, out=tmp_path / "two", **QUICK)
        np.testing.assert_array_equal(whole.R, spread.R)
        assert spread.config == whole.config
    finally:
        cl_lib.methods._base.REGISTERED.pop("pausing")
