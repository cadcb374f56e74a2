"""A search ends with the same settings however often it was killed and whoever else searches."""

import multiprocessing
import os
import time

import pytest

from cl_lib.search import optimise, record, study_of

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


def value_by_stages(settings, told):
    for stage in range(3):
        told(stage, value(settings) + stage)
    return value(settings) + 3


def prune_and_die(place, after):
    calls = []

    def dying(settings, told):
        calls.append(settings)
        told(0, value(settings))
        if len(calls) > after:
            os._exit(9)
        return value_by_stages(settings, told)

    optimise(dying, RANGES, 12, str(place), "some", "minimize", prune=True)


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


def test_hopeless_trials_are_given_up_and_a_killed_search_gives_up_the_same(tmp_path):
    search = lambda place: optimise(value_by_stages, RANGES, 12, str(place), "some", "minimize", prune=True)
    whole = search(tmp_path / "whole")
    given_up = tried(tmp_path / "whole", "PRUNED")
    assert 0 < len(given_up) < 8 and whole not in given_up
    found = record(str(tmp_path / "whole"), "some", "minimize")
    assert (found["trials"], found["pruned"]) == (12, len(given_up)) and found["score"] == value(whole) + 3
    process = apart(prune_and_die, tmp_path / "killed", 7)
    process.join(60)
    assert process.exitcode == 9 and search(tmp_path / "killed") == whole
    assert tried(tmp_path / "killed") == tried(tmp_path / "whole")
    assert tried(tmp_path / "killed", "PRUNED") == given_up
