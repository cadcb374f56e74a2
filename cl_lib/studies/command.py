"""The ``study`` command: run what a file describes, or say what it is, what it costs and how it goes."""

from cl_lib.bounds import read as read_word
from cl_lib.errors import InputError
from cl_lib.results.table import export
from cl_lib.studies.backends import NAMES, Backend
from cl_lib.studies.cells import Machine, Study, studies, study
from cl_lib.studies.plan import plan, shown, watch
from cl_lib.studies.runner import Part, RunsFailed, run_study
from cl_lib.studies.store import Store

EVERY = 5.0  # seconds between looks at a running study


def add_arguments(parser) -> None:
    """The arguments of the ``study`` command, for an argparse parser."""
    parser.add_argument("file", help="a grid, for example notebooks/experiments/recl.yaml")
    parser.add_argument("study", nargs="*", help="which of its studies (default: all, in order)")
    parser.add_argument("--seeds", type=int, help="how many (default: as the file says)")
    parser.add_argument("--out", default="data/results", metavar="DIR", help="or s3://… (default: data/results)")
    parser.add_argument("--data", metavar="DIR", help="where data sets lie (default: $CL_DATA, else data/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--fresh", action="store_true", help="run again what other code has made")

    what = parser.add_argument_group("instead of running").add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the studies and how many runs each has")
    what.add_argument("--check", action="store_true", help="say whether all of them can be meant")
    what.add_argument("--plan", action="store_true", help="say what is to be run, how long it takes, how much memory")
    what.add_argument("--watch", action="store_true", help="show how a running study stands, from its files alone")
    what.add_argument("--collect", action="store_true", help="make the table anew, after the jobs of an array")
    parser.add_argument("--table", metavar="FILE", help="with --collect: the table also as .csv or .parquet")

    where = parser.add_argument_group("many at a time")
    where.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (default: 1)")
    where.add_argument("--backend", default="loky", help=f"{', '.join(NAMES)} (default: loky, processes here)")
    where.add_argument("--address", help="of the Ray or Dask cluster; without it one is started here")
    where.add_argument("--gpus-per-run", type=float, metavar="X", help="share of a GPU, 0.25: four runs on each")
    where.add_argument("--cell", metavar="I/N", help="only the I-th of N equal parts, for a job of an array")


def command(arguments) -> int:
    """Carry out the ``study`` command with parsed arguments; returns the exit status. Raises InputError."""
    if arguments.seeds is not None and arguments.seeds < 1:
        raise InputError(f"--seeds {arguments.seeds} must be a whole number, 1 or more.")
    backend = Backend(arguments.backend, arguments.jobs, arguments.address, arguments.gpus_per_run)
    part, known = _part(arguments.cell), studies(arguments.file, arguments.seeds)
    asked = [study(arguments.file, name, arguments.seeds) for name in arguments.study or known]
    failed = []
    for one in asked:
        print(f"{one.name}: {len(one.cells)} runs of {one.seeds} seeds. {one.about}".rstrip(), flush=True)
        if arguments.check:
            one.check()
        elif arguments.plan:
            one.check()
            table, told = plan(one, Store(one, arguments.out), Machine(arguments.device, arguments.data))
            print(f"{shown(table)}\n{told}", flush=True)
        elif arguments.watch:
            watch(one, Store(one, arguments.out), EVERY, lambda text: print(text, flush=True))
        elif arguments.collect:
            _collect(one, arguments)
        elif not arguments.list:
            try:
                print(_run(one, arguments, backend, part))
            except RunsFailed as error:
                failed.append(error)
    if failed:
        kind = InputError if all(error.expected for error in failed) else RuntimeError
        raise kind("\n".join(map(str, failed)))
    return 0


def _run(one: Study, arguments, backend: Backend, part: Part) -> str:
    return run_study(
        one.file,
        one.name,
        arguments.out,
        arguments.seeds,
        arguments.device,
        arguments.data,
        report=lambda text: print(text, flush=True),
        backend=backend,
        part=part,
        fresh=arguments.fresh,
    )


def _collect(one: Study, arguments) -> None:
    store = Store(one, arguments.out)
    table = store.collect()
    there, failures = store.rows(), store.failures()
    print(f"{sum(name in there for name in store.order)} of {len(store.order)} runs are in {table}")
    for failure in failures:
        print(f"  failed: seed {failure['seed']} {failure['run']}: {failure['error']}")
    if arguments.table:
        print(export(table, arguments.table))


def _part(text: str | None) -> Part:
    if text is None:
        return Part()
    numbers = [read_word(word, int) for word in text.split("/")]
    if len(numbers) != 2 or not all(type(number) is int for number in numbers):
        raise InputError(f"--cell {text} is no part: give I/N, such as 3/40 for the third of forty.")
    return Part(*numbers)
