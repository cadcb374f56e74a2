"""What a run measured, what it cost, where it came from, and one file to keep it in."""

import html
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cl_lib.errors import InputError
from cl_lib.files import read_tensors, write_tensors
from cl_lib.identity import provenance as provenance
from cl_lib.methods._base import Method
from cl_lib.results import answer, metrics
from cl_lib.seeds import Bag, cat_padded, flatten, hollow, unflatten

# What the file holds, and how: tensors, dicts of tensors, JSON.
ARRAYS = ("R", "baseline", "per_class", "losses")
DICTS_OF_ARRAYS = ("seconds_by_task", "curves")
PLAIN = (
    "config", "seeds", "classes", "seconds", "peak_memory", "stored_bytes", "parameters", "provenance", "rows",
    "dropped",
)  # fmt: skip
FORMAT = "cl_lib result"


@dataclass(eq=False, repr=False)
class Result:
    """S seeds of one method on a stream of T tasks with C output rows. Numpy arrays; NaN is "never measured".

    Arguments:
        config: everything that defines the run, as plain values. Read here: ``method`` (a key, or a dict with
            ``key``), ``stream`` (``Stream.config()`` and the inputs' ``shape``), ``network`` and ``hidden``.
        seeds: the seeds, in the order of every leading axis below.
        R: ``[S, T, T]``, the accuracy on task j after learning task i.
        baseline: ``[S, T]``, the accuracy of the untrained network.
        per_class: ``[S, T, C]``, the accuracy on each output row's class after each task.
        classes: the class names of the output rows, a list for each seed.
        losses: ``[S, T, E]``, the mean training loss of each epoch.
        seconds: spent in ``train``, ``task_end`` and ``evaluate``, over all seeds.
        seconds_by_task: the same for each task, ``[T]``.
        peak_memory: bytes, at most at once.
        stored_bytes: what one seed keeps between tasks besides its network: ``total``, and each part by name.
        parameters: how many numbers one network trains.
        curves: what a method measured itself, by name, ``[S, ...]``.
        provenance: see ``cl_lib.identity``.
        weights: the networks after the last task, by name, ``[S, ...]``.
        kept: what else the learner held then, nested and ``[S, ...]``: the method's ``state`` (buffers, importance,
            routers), the ``random`` numbers' states, which seeds are ``active``, and ``normalise``, the ``mean`` and
            ``std`` of the inputs. With it a result answers, and a learner goes on from it.
        rows: the output rows of each task, T lists.
        dropped: why, for each seed that training went on without.
        network: the module that takes one seed's weights, or a function that makes it. It is not saved.
        answering: the method whose answers these are. It is not saved, but made again from ``config``.
    """

    config: dict
    seeds: tuple[int, ...]
    R: np.ndarray
    baseline: np.ndarray | None = None
    per_class: np.ndarray | None = None
    classes: list[list[str]] = field(default_factory=list)
    losses: np.ndarray | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    seconds_by_task: dict[str, np.ndarray] = field(default_factory=dict)
    peak_memory: int = 0
    stored_bytes: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    kept: Bag = field(default_factory=Bag)
    rows: list[list[int]] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    network: nn.Module | Callable[[], nn.Module] | None = None
    answering: Method | None = None

    def __post_init__(self):
        try:
            self.seeds = tuple(int(seed) for seed in self.seeds)
            self.R = np.asarray(self.R, dtype=float)
        except (TypeError, ValueError) as error:
            raise InputError(f"seeds must be whole numbers and R numbers: {error}.") from None
        self.dropped = {int(seed): str(why) for seed, why in self.dropped.items()}
        S, T = len(self.seeds), self.R.shape[-1] if self.R.ndim else 0
        shapes = {"R": (S, T, T), "baseline": (S, T), "per_class": (S, T, ...), "losses": (S, T, ...)}
        for name, shape in shapes.items():
            if getattr(self, name) is None:
                setattr(self, name, np.full([0 if n is ... else n for n in shape], np.nan))
            array = np.asarray(getattr(self, name), dtype=float)
            wrong = [n for n, m in zip(shape, array.shape, strict=False) if n not in (m, ...)]
            if wrong or array.ndim != len(shape):
                wanted = ", ".join("…" if n is ... else str(n) for n in shape)
                raise InputError(f"{name} is {[*array.shape]}, but {S} seeds and {T} tasks need [{wanted}].")
            setattr(self, name, array)
        for name in DICTS_OF_ARRAYS:
            setattr(self, name, {key: np.asarray(value) for key, value in getattr(self, name).items()})

    # --- what it is --------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The method's key."""
        method = self.config.get("method", "run")
        return method["key"] if isinstance(method, dict) else str(method)

    @property
    def scenario(self) -> str | None:
        """Whether learning is "task", "domain" or "class" incremental; None where nobody said."""
        return self.stream.get("scenario")

    @property
    def stream(self) -> dict:
        """The stream's part of the configuration."""
        return self.config.get("stream", {})

    @property
    def tasks(self) -> int:
        """T."""
        return self.R.shape[-1]

    # --- numbers -----------------------------------------------------------------------------------------

    def metrics(self, reference: "Result | None" = None) -> pd.DataFrame:
        """Every metric of ``cl_lib.metrics``, one row a seed.

        ``reference`` is a joint run with the same seeds and tasks; without it ``intransigence`` is NaN.
        ``fwt`` is NaN in task- and class-incremental learning, where it is fixed by the masks rather than by
        what was learned. Raises InputError for a reference that lacks a seed or has other tasks.
        """
        others = {
            "fwt": [self.baseline if self.scenario in ("domain", None) else self.baseline * np.nan],
            "intransigence": [self.R * np.nan if reference is None else self._paired(reference)],
        }
        values = {name: getattr(metrics, name)(self.R, *others.get(name, [])) for name in metrics.NAMES}
        return pd.DataFrame(values, index=pd.Index(self.seeds, name="seed"))

    def _paired(self, reference: "Result") -> np.ndarray:
        """R of the reference, its seeds in our order."""
        lacking = [seed for seed in self.seeds if seed not in reference.seeds]
        if lacking or reference.tasks != self.tasks:
            raise InputError(
                f"The reference has {reference.tasks} tasks and seeds {list(reference.seeds)}, this result "
                f"has {self.tasks} and {list(self.seeds)}: run joint on the same stream with these seeds."
            )
        return reference.R[[reference.seeds.index(seed) for seed in self.seeds]]

    def summary(self, reference: "Result | None" = None) -> pd.DataFrame:
        """Mean, std, 95 % interval (``low`` to ``high``) and number of seeds ``n``, one row a metric."""
        frame = self.metrics(reference)
        return pd.DataFrame(metrics.summary(frame)._asdict(), index=pd.Index(frame.columns, name="metric"))

    def frame(self, reference: "Result | None" = None) -> pd.DataFrame:
        """Everything measured, one number a row: ``method, quantity, seed, after, on, step, value``.

        ``after`` is the last task learned (−1: the untrained network) and ``on`` the task tested. ``step`` is
        the epoch of a ``loss``, the output row of a ``class_accuracy``, the place in a ``curve:…``. What does
        not apply is missing; what was never measured has no row, except for metrics. ``seconds:…`` are over
        all seeds.
        """
        table = self.metrics(reference)
        parts = [
            _tidy("accuracy", self.R, "seed", "after", "on"),
            _tidy("accuracy", self.baseline, "seed", "on").assign(after=-1),
            _tidy("class_accuracy", self.per_class, "seed", "after", "step"),
            _tidy("loss", self.losses, "seed", "after", "step"),
            *(_tidy(f"curve:{k}", v.reshape(len(v), -1), "seed", "step") for k, v in self.curves.items()),
            *(_tidy(f"seconds:{k}", v, "after") for k, v in self.seconds_by_task.items()),
            table.reset_index(drop=True).rename_axis("seed").reset_index().melt("seed", var_name="quantity"),
        ]
        columns = ["method", "quantity", "seed", "after", "on", "step", "value"]
        frame = pd.concat([part for part in parts if len(part)], ignore_index=True).assign(method=self.method)
        frame["seed"] = frame["seed"].map(dict(enumerate(self.seeds)))
        return frame.reindex(columns=columns).astype(dict.fromkeys(("seed", "after", "on", "step"), "Int64"))

    def lost(self) -> str:
        """Which seeds are in no mean, and why, as a sentence; empty where all are in it."""
        bare = {s: "it was not measured" for s, R in zip(self.seeds, self.R, strict=True) if np.isnan(R[-1]).all()}
        if not (out := bare | self.dropped):
            return ""
        n, why = len(self.seeds) - len(out), "; ".join(f"seed {s}: {out[s]}" for s in self.seeds if s in out)
        return f"n = {n} of {len(self.seeds)} seeds, dropped {why}"

    # --- networks ----------------------------------------------------------------------------------------

    def model(self, seed: int, network: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
        """The network of one seed after the last task, in evaluation mode, on the CPU, on its own.

        It gives logits, which are not every method's answer: :meth:`predict` gives that.

        ``network`` is a module that can take the weights, or a function that makes one. It is needed only for
        a result that was loaded from a file and whose network was not one of ``cl_lib.nets.networks`` as it is.
        Raises InputError for a seed that was not run, and where no module can be made.
        """
        return answer.model(self, seed, network)

    def scores(self, x, seed: int, task: int | None = None, *, method=None, network=None) -> Tensor:
        """The method's scores ``[n, C]``, −∞ on rows that the scenario rules out; the arg-max is the answer.

        Arguments as in :meth:`predict`.
        """
        return answer.scores(self, x, seed, task, method=method, network=network)

    def predict(self, x, seed: int, task: int | None = None, *, method=None, network=None) -> Tensor:
        """The output rows ``[n]`` that the method answers after the last task, as they were counted in R.

        ``self.classes[i][row]`` names the class of an output row for the i-th seed.

        Arguments:
            x: inputs as the network meets them, ``[n, …]`` (``stream.batch`` makes them), or images as uint8, which
                are normalised as the run's were; a view (a permutation, a rotation) is the data's own matter.
            seed: whose network and state answer.
            task: the task of the inputs; needed in task-incremental learning, and of no use elsewhere.
            method: the method, where it was a class of your own and the result came from a file.
            network: the network, in the same case, as for :meth:`model`.

        Raises InputError for a seed or task that was not run, and where the method or its state is not at hand.
        """
        return self.scores(x, seed, task, method=method, network=network).argmax(-1)

    # --- files and groups --------------------------------------------------------------------------------

    def save(self, path) -> Path:
        """Write everything but ``network`` to one safetensors file, plain values as JSON in its header.

        The file appears whole or not at all: it is written beside its place and then renamed. Raises
        InputError where it cannot be written; a file that was there before is then untouched.
        """
        arrays = {name: getattr(self, name) for name in ARRAYS}
        arrays |= {f"{group}/{k}": v for group in DICTS_OF_ARRAYS for k, v in getattr(self, group).items()}
        tensors = {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}
        tensors |= {f"weights/{name}": w.detach().cpu().contiguous() for name, w in self.weights.items()}
        tensors |= {f"kept/{name}": t.detach().cpu().contiguous() for name, t in flatten(self.kept)}
        values = {name: getattr(self, name) for name in PLAIN} | {"empty": list(hollow(self.kept))}
        write_tensors(path, tensors, FORMAT, {"plain": json.dumps(values, default=_plain)})
        return Path(path)

    @classmethod
    def load(cls, path) -> "Result":
        """Read what ``save`` wrote. Raises InputError for any other file, and for one that was damaged since."""
        tensors, header = read_tensors(path, FORMAT)
        try:
            plain = json.loads(header["plain"])
            empty = plain.pop("empty", ())
            groups = {group: {} for group in (*DICTS_OF_ARRAYS, "weights", "kept")}
            for group, _, name in (key.partition("/") for key in tensors if "/" in key):
                tensor = tensors[f"{group}/{name}"]
                groups[group][name] = tensor.numpy() if group in DICTS_OF_ARRAYS else tensor
            groups["kept"] = unflatten(groups["kept"], empty)
            return cls(**{name: tensors[name].numpy() for name in ARRAYS}, **plain, **groups)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path} is no result saved by cl_lib, or damaged: delete it and run again.") from error

    @classmethod
    def join(cls, results: "list[Result]", seeds: tuple[int, ...] | None = None) -> "Result":
        """One result from groups of seeds that ran apart, ordered as ``seeds`` (default: as given).

        Seconds are added, peak memory is the largest. Raises InputError where runs differ or a seed is there
        twice.
        """
        first, *others = results
        for other in others:
            both = {**first.config, **other.config}
            if differing := [name for name in both if first.config.get(name) != other.config.get(name)]:
                raise InputError(f"These runs differ in {', '.join(differing)}: join only groups of seeds.")
        there = [seed for result in results for seed in result.seeds]
        seeds = tuple(there if seeds is None else seeds)
        if sorted(seeds) != sorted(there) or len(set(seeds)) != len(seeds):
            raise InputError(f"Seeds {list(seeds)} are asked for, {there} are there: each is needed once.")
        order = [there.index(seed) for seed in seeds]
        alike = lambda group: {k: [getattr(r, group)[k] for r in results] for k in getattr(first, group)}
        names = [rows for result in results for rows in result.classes]
        by_path = [dict(flatten(result.kept)) for result in results]  # in whatever order a file has them
        kept = {path: [tensors[path] for tensors in by_path] for path in by_path[0]}
        return cls(
            config=first.config,
            seeds=seeds,
            **{name: _concatenate([getattr(r, name) for r in results])[order] for name in ARRAYS},
            classes=[names[i] for i in order] if len(names) == len(order) else names,
            seconds={key: sum(values) for key, values in alike("seconds").items()},
            seconds_by_task={key: sum(values) for key, values in alike("seconds_by_task").items()},
            peak_memory=max(r.peak_memory for r in results),
            stored_bytes={key: max(values) for key, values in alike("stored_bytes").items()},
            parameters=first.parameters,
            curves={key: _concatenate(values)[order] for key, values in alike("curves").items()},
            provenance=first.provenance,
            weights={key: torch.cat(values)[order] for key, values in alike("weights").items()},
            kept=unflatten({path: cat_padded(ts)[order] for path, ts in kept.items()}, hollow(first.kept)),
            rows=first.rows,
            dropped={seed: why for result in results for seed, why in result.dropped.items()},
            network=first.network,
            answering=first.answering,
        )

    # --- for people --------------------------------------------------------------------------------------

    def _lines(self) -> tuple[str, list[tuple[str, str]]]:
        plural = lambda n, word: f"{n} {word}" + "s" * (n != 1)
        scenario = self.scenario and f"{self.scenario}-incremental"
        size = plural(self.tasks, "task"), plural(len(self.seeds), "seed")
        title = " · ".join(part for part in (self.method, self.stream.get("stream"), scenario, *size) if part)
        table = 100 * self.summary()
        names = {"ACC": "acc", "BWT": "bwt", "forgetting": "forgetting"}
        return title, [(name, _percent(*table.loc[row, ["mean", "std"]])) for name, row in names.items()]

    def __repr__(self) -> str:
        title, rows = self._lines()
        return "\n".join([title, *(f"  {name:<11}{value:>14}" for name, value in rows), *filter(None, [self.lost()])])

    def _repr_html_(self) -> str:
        title, rows = self._lines()
        cells = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
        caption = f"<caption>{html.escape(title)}</caption>"
        left = f'<tr><td colspan="2">{html.escape(self.lost())}</td></tr>' if self.lost() else ""
        return f'<table class="dataframe result">{caption}<tbody>{cells}{left}</tbody></table>'


def _percent(mean: float, std: float) -> str:
    if np.isnan(mean):
        return "–"
    return f"{mean:.1f} %".replace("-", "−") + ("" if np.isnan(std) else f" ± {std:.1f}")


def _tidy(quantity: str, values: np.ndarray, *axes: str) -> pd.DataFrame:
    """One row for each number that was measured, with its place on each axis."""
    where = np.argwhere(~np.isnan(values))
    return pd.DataFrame(where, columns=list(axes)).assign(quantity=quantity, value=values[tuple(where.T)])


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    """Along the seeds, the shorter ones filled up with NaN (not all need train for equally many epochs)."""
    shape = np.max([array.shape[1:] for array in arrays], axis=0)
    if all(array.shape[1:] == tuple(shape) for array in arrays):
        return np.concatenate(arrays)
    filled = [np.full((len(array), *shape), np.nan) for array in arrays]
    for whole, array in zip(filled, arrays, strict=True):
        whole[tuple(slice(n) for n in array.shape)] = array
    return np.concatenate(filled)


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    raise InputError(f"{value!r} cannot be saved: config and provenance hold text, numbers, lists and dicts.")
