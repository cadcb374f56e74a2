"""Which bugs would no test notice? ``make mutants`` puts small ones into the methods, one at a time, and tells.

A mutant is a file with one operator, comparison, number, argument or statement changed. It is killed if one of the
tests that run the changed line fails. First all tests of the rooms run once and are watched (again with --watch); then
a random sample of mutants, the same for the same --seed, is tried, each on the quickest of its tests, as many as
--limit seconds hold. What only speaks or describes is left alone: docstrings, errors, warnings, citations, defaults.

    python tests/mutants.py --count 200 --rooms methods replay
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
ROOMS = {"methods": ["tests/methods"], "replay": ["tests/replay", "tests/methods"], "curvature": ["tests/curvature"]}
KEPT = HERE / ".mutants.json"  # what each test runs, and for how long
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
ASIDE = {"warn", "suggest", "InputError", "warn_unless_plain", "warn_if_small", "report"}  # calls that only speak


# --- what a test runs -------------------------------------------------------------------------------------


class Watch:
    """A pytest plugin: under ``coverage`` each test is a context of its own; who passes, its seconds are kept."""

    def __init__(self):
        import coverage

        self.coverage, self.seconds, self.failed = coverage.Coverage.current(), {}, set()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        start = time.monotonic()
        self.coverage.switch_context(item.nodeid)
        yield
        self.coverage.switch_context("")
        if item.nodeid not in self.failed:
            self.seconds[item.nodeid] = round(time.monotonic() - start, 2)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.add(report.nodeid)


def watch(folders: list[str]) -> None:
    """Run all tests of the rooms once and keep which lines each of them runs."""
    import coverage

    at = [f"cl_lib/{room}/*" for room in ROOMS]
    measured = coverage.Coverage(data_file=None, include=at)
    with measured.collect():
        own = Watch()
        pytest.main(["-q", "-p", "no:cacheprovider", *folders], plugins=[own])
    data, lines = measured.get_data(), {}
    for file in data.measured_files():
        found = data.contexts_by_lineno(file)
        lines[str(Path(file).relative_to(HERE))] = {n: sorted(own.seconds.keys() & {*c}) for n, c in found.items()}
    KEPT.write_text(json.dumps({"seconds": own.seconds, "lines": lines}))
    if own.failed:
        print(f"{len(own.failed)} tests fail without any mutant and are left out.", file=sys.stderr)


# --- mutants ----------------------------------------------------------------------------------------------


def spoken(node: ast.AST) -> bool:
    """Whether a node only speaks or describes: an error, a warning, a docstring, a class's own words and defaults."""
    if isinstance(node, ast.Raise | ast.AnnAssign | ast.Import | ast.ImportFrom | ast.JoinedStr | ast.arguments):
        return True
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in ASIDE
    if isinstance(node, ast.keyword) and node.arg in ("strict", "fused"):  # changes no number
        return True
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def places(tree: ast.AST):
    """(node, changed) for all that can be changed within functions; ``changed`` makes the node another one in place."""

    def inside(node, function: bool):
        if spoken(node) or (isinstance(node, ast.If) and all(spoken(s) for s in node.body)):
            return
        function = function or isinstance(node, ast.FunctionDef | ast.Lambda)
        if function:
            yield from ((node, kind) for kind in kinds(node))
        for name, value in ast.iter_fields(node):
            if name in ("decorator_list", "annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from inside(child, function)

    yield from inside(tree, False)


def kinds(node: ast.AST) -> list[str]:
    """What can be done to a node."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        return ["operator"] if type(node.op) in OPERATORS else []
    if isinstance(node, ast.Compare):
        return ["comparison"] if type(node.ops[0]) in OPERATORS else []
    if isinstance(node, ast.UnaryOp):
        return ["sign"]
    if isinstance(node, ast.Constant):
        return ["constant"] if isinstance(node.value, bool | int | float) else []
    if isinstance(node, ast.Call):
        return ["argument"] * bool(node.keywords)
    if isinstance(node, ast.Expr):
        return ["statement"]
    return ["branch"] if isinstance(node, ast.IfExp | ast.If) else []


def change(node: ast.AST, kind: str) -> None:
    """Make a node another one, in place."""
    if kind == "operator":
        node.op = OPERATORS[type(node.op)]()
    elif kind == "comparison":
        node.ops[0] = OPERATORS[type(node.ops[0])]()
    elif kind == "sign":
        node.op, node.operand = ast.UAdd(), node.operand if not isinstance(node.op, ast.Not) else truth(node.operand)
    elif kind == "constant":
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif kind == "argument":
        node.keywords.pop()
    elif kind == "statement":
        node.value = ast.Constant(None)
    else:
        node.test = ast.UnaryOp(ast.Not(), node.test)


def truth(node: ast.AST) -> ast.AST:
    return ast.Call(ast.Name("bool", ast.Load()), [node], [])


def mutants(path: Path) -> list[tuple[int, int, str]]:
    """(number, line, kind) of every mutant of a file."""
    found = places(ast.parse(path.read_text("utf-8")))
    return [(number, node.lineno, kind) for number, (node, kind) in enumerate(found)]


def mutated(text: str, number: int) -> tuple[str, str]:
    """The source with one place changed, and in words what was changed."""
    tree = ast.parse(text)
    node, kind = list(places(tree))[number]
    before = ast.unparse(copy.deepcopy(node)).split("\n")[0]
    change(node, kind)
    ast.fix_missing_locations(tree)
    return ast.unparse(tree), f"{before}  →  {ast.unparse(node).splitlines()[0]}"


# --- trying them ------------------------------------------------------------------------------------------


def attempt(tree: Path, tests: list[str], seconds: float) -> str:
    """``killed``, ``survived`` or ``slow`` (a mutant that does not end counts as killed): what the tests say of a tree.

    In a fork, which finds torch and pytest imported already, and nothing of the library.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
            os.chdir(tree)
            sys.path[:0] = [str(tree), str(tree / "tests")]
            sys.dont_write_bytecode = True
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
        finally:
            os._exit(status)  # whatever happens: what is the parent's is not to be tidied away here
    end = time.monotonic() + 5 * seconds + 30
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "slow"


def chosen(known: dict, file: str, line: int, limit: float) -> list[str]:
    """The quickest tests that run a line, up to a limit of seconds in all."""
    tests = sorted(known["lines"].get(file, {}).get(str(line), []), key=lambda t: known["seconds"].get(t, 0))
    total, some = 0.0, []
    for test in tests:
        total += known["seconds"].get(test, 0)
        if some and total > limit:
            break
        some.append(test)
    return some


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--files", nargs="+", help="parts of the names of the files to change")
    parser.add_argument("--count", type=int, default=300, help="mutants to try, 0 for all (default: 300)")
    parser.add_argument("--limit", type=float, default=60, help="seconds of tests for one mutant (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--watch", action="store_true", help="see again what each test runs, as after changed tests")
    chosen_by = parser.parse_args()
    os.chdir(HERE)
    if chosen_by.watch or not KEPT.exists():
        folders = sorted({folder for folders in ROOMS.values() for folder in folders})
        subprocess.run([sys.executable, "-c", f"import mutants; mutants.watch({folders})"], check=True,
                       env=os.environ | {"PYTHONPATH": f"{HERE}:{HERE / 'tests'}"})  # fmt: skip
    known = json.loads(KEPT.read_text())
    import torch  # before the forks; not what pytest rewrites as it is imported

    torch.set_num_threads(1)
    every = [
        (room, path.relative_to(HERE), *mutant)
        for room in chosen_by.rooms
        for path in sorted((HERE / "cl_lib" / room).rglob("*.py"))
        if not chosen_by.files or any(part in str(path) for part in chosen_by.files)
        for mutant in mutants(path)
    ]
    some = random.Random(chosen_by.seed).sample(every, min(chosen_by.count or len(every), len(every)))
    score: dict[str, Counter] = {room: Counter() for room in chosen_by.rooms}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        for part in ("cl_lib", "tests"):
            shutil.copytree(HERE / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE / "pyproject.toml", tree)
        quick = sorted(known["seconds"], key=known["seconds"].get)[:20]
        if attempt(tree, quick, 60) != "survived":
            print("The tests fail without any mutant: watch them again with --watch.", file=sys.stderr)
            return 1
        for room, path, number, line, kind in some:
            text = (HERE / path).read_text("utf-8")
            source, words = mutated(text, number)
            (tree / path).write_text(source, "utf-8")
            tests = chosen(known, str(path), line, chosen_by.limit)
            outcome = attempt(tree, tests, sum(known["seconds"][t] for t in tests)) if tests else "unseen"
            (tree / path).write_text(text, "utf-8")
            score[room][outcome] += 1
            if outcome in ("survived", "unseen"):
                print(f"{outcome}  {path}:{line}  {kind}  {words}  [{len(tests)} tests]", flush=True)
    for room, counts in score.items():
        if total := sum(counts.values()):
            killed = counts["killed"] + counts["slow"]
            print(f"{room}: {killed} of {total} killed ({killed / total:.0%}), of {sum(e[0] == room for e in every)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
