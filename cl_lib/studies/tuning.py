"""The ``tune`` command: a searched study of one method in one line, whose best settings are kept for ``run --best``."""

from pathlib import Path

from cl_lib import bounds, search
from cl_lib.data import kinds
from cl_lib.errors import InputError
from cl_lib.results.table import name_of
from cl_lib.studies import best
from cl_lib.studies.cells import Machine, MethodCell, Study
from cl_lib.studies.runner import search_ranges
from cl_lib.studies.spaces import serving, space
from cl_lib.studies.store import Store

SCENARIOS = ("task", "domain", "class")


def add_arguments(parser) -> None:
    """The arguments of the ``tune`` command, for an argparse parser."""
    parser.usage = "%(prog)s METHOD|all [NAME=VALUE …] [options]"
    parser.add_argument("method", metavar="METHOD", help="of `methods`, or all; ranges are in studies/spaces.py")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="a setting of method, training or stream")
    parser.add_argument("--dataset", default="digits", help=f"{', '.join(kinds.NAMES)} (default: digits)")
    parser.add_argument("--stream", default="split", help=f"{', '.join(kinds.KINDS)} (default: split)")
    parser.add_argument("--scenario", default=None, help="task, domain, class, or all (default: the stream's)")
    parser.add_argument("--trials", type=int, default=50, help="how many, the same for every method (default: 50)")
    parser.add_argument("--tasks", type=int, default=3, help="the first so many are learned (default: 3)")
    parser.add_argument("--validation", type=float, default=0.2, help="share of the training images (default: 0.2)")
    parser.add_argument("--seed", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--out", default="results", metavar="DIR", help="where trials are kept (default: results)")
    parser.add_argument("--best", metavar="DIR", help=f"where what was found is written (default: {best.FOLDER})")
    parser.add_argument("--data", metavar="DIR", help="where data sets lie (default: $CL_DATA, else data/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")


def command(arguments) -> int:
    """Carry out the ``tune`` command with parsed arguments; returns the exit status. Raises InputError."""
    settings = dict(_setting(word) for word in arguments.settings)
    source = {"dataset": arguments.dataset, "stream": arguments.stream}
    usual = kinds.options_of(arguments.stream)["scenario"].default
    scenarios = SCENARIOS if arguments.scenario == "all" else (arguments.scenario or usual,)
    how = {name: getattr(arguments, name) for name in ("trials", "tasks", "validation", "seed")}
    for name in ("trials", "tasks"):
        if how[name] < 1:
            raise InputError(f"--{name} {how[name]} must be a whole number, 1 or more.")
    machine, failed = Machine(arguments.device, arguments.data), []
    for scenario in scenarios:
        for method in serving(scenario) if arguments.method == "all" else [arguments.method]:
            cell = MethodCell({**source, "scenario": scenario, "method": method, **space(method), **settings})
            cell.check()
            try:
                entry = tune(cell, how, arguments.out, machine)
            except InputError as error:  # of the whole search; what one trial says is told by it
                failed.append(f"{method}, {scenario}-incremental: {error}")
                continue
            place = best.file_of(f"{arguments.stream}-{arguments.dataset}", arguments.best)
            best.write(place, f"{arguments.stream}-{arguments.dataset}", scenario, method, entry)
            found = " ".join(f"{name}={value}" for name, value in entry["settings"].items())
            score = f"held out {entry['score']:.3f}, {entry['trials']} trials, {entry['pruned']} given up"
            print(f"{method}, {scenario}-incremental: {found}  {score}: {place}", flush=True)
    if failed:
        raise InputError("\n".join(failed))
    return 0


def tune(cell: MethodCell, how: dict, out, machine: Machine) -> dict:
    """Search a cell's ranges, as far as that is not done yet; what :mod:`cl_lib.studies.best` keeps of it.

    Raises InputError where no trial came to its end.
    """
    dataset, stream = cell.settings["dataset"], cell.settings.get("stream", "split")
    store = Store(Study(Path("tune"), f"{stream}-{dataset}", (cell,), search=how), out)
    store.files.ready()
    with store.files.claim(store.label(cell), wait=True):
        chosen = search_ranges(store, cell, how, machine)
        found = search.record(str(store.files.workshop / store.journal(cell)), name_of(cell.settings), "maximize")
    _, _, about, others = cell.parts({})
    about = {name: value for name, value in about.items() if name != "scenario"}
    fixed = {name: value for name, value in others.items() if name not in cell.ranges}
    told = {name: part for name, part in (("fixed", fixed), ("stream", about)) if part}
    score = round(found.pop("score"), 5)
    return {"settings": chosen, **told, "score": score, **found, "command": _told(cell, how, fixed | about)}


def _told(cell: MethodCell, how: dict, fixed: dict) -> str:
    """The command that searched."""
    own = [f"{name}={str(value).replace(' ', '')}" for name, value in fixed.items()]
    about = {name: cell.settings.get(name, "split") for name in ("dataset", "stream", "scenario")} | how
    options = [f"--{name} {value}" for name, value in about.items() if (name, value) != ("stream", "split")]
    return " ".join(["python -m cl_lib tune", cell.settings["method"], *own, *options])


def _setting(word: str) -> tuple[str, object]:
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise InputError(f"{word!r} is not of the form name=value, such as epochs=3.")
    return name, bounds.literal(text)
