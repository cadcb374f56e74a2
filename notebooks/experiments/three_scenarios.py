"""The three-scenario protocol beside Hsu et al. (2018), as a table.

python notebooks/experiments/three_scenarios.py [data/results]
"""

import csv
import sys
from pathlib import Path

import numpy as np
from cl_lib.studies import frame

HERE = Path(__file__).resolve().parents[2] / "data"
SCENARIOS = ("task", "domain", "class")
# what a row of ours is called in Hsu et al.'s table 2: settings that tell it
NAMES = {
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


def ours(folder: Path) -> dict:
    """Final average accuracies in per cent by (name, scenario)."""
    found = {}
    for scenario in SCENARIOS:
        path = folder / f"three-scenarios-{scenario}.json"
        if not path.exists():
            continue
        for row in frame(path).to_dict("records"):
            value = lambda key, row=row: (
                None if row.get(key) != row.get(key) else row.get(key)
            )
            for name, wanted in NAMES.items():
                if all(value(key) == of for key, of in wanted.items()):
                    found.setdefault((name, scenario), []).append(
                        100 * row["acc"]
                    )
    return found


def theirs() -> dict:
    """Mean and standard deviation over ten runs by (name, scenario)."""
    with open(HERE / "published" / "hsu2018.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        (
            r["method"],
            r["scenario"],
        ): f"{float(r['value']):.1f} ± {float(r['std']):.1f}"
        for r in rows
    }


def told(values) -> str:
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread} ({len(values)})"


def table(folder: Path) -> str:
    """Ours (n) and Hsu et al.'s, a method a line."""
    here, there = ours(folder), theirs()
    columns = [f"{who} {s}" for s in SCENARIOS for who in ("ours", "Hsu")]
    lines = [
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in NAMES:
        cells = []
        for s in SCENARIOS:
            values = here.get((name, s))
            cells += [told(values) if values else "", there.get((name, s), "")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"))
