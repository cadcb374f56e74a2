"""A search ends with the same settings however often it was killed and whoever else searches."""

import multiprocessing
import os
import time

import pytest

from cl_lib.search import optimise, study_of

RANGES = {"rate": {"log": (1e-4, 1.0)}, "width": {"between": (10, 500)}}
TRIALS = 7


def value(settings):
    return (settings["rate"] - 0.1) ** 2 + settings["width"] / 500


def searched(place, trials=TRIALS, objective=value):
    return optimise(objective, RANGES, trials, str(place), "some", "minimize")


def tried(place, *states):
    trials = study_of(str(place), "some", "minimize").get_trials(deepcopy=False)
    return [trial.params for trial in trials if trial.state.name in (states or ("COMPLETE", "PRUNED"))]


def search_and_die(place, after):
    calls = []

    def dying(settings):
        calls.append(settings)
        if len(calls) > after:
            os._exit(9)  # as a kill: nothing is told to anybody
        return value(settings)

    searched(place, objective=dying)


def search_slowly(place, found):
    def slow(settings):
        time.sleep(0.1)
        return value(settings)

    found.put(searched(place, objective=slow))


def apart(function, *arguments):
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_search_ends_as_an_uninterrupted_one(tmp_path, after):
    whole = searched(tmp_path / "whole")
    process = apart(search_and_die, tmp_path / "killed", after)
    process.join(60)
    assert process.exitcode == 9 and len(tried(tmp_path / "killed", "RUNNING")) == 1
    assert searched(tmp_path / "killed") == whole
    assert tried(tmp_path / "killed") == tried(tmp_path / "whole")


def test_two_processes_search_together_what_one_would(tmp_path):
    whole = searched(tmp_path / "whole")
    found = multiprocessing.get_context("spawn").Queue()
    both = [apart(search_slowly, tmp_path / "both", found) for _ in range(2)]
    assert [found.get(timeout=60) for _ in both] == [whole, whole]
    for process in both:
        process.join(60)
    assert tried(tmp_path / "both") == tried(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "both"}, "claims go when the search is over"


def test_a_search_goes_on_after_a_full_disk(tmp_path):
    whole = searched(tmp_path / "whole")
    kept = (tmp_path / "whole").read_bytes()
    for share in (0.3, 0.7):
        (tmp_path / "cut").write_bytes(kept[: int(share * len(kept))])
        assert not (tmp_path / "cut").read_bytes().endswith(b"\n")
        assert searched(tmp_path / "cut") == whole
        assert tried(tmp_path / "cut") == tried(tmp_path / "whole")
