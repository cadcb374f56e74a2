"""``check_method`` finds what is wrong with a method, says which promise it breaks, and lets a good one pass."""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cl_lib import Bag, InputError, Method
from cl_lib.testing import PROMISES, Candidate, DoesNotApply, PromiseBroken, beats_fine_tuning, check_method

ASKED = {promise.name: promise for promise in PROMISES}


@dataclass
class Own(Method, registered=False):
    """A small penalty on the parameters: what the methods below get wrong in one way each."""

    strength: float = 0.1
    scenarios = ("domain", "class")
    neutral = {"strength": 0.0}

    def penalty(self, net, batch, state):
        return self.strength * sum(p.square().sum() for p in net.params.values()) if self.strength else 0.0


# --- one thing wrong in each ------------------------------------------------------------------------------


class NoDataclass(Own, registered=False):
    margin: float = 1.0


@dataclass
class HidesAnOption(Own, registered=False):
    lr: float = 1.0


class StrangeNames(Own, registered=False):
    neutral = {"strenght": 0.0}


class StrangeScenario(Own, registered=False):
    scenarios = "class"


class HelpsNowhere(Own, registered=False):
    helps = {"classes": {}}


class Crashes(Own, registered=False):
    def task(self, net, batch):
        return net(batch.x)[:, batch.nowhere].sum()


class ServesAll(Own, registered=False):
    def refuse_unless_served(self, scenario):
        pass


class WarnsTwice(Own, registered=False):
    poor = {"class": "it is only a test"}

    def check(self, learner):
        warnings.warn("Once more.", stacklevel=2)


class NotNeutral(Own, registered=False):
    def penalty(self, net, batch, state):
        return (self.strength + 1e-7) * sum(p.square().sum() for p in net.params.values())


class AlwaysNeutral(Own, registered=False):
    def penalty(self, net, batch, state):
        return 0.0


class DrawsGlobally(Own, registered=False):
    """Also when a task begins: between steps, the learner keeps the global generator from harm."""

    def before_task(self, net, task, state):
        return Bag(noise=torch.randn(10))

    def task(self, net, batch):
        return super().task(net, batch)

    def penalty(self, net, batch, state):
        return 0.1 * (state.noise * net(batch.x)).mean()


class DrawsFromNumpy(Own, registered=False):
    def before_step(self, learner, batch, state):
        batch.x = batch.x + float(np.random.rand())  # noqa: NPY002, the mistake


class CountsOnItself(Own, registered=False):
    steps = [0]

    def before_step(self, learner, batch, state):
        self.steps[0] += 1
        batch.x = batch.x / self.steps[0]


class AnswersFromItself(Own, registered=False):
    def after_task(self, net, task, state):
        self.last = task.index
        return state

    def predict(self, net, x, state, task):
        return net(x) if getattr(self, "last", None) else -net(x)


class KeepsAnAnchor(Own, registered=False):
    anchor = None

    def after_task(self, net, task, state):
        self.anchor = net.snapshot().params
        return state

    def penalty(self, net, batch, state):
        anchor = self.anchor or {}
        return sum(((net.params[k] - a) ** 2).sum() for k, a in anchor.items()) + 0.0


class ReadsAValue(Own, registered=False):
    def penalty(self, net, batch, state):
        return 0.1 / (1 + net(batch.x).square().mean().item())


class OneForAll(Own, registered=False):
    """Every seed gets the first one's random numbers."""

    def before_step(self, learner, batch, state):
        noise = torch.randn(batch.x.shape[1:], generator=learner.random((0,))[0])
        batch.x = batch.x + noise


class CountsForAll(Own, registered=False):
    """A seed that has stopped goes on counting with the others."""

    def start(self, learner):
        return Bag(steps=torch.zeros(len(learner.seeds)))

    def after_step(self, learner, batch, state):
        learner.state.steps += 1

    def penalty(self, net, batch, state):
        return 0.01 * state.steps * net(batch.x).square().mean()


