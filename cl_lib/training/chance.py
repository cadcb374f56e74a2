"""The random numbers of a learner: each seed draws from streams of its own, one for each purpose."""

import torch

from cl_lib.seeds import Bag, Draws, generator, keys

PURPOSES = ("order", "augment", "method")


class Chance:
    """Generators on the CPU for what happens once in a while, and draws on the device for what a step does.

    Whoever asks for another purpose gets a stream of its own, as it would have been from the start.
    """

    def __init__(self, seeds: tuple[int, ...], device: torch.device):
        self.seeds, self.device = seeds, device
        self.keys, self.counts = {}, Bag()
        self.generators: dict[str, list[torch.Generator]] = {}
        for purpose in PURPOSES:
            self.random(purpose)

    def random(self, purpose: str) -> list[torch.Generator]:
        """One generator a seed."""
        if purpose not in self.generators:
            self.generators[purpose] = [generator(seed, purpose) for seed in self.seeds]
        return self.generators[purpose]

    def draws(self, positions, purpose: str) -> Draws:
        """Numbers for the seeds at ``positions`` at once."""
        if purpose not in self.keys:
            self.keys[purpose] = keys(self.seeds, purpose, self.device)
            self.counts.setdefault(purpose, torch.zeros_like(self.keys[purpose]))
        return Draws(self.keys[purpose], self.counts[purpose], positions)

    def state_dict(self) -> Bag:
        """Where every stream stands: ``random``, the generators' states ``[S, …]``, and ``counts`` ``[S]``."""
        random = {k: torch.stack([g.get_state() for g in every]) for k, every in self.generators.items()}
        return Bag(random=Bag(random), counts=Bag({k: v.clone() for k, v in self.counts.items()}))

    def load_state_dict(self, kept: Bag) -> None:
        """Put every stream back to where it stood, in place; one that was not there yet, to its start."""
        random, counts = kept.random, kept.get("counts", Bag())
        for purpose in {**self.generators, **random}:
            states = random.get(purpose)
            for i, own in enumerate(self.random(purpose)):
                start = generator(self.seeds[i], purpose).get_state()
                own.set_state(start if states is None else states[i].cpu().clone())  # a row is not enough for it
        for purpose in {**self.counts, **counts}:
            own = self.draws((0,), purpose).counts
            own.copy_(counts[purpose]) if purpose in counts else own.zero_()
