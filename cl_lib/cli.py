"""``python -m cl_lib``: list methods, run one, compare several, run a chapter or a study.

The options stand where they are defined and are read from there: training in ``Options``, a stream's in the function
that makes it, where and how in ``Execution``.
"""

import argparse
import importlib
import json
import os
import sys
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

import pandas as pd

from cl_lib import bounds, signatures
from cl_lib.data import kinds
from cl_lib.errors import Diverged, InputError, nearest, suggest
from cl_lib.extras import missing
from cl_lib.files import writable
from cl_lib.methods._registry import described, find, parameter_names
from cl_lib.naming import is_named, resolve
from cl_lib.results import metrics
from cl_lib.results.result import Result
from cl_lib.signatures import Option
from cl_lib.training.options import Options
from cl_lib.training.request import Execution, check_seeds, separate
from cl_lib.training.runs import run

COMMANDS = {
    "methods": "list every method and its parameters",
    "run": "train one method on a stream of tasks and measure it",
    "compare": "the same for several methods, in one table",
    "notebook": "run a chapter with your own parameters",
    "study": "run the experiments that a file describes",
    "tune": "search a method's settings on held-out images, for run --best",
    "doctor": "check what this machine computes on, and that the fast way gives the plain one's numbers",
}
ELSEWHERE = {  # what they need is imported only where they are called
    "notebook": "cl_lib.report.notebooks",
    "study": "cl_lib.studies.command",
    "tune": "cl_lib.studies.tuning",
    "doctor": "cl_lib.training.doctor",
}
EXAMPLES = {
    "": "methods | run ewc strength=300 --scenario domain --seeds 3 | compare finetune er joint --figure er.png",
    "run": "run er memory=500 --dataset mnist --epochs 1 | run ./my_method.py:MyMethod --scenario task",
    "compare": "compare finetune er joint --seeds 5 --jobs 2 | compare er memory=50 er memory=500 er memory=500 lr=0.1",
    "notebook": "notebook notebooks/02_deriving_forgetting.ipynb -p seeds 5",
    "study": "study notebooks/experiments/recl.yaml hosts --seeds 1",
    "tune": "tune ewc --dataset digits --scenario domain --trials 12 | tune er memory=50 epochs=3 --trials 20",
    "doctor": "doctor | doctor --device cuda:1",
}
FIGURES = (".png", ".svg", ".pdf")


# --- what can be asked ------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that refuses in a sentence, as everything here does."""

    def error(self, message: str):
        raise InputError(f"{self.prog}: {message} (--help lists what there is).")

    def parse_known_args(self, args=None, namespace=None):
        parsed, left = super().parse_known_args(args, namespace)
        if left and left[0].startswith("-"):
            near = nearest(left[0], self._option_string_actions)
            raise InputError(f"{left[0]} is no option of `{self.prog}`.{near} --help lists them.")
        if left:
            raise InputError(f"{left[0]!r} comes after the options of `{self.prog}`: put it before them.")
        return parsed, left