class NamesALayer(Own, registered=False):
    def penalty(self, net, batch, state):
        return net.params["body.1.weight"].square().sum() + net.params["body.3.bias"].sum()


class RefusesConvolutions(Own, registered=False):
    def check(self, learner):
        if any(p.dim() == 5 for p in learner.params.values()):
            raise InputError("It has no use for convolutions: give it an mlp.")


class TableOfTasks(Own, registered=False):
    def start(self, learner):
        return Bag(table=torch.ones(len(learner.seeds), learner.stream.tasks))

    def penalty(self, net, batch, state):
        return 0.01 * state.table[batch.task_index] * net(batch.x).square().mean()


class KnowsItsTasks(TableOfTasks, registered=False):
    def grow(self, state, growth):
        raise InputError("Its table is made for the tasks that are known: give them all at once.")


class Forgets(Own, registered=False):
    """A longer stream makes it answer otherwise."""

    def start(self, learner):
        return Bag(sign=torch.ones(len(learner.seeds)))

    def grow(self, state, growth):
        return Bag(sign=-state.sign)

    def predict(self, net, x, state, task):
        return state.sign * net(x)


class WantsBoundaries(Own, registered=False):
    def check(self, learner):
        if not learner.stream.boundaries:
            raise InputError("It wants to know where tasks begin.")


class DoesNotHelp(Own, registered=False):
    helps = {"class": {"strength": 0.0}}


