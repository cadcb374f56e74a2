"""How a run goes and how long it still takes: a bar on a terminal, elsewhere a line at least every ten seconds."""

import multiprocessing
import sys
import time

from tqdm import tqdm

BAR = "{percentage:3.0f} % {bar:10} {remaining} left  {desc}"
LINE = "{percentage:3.0f} %  {elapsed} gone, {remaining} left  {desc}"
SECONDS = 8  # between lines where nothing can be written over; a step may take some more


def visible(asked: bool | None = None) -> bool:
    """Whether progress is shown: as asked, else everywhere but in a notebook, whose page would keep it."""
    return not type(sys.stderr).__module__.startswith("ipykernel") if asked is None else asked


class Progress:
    """Task, epoch, loss, accuracy and time left of a run of some seeds; what is done is counted in tasks of a seed."""

    def __init__(
        self,
        method: str,
        stream,
        epochs: int,
        shown: bool | None,
        seeds: tuple[int, ...] = (0,),
        budget: int | None = None,
    ):
        self.tasks, self.epochs, self.shown, self.seeds = stream.tasks, epochs, visible(shown), len(seeds)
        apart = multiprocessing.current_process().name != "MainProcess"
        self.terminal = sys.stderr.isatty() and not apart
        self.budget = budget  # in steps
        self.name = f"{method} seed {', '.join(map(str, seeds))}" if apart else method
        self.task, self.shares, self.measured, self.bar = 0, {}, "", None

    def step(self, task: int, epoch: int, positions: tuple[int, ...], steps: dict[int, int]) -> None:
        """After every step of the seeds at ``positions``; ``steps`` says how many each takes in this training."""
        if self.shown:
            self._at(task)
            for i in positions:
                self.shares[i] = min(self.shares.get(i, 0.0) + 1 / steps[i], 1.0)
            in_steps = self.budget is not None and steps[positions[0]] == self.budget
            done = round(self.shares[positions[0]] * steps[positions[0]])
            epochs = f"epoch {epoch + 1}/{max(self.epochs, epoch + 1)}"
            self._show(f"step {done}/{self.budget}" if in_steps else epochs)

    def epoch(self, task: int, epoch: int, records, running) -> None:
        """After every epoch, for the seeds that go on."""
        if self.shown:
            accuracy = records.mean_accuracy(task)
            learned = "" if accuracy is None else f"  accuracy {accuracy:.3f}"
            self.measured = f"  loss {records.last_loss(running):.4f}{learned}"

    def report(self, task: int, what: str, step: int, steps: int, loss) -> None:
        """During other work than epochs; ``loss`` is a tensor that is read only when it is shown."""
        if self.shown:
            self._at(task)
            if time.time() - self.bar.last_print_t > self.bar.mininterval:
                self.measured = f"  loss {float(loss.mean()):.4f}"
                self._show(f"{what} {step}/{steps}")

    def say(self, message: str) -> None:
        """A sentence that stays, also where progress is silent."""
        tqdm.write(message, file=sys.stderr)

    def end(self) -> None:
        """The run is over."""
        if self.bar is not None:
            self.bar.update(self.bar.total - self.bar.n)
            self.bar.close()

    def _at(self, task: int) -> None:
        if self.bar is None:
            self.bar = self._open(task)
        if task != self.task:
            self.task, self.shares = task, {}

    def _show(self, where: str) -> None:
        bar = self.bar
        bar.total = max(bar.total, (self.task + 1) * self.seeds)
        bar.desc = f"{self.name}  task {self.task + 1}/{bar.total // self.seeds}  {where}{self.measured}"
        bar.update(self.task * self.seeds + sum(self.shares.values()) - bar.n)

    def _open(self, task: int) -> "Bar":
        interval = 0.2 if self.terminal else SECONDS
        return Bar(
            total=self.tasks * self.seeds,
            initial=task * self.seeds,  # what an earlier run has done took none of this one's time
            bar_format=BAR if self.terminal else LINE,
            file=sys.stderr if self.terminal else Lines(),
            mininterval=interval,
            delay=interval,
            miniters=0,
            smoothing=0,
            dynamic_ncols=True,
            leave=self.terminal,
            position=0,  # not below one that nobody closed
        )


class Countdown:
    """How far a list of pieces of work is, and how long the rest takes if it goes on like that."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()

    def one(self) -> str:
        """Another piece is done."""
        self.done += 1
        left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
        return f"{self.done} of {self.total}, {tqdm.format_interval(left)} left"


class Bar(tqdm):
    """tqdm without the thread that watches over loops which count by themselves."""

    monitor_interval = 0


class Lines:
    """Standard error as a file for tqdm where nothing can be written over: every state is a line."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()