def parser(words: list[str] | None = None) -> argparse.ArgumentParser:
    """The parser for a command line: of its command and stream where ``words`` are given, else of all."""
    top = _parser(Parser, "", prog="python -m cl_lib", description="Continual learning, derived and reproduced.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    each = {name: _parser(commands.add_parser, name, help=about) for name, about in COMMANDS.items()}
    each["methods"].add_argument("--json", action="store_true", help="as JSON: key, family, scenarios, parameters, …")
    for name, dots, about in (("run", "", "a method"), ("compare", " METHOD …", "methods")):
        each[name].usage = f"%(prog)s METHOD [NAME=VALUE …]{dots} [options]"
        text = f"{about} of `methods`, or module:Name; then its own settings, such as memory=50 lr=0.1"
        each[name].add_argument("rows", metavar="METHOD", nargs="+", help=text)
        _add_run_options(each[name], _stream_in(words or []))
    for name, module in ELSEWHERE.items():
        if words is None or name in words[:1]:
            importlib.import_module(module).add_arguments(each[name])
    for command in each.values():
        command.add_argument("--traceback", action="store_true", help="show the whole stack trace of an error")
    return top


def _parser(make, name: str, **more) -> argparse.ArgumentParser:
    lines = "\n".join(f"  python -m cl_lib {example}" for example in EXAMPLES.get(name, "methods").split(" | "))
    about = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": f"examples:\n{lines}", **more}
    return make(*[name] * bool(name), allow_abbrev=False, **about)


def _add_run_options(command: argparse.ArgumentParser, kind: str) -> None:
    data = command.add_argument_group("the stream of tasks")
    known = ", ".join(kinds.KINDS)
    data.add_argument("--dataset", default=SUPPRESS, help=f"{', '.join(kinds.NAMES)}, or module:name (default: digits)")
    data.add_argument("--stream", default="split", help=f"{known}, or module:name (default: split)")
    for of in _stream_options(kind).values():
        first, told = next(iter(of.values())), {k: _told(option.default) for k, option in of.items()}
        only = "" if len(of) in (1, len(kinds.KINDS)) and kind in of else f"{', '.join(of)}: "
        alike = len(set(told.values())) == 1
        _add(data, first, only, None if alike else ", ".join(f"{d} for {k}" for k, d in told.items() if d))
    data.add_argument(
        "--data",
        metavar="DIR",
        help="where data sets lie (default: $CL_DATA, else data/ of the checkout or the user's cache)",
    )

    how = command.add_argument_group("training")
    how.add_argument("--seeds", default="1", help="how many (5 means 0 to 4), or which: 3,4 (default: 1)")
    for option in signatures.options(Options).values():
        _add(how, option)
    how.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="parameters of all methods that have them; of one of several: ewc.strength=300",
    )

    how.add_argument("--best", action="store_true", help="the best settings that `tune` found, where none are given")

    where = command.add_argument_group("where and how")
    for option in signatures.options(Execution).values():
        _add(where, option, default="results" if option.name == "out" else None)
    where.add_argument("--figure", metavar="FILE", help=f"draw the accuracy over the tasks: {', '.join(FIGURES)}")


def _stream_options(kind: str) -> dict[str, dict[str, Option]]:
    own = {} if kind in kinds.KINDS else {name: {kind: option} for name, option in kinds.options_of(kind).items()}
    return {**kinds.all_options(), **own}


def _add(group, option: Option, before: str = "", default: str | None = None) -> None:
    """An option of the command line; one that is not given is not in the parsed arguments."""
    flag, types = "--" + option.name.replace("_", "-"), {kind for kind, _ in bounds.kinds(option.hint)}
    default = _told(option.default) if default is None else default
    allowed = "" if str in types else bounds.describe(option.hint, typed=True)
    notes = "; ".join(filter(None, (allowed, default and f"default: {default}")))
    about = f"{before}{option.help} ({notes})".replace(" ()", "").replace("%", "%%")
    if types == {bool} and not option.default:
        how = {"action": "store_true"}
    elif types <= {bool, type(None)}:
        how = {"action": argparse.BooleanOptionalAction}
    elif bool in types:
        how = {"nargs": "?", "const": "True", "metavar": "module:name"}
    else:
        how = {"metavar": "N" if int in types else "X" if float in types else "…"}
    group.add_argument(flag, default=SUPPRESS, help=about, **how)


def _told(default) -> str:
    if isinstance(default, list | tuple):
        return ",".join(map(str, default))
    return "" if default is None or default is False else str(default)


