"""Files that appear whole or not at all, that tell whether they were damaged, and claims that end with their holder."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cl_lib.errors import InputError

HERE = hashlib.sha256(platform.node().encode()).hexdigest()[:6]  # which machine, without its name
LEFT = 24 * 3600  # seconds after which what another machine began to write is nobody's


# --- writing ------------------------------------------------------------------------------------------------


def writable(folder) -> Path:
    """Make the folder if it is not there, sweep out what killed processes left half-written, and return it.

    Raises InputError where nothing can be written to it.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}): choose another folder.") from error
    for path in Path(folder).glob(".*.part"):
        if _left_behind(path):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return Path(folder)


@contextlib.contextmanager
def replacing(path) -> Iterator[Path]:
    """A path to write to; the file takes the place of ``path`` when the block ends well, else it is gone.

    ``with replacing("a.json") as temporary: temporary.write_text("{}")``. A kill or a full disk at any moment leaves
    what was there before. Raises InputError where the place cannot be written to.
    """
    path = Path(path)
    begun = {"prefix": f".{path.name}.{HERE}-{os.getpid()}.", "suffix": ".part", "dir": path.parent}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # in a folder of its own, for what is written may be put together from other files beside it
        with tempfile.TemporaryDirectory(**begun, ignore_cleanup_errors=True) as folder:
            temporary = Path(folder) / path.name
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask has it, which not everyone who writes keeps to
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} was not written ({reason}): free space or choose another place.") from error


def _left_behind(path: Path) -> bool:
    """Whether nobody writes any more to what :func:`replacing` made."""
    where, _, process = path.name.split(".")[-3].partition("-")  # .name.where-process.random.part
    with contextlib.suppress(OSError):
        return (where == HERE and not _alive(process)) or time.time() - path.stat().st_mtime > LEFT
    return False  # gone meanwhile


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # of another user
        pass
    return True


# --- tensors ------------------------------------------------------------------------------------------------


def write_tensors(path, tensors: dict[str, Tensor], format: str, header: dict[str, str]) -> None:
    """Write tensors on the CPU and words about them to one safetensors file, with a checksum over both.

    ``format`` says what the file holds, ``"cl_lib result"``, say. Raises InputError where it cannot be written.
    """
    tensors, header = {k: t.contiguous() for k, t in tensors.items()}, {**header, "format": f"{format} 2"}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={**header, "sha256": _checksum(tensors, header)})


def read_tensors(path, format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header that :func:`write_tensors` wrote. Raises InputError for any other file.

    Files of the first version, which have no checksum, are taken as they are.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(path, bytes):
        raise InputError(f"{path!r} is no path: give the name of a file.")
    what = format.split()[-1]
    damaged = f"{path} is no {what} saved by cl_lib, or damaged"
    with _readable(path, damaged) as file:
        header = file.metadata() or {}
        if header.get("format") not in (f"{format} 1", f"{format} 2"):
            raise InputError(f"{path} holds tensors, but not a {what} that this version can read.")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    given = header.pop("sha256", None)
    if given != _checksum(tensors, header) and (given is not None or header["format"] != f"{format} 1"):
        raise InputError(f"{damaged} (its checksum is another): delete it and run again.")
    return tensors, header


def read_header(path) -> dict[str, str]:
    """The words in a safetensors file, nothing else read. Raises InputError for any other file."""
    with _readable(path, f"{path} holds no tensors, or is damaged") as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _readable(path, damaged: str):
    if not Path(path).is_file():
        raise InputError(f"There is no file {path}.")
    try:
        open(path, "rb").close()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): ask its owner for the permission.") from error
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{damaged} ({error}): delete it and run again.") from error


def _checksum(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


# --- claims -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone may do what ``path`` stands for, until the block ends; ``wait`` makes it so.

    The claim is a lock of the system's on that file, which is let go when its holder dies, however that happens.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=wait)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before it is let go; who waits for it sees that it is gone, and makes a new one
        lock.release()
