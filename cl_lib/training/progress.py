"""One plain line that tells how a run goes: task, epoch, loss, accuracy. Only where somebody can see it move."""

import sys
import time


class Progress:
    """Writes over its own line on a terminal; silent elsewhere (pipes, notebooks, papermill), unless asked."""

    def __init__(self, method: str, stream, epochs: int, shown: bool | None):
        self.method, self.tasks, self.epochs = method, stream.tasks, epochs
        self.terminal = sys.stderr.isatty()
        self.shown = self.terminal if shown is None else shown
        self.last = 0.0

    def epoch(self, task: int, epoch: int, records, running) -> None:
        now = time.monotonic()
        if not self.shown or (now - self.last < 0.2 and epoch + 1 < self.epochs):
            return
        self.last = now
        learned = records.mean_accuracy()
        accuracy = "" if learned is None else f"  accuracy {learned:.3f}"
        self._write(
            f"{self.method}  task {task + 1}/{self.tasks}  epoch {epoch + 1}/{self.epochs}  "
            f"loss {records.last_loss(running):.4f}{accuracy}"
        )

    def reconstruct(self, task: int, step: int, steps: int, loss) -> None:
        if self.shown and time.monotonic() - self.last > 0.2:
            self.last = time.monotonic()
            self._write(
                f"{self.method}  task {task + 1}/{self.tasks}  reconstruction {step}/{steps}  "
                f"loss {float(loss.mean()):.4f}"
            )

    def say(self, message: str) -> None:
        """A sentence that stays, also where progress is silent."""
        print(message, file=sys.stderr)

    def end(self) -> None:
        if self.shown and self.terminal:
            print(file=sys.stderr)

    def _write(self, line: str) -> None:
        if self.terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