BREAKS = [
    ("declares_what_there_is", NoDataclass, {}, "margin is annotated, but it is no parameter"),
    ("declares_what_there_is", HidesAnOption, {}, "lr is a parameter and an option of training"),
    ("declares_what_there_is", StrangeNames, {}, "name strenght, which is no parameter"),
    ("declares_what_there_is", StrangeScenario, {}, "scenarios = 'class' is not a tuple"),
    ("declares_what_there_is", HelpsNowhere, {}, "helps or poor name classes"),
    ("serves_what_it_declares", Crashes, {"scenario": "class"}, "AttributeError: There is no 'nowhere' here"),
    ("serves_what_it_declares", ServesAll, {"scenario": "task"}, "does not declare task-incremental .* not refused"),
    ("warns_where_it_is_poor", WarnsTwice, {"scenario": "class"}, r"\['PoorPairing', 'UserWarning'\]"),
    ("neutral_is_fine_tuning", NotNeutral, {"scenario": "class"}, "beside fine-tuning, .* differs by up to"),
    ("neutral_is_fine_tuning", AlwaysNeutral, {"scenario": "class"}, "as it was given it is fine-tuning too"),
    ("same_seed_same_bits", DrawsGlobally, {}, "run twice, .* differs by up to"),
    ("same_seed_same_bits", CountsOnItself, {}, "run twice, .* differs by up to"),
    ("leaves_global_randomness_alone", DrawsGlobally, {}, "the generator of torch moved"),
    ("leaves_global_randomness_alone", DrawsFromNumpy, {}, "the generator of numpy moved"),
    ("stored_result_answers", AnswersFromItself, {"scenario": "class"}, r"R says [01]\.\d+, the loaded one [01]\.\d+"),
    ("resumed_is_uninterrupted", KeepsAnAnchor, {"killed_after": 0}, "uninterrupted run of seed 0, .* differs"),
    ("seed_alone_is_seed_among_others", ReadsAValue, {"scenario": "class", "at_once": 2}, "stacked = False"),
    ("seed_alone_is_seed_among_others", OneForAll, {"scenario": "class", "at_once": 3}, "beside seed 1 alone"),
    ("seeds_may_stop_early", CountsForAll, {}, r"beside seed \d alone, .* differs"),
    ("works_with_networks", NamesALayer, {"network": "cnn"}, "KeyError: 'body.1.weight'"),
    ("goes_on_when_a_task_is_appended", TableOfTasks, {"scenario": "class"}, "IndexError: index 2 is out of bounds"),
    (
        "goes_on_when_a_task_is_appended",
        Forgets,
        {"scenario": "class"},
        "when it was appended, the accuracy on task 0 differs",
    ),
    ("needs_no_boundary_or_is_refused", WantsBoundaries, {}, "though it has none of the hooks"),
    ("beats_fine_tuning", DoesNotHelp, {"scenario": "class"}, r"it errs in \d\d\.\d % of its answers, fine-tuning in"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name, kind, case, said", BREAKS, ids=[f"{b[0]}-{b[1].__name__}" for b in BREAKS])
def test_a_broken_promise_is_found_and_named(name, kind, case, said):
    with pytest.raises(PromiseBroken, match=said) as caught:
        ASKED[name](Candidate(kind), **case)
    message = str(caught.value)
    assert message.startswith(f"{kind.key} breaks a promise. {ASKED[name].sentence}")
    assert message.endswith(ASKED[name].advice) and "\n" not in message


def test_every_promise_can_be_broken():
    assert {name for name, *_ in BREAKS} == set(ASKED) - {"is_documented", "captured_is_eager"}


@pytest.mark.parametrize(
    "name, kind, case, why",
    [
        ("is_documented", Own, {}, "only the library's own"),
        ("warns_where_it_is_poor", Own, {"scenario": "class"}, "declares no `poor`"),
        ("neutral_is_fine_tuning", Own, {"scenario": "task"}, "does not serve task-incremental"),
        ("works_with_networks", RefusesConvolutions, {"network": "cnn"}, "refuses .*no use for convolutions"),
        ("goes_on_when_a_task_is_appended", KnowsItsTasks, {"scenario": "class"}, "refuses .*tasks that are known"),
        ("beats_fine_tuning", DoesNotHelp, {"scenario": "domain"}, "does not say that it helps in domain"),
        ("seeds_may_stop_early", type("Alone", (Own,), {"stacked": False}, registered=False), {}, "one after another"),
    ],
)
def test_what_says_nothing_about_a_method_is_told_apart(name, kind, case, why):
    with pytest.raises(DoesNotApply, match=why):
        ASKED[name](Candidate(kind), **case)


def test_every_promise_says_its_sentence_and_where_to_look():
    for promise in PROMISES:
        assert promise.sentence.endswith(".") and promise.advice.endswith("."), promise.name
        assert promise.sentence.count(". ") == 0, promise.name


# --- all of them ------------------------------------------------------------------------------------------


def test_a_good_method_passes_and_the_report_can_be_read():
    report = check_method(Own, quick=True, strength=0.02)
    assert report.key == "own" and report.parameters == {"strength": 0.02}
    assert {*report.kept, *report.others} == {promise.sentence for promise in PROMISES}
    text = str(report)
    assert text.startswith(f"own (strength=0.02) keeps {len(report.kept)} promises.") and repr(report) == text
    assert all(len(line) < 80 for line in text.splitlines()), "it fits a terminal"
    flat = " ".join(text.split())
    assert all(sentence in flat for sentence in report.kept)
    assert "Not asked: it declares no `helps`." in flat


def test_the_first_promise_that_is_broken_ends_it():
    with pytest.raises(PromiseBroken, match="margin is annotated"):
        check_method(NoDataclass)


def test_keys_sums_and_objects_are_checked_too():
    beats_fine_tuning("er", scenario="class")
    for method in ("finetune", Own(strength=0.5)):
        assert Candidate(method).new() is not Candidate(method).given
    candidate = Candidate("er+lwf", {"lwf.strength": 0.5, "memory": 40})
    ASKED["stored_result_answers"](candidate, scenario="class")
    ASKED["resumed_is_uninterrupted"](candidate, killed_after=0)


def test_what_cannot_be_checked_is_refused_in_a_sentence():
    with pytest.raises(InputError, match="Did you mean 'strength'"):
        check_method(Own, strenght=1.0)
    with pytest.raises(InputError, match="is not a method"):
        check_method(dict)
