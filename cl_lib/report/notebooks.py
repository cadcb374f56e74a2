"""Run the book's notebooks: all of them for the book, or one with the reader's own parameters.

papermill passes a misspelt parameter on with a warning and exits 0. Here it is refused before anything runs,
and a notebook that fails is named together with the cell and the error.
"""

import ast
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat

from cl_lib.errors import InputError, suggest

# One thread a kernel: notebooks run beside each other, and sums then come out alike on every machine.
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
COLAB = "colab"


class NotebookFailed(RuntimeError):
    """A notebook did not run to its end. The message names the notebook, the cell and the error."""


def read(path) -> nbformat.NotebookNode:
    """The notebook at ``path``; InputError where there is none."""
    path = Path(path)
    if not path.is_file():
        folder = path.parent
        if folder.is_dir() and (names := [p.name for p in folder.glob("*.ipynb")]):
            raise suggest(path.name, names, f"notebook in {folder}")
        raise InputError(f"{path} does not exist: give the path of a notebook, such as notebooks/01_….ipynb.")
    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a Jupyter notebook: give the path of an .ipynb file.") from error


def tagged(notebook, tag: str) -> list:
    """The cells of ``notebook`` that carry ``tag``."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def parameters(notebook) -> dict[str, object]:
    """Names and defaults of the notebook's parameters: the assignments in its cell tagged ``parameters``.

    A default that is not a literal is given as its source text.
    """
    found = {}
    for cell in tagged(notebook, "parameters"):
        for node in ast.parse(cell.source).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name) and node.value is not None:
                    try:
                        found[target.id] = ast.literal_eval(node.value)
                    except ValueError:
                        found[target.id] = ast.unparse(node.value)
    return found


def parse(text: str):
    """A value from the command line: a Python literal where it is one, otherwise the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def execute(notebook, output, values: dict | None = None, *, progress: bool = False) -> Path:
    """Run the notebook at ``notebook`` with its parameters set to ``values``, and write the result to ``output``.

    Returns the path written. Raises InputError for a missing notebook, a parameter that the notebook does not
    have and an output that would overwrite the notebook; NotebookFailed where a cell fails (``output`` then
    holds what ran).
    """
    import papermill
    from traitlets.config import Config

    notebook, output, values = Path(notebook), Path(output), dict(values or {})
    known = parameters(read(notebook))
    for name in values:
        if name not in known:
            raise suggest(name, known, f"parameter of {notebook.name}")
    if output.resolve() == notebook.resolve():
        raise InputError(f"{output} is the notebook itself: give another file for the executed copy.")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else each kernel warns about frozen modules
    with (
        tempfile.TemporaryDirectory() as sockets
    ):  # the kernel is reached through files in here, not through open ports
        local = {"transport": "ipc", "ip": f"{sockets}/kernel"} if os.name == "posix" else {}
        try:
            papermill.execute_notebook(
                str(notebook),
                str(output),
                values,
                kernel_name="python3",
                language="python",
                progress_bar=progress,
                config=Config(KernelManager=local),
                extra_arguments=["--log-level=CRITICAL"],  # the kernel's own chatter; errors of cells are raised
            )
        except Exception as error:
            raise NotebookFailed(f"{notebook.name}{_where(output)}: {_reason(error)}") from error
    return output


def _where(output: Path) -> str:
    """The cell at which papermill stopped, counted without the cells that papermill adds."""
    if not output.is_file():
        return ""
    number = 0
    for cell in nbformat.read(output, as_version=4).cells:
        if {"injected-parameters", "papermill-error-cell-tag"} & set(cell.metadata.get("tags", ())):
            continue
        number += 1
        state = cell.metadata.get("papermill", {})
        if state.get("exception") or state.get("status") in ("failed", "running"):
            first = cell.source.strip().splitlines()[0] if cell.source.strip() else ""
            return f", cell {number} ({first})"
    return ""


def _reason(error: Exception) -> str:
    if hasattr(error, "ename"):
        return f"{error.ename}: {error.evalue}"
    return f"{type(error).__name__}: {str(error).strip()}"


def execute_all(notebooks: Iterable[Path], folder, jobs: int | None = None) -> list[Path]:
    """Run every notebook with its defaults into ``folder``, ``jobs`` at a time (default: one a core).

    Prints one line for each. All of them run; if any failed, NotebookFailed then names each of them.
    """
    notebooks, folder, failures = [Path(p) for p in notebooks], Path(folder), []
    os.environ.update(ONE_THREAD)
    start = time.perf_counter()
    # Threads, not processes: the work is in the kernels.
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        runs = {pool.submit(execute, path, folder / path.name): path for path in notebooks}
        for run in as_completed(runs):
            error, path = run.exception(), runs[run]
            print(
                f"  {path.name}: {'FAILED' if error else 'done'} after {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            if error:
                failures.append(error)
    if failures:
        raise NotebookFailed("\n".join(map(str, failures))) from failures[0]
    return [folder / path.name for path in notebooks]


def strip(notebook) -> nbformat.NotebookNode:
    """``notebook`` without what changes from run to run: timings, machine paths, the kernel's version.

    In place. Tags, cell ids, outputs and the figures' alternative texts stay.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        }
    )
    for cell in notebook.cells:
        for key in ("papermill", "execution", "collapsed", "ExecuteTime"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
    return notebook


def with_install(notebook, url: str, branch: str = "main") -> nbformat.NotebookNode:
    """``notebook`` with a first code cell that finds or installs the library; without one while ``url`` is empty.

    In place. The cell is made from the book's configuration, so that the address stands in one file only.
    """
    notebook.cells = [cell for cell in notebook.cells if COLAB not in cell.metadata.get("tags", ())]
    if url:
        source = (
            "from importlib.util import find_spec\n\n"
            'if find_spec("cl_lib") is None:\n'
            f"    %pip install --quiet git+{url}@{branch}\n"
            f'    print("cl_lib was installed from {url}")\n'
            "else:\n"
            '    print("cl_lib is installed")'
        )
        cell = nbformat.v4.new_code_cell(source, id=COLAB, metadata={"tags": [COLAB, "remove-cell"]})
        notebook.cells.insert(next(i for i, c in enumerate(notebook.cells) if c.cell_type == "code"), cell)
    return notebook


def write(notebook, path) -> None:
    """Write ``notebook`` to ``path`` whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    nbformat.write(notebook, temporary)
    temporary.replace(path)


def add_arguments(parser) -> None:
    """The arguments of the ``notebook`` command, for an argparse parser."""
    parser.add_argument("notebook", help="the notebook to run, for example notebooks/01_scenarios_and_metrics.ipynb")
    parser.add_argument("output", nargs="?", help="where to write the executed copy (default: results/<its name>)")
    parser.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter; repeat for more",
    )
    parser.add_argument("--list", action="store_true", help="print the notebook's parameters and their defaults")


def command(arguments) -> int:
    """Carry out the ``notebook`` command with parsed arguments; returns the exit status. Raises InputError."""
    if arguments.list:
        for name, default in parameters(read(arguments.notebook)).items():
            print(f"{name} = {default!r}")
        return 0
    output = arguments.output or Path("results") / Path(arguments.notebook).name
    try:
        execute(
            arguments.notebook,
            output,
            {name: parse(value) for name, value in arguments.parameter},
            progress=sys.stderr.isatty(),
        )
    except NotebookFailed as error:
        print(f"{error}\nWhat ran is in {output}.", file=sys.stderr)
        return 1
    print(output)
    return 0
