"""Does a study come to the same on a cluster, whichever of its machines dies? Tried with clusters on this machine.

    python tests/clusters.py dask ray s3

For Dask and Ray a head and two workers are started. A study is run by them; again, and one worker is killed in the
middle; and again, and the head is killed, after which cluster and command are started anew. For s3 the study runs
twice at one moment into a bucket of a ``moto`` server. Each must end with the rows of an undisturbed run on one core.
Needs ``cl_lib[ray]``, ``cl_lib[dask]``, ``cl_lib[s3]`` and ``moto[server]``.
"""

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cl_lib.places import place
from cl_lib.results.table import name_of, read_rows

STUDY = """
common: {dataset: digits, per_class: 20, epochs: 10, hidden: [20], scenario: domain, tasks: 2}
studies:
  some: {seeds: 2, vary: {lr: [0.01, 0.02]}, methods: [{method: finetune}, {method: er, memory: 20}]}
"""
PATIENCE = 180.0  # seconds
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def started(*words, log: Path, **more) -> subprocess.Popen:
    """A program in a process group of its own."""
    with open(log, "ab") as file:
        return subprocess.Popen([str(w) for w in words], stdout=file, stderr=file, start_new_session=True, **more)


def killed(program: subprocess.Popen, how=signal.SIGKILL) -> None:
    """A program and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, how)
    program.wait(60)


def answers(port: int) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"nothing answers on port {port}")


class Dask:
    """A scheduler and two workers of one thread."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.address = folder, f"tcp://127.0.0.1:{port}"
        run = lambda what: [sys.executable, "-m", f"distributed.cli.dask_{what}"]
        here = ["--host", "127.0.0.1", "--no-dashboard"]
        self.head = started(*run("scheduler"), *here, "--port", port, log=folder / "log", cwd=folder)
        answers(port)
        one = [*run("worker"), self.address, "--nthreads", 1, "--no-nanny", "--no-dashboard", "--death-timeout", 60]
        self.workers = [started(*one, log=folder / "log", cwd=folder) for _ in range(2)]
        self.words = ["--backend", "dask", "--address", self.address]

    def stop(self) -> None:
        for program in (*self.workers, self.head):
            killed(program)


class Ray:
    """A head that computes nothing and two nodes of one core."""

    def __init__(self, folder: Path, port: int):
        address = f"127.0.0.1:{port}"
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}  # this cluster's
        os.environ |= own | {"RAY_raylet_start_wait_time_s": f"{PATIENCE:.0f}"}
        here = ["--node-ip-address", "127.0.0.1", "--block", "--disable-usage-stats", "--object-store-memory", 10**8]
        head = ["--head", "--port", port, "--num-cpus", 0, "--include-dashboard", "false"]
        self.head = started(*RAY, "start", *head, *here, log=folder / "log", cwd=folder)
        answers(port)
        one = [*RAY, "start", "--address", address, "--num-cpus", 1, *here]
        self.workers = []
        for number in range(2):
            log = folder / f"log-{port}-{number}"
            self.workers.append(started(*one, log=log, cwd=folder))
            until = time.monotonic() + PATIENCE
            while "runtime started" not in log.read_text():
                if time.monotonic() > until:
                    raise TimeoutError(f"a node of Ray did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
        self.words = ["--backend", "ray", "--address", address]

    def stop(self) -> None:
        for program in (*self.workers, self.head):
            killed(program)


@contextlib.contextmanager
def cluster(kind, folder: Path, port: int) -> Iterator:
    some = kind(folder, port)
    try:
        yield some
    finally:
        some.stop()


# --- what is tried ----------------------------------------------------------------------------------------


def study(folder: Path, out, *words, env=None) -> subprocess.Popen:
    call = [sys.executable, "-m", "cl_lib", "study", folder / "own.yaml", "some", "--out", out, *words]
    return started(*call, log=folder / "told", env={**os.environ, **(env or {})})


def finished(program: subprocess.Popen, folder: Path) -> None:
    if status := program.wait(600):
        raise RuntimeError(f"ended with status {status}:\n{(folder / 'told').read_text()[-2000:]}")


def rows_left(folder: Path, out: str) -> int:
    return len([*(folder / out / "own-some").glob("*-seed*.json")])


def begun(folder: Path, out: str, number: int) -> None:
    """Wait until so many runs are done."""
    until = time.monotonic() + PATIENCE
    while rows_left(folder, out) < number:
        if time.monotonic() > until:
            raise TimeoutError(f"no {number} runs after {PATIENCE:.0f} s:\n{(folder / 'told').read_text()[-2000:]}")
        time.sleep(0.05)


def numbers(path) -> dict:
    untimed = lambda row: {k: v for k, v in row.items() if not k.endswith("seconds")}
    return {name_of(row["run"], row["seed"]): untimed(row) for row in read_rows(path)}


def on_cluster(kind, folder: Path, alone: dict) -> None:
    port = free_port()
    same = lambda out: numbers(folder / out / "own-some.json") == alone
    with cluster(kind, folder, port) as some:
        finished(study(folder, folder / "whole", *some.words), folder)
        print(f"{kind.__name__}: undisturbed, the same: {same('whole')}", flush=True)
        running = study(folder, folder / "worker", *some.words)
        begun(folder, "worker", 2)
        killed(some.workers[0])
        there = rows_left(folder, "worker")
        finished(running, folder)
        print(f"{kind.__name__}: a worker killed after {there} runs, the same: {same('worker')}", flush=True)
    with cluster(kind, folder, port := free_port()) as some:
        running = study(folder, folder / "head", *some.words)
        begun(folder, "head", 2)
        some.stop()
        there = rows_left(folder, "head")
        time.sleep(5)
        killed(running)
    with cluster(kind, folder, port) as some:
        finished(study(folder, folder / "head", *some.words), folder)
        print(f"{kind.__name__}: the head killed after {there} runs, the same: {same('head')}", flush=True)
    if not all(map(same, ("whole", "worker", "head"))):
        raise SystemExit(f"{kind.__name__}: other rows than those of one core")


def on_s3(folder: Path, alone: dict) -> None:
    port = free_port()
    server = started(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port, log=folder / "log")
    try:
        answers(port)
        env = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
        env |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        os.environ.update(env)
        import s3fs

        s3fs.S3FileSystem(endpoint_url=env["AWS_ENDPOINT_URL"]).mkdir("results")
        with place("s3://results/claims").claim("a") as mine, place("s3://results/claims").claim("a") as theirs:
            one = mine and not theirs
        both = [study(folder, "s3://results/all", env=env) for _ in range(2)]
        for running in both:
            finished(running, folder)
        finished(study(folder, "s3://results/all", "--collect"), folder)
        same = one and numbers("s3://results/all/own-some.json") == alone
        print(f"s3: one holder of a claim: {one}; two processes at one moment, the same: {same}", flush=True)
        if not same:
            raise SystemExit("s3: other rows than those of a folder")
    finally:
        killed(server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", default=["dask", "ray", "s3"], choices=["dask", "ray", "s3"])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "own.yaml").write_text(STUDY)
        finished(study(folder, folder / "alone"), folder)
        alone = numbers(folder / "alone" / "own-some.json")
        print(f"alone: {len(alone)} runs", flush=True)
        for what in asked.what:
            (folder / what).mkdir()
            (folder / what / "own.yaml").write_text(STUDY)
            each = {"dask": Dask, "ray": Ray}
            on_s3(folder / what, alone) if what == "s3" else on_cluster(each[what], folder / what, alone)
    print(json.dumps({"tried": asked.what, "runs": len(alone), "different": 0}))


if __name__ == "__main__":
    main()
