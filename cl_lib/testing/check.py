"""All promises at once."""

import textwrap
from dataclasses import dataclass

from cl_lib.testing.promise import PROMISES, Candidate, DoesNotApply


@dataclass(frozen=True)
class Report:
    """Which promises a method keeps, and which say nothing about it: sentence -> why. Print it."""

    key: str
    parameters: dict
    kept: tuple[str, ...]
    others: dict[str, str]

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.parameters.items())
        title = f"{self.key}{f' ({given})' * bool(given)} keeps {len(self.kept)} promises."
        lines = [f"kept  {sentence}" for sentence in self.kept]
        lines += [f"–     {sentence} Not asked: {why}." for sentence, why in self.others.items()]
        wrap = lambda line, indent: textwrap.fill(line, 79, subsequent_indent=indent, break_on_hyphens=False)
        return "\n".join([wrap(title, "  "), *(wrap(line, " " * 6) for line in lines)])

    __repr__ = __str__


def check_method(method, /, quick: bool = False, **parameters) -> Report:
    """Hold a method to every promise; returns which it keeps and which do not apply to it.

    Arguments:
        method: a class derived from :class:`~cl_lib.methods._base.Method`, or what else ``cl_lib.run`` takes for one.
        quick: ask every promise in one case instead of in all (scenarios, seeds at once, networks).
        **parameters: those of the method, at which it is to be checked.

    Raises:
        PromiseBroken: at the first promise that the method does not keep.
        InputError: for parameters that the method does not have.
    """
    candidate = Candidate(method, parameters)
    kept, others = [], {}
    for one in PROMISES:
        applied, reasons = 0, []
        for case in one.cases:
            if quick and applied:
                break
            try:
                one(candidate, **case)
                applied += 1
            except DoesNotApply as reason:
                reasons.append(str(reason))
        if applied:
            kept.append(one.sentence)
        else:
            others[one.sentence] = "; ".join(dict.fromkeys(reasons))
    return Report(candidate.key, candidate.given.parameters(), tuple(kept), others)
