"""Single figures of the bench: each says what it is, yields a ratio for each round, and has a limit."""

import os

import bare
import torch
from workload import timed

import cl_lib
from cl_lib.curvature.fisher import diagonal
from cl_lib.methods.eidetic.apprentice import Apprentice
from cl_lib.methods.recl import reconstruction as search
from cl_lib.nets import networks
from cl_lib.training.evaluation import scores


def evaluation(work, rounds):
    """evaluation / its forward passes alone"""
    learner, (model, _) = work.learner("finetune"), work.bare()
    learner.met = learner.stream.tasks

    @torch.no_grad()
    def forward():
        for x, _ in work.test:
            model(x)

    tasks = range(learner.stream.tasks)
    for _ in range(5 * rounds):
        reference = timed(forward)
        yield timed(learner.hits, tasks) / reference


evaluation.limit = "<=", 1.15


def end_of_task(work, rounds):
    """batch-size-1 loop / exact Fisher of 1,000 samples"""
    learner, (model, _) = work.learner("ewc"), work.bare()
    net, ours = learner.net(), {}
    for p, own in zip(model.parameters(), net.params.values(), strict=True):
        p.data.copy_(own)
    n = 100 if work.tiny else 1000
    x = torch.cat([x for x, _ in work.train])
    x = x[torch.randperm(len(x))[:n]]
    images, chunk = x.view(n, *learner.stream.shape), n // 10
    loop = bare.fisher(model, x, chunk)
    for _ in range(10):  # a tenth of the loop and all of ours, in turn

        def tenth():
            ours["loop"] = next(loop)

        slow = timed(tenth)
        yield 10 * slow / timed(lambda: ours.update(net=diagonal(net, images)))
    error = max(
        float((a / n - b).abs().max() / (a / n).abs().max())
        for a, b in zip(ours["loop"], ours["net"].values(), strict=True)
    )
    end_of_task.note = f"largest relative difference {error:.0e} (<= 1e-5: {'ok' if error <= 1e-5 else 'over'})"


end_of_task.limit = ">=", 20


def _eidetic(work, scenario, **more):
    """A learner that owns neurons: its first task is behind it, pruned whatever it cost."""
    learner = work.learner("eidetic", stream=work.stream(scenario), tolerance=0.99, **more)
    learner.learn()
    return learner


def masked_step(work, rounds):
    """Eidetic: an epoch with frozen entries / fine-tuning's"""
    own, plain = _eidetic(work, "task"), work.learner("finetune", stream=work.stream("task"))
    apprentice = Apprentice(own.method, own, 1, 0)
    for _ in range(3 * rounds):
        reference = timed(plain.train, [1])
        yield timed(apprentice.train, [1], 1) / reference


masked_step.limit = "<=", 1.25


