"""Other libraries on the bench's workload: each in an environment of its own, spoken to in lines of JSON."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

GUIDE, LEAN = "as its guide sets it up", "resident tensors, no metrics"
PEERS = dict.fromkeys(("finetune", "ewc", "lwf", "er", "agem"), (GUIDE, LEAN))
TORCH = ("torch==2.13.0", "torchvision==0.28.0")


class Peer:
    """A process that trains when asked and answers with seconds and accuracy."""

    def __init__(self, python: Path, script: Path, data: dict):
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            torch.save(data, file.name)
            self.process = subprocess.Popen(
                [python, script, file.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            self.versions = self._answer()  # it has read the file by then

    def ask(self, **request) -> dict:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"The peer stopped: try {self.process.args[0]} {self.process.args[1]} by hand.")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def start(root: Path, work, settings: dict, make: bool) -> Peer | None:
    """Avalanche, where its environment is at hand or is to be made; else None."""
    python = root / ".venv-avalanche" / "bin" / "python"
    if make and not python.exists():
        environment(python.parents[1])
    if not python.exists():
        print('Avalanche is not measured: make bench ARGS="--peers" makes its environment.', file=sys.stderr)
        return None
    stream = work.stream("class")
    mean, std = (float(v) for v in (work.data.x.float().mean() / 255, work.data.x.float().std() / 255))
    settings = {
        **settings,
        "ewc_strength": 100.0,
        "hidden": list(work.hidden),
        "lr": work.lr,
        "tasks": stream.tasks,
        "batch_size": work.batch_size,
        "outputs": stream.outputs,
        "mean": mean,
        "std": std,
    }
    images = {"x": work.data.x[:, 0], "y": work.data.y}
    return Peer(
        python,
        Path(__file__).with_name("avalanche_peer.py"),
        {"settings": settings, "images": images, "train": work.train, "test": work.test},
    )


def environment(folder: Path) -> None:
    print(f"Making {folder.name} (some minutes, once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([*pip, TORCH[0]], check=True)
        subprocess.run([*pip, "avalanche-lib==0.6.0", *TORCH], check=True)
    except subprocess.CalledProcessError:
        (folder / "bin" / "python").unlink()  # half an environment is none
        sys.exit("Avalanche's environment could not be made: is there a network? Run without --peers.")
