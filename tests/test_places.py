"""Where files of studies are: a folder, or an object store, here the one that fsspec keeps in memory."""

import json
import threading
import time
import uuid

import pytest

import cl_lib
from cl_lib import places
from cl_lib.cli import main
from cl_lib.places import Bucket, Folder, place
from cl_lib.results.table import read_rows
from cl_lib.studies import frame
from cl_lib.studies.cells import MethodCell
from cl_lib.studies.runner import run_study

STUDIES = """
common: {dataset: digits, per_class: 4, epochs: 1, hidden: [8], tasks: 2}
studies:
  small: {seeds: 2, methods: [{method: finetune}, {method: er, memory: 20}]}
  searched: {search: {trials: 3, validation: 0.25}, methods: [{method: finetune, lr: {log: [1.0e-3, 0.1]}}]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(STUDIES, "utf-8")
    return path


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path / "machine"))
    return f"memory://{uuid.uuid4().hex}"


def rows(path):
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in read_rows(path)]


@pytest.mark.parametrize("name", ["small", "searched"])
def test_a_study_in_an_object_store_is_as_one_in_a_folder(file, url, tmp_path, name):
    there, told = run_study(file, name, f"{url}/deep", report=str), []
    assert there == f"{url}/deep/some-{name}.json"
    assert rows(there) == rows(run_study(file, name, tmp_path / "here", report=str))
    files = Bucket(f"{url}/deep/some-{name}")
    assert not [name for name in files.names() if name.startswith(".")], "claims go"
    for row in read_rows(there):
        (tmp_path / "kept").write_bytes(files.read(row["file"]))
        assert cl_lib.Result.load(tmp_path / "kept").seeds == (row["seed"],)
    assert len(frame(there)) == len(rows(there))
    run_study(file, name, f"{url}/deep", report=told.append)
    assert len(told) == 1 and "are in" in told[0]


def test_a_killed_search_goes_on_on_another_machine(file, url, tmp_path, monkeypatch):
    whole = rows(run_study(file, "searched", tmp_path / "here", report=str))
    real, calls = MethodCell.held_out, []

    def dying(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(MethodCell, "held_out", dying)
    with pytest.raises(KeyboardInterrupt):
        run_study(file, "searched", url, report=str)
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path / "another"))
    assert rows(run_study(file, "searched", url, report=str)) == whole
    assert len(calls) == 3 + 1, "two trials were there, and one was due"


def test_one_holds_a_claim_and_a_dead_ones_is_taken_over(url, monkeypatch):
    one, other = Bucket(url), Bucket(url)
    with one.claim("a") as mine, other.claim("a") as theirs, other.claim("b") as another:
        assert (mine, theirs, another) == (True, False, True) and one.claims() == {"a", "b"}
    assert one.claims() == set() == one.names()
    one.write(".a.claim", json.dumps({"holder": "dead", "until": time.time() - 1}).encode())
    assert one.claims() == set()
    with one.claim("a") as mine, other.claim("a") as theirs:
        assert (mine, theirs) == (True, False)
    monkeypatch.setattr(places, "LEASE", 0.4)
    with one.claim("a"):
        time.sleep(1.0)
        with other.claim("a") as theirs:
            assert not theirs, "a holder that lives renews it"


def test_who_waits_for_a_claim_gets_it(url):
    one, order = Bucket(url), []

    def second():
        with Bucket(url).claim("a", wait=True) as mine:
            order.append(("second", mine))

    thread = threading.Thread(target=second)
    with one.claim("a"):
        thread.start()
        time.sleep(0.2)
        order.append(("first", True))
    thread.join(20)
    assert order == [("first", True), ("second", True)]


def test_what_is_no_place_is_told(file, tmp_path, capsys):
    assert main(["study", str(file), "small", "--out", "nowhere://x"]) == 2
    assert "nowhere://x cannot be reached" in capsys.readouterr().err
    (tmp_path / "taken").write_text("")
    assert main(["study", str(file), "small", "--out", str(tmp_path / "taken")]) == 2
    assert isinstance(place(f"file://{tmp_path}"), Folder) and place(f"file://{tmp_path}").path == tmp_path