def pruning(work, rounds):
    """Eidetic: scoring and pruning / a task's training"""
    for score in ("l2", "taylor"):
        for _ in range(rounds):
            # by Taylor a tenth of the images is looked at, by l2 none
            learner = work.learner(
                "eidetic", stream=work.stream("task"), score=score, score_samples=max(1, len(work.train[0][0]) // 20)
            )
            learner.learn()
            yield learner.records.curves["scoring"][0, 0] / learner.records.seconds["train"][0]


pruning.limit = "<=", 0.05


def routing(work, rounds):
    """Eidetic: scores with a router / logits"""
    learner = _eidetic(work, "class", router_epochs=1)
    x = work.test[0][0].view(1, -1, *learner.stream.shape)

    @torch.no_grad()
    def plain():
        learner.net()(x[0])

    for _ in range(20 * rounds):
        reference = timed(plain)
        yield (
            timed(torch.no_grad()(lambda: scores(learner.networks, learner.method, learner.state, (0,), x))) / reference
        )


routing.limit = "<=", 1.1


def processes(work, rounds):
    """ten seeds one after another / with jobs=2"""
    if len(os.sched_getaffinity(0)) < 2:
        return
    seeds = 2 if work.tiny else 10
    processes.note = "starting the processes counts in the first round"
    for _ in range(1 if work.tiny else min(rounds, 3)):
        one, two = (
            timed(
                lambda jobs=jobs: cl_lib.run(
                    "finetune",
                    work.stream("class"),
                    seeds=seeds,
                    jobs=jobs,
                    device="cpu",
                    progress=False,
                    **work.options,
                )
            )
            for jobs in (1, 2)
        )
        yield one / two


processes.limit = ">=", 1.7


def _on_cuda(work, seeds, capture):
    """A learner on CUDA that has been through its first task."""
    learner = work.learner("finetune", tuple(range(seeds)), device="cuda", capture=capture)
    learner.learn(0)
    return learner


def _training(learner) -> float:
    learner.learn()
    return learner.records.seconds["train"][learner.done - 1]


def stacked(work, rounds):
    """CUDA, eager: ten stacked seeds / one"""
    for _ in range(rounds if torch.cuda.is_available() else 0):
        one, ten = (_on_cuda(work, n, capture=False) for n in (1, 10))
        for _ in range(work.stream("class").tasks - 1):
            reference = _training(one)
            yield _training(ten) / reference


stacked.limit = "<=", 1.5


def captured(work, rounds):
    """CUDA: eager step / captured step"""
    for _ in range(rounds if torch.cuda.is_available() else 0):
        eager, graph = (_on_cuda(work, 1, capture=c) for c in (False, True))
        for _ in range(work.stream("class").tasks - 1):
            slow = _training(eager)
            yield slow / _training(graph)


captured.limit = ">=", 4


def recall(work, rounds):
    """Seconds of a training step at batch 100 and of an iteration of ReCL at m = 100, on its own network, in turn."""
    hidden = (16, 16) if work.tiny else (1000, 1000)
    model = networks.homogeneous_mlp((1, 28, 28), 10, hidden)
    optimizer, settings = torch.optim.SGD(model.parameters(), lr=work.lr), search.Settings(iterations=4)
    params = {k: p.detach()[None].clone() for k, p in model.named_parameters()}
    rows = torch.arange(10) < 2
    x, c = search.start(100, (1, 28, 28), settings.spread, torch.Generator().manual_seed(0), torch.float32)
    more = params, {}, x[None], c[None], search.labels(100, rows), rows, settings
    images, labels = torch.rand(1000, 784), torch.arange(1000) % 10
    for warm_up in (True, *[False] * 3 * rounds):
        step = timed(bare.train, model, optimizer, images, labels, 100) / 10
        iteration = timed(search.search, model, *more) / (settings.iterations + 1)  # the loss at λ = 0 is one more
        if not warm_up:
            yield step, iteration


def reconstruction(work, rounds):
    """ReCL: one iteration, m = 100 / a step at batch 100"""
    for step, iteration in recall(work, rounds):
        yield iteration / step


reconstruction.limit = "<=", 4.5


def recl(work, rounds):
    """ReCL, 1,000 iterations, 30 epochs / fine-tuning"""
    recl.note = "reckoned for a task of all its images at batch 100, from one step and one iteration"
    for step, iteration in recall(work, rounds):
        train = 30 * len(work.train[0][0]) / 100 * step
        yield (train * (1 + 100 / len(work.train[0][0])) + 1000 * iteration) / train


recl.limit = "<=", 2.5


def packnet(work, rounds):
    """PackNet, 2 epochs and 1 of retraining / 2 epochs"""
    packnet.note = "1.40 by count: half as many steps again, in four of five tasks"
    for seed in range(rounds):
        once, again = (work.learner("packnet", (seed,), epochs=2, retrain=share) for share in (0.0, 0.5))
        for task in range(once.stream.tasks):
            once.learn(task)
            again.learn(task)
        yield again.records.seconds["train"].sum() / once.records.seconds["train"].sum()


packnet.limit = "<=", 1.5


def mer(work, rounds):
    """MER, sequences of 10 samples / as many bare steps of 1"""
    images = 2 if work.tiny else 20
    stream = cl_lib.split(work.data, tasks=5, scenario="class", per_class=images // 2)
    x, y = (t[:images].repeat_interleave(10, 0) for t in work.train[0])
    for seed in range(rounds):
        learner, (model, optimizer) = work.learner("mer", (seed,), stream=stream, batch_size=10), work.bare()
        learner.learn()  # the memory is filled
        for task in range(1, 5):
            reference = timed(bare.train, model, optimizer, x, y, 1)
            learner.learn(task)
            yield learner.records.seconds["train"][task] / reference


mer.limit = None


def oml(work, rounds):
    """OML, meta-training / as many bare steps"""
    steps = 2 if work.tiny else 20
    learner, (model, optimizer) = work.learner("oml", meta_steps=steps), work.bare()
    images, labels = (t[: steps * work.batch_size] for t in work.train[0])
    for _ in range(3 * rounds):
        reference = timed(bare.train, model, optimizer, images, labels, work.batch_size)
        yield timed(learner.method.meta_train, learner, (0,)) / reference


oml.limit = None


def oml_online(work, rounds):
    """OML, an epoch of its last layer / the bare loop's"""
    for seed in range(rounds):
        learner, (model, optimizer) = work.learner("oml", (seed,), meta_steps=1), work.bare()
        learner.learn()
        for task in range(1, learner.stream.tasks):
            reference = timed(bare.train, model, optimizer, *work.train[task], work.batch_size)
            learner.learn(task)
            yield learner.records.seconds["train"][task] / reference


oml_online.limit = "<=", 1.0


def _flashback(work, rounds, host):
    """The training times of a host with Flashback over the host's alone, six epochs a task, in turn."""
    stream = cl_lib.split(work.data, tasks=5, scenario="class", per_class=None if work.tiny else 2000)
    settings = {"stream": stream, "host": host, "epochs": 6, "loss_over": "seen"}
    settings |= {"primary_epochs": 1, "flashback_epochs": 5}
    settings |= {"host.memory": 500} if host in ("icarl", "lucir", "xder") else {}
    for seed in range(rounds):
        alone, twice = (work.learner("flashback", (seed,), **settings, mode=m) for m in ("original", "flashback"))
        for task in range(3):
            alone.learn(task)
            twice.learn(task)
        yield twice.records.seconds["train"][1:].sum() / alone.records.seconds["train"][1:].sum()


def flashback_ewc(work, rounds):
    """Flashback, 1 + 5 epochs / online EWC, 6"""
    yield from _flashback(work, rounds, "ewc")


def flashback_lwf_mc(work, rounds):
    """Flashback, 1 + 5 epochs / LwF.MC, 6"""
    flashback_lwf_mc.note = "1.25 by count: one forward pass more, beside two and one backward, in 5 of 6 epochs"
    yield from _flashback(work, rounds, "lwf_mc")


def flashback_icarl(work, rounds):
    """Flashback, 1 + 5 epochs / iCaRL, 6"""
    yield from _flashback(work, rounds, "icarl")


def flashback_lucir(work, rounds):
    """Flashback, 1 + 5 epochs / LUCIR, 6"""
    yield from _flashback(work, rounds, "lucir")


def flashback_xder(work, rounds):
    """Flashback, 1 + 5 epochs / X-DER, 6"""
    yield from _flashback(work, rounds, "xder")


FLASHBACK = flashback_ewc, flashback_lwf_mc, flashback_icarl, flashback_lucir, flashback_xder
for figure in FLASHBACK:
    figure.limit = "<=", 1.25

ALL = (
    evaluation, end_of_task, masked_step, pruning, routing, processes, stacked, captured, reconstruction, recl,
    packnet, mer, oml, oml_online, *FLASHBACK,
)  # fmt: skip
