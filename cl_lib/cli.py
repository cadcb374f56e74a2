"""``python -m cl_lib``: list methods, run one, compare several, run a chapter."""

import argparse
import ast
import json
import sys

import pandas as pd

from cl_lib.data import datasets, streams
from cl_lib.errors import Diverged, InputError, suggest
from cl_lib.methods._base import SCENARIOS
from cl_lib.methods._registry import described, parameter_names, registry
from cl_lib.report import notebooks
from cl_lib.results.result import Result
from cl_lib.studies import grids
from cl_lib.training.options import Options
from cl_lib.training.runs import run

STREAMS = {"split": "split", "permuted": "permuted", "rotated": "rotated", "shifted": "shifted"}
EXAMPLES = """\
examples:
  python -m cl_lib methods
  python -m cl_lib run ewc --set strength=300 --scenario domain --seeds 3
  python -m cl_lib compare finetune er joint --dataset mnist --epochs 1 --seeds 5 --jobs 2 --figure er.png
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m cl_lib",
        description="Continual learning, derived and reproduced.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser("methods", help="list every method and its parameters", allow_abbrev=False)
    listing.add_argument("--json", action="store_true", help="as JSON: key, family, scenarios, citation, parameters")

    one = commands.add_parser(
        "run",
        help="train one method on a stream of tasks and measure it",
        allow_abbrev=False,
        epilog="example: python -m cl_lib run er --set memory=500 --dataset mnist --epochs 1",
    )
    one.add_argument("method", metavar="METHOD", help="a key from `python -m cl_lib methods`")
    many = commands.add_parser(
        "compare",
        help="the same for several methods, in one table",
        allow_abbrev=False,
        epilog="example: python -m cl_lib compare finetune ewc er --set ewc.strength=300 er.memory=500",
    )
    many.add_argument("methods", metavar="METHOD", nargs="+", help="keys from `python -m cl_lib methods`")
    for command in (one, many):
        add_run_options(command)

    notebook = commands.add_parser(
        "notebook",
        help="run a chapter with your own parameters",
        allow_abbrev=False,
        epilog="example: python -m cl_lib notebook notebooks/02_deriving_forgetting.ipynb -p seeds 5",
    )
    notebooks.add_arguments(notebook)

    study = commands.add_parser(
        "study",
        help="run the experiments that a file describes",
        allow_abbrev=False,
        epilog="example: python -m cl_lib study notebooks/experiments/recl.yaml hosts --seeds 1",
    )
    grids.add_arguments(study)
    return top


def add_run_options(command: argparse.ArgumentParser) -> None:
    default = {f: Options.__dataclass_fields__[f].default for f in Options.__dataclass_fields__}

    data = command.add_argument_group("the stream of tasks")
    data.add_argument("--dataset", default="digits", help=f"one of {', '.join(datasets.NAMES)} (default: digits)")
    data.add_argument("--stream", default="split", help="split, permuted, rotated or shifted (default: split)")
    data.add_argument("--scenario", help="task, domain or class (default: class for split, domain otherwise)")
    data.add_argument("--tasks", type=int, help="how many tasks (default: 5 split, 10 permuted)")
    data.add_argument("--first", type=int, help="split: classes in a larger first task")
    data.add_argument("--order", help="split: fixed, per-seed, or the classes in order, such as 3,1,4,0,…")
    data.add_argument("--per-class", type=int, help="training images a class (default: all)")
    data.add_argument("--normalise", help="standard, centre or none (default: standard)")
    data.add_argument("--validation", type=float, help="share of the training images kept for validation")
    data.add_argument("--augment", action="store_true", help="random crops and flips")
    data.add_argument(
        "--data", metavar="DIR", help="where data sets lie (default: $CL_DATA, else data/ of the checkout)"
    )

    how = command.add_argument_group("training")
    how.add_argument("--seeds", default="1", help="how many (5 means 0 to 4), or which: 3,4 (default: 1)")
    how.add_argument("--network", default=default["network"], help="mlp, cnn, homogeneous_mlp, alexnet, resnet18, …")
    how.add_argument("--hidden", default="100,100", help="widths of the mlp's hidden layers (default: 100,100)")
    how.add_argument("--epochs", type=int, default=default["epochs"], help="passes over a task (default: %(default)s)")
    how.add_argument("--batch-size", type=int, default=default["batch_size"], help="(default: %(default)s)")
    how.add_argument("--lr", type=float, default=default["lr"], help="learning rate (default: %(default)s)")
    how.add_argument("--optimizer", default=default["optimizer"], help="sgd, adam or adamw (default: sgd)")
    how.add_argument("--momentum", type=float, default=default["momentum"], help="of sgd (default: %(default)s)")
    how.add_argument("--weight-decay", type=float, default=default["weight_decay"], help="(default: %(default)s)")
    how.add_argument("--schedule", help="cosine: the learning rate falls to 0 within each task")
    how.add_argument("--clip", type=float, help="bound on the gradient's norm")
    how.add_argument(
        "--loss-over",
        default=default["loss_over"],
        help="rows that the class-incremental loss sees: seen, present or all (default: seen)",
    )
    how.add_argument("--dtype", default=default["dtype"], help="float32, float64 or bfloat16 (default: float32)")
    how.add_argument("--patience", type=int, help="epochs without a better validation accuracy before a seed stops")
    how.add_argument(
        "--on-divergence", default=default["on_divergence"], help="raise, or drop the seed (default: raise)"
    )
    how.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="parameters of the method, such as strength=300; one of several methods: ewc.strength=300",
    )

    where = command.add_argument_group("where and how")
    where.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    where.add_argument(
        "--seeds-at-once", type=int, help="seeds stacked on the device (default: all on CUDA, 1 on a CPU)"
    )
    where.add_argument("--jobs", type=int, default=1, help="processes that share the seeds (default: 1)")
    where.add_argument("--out", default="results", metavar="DIR", help="where results are kept (default: results)")
    where.add_argument("--fresh", action="store_true", help="run again what has already finished there")
    where.add_argument("--figure", metavar="FILE", help="draw the accuracy over the tasks: .png, .svg or .pdf")
    where.add_argument("--traceback", action="store_true", help="show the whole stack trace of an error")


def make_stream(args) -> streams.Stream:
    if args.stream not in STREAMS:
        raise suggest(args.stream, STREAMS, "stream")
    scenario = args.scenario or ("class" if args.stream == "split" else "domain")
    if scenario not in SCENARIOS:
        raise suggest(scenario, SCENARIOS, "scenario")
    names = ["tasks", "per_class", "normalise", "validation", "augment"]
    only_split = ["first", "order"]
    asked = {n: getattr(args, n) for n in names + only_split}
    given = {n: value for n, value in asked.items() if value is not None and value is not False}  # 0 was asked for
    for name in only_split:
        if name in given and args.stream != "split":
            raise InputError(f"--{name} belongs to --stream split; leave it out for {args.stream}.")
    if isinstance(given.get("order"), str) and given["order"] not in ("fixed", "per-seed"):
        given["order"] = numbers(given["order"], "--order")
    if args.stream == "shifted" and "tasks" in given:
        raise InputError("--tasks does not apply to --stream shifted: its tasks are clean, rotated and noisy.")
    return getattr(streams, args.stream)(datasets.load(args.dataset, root=args.data), scenario=scenario, **given)


def numbers(text: str, what: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise InputError(f"{what} {text!r} is not a list of whole numbers such as 3,4.") from None


def seeds_of(text: str) -> tuple[int, ...]:
    """``5`` means seeds 0 to 4, ``3,4`` or ``3,`` names them."""
    given = numbers(text, "--seeds")
    if "," in text:
        return tuple(given)
    if not given or given[0] < 1:
        raise InputError(f"--seeds {text} names no seed: give how many, 1 or more, or a list such as 3,4.")
    return tuple(range(given[0]))


def settings(pairs: list[str], keys: list[str]) -> dict[str, dict]:
    """Parameters of each method from ``key.name=value``, for one, or ``name=value``, for all that have it."""
    out: dict[str, dict] = {key: {} for key in keys}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--set {pair!r} is not of the form name=value, such as strength=300.")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        owner, dot, rest = name.partition(".")
        if dot and owner in out:
            out[owner][rest] = value
            continue
        having = [key for key in keys if name in (own := parameter_names(key)) or (owner == "host" and "host" in own)]
        if not having:
            known = [
                *(
                    parameter_names(keys[0])
                    if len(keys) == 1
                    else (f"{k}.{n}" for k in keys for n in parameter_names(k))
                )
            ]
            raise suggest(name, known, f"parameter of {' or '.join(keys)}")
        for key in having:
            out[key][name] = value
    return out


def table(results: list[Result]) -> str:
    """One line a method: mean ± std over the seeds."""
    rows = {}
    for result in results:
        summary = result.summary()
        columns = {"accuracy": "acc", "backward transfer": "bwt", "forgetting": "forgetting"}
        columns["learning accuracy"] = "learning_accuracy"
        rows[result.method] = {title: spread(summary.loc[metric]) for title, metric in columns.items()}
        rows[result.method]["seconds"] = f"{sum(result.seconds.values()):.1f}"
        rows[result.method]["stored"] = f"{result.stored_bytes['total'] / 1e6:.2f} MB"
    return pd.DataFrame(rows).T.to_string()


def spread(metric: pd.Series) -> str:
    text = f"{metric['mean']:.3f} ± {metric['std']:.3f}" if metric["n"] > 1 else f"{metric['mean']:.3f}"
    return "–" if "nan" in text else text


def execute(args) -> None:
    keys = [args.method] if args.command == "run" else args.methods
    for part in "+".join(keys).split("+"):
        if part not in registry():
            raise suggest(part, registry(), "method")
    own = settings(args.set, keys)
    stream = make_stream(args)
    options = {
        name: getattr(args, name)
        for name in (
            "network",
            "epochs",
            "batch_size",
            "lr",
            "optimizer",
            "momentum",
            "weight_decay",
            "schedule",
            "clip",
            "loss_over",
            "dtype",
            "patience",
            "on_divergence",
            "device",
            "seeds_at_once",
            "jobs",
            "out",
            "fresh",
        )
    }
    options |= {"hidden": tuple(numbers(args.hidden, "--hidden")), "seeds": seeds_of(args.seeds)}
    results = [run(key, stream, **options, **own[key]) for key in keys]

    print(stream)
    if args.command == "run":
        mean = results[0].R.mean(0)
        print("\naccuracy on task (column) after learning task (row), mean over seeds")
        print(pd.DataFrame(mean).map("{:.3f}".format).to_string())
    print(f"\n{table(results)}\n\nsaved in {args.out}")
    if args.figure:
        draw(results, args.figure)


def draw(results: list[Result], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from cl_lib.report import plotting

    axes = plotting.curves(results)
    try:
        axes.figure.savefig(path, dpi=200, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise InputError(
            f"--figure {path} cannot be written ({error}): choose another place, or .png, .svg, .pdf."
        ) from None
    print(f"drawn in {path}")


def list_methods(as_json: bool) -> None:
    known = described()
    if as_json:
        print(json.dumps(known, indent=2, default=str))
        return
    for entry in known:
        print(f"{entry['key']:<10} {entry['family']:<16} {' '.join(entry['scenarios'])}")
        print(f"{'':<10} {entry['citation']}")
        parameters = "  ".join(f"{k}={v}" for k, v in entry["parameters"].items())
        print(f"{'':<10} {parameters}\n" if parameters else "")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a run that failed, 2 bad input."""
    args = parser().parse_args(argv)
    try:
        if args.command == "notebook":
            return notebooks.command(args)
        if args.command == "study":
            return grids.command(args)
        if args.command == "methods":
            list_methods(args.json)
        else:
            execute(args)
        return 0
    except Exception as error:
        if getattr(args, "traceback", False):
            raise
        expected = isinstance(error, InputError | Diverged | OSError | RuntimeError)
        what = error if expected else f"{type(error).__name__}: {error} (--traceback shows where)"
        print(f"\nerror: {what}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("\nstopped; finished tasks are kept, the same command goes on from there", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