def _stream_in(words: list[str]) -> str:
    """The kind of stream that a command line names: what else it may say depends on it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--stream", nargs="?", default="split")
    return first.parse_known_args(words)[0].stream or "split"


# --- what was asked ---------------------------------------------------------------------------------------


def value_of(text: str, hint=Any):
    """What a word of the command line stands for; ``module:name`` where the hint allows no word is what it names."""
    value = bounds.read(text, hint)
    return resolve(text) if value == text and is_named(text) and not bounds.allows(hint, text) else value


def given(args, options: dict[str, Option]) -> dict[str, Any]:
    """What the command line says about some options, those that it does not mention left out."""
    asked = {name: getattr(args, name) for name in options if hasattr(args, name)}
    return {name: value_of(v, options[name].hint) if isinstance(v, str) else v for name, v in asked.items()}


def rows(words: list[str], everywhere: list[str] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Methods and their settings from words such as ``er memory=50 er memory=500 finetune``.

    ``everywhere`` are settings for every method that has them, or ``er.memory=50`` for one.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for word in words:
        if "=" not in word:
            find_all(word)
            found.append((word, {}))
        elif not found:
            raise InputError(f"{word!r} comes before any method: name the method first, such as er {word}.")
        else:
            name, value = setting(word, [found[-1][0]])
            found[-1][1][name] = value
    methods = [method for method, _ in found]
    for word in everywhere:
        name, value = setting(word, methods)
        owner, dot, rest = name.partition(".")
        concerned = [row for row in found if dot and row[0] == owner]
        name = rest if concerned else name
        having = [row for row in found if name in (n := parameter_names(row[0])) or (owner == "host" and "host" in n)]
        if not concerned and not having:
            names = [
                n if len(set(methods)) == 1 else f"{m}.{n}" for m in dict.fromkeys(methods) for n in parameter_names(m)
            ]
            raise suggest(name, names, f"parameter of {' or '.join(dict.fromkeys(methods))}")
        for _, settings in concerned or having:
            settings.setdefault(name, value)
    return found


def setting(word: str, methods: list[str]) -> tuple[str, Any]:
    """Name and value from ``name=value``, read as the first of the methods that has such a parameter says."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise InputError(f"{word!r} is not of the form name=value, such as strength=300.")
    last = name.rpartition(".")[2]
    hints = [bounds.hints(cls) for method in methods for cls in find_all(method)] + [bounds.hints(Options)]
    return name, value_of(text, next((own[last] for own in hints if last in own), Any))


def find_all(method: str) -> list[type]:
    """The classes of a method, of each part of a sum."""
    found = map(find, method.split("+"))
    return [one if isinstance(one, type) else type(one) for one in found]


def labels(asked: list[tuple[str, dict]], keys: list[str]) -> list[str]:
    """A name for each row: its method's key, with its settings where the same method has several rows."""
    told = [" ".join([key, *(f"{k}={v}" for k, v in s.items())]) for key, (_, s) in zip(keys, asked, strict=True)]
    names = [key if keys.count(key) == 1 else text for key, text in zip(keys, told, strict=True)]
    if twice := [name for name in names if names.count(name) > 1]:
        key = twice[0].split()[0]
        raise InputError(
            f"{twice[0]} is asked for twice: give one of them another setting, as in {key} lr=0.01 {key} lr=0.1."
        )
    return names


# --- running and telling ----------------------------------------------------------------------------------


def execute(args) -> None:
    """``run`` and ``compare``. Whatever can be refused is refused before any data are read."""
    asked = rows(args.rows, args.set)
    if args.command == "run" and len(asked) > 1:
        raise InputError(f"run trains one method, and these are {len(asked)}: use compare.")
    how = {"out": "results"} | given(args, signatures.options(Execution))
    Execution(**how)
    seeds, training = check_seeds(bounds.read(args.seeds)), given(args, signatures.options(Options))
    found = [best_of(method, args) if args.best else {} for method, _ in asked]
    made = [separate(m, best | training | settings) for (m, settings), best in zip(asked, found, strict=True)]
    names = labels(asked, [method.key for method, _ in made])
    if args.figure:
        check_figure(Path(args.figure))

    told = given(args, {name: next(iter(of.values())) for name, of in _stream_options(args.stream).items()})
    stream = kinds.make_stream(args.stream, getattr(args, "dataset", None), args.data, **told)
    results = {
        name: run(method, stream, seeds=seeds, **how, **vars(options))
        for name, (method, options) in zip(names, made, strict=True)
    }
    print(stream)
    if args.command == "run":
        found = metrics.summary(next(iter(results.values())).R)
        print(f"\naccuracy on task (column) after learning task (row), mean over seeds, n = {found.n[-1, 0]}")
        print(pd.DataFrame(found.mean).map("{:.3f}".format).to_string())
    print(f"\n{table(results)}\n\n{caption(results)}\nsaved in {how['out']}")
    if args.figure:
        draw(results, args.figure)


