"""Files that appear whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from cl_lib.errors import InputError


def writable(folder) -> Path:
    """Make the folder if it is not there, and return it. Raises InputError where nothing can be written to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}): choose another folder.") from error
    return Path(folder)


@contextlib.contextmanager
def replacing(path) -> Iterator[Path]:
    """A path to write to; the file takes the place of ``path`` when the block ends well, else it is gone.

    ``with replacing("a.safetensors") as temporary: save_file(tensors, temporary)``. A kill or a full disk at
    any moment leaves what was there before. Raises InputError where the place cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} was not written ({reason}): free space or choose another place.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
