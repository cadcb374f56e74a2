"""Continual learning, derived and reproduced: a thin, fast library beneath the book."""

from cl_lib import methods
from cl_lib.claims import claim, collect
from cl_lib.datasets import Dataset, load
from cl_lib.errors import Diverged, InputError, PoorPairing
from cl_lib.learner import Learner
from cl_lib.method import Method
from cl_lib.options import Options
from cl_lib.results import Result, Tracker
from cl_lib.runs import run
from cl_lib.streams import Stream, from_datasets, permuted, rotated, shifted, split

__all__ = [
    "Dataset", "Diverged", "InputError", "Learner", "Method", "Options", "PoorPairing", "Result", "Stream", "Tracker",
    "claim", "collect", "from_datasets", "load", "methods", "permuted", "rotated", "run", "shifted", "split",
]
