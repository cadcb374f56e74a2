"""Continual learning, derived and reproduced: a thin, fast library beneath the book."""

from cl_lib import methods, testing
from cl_lib.data.datasets import Dataset, load
from cl_lib.data.streams import Stream, from_datasets, permuted, rotated, shifted, split
from cl_lib.errors import Diverged, InputError, PoorPairing
from cl_lib.methods._base import Method
from cl_lib.report.claims import claim, collect
from cl_lib.results import metrics
from cl_lib.results.result import Result
from cl_lib.results.tracker import Tracker
from cl_lib.seeds import Bag
from cl_lib.studies.best import best
from cl_lib.training.callbacks import Callback
from cl_lib.training.learner import Learner
from cl_lib.training.options import Options
from cl_lib.training.runs import run

__all__ = [
    "Bag",
    "Callback",
    "Dataset",
    "Diverged",
    "InputError",
    "Learner",
    "Method",
    "Options",
    "PoorPairing",
    "Result",
    "Stream",
    "Tracker",
    "best",
    "claim",
    "collect",
    "from_datasets",
    "load",
    "methods",
    "metrics",
    "permuted",
    "rotated",
    "run",
    "shifted",
    "split",
    "testing",
]
