from dataclasses import dataclass

from cl_lib.methods._base import Method


@dataclass
class Joint(Method):
    r"""Joint training: after task t, a network trained on the data of all tasks so far.

    .. math:: \min_\theta \sum_{k \le t} \mathcal L_k(\theta)

    The upper reference, not a continual learner: row i of the accuracy matrix belongs to a model that was
    trained from its initial weights on tasks 0 … i together, for ``epochs`` epochs of their union. Its number
    of updates therefore grows with the task, and its total exceeds fine-tuning's by a factor of about
    (T + 1) / 2; published joint budgets differ, so compare with the updates in mind. With ``steps`` every row has
    the same number. ``fresh=False`` goes on with the network that the tasks before left, as van de Ven & Tolias's
    code does (the optimiser's state is the run's ``optimizer_state``).
    """

    fresh: bool = True  # start each row from the initial weights

    family = "reference"
    helps = {"class": {}, "domain": {}}
    citation = (
        "the multi-task bound, e.g. van de Ven, Tuytelaars & Tolias, 2022, Nature Machine Intelligence 4: 1185–1197"
    )
    cost = "keeps all data; training time grows with the number of tasks"

    def fit(self, learner, task):
        if self.fresh:
            learner.reset()
        learner.train(list(range(task + 1)))
