"""Where files of studies are: a folder that any number of processes see, or what fsspec reaches, ``s3://bucket/path``.

A claim on a folder is a lock of the system's and ends with its holder; over a network file system it holds as that
system's locks do. An object store has no locks: a claim there is an object that only one can make, which its holder
renews, and which is nobody's once it is ``LEASE`` seconds old. Two who find such a left one at one moment may both
take it: a run is then done twice, with the same numbers under the same name, and none is lost.
"""

import contextlib
import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from cl_lib.errors import InputError
from cl_lib.files import claimed, replacing, writable

LEASE = 120.0  # seconds after which a claim that is not renewed is nobody's


def place(path) -> "Folder | Bucket":
    """The place of a path or a URL."""
    remote = "://" in str(path) and not str(path).startswith("file://")
    return Bucket(str(path)) if remote else Folder(Path(str(path).removeprefix("file://")).absolute())


class Folder:
    """A folder of this machine, or one that several machines mount."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def below(self, name: str) -> "Folder":
        return Folder(self.path / name)

    def names(self) -> set[str]:
        """The files that are there."""
        with contextlib.suppress(FileNotFoundError):
            return {entry.name for entry in os.scandir(self.path)}
        return set()

    def read(self, name: str) -> bytes | None:
        """A file, None where there is none."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InputError(f"{self.path / name} cannot be read ({error.strerror}): mend it.") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all. Raises InputError where that cannot be."""
        with replacing(self.path / name) as temporary:
            temporary.write_bytes(data)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def ready(self) -> None:
        """Make sure that it can be written to. Raises InputError where it cannot."""
        writable(self.path)

    def claim(self, name: str, wait: bool = False) -> contextlib.AbstractContextManager[bool]:
        """Whether this process alone may do what has this name, see :func:`cl_lib.files.claimed`."""
        return claimed(self.path / f".{name}.claim", wait)

    def claims(self) -> set[str]:
        """What processes are at, as far as their claims tell."""
        return {name[1:-6] for name in self.names() if name.startswith(".") and name.endswith(".claim")}

    @property
    def workshop(self) -> Path:
        """Where runs write and keep checkpoints: the folder itself."""
        return self.path

    def fetch(self, name: str) -> None:
        """Bring a file to the workshop, where it is already."""

    def keep(self, name: str) -> None:
        """Bring a file from the workshop, where it stays."""


class Bucket:
    """A prefix of an object store, or of any other file system of fsspec's."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # the driver's package, or no such protocol
            raise InputError(f"{url} cannot be reached ({error}): install what it names, or give a folder.") from error

    def __str__(self) -> str:
        return self.url

    def __reduce__(self):
        return Bucket, (self.url,)

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def below(self, name: str) -> "Bucket":
        return Bucket(f"{self.url}/{name}")

    def names(self) -> set[str]:
        self.system.invalidate_cache()
        try:
            return {path.rpartition("/")[2] for path in self.system.ls(self.root, detail=False)}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes | None:
        try:
            return self.system.cat_file(self._at(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error

    def write(self, name: str, data: bytes, **how) -> None:
        try:
            self.system.makedirs(self.root, exist_ok=True)
            self.system.pipe_file(self._at(name), data, **how)
        except FileExistsError:
            raise
        except OSError as error:
            raise self._unusable(error) from error

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._at(name))

    def ready(self) -> None:
        self.write(".writable", b"")
        self.remove(".writable")

    def _unusable(self, error) -> InputError:
        return InputError(f"{self.url} cannot be used ({error}): check the address and the right to write there.")

    @contextlib.contextmanager
    def claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether this process alone may do what has this name, as long as it renews its lease."""
        file, holder = f".{name}.claim", uuid.uuid4().hex
        lease = lambda: json.dumps({"holder": holder, "until": time.time() + LEASE}).encode()
        while not (mine := self._taken(file, lease)) and wait:
            time.sleep(min(1.0, LEASE / 4))
        if not mine:
            yield False
            return
        over = threading.Event()

        def renew():
            while not over.wait(LEASE / 4):
                with contextlib.suppress(InputError):  # the next one may come through
                    self.write(file, lease())

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield True
        finally:
            over.set()
            thread.join()
            self.remove(file)

    def _taken(self, file: str, lease) -> bool:
        try:
            self.write(file, lease(), mode="create")
            return True
        except FileExistsError:
            if not self._left(file):
                return False
        mine = lease()
        self.write(file, mine)
        time.sleep(min(1.0, LEASE / 100))  # whoever writes after us has it
        return self.read(file) == mine

    def _left(self, file: str) -> bool:
        held = self.read(file)
        return held is not None and json.loads(held)["until"] < time.time()

    def claims(self) -> set[str]:
        named = [name for name in self.names() if name.startswith(".") and name.endswith(".claim")]
        return {name[1:-6] for name in named if not self._left(name)}

    @property
    def workshop(self) -> Path:
        """A folder of this machine's: a killed run goes on from its checkpoint here, and begins anew elsewhere."""
        path = Path(tempfile.gettempdir()) / f"cl_lib-{os.getuid()}" / sha256(self.url.encode()).hexdigest()[:12]
        path.mkdir(parents=True, exist_ok=True)
        return path

    def fetch(self, name: str) -> None:
        if (data := self.read(name)) is not None:
            Folder(self.workshop).write(name, data)

    def keep(self, name: str) -> None:
        self.write(name, (self.workshop / name).read_bytes())