def best_of(method: str, args) -> dict:
    """The best settings known of a method on the stream that was asked for, which is said."""
    from cl_lib.studies import best

    if is_named(args.stream) or is_named(getattr(args, "dataset", "")):
        raise InputError("--best knows the library's own streams and data sets: give the settings of yours.")
    usual = kinds.options_of(args.stream)["scenario"].default
    stream, scenario = f"{args.stream}-{getattr(args, 'dataset', 'digits')}", getattr(args, "scenario", usual)
    entry, place = best.entry_of(method, stream, scenario)
    found = best.settings_of(entry)
    told = " ".join(f"{name}={value}" for name, value in found.items())
    print(f"best settings of {method}: {told}, {entry['trials']} trials, held out {entry['score']:.3f} ({place})")
    return found


def table(results: dict[str, Result]) -> str:
    """One line a result: mean ± std over its seeds."""
    shown = {"accuracy": "acc", "backward transfer": "bwt", "forgetting": "forgetting"}
    shown["learning accuracy"] = "learning_accuracy"
    lines = {}
    for name, result in results.items():
        summary = result.summary()
        lines[name] = {title: spread(summary.loc[metric]) for title, metric in shown.items()}
        lines[name]["n"] = f"{summary.loc['acc', 'n']:.0f}"
        lines[name]["seconds"] = f"{sum(result.seconds.values()):.1f}"
        lines[name]["stored"] = f"{result.stored_bytes['total'] / 1e6:.2f} MB"
    return pd.DataFrame(lines).T.to_string()


def caption(results: dict[str, Result]) -> str:
    """What the table's numbers are, and which seeds are not in them."""
    seeds = next(iter(results.values())).seeds
    n = len(seeds)
    told = [f"mean ± standard deviation over n = {n} seeds" if n > 1 else f"n = 1, seed {seeds[0]}: no ±"]
    told.append("seconds: of all seeds together; stored: what the method keeps for one seed beside its network")
    for name, result in results.items():
        if lost := result.lost():
            told.append(f"{name}: {lost}")
    return "\n".join(told)


def spread(metric: pd.Series) -> str:
    text = f"{metric['mean']:.3f} ± {metric['std']:.3f}" if metric["n"] > 1 else f"{metric['mean']:.3f}"
    return "–" if "nan" in text else text


def check_figure(path: Path) -> None:
    """Refuse a place where no figure can be drawn, before anything runs."""
    if path.is_dir() or path.suffix not in FIGURES:
        raise InputError(f"--figure {path} is no file to draw to: give a name that ends in {' or '.join(FIGURES)}.")
    writable(path.parent)


def draw(results: dict[str, Result], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from cl_lib.report import plotting

    axes = plotting.curves(results)
    try:
        axes.figure.savefig(path, dpi=200, bbox_inches="tight")
    except OSError as error:
        raise InputError(f"--figure {path} cannot be written ({error}): choose another place.") from None
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
    words = list(sys.argv[1:] if argv is None else argv)
    command = next(iter(words), "")
    try:
        if command and not command.startswith("-") and command not in COMMANDS:
            raise suggest(command, COMMANDS, "command")
        args = parser(words).parse_args(words)
        if command in ELSEWHERE:
            return importlib.import_module(ELSEWHERE[command]).command(args)
        if command == "methods":
            list_methods(args.json)
        else:
            execute(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # who reads what we print has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            error = missing(error, f"`python -m cl_lib {command}`") or error
        if "--traceback" in words:
            raise
        expected = isinstance(error, InputError | Diverged | OSError | RuntimeError)
        what = error if expected else f"{type(error).__name__}: {error} (--traceback shows where)"
        print(f"error: {what}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("\nstopped; finished tasks are kept, the same command goes on from there", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
