"""The settings of the paper's released scripts, as arguments of a run: both arms of each host and data set.

The arms differ in learning rate and strengths, some in epochs (10 + 60 beside 60). Names are ours: λ_e is half of
``host.strength``, λ_wd is ``host.l2``. Left out is what our methods do not have as an option: iCaRL's scripts replay
half of a batch, ours learns from one training set; rates that a schedule lowered are carried over from task to task.
Data: CIFAR-10 in 5 tasks of 2 classes, CIFAR-100 in 10 of 10, classes in natural order, a ResNet-18 of 64 filters,
random crops and flips; seeds 123, 246 and 369.
"""

from cl_lib.errors import suggest

DATASETS = ("cifar10", "cifar100")
LATE = {"milestones": [35, 45], "gamma": 0.1}
LATER = {"milestones": [42, 54], "gamma": 0.1}
COMMON = {"network": "resnet18", "epochs": 60}

EWC = {"host.decay": 1.0, "data_loss": "binary", "batch_size": 128}
LUCIR = {"host.memory": 2000, "host.growth": "tasks", "host.ranking_over": "mean", "momentum": 0.9,
         "base_schedule": LATER}  # fmt: skip
MC = {"batch_size": 32, "lr": 0.3}
XDER = {"host.memory": 2000, "lr": 0.03, "batch_size": 32}

#: (host, data set) -> what both arms share, what the host has, what Flashback has
SETTINGS = {
    ("ewc", name): (EWC, {"lr": 0.2, "host.strength": 20.0},
                    {"lr": 0.03, "host.strength": 30.0, "plasticity": 0.1, "primary_epochs": 5, "flashback_epochs": 55})
    for name in DATASETS
} | {
    ("icarl", "cifar10"): (
        {"host.memory": 2000, "batch_size": 512, "lr": 0.3, "weight_decay": 1e-5}, {},
        {"plasticity": 0.01, "primary_epochs": 10, "flashback_epochs": 60}),
    ("icarl", "cifar100"): (
        {"host.memory": 2000, "batch_size": 32, "lr": 0.3, "weight_decay": 1e-5}, {},
        {"plasticity": 0.01, "primary_epochs": 10, "flashback_epochs": 50, "flashback_schedule": LATE}),
    ("lucir", "cifar10"): (
        LUCIR | {"batch_size": 256, "lr": 0.05},
        {"host.strength": 7.0, "host.ranking": 1.0, "host.balanced_rate": 0.01, "schedule": LATER},
        {"host.strength": 5.0, "host.ranking": 1.5, "host.balanced_rate": 0.02, "plasticity": 0.01,
         "primary_epochs": 10, "flashback_epochs": 60, "flashback_schedule": LATER}),
    ("lucir", "cifar100"): (
        LUCIR | {"batch_size": 128, "lr": 0.03, "host.balanced_rate": 0.01},
        {"host.strength": 7.0, "host.ranking": 1.0},
        {"host.strength": 6.0, "host.ranking": 1.5, "plasticity": 0.08, "primary_epochs": 10, "flashback_epochs": 50,
         "flashback_schedule": LATE}),
    ("lwf_mc", "cifar10"): (
        MC | {"host.l2": 5e-5}, {}, {"plasticity": 0.01, "primary_epochs": 10, "flashback_epochs": 50}),
    ("lwf_mc", "cifar100"): (
        MC, {"host.l2": 2e-5},
        {"host.l2": 3e-5, "plasticity": 0.01, "primary_epochs": 10, "flashback_epochs": 50}),
    ("xder", "cifar10"): (
        XDER, {"schedule": LATE}, {"plasticity": 0.001, "primary_epochs": 10, "flashback_epochs": 50}),
    ("xder", "cifar100"): (XDER, {}, {"plasticity": 0.001, "primary_epochs": 10, "flashback_epochs": 50}),
}  # fmt: skip


def arm(host: str, dataset: str, name: str) -> dict:
    """The arguments of a run.

    ``"original"`` and ``"flashback"`` are the published arms. ``"equal"`` is Flashback with the settings of
    ``"original"`` and its number of epochs; only α_p is the published one. Raises InputError for what there is not.
    """
    if name not in ("original", "equal", "flashback"):
        raise suggest(name, ("original", "equal", "flashback"), "arm")
    if (host, dataset) not in SETTINGS:
        raise suggest(f"{host} on {dataset}", [f"{h} on {d}" for h, d in SETTINGS], "published setting")
    shared, original, flashback = SETTINGS[host, dataset]
    own = {"original": original, "equal": original | {"plasticity": flashback["plasticity"]}, "flashback": flashback}
    mode = "original" if name == "original" else "flashback"
    return {"method": "flashback", "host": host, "mode": mode, **COMMON, **shared, **own[name]}
