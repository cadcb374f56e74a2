"""What every method promises, as functions: the library's own tests run these, and so can you, on your own class.

::

    print(cl_lib.testing.check_method(MyMethod, strength=3.0))
    cl_lib.testing.beats_fine_tuning(MyMethod, scenario="class")  # one of them alone

A promise is held on small streams of ``digits``. Its docstring says it in a sentence; the rest of the docstring says
where to look when it is broken.
"""

from cl_lib.testing.check import Report, check_method
from cl_lib.testing.promise import PROMISES, Candidate, DoesNotApply, Promise, PromiseBroken
from cl_lib.testing.promises import (
    beats_fine_tuning,
    captured_is_eager,
    declares_what_there_is,
    goes_on_when_a_task_is_appended,
    is_documented,
    leaves_global_randomness_alone,
    needs_no_boundary_or_is_refused,
    neutral_is_fine_tuning,
    resumed_is_uninterrupted,
    same_seed_same_bits,
    seed_alone_is_seed_among_others,
    seeds_may_stop_early,
    serves_what_it_declares,
    stored_result_answers,
    warns_where_it_is_poor,
    works_with_networks,
)

__all__ = [
    "PROMISES",
    "Candidate",
    "DoesNotApply",
    "Promise",
    "PromiseBroken",
    "Report",
    "beats_fine_tuning",
    "captured_is_eager",
    "check_method",
    "declares_what_there_is",
    "goes_on_when_a_task_is_appended",
    "is_documented",
    "leaves_global_randomness_alone",
    "needs_no_boundary_or_is_refused",
    "neutral_is_fine_tuning",
    "resumed_is_uninterrupted",
    "same_seed_same_bits",
    "seed_alone_is_seed_among_others",
    "seeds_may_stop_early",
    "serves_what_it_declares",
    "stored_result_answers",
    "warns_where_it_is_poor",
    "works_with_networks",
]
