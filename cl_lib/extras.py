"""Packages that only some of the library needs: what is said where one is not installed."""

from cl_lib.errors import InputError

#: import name -> the package, and the extra of ``pyproject.toml`` that brings it.
EXTRAS = {
    "papermill": ("papermill", "notebooks"),
    "nbformat": ("nbformat", "notebooks"),
    "ipykernel": ("ipykernel", "notebooks"),
    "yaml": ("PyYAML", "studies"),
    "optuna": ("optuna", "studies"),
    "torchmetrics": ("torchmetrics", "studies"),
    "pyarrow": ("pyarrow", "parquet"),
    "ray": ("ray", "ray"),
    "distributed": ("dask[distributed]", "dask"),
    "s3fs": ("s3fs", "s3"),
}


def missing(error: ModuleNotFoundError, what: str) -> InputError | None:
    """The sentence for a package of an extra that ``what`` needed and did not find; None for any other module."""
    package, extra = EXTRAS.get((error.name or "").partition(".")[0], (None, None))
    if package is None:
        return None
    return InputError(
        f"{what} needs {package}, which is not installed: pip install {package}, or install cl_lib with its extra "
        f"{extra!r}, cl_lib[{extra}]."
    )
