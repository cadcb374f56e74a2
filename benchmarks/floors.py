"""The least that a method can cost: its matrix products, counted, over those of the bare loop's step.

Products are multiply-adds of an MLP (784-400-400-10 unless told) on batches of 128, with 128 stored samples beside
them. Bytes moved by element-wise work, random draws and the optimiser's step come on top, in words.
"""

import itertools


def floors(sizes=(784, 400, 400, 10), batch=128, tasks=5, gem=100) -> dict[str, tuple[float, str]]:
    """Method -> (products over the bare step's, averaged over the tasks; what is counted, and what is not)."""
    layers = list(itertools.pairwise(sizes))
    forward = sum(i * o for i, o in layers)  # of one sample
    backward = forward + sum(i * o for i, o in layers[1:])  # to the weights; to the inputs, but for the first layer
    step = forward + backward
    later = (tasks - 1) / tasks  # tasks that have a past
    exemplars = 1 + later * 500 / 12_000  # trained on beside 12,000 new samples
    kronecker = sum(o * o * (i + 1) + o * (i + 1) ** 2 for i, o in layers) / (batch * step)
    return {
        "finetune": (1.0, "one forward and one backward pass"),
        "ewc": (1.0, "moves 5 arrays of all parameters: θ, θ*, F and the gradient read, the gradient written"),
        "mas": (1.0, "moves 5 arrays of all parameters, as EWC does"),
        "si": (1.0, "moves 12: EWC's 5, θ kept from before the step 2, the path integral's 5"),
        "ewc_kfac": (1 + later * kronecker, "G Δ A of every layer, for one pair of factors"),
        "lwf": (1 + later * forward / step, "the teacher's forward pass"),
        "er": (2.0, "as many stored samples as new ones"),
        "er_ace": (2.0, "as many stored samples as new ones"),
        "der": (2.0, "as many stored samples as new ones"),
        "derpp": (3.0, "two draws from the buffer, each as large as the batch"),
        "agem": (
            1 + later,
            "the reference batch's passes; moves 5 arrays: two read for the products, two read and "
            "one written for the projection",
        ),
        "gem": (1 + (tasks - 1) / 2 * gem / batch, f"passes over {gem} images of each earlier task; and the dual"),
        "gpm": (1.0, "and the projection, 2 · out · in · kept directions of every layer"),
        "lwf_mc": (1 + later * forward / step, "the teacher's forward pass"),
        "icarl": (exemplars * (1 + later * forward / step), "the teacher's pass; 500 exemplars beside the data"),
        "xder": (1 + 2 * later + (1 + later) * 64 / batch, "two draws from the buffer; 64 new and 64 stored views"),
        "upgd": (1.0, "a normal draw for each parameter; moves 10 arrays: trace 4, its maximum 1, noise 1, step 4"),
    }
