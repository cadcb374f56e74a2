"""Files appear whole, tell what was damaged, are for whom the folder is; nothing half-written stays."""

import os
import random
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cl_lib import InputError, Result, files
from cl_lib.files import claimed, read_header, read_tensors, replacing, writable, write_tensors

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "number": torch.tensor(3),
    "nothing": torch.zeros(0, 4),
    "turned": torch.arange(6).view(2, 3).T,
}
FORMAT = "cl_lib result"


def test_tensors_and_words_come_back(tmp_path):
    write_tensors(tmp_path / "a", TENSORS, FORMAT, {"plain": "θ"})
    tensors, header = read_tensors(tmp_path / "a", FORMAT)
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(t, TENSORS[k]) for k, t in tensors.items())
    assert header == {"plain": "θ", "format": "cl_lib result 2"}
    assert read_header(tmp_path / "a")["plain"] == "θ"


def test_a_flipped_bit_is_noticed(tmp_path):
    write_tensors(tmp_path / "a", TENSORS, FORMAT, {"plain": "some words"})
    good, draw = (tmp_path / "a").read_bytes(), random.Random(0)
    inert = 0
    for place in [*range(8 * len(good[:8])), *(draw.randrange(64, 8 * len(good)) for _ in range(600))]:
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        (tmp_path / "b").write_bytes(bad)
        try:
            tensors, header = read_tensors(tmp_path / "b", FORMAT)
        except InputError as error:
            assert str(error).endswith((".", "again.", "read."))
            continue
        inert += 1  # white space in the header, say
        assert header == {"plain": "some words", "format": "cl_lib result 2"}
        assert all(torch.equal(t, TENSORS[k]) for k, t in tensors.items())
    assert inert < 10


def test_results_and_checkpoints_are_checked(tmp_path):
    result = Result({"method": "er"}, (0,), R=np.full((1, 2, 2), 0.5), weights={"w": torch.ones(1, 50)})
    place = result.save(tmp_path / "a")
    content = bytearray(place.read_bytes())
    content[-10] ^= 4  # within the weights
    place.write_bytes(content)
    with pytest.raises(InputError, match="its checksum is another"):
        Result.load(place)


def test_files_from_before_there_were_checksums_are_read(tmp_path):
    save_file(TENSORS | {"turned": torch.ones(1)}, tmp_path / "old", metadata={"format": "cl_lib result 1"})
    assert torch.equal(read_tensors(tmp_path / "old", FORMAT)[0]["matrix"], TENSORS["matrix"])
    save_file({"a": torch.ones(1)}, tmp_path / "new", metadata={"format": "cl_lib result 2"})
    with pytest.raises(InputError, match="its checksum is another"):
        read_tensors(tmp_path / "new", FORMAT)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_for_whom_the_umask_lets_in(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a", TENSORS, FORMAT, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    write_tensors(tmp_path / "a", TENSORS, FORMAT, {})

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\): ask its owner"):
        read_tensors(tmp_path / "a", FORMAT)


# --- what killed processes leave ---------------------------------------------------------------------------------


def left_by_a_killed_process(folder):
    """A process that dies while it writes, as safetensors does, a file beside its own."""
    script = (
        "import os, signal, sys\n"
        "from cl_lib.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    (temporary.parent / '.tmp123').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder / "a.safetensors")])
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_swept_by_the_next_start(tmp_path):
    left_by_a_killed_process(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with replacing(tmp_path / "b") as unfinished:
        writable(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [unfinished.parent.name], "what is being written stays"
        unfinished.write_text("b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_other_machines_write_is_left_for_a_day(tmp_path):
    for name in (".a.abcdef-1.x.part", ".old.safetensors.1234.part"):
        (tmp_path / name).write_text("half")
    writable(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 2 * files.LEFT,) * 2)
    writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_claim_is_one_process_s_until_it_dies(tmp_path):
    script = (
        "import sys, time\n"
        "from cl_lib.files import claimed\n"
        "with claimed(sys.argv[1]) as mine:\n"
        "    print(mine, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        with claimed(tmp_path / "c") as mine:
            assert not mine
    finally:
        process.kill()
        process.communicate()
    with claimed(tmp_path / "c") as mine:
        assert mine
    assert not list(tmp_path.iterdir())
