"""What was measured before, comes with the book in ``data/results``, and is shown beside published numbers.

python -m cl_lib.report.archive    the three scenarios of Split-MNIST, as a table in Markdown
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from cl_lib.report import tables
from cl_lib.results import table

RESULTS = Path(__file__).resolve().parents[2] / "data" / "results"
SCENARIOS = ("task", "domain", "class")
#: the columns of a table of methods, by what a row of results calls them; what they cost with its unit and form
AMOUNTS = {"acc": "accuracy, %", "bwt": "backward transfer"}
COSTS = {"total_seconds": ("seconds", 1, "{:.1f}".format), "stored_bytes": ("stored, MB", 1e6, "{:.2f}".format)}
#: what a row of ours is called in Hsu et al.'s table 2: the settings that tell it
HSU = {
    "Adam": {"method": "finetune", "optimizer": "adam"},
    "SGD": {"method": "finetune", "optimizer": "sgd"},
    "EWC": {"method": "ewc", "decay": None},
    "Online EWC": {"method": "ewc", "decay": 1.0},
    "SI": {"method": "si"},
    "MAS": {"method": "mas"},
    "LwF": {"method": "lwf"},
    "Naive rehearsal": {"method": "er", "memory": 1100},
    "Naive rehearsal-C": {"method": "er", "memory": 4400},
    "GEM": {"method": "gem"},
    "DGR": {"method": "dgr", "temperature": None},
    "DGR, τ = 2": {"method": "dgr", "temperature": 2.0},
    "Joint": {"method": "joint"},
}


def study(name: str, results: Path = RESULTS, of: Iterable[dict] | None = None) -> pd.DataFrame:
    """The runs of ``<name>.json`` as :func:`cl_lib.results.table.frame` gives them; none where it was not run."""
    place = Path(results, f"{name}.json")
    return table.frame(place, of) if place.is_file() else pd.DataFrame()


def overview(name: str, label: Callable[[pd.Series], str], results: Path = RESULTS) -> pd.DataFrame:
    """A study as a page shows it: accuracy and forgetting in per cent, mean ± standard deviation, and n, by ``label``.

    Arguments:
        label: what a run (a row of :func:`study`) is called; runs of one name are seeds of one row.
    """
    runs = study(name, results)
    if not len(runs):
        return runs
    rows = runs.groupby(runs.apply(label, axis=1), sort=False)
    columns = {
        f"{name}, % ± std": rows[of].agg(tables.spread) for name, of in (("ACC", "acc"), ("forgetting", "forgetting"))
    }
    return pd.DataFrame(columns | {"n": rows.acc.count()})


def side_by_side(name: str, results: Path = RESULTS, of: Iterable[dict] | None = None) -> pd.DataFrame:
    """A study of methods as a table, the most accurate first: each what it reaches and what it takes.

    Accuracy and backward transfer in per cent, mean ± half of the 95 % interval; the seconds of a run, its training and
    its tests; MB of what a method keeps for one seed beside its network; and over how many seeds, ``4 of 5`` where one
    diverged. Of a method that diverged with every seed only that is said. Empty where nothing was run.

    Arguments:
        of: the settings of the runs that are wanted, see :func:`cl_lib.results.table.frame`.
    """
    runs = study(name, results, of)
    if not len(runs):
        return runs
    rows = runs.reindex(columns=["method", *AMOUNTS, *COSTS]).groupby("method")
    order = rows.acc.mean().sort_values(ascending=False, kind="stable").index
    columns = {title: rows[of].agg(_interval) for of, title in AMOUNTS.items()}
    columns |= {title: (rows[of].mean() / unit).map(told) for of, (title, unit, told) in COSTS.items()}
    counts = pd.DataFrame({"there": rows.acc.count(), "asked": rows.size()})
    columns["n"] = [f"{n} of {of}" if n < of else str(n) for n, of in counts.itertuples(index=False)]
    return pd.DataFrame(columns).loc[order].replace("nan", "")


def _interval(values: pd.Series) -> str:
    return tables.interval(values.dropna()) if values.notna().any() else "diverged"


def published(name: str, results: Path = RESULTS) -> pd.Series:
    """Accuracies that a paper prints, in per cent, mean ± standard deviation, by our name of the method.

    They stand in ``data/published/<name>.csv``, with the table they are from and what it was measured on.
    """
    rows = pd.read_csv(results.parent / "published" / f"{name}.csv").set_index("method")
    return rows.apply(lambda row: _printed(row["value"], row["std"]), axis=1)


def _printed(value: float, std: float) -> str:
    return f"{value:.1f} ± {std:.1f}"


def three_scenarios(results: Path = RESULTS) -> pd.DataFrame:
    """Accuracy after the last of five tasks of Split-MNIST, in per cent, beside Hsu et al. (2018, table 2).

    A row for each method, columns (scenario, "ours, n" or "Hsu et al."): mean ± standard deviation over seeds, and of
    ours their number. What was not run, or is not theirs, is empty. The protocol is that of van de Ven & Tolias
    (2019): ``notebooks/experiments/three-scenarios.yaml``.
    """
    theirs = pd.read_csv(RESULTS.parent / "published" / "hsu2018.csv").set_index(["scenario", "method"])
    cells = {}
    for scenario in SCENARIOS:
        ours = study(f"three-scenarios-{scenario}", results)
        for name, settings in HSU.items():
            own = ours[_matching(ours, settings)].acc if len(ours) else []
            printed = theirs.loc[[(scenario, name)]] if (scenario, name) in theirs.index else []
            cells.setdefault((scenario, "ours, n"), {})[name] = f"{tables.spread(own)}, {len(own)}" if len(own) else ""
            cells.setdefault((scenario, "Hsu et al."), {})[name] = (
                _printed(printed["value"].item(), printed["std"].item()) if len(printed) else ""
            )
    return pd.DataFrame(cells)


def _matching(runs: pd.DataFrame, settings: dict) -> pd.Series:
    """Which runs have these settings; None is a setting that a run does not name."""
    columns = runs.reindex(columns=list(settings))
    return pd.concat([columns[k].isna() if v is None else columns[k] == v for k, v in settings.items()], axis=1).all(
        axis=1
    )


if __name__ == "__main__":
    print(three_scenarios().to_markdown())
