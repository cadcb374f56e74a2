"""What a study costs beside what it runs: over ``run``, at a notebook's start, and what two processes gain.

    python benchmarks/studies.py

On a machine that others use too the clock says little: seconds of the processor are told beside it, and what is
compared is measured in turn.
"""

import contextlib
import json
import resource
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import nbformat

import cl_lib
from cl_lib.studies.cells import studies
from cl_lib.studies.runner import run_study

ROUNDS, MINUTE = 5, 60
RUN = {"epochs": 2, "hidden": [100, 100], "lr": 0.05, "memory": 200}
CELL = {"method": "er", "dataset": "digits", "scenario": "domain", **RUN}


@contextlib.contextmanager
def measured(found: list):
    """Seconds by the clock and of the processor, this process's and its children's."""
    begun, cpu = time.perf_counter(), _processor()
    yield
    found.append((time.perf_counter() - begun, _processor() - cpu))


def _processor() -> float:
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


def write(folder: Path, seeds: int, **cells) -> Path:
    path = folder / "own.yaml"
    path.write_text(json.dumps({"studies": {"some": {"seeds": seeds, **cells}}}))
    return path


def over_run(folder: Path) -> str:
    """A study of one run, and the run itself, in turn."""
    path, alone, study = write(folder, 1, methods=[CELL]), [], []
    for i in range(ROUNDS):
        with measured(alone):
            stream = cl_lib.split("digits", scenario="domain")
            cl_lib.run("er", stream, seeds=1, out=folder / f"run{i}", progress=False, **RUN)
        with measured(study):
            run_study(path, "some", folder / f"study{i}", report=lambda text: None)
    more = median(b[1] - a[1] for a, b in zip(alone, study, strict=True))
    whole = median(a[1] for a in alone)
    return f"a run: {whole:.2f} s of the processor, as a study {more:+.2f} s: {more / MINUTE:+.1%} of a run of a minute"


def notebook(folder: Path) -> str:
    """A notebook that does nothing."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("seed = 0")])
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, folder / "nothing.ipynb")
    path, found = write(folder, ROUNDS, notebooks=[{"notebook": "nothing"}]), []
    (cell,) = studies(path)["some"].cells
    cell.check()
    with measured(found):
        run_study(path, "some", folder / "notebooks", report=lambda text: None)
    clock, cpu = (seconds / ROUNDS for seconds in found[0])
    return f"a notebook that does nothing: {clock:.1f} s by the clock, {cpu:.1f} s of the processor"


def two_processes(folder: Path) -> str:
    """Ten seeds one after another, and by two processes, in turn; the workers' start is in the first round alone."""
    path, one, two = write(folder, 10, methods=[CELL]), [], []
    for i in range(2):
        for jobs, found in ((1, one), (2, two)):
            with measured(found):
                run_study(path, "some", folder / f"jobs{jobs}{i}", report=lambda text: None, jobs=jobs)
    cold, warm = (a[0] / b[0] for a, b in zip(one, two, strict=True))
    told = f"ten seeds, {one[1][0]:.0f} s one after another"
    return f"{told}: {warm:.2f} times faster by two processes, {cold:.2f} with their start"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cl_lib.load("digits")
        for what in (over_run, notebook, two_processes):
            print(what(Path(name)), flush=True)
