"""Losses as pure functions of one model's logits or parameters. Masked rows get a gradient of exactly 0."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lib.errors import InputError, suggest

Tensors = Mapping[str, Tensor]


def masked(logits: Tensor, rows: Tensor | None) -> Tensor:
    """Logits [B, C] in which the rows that do not count have probability zero.

    ``rows`` is a boolean mask [C] or [B, C], True where an output row counts; None counts all. The filler is
    the least finite number, not −∞: softmax makes it the same 0, and no 0 · ∞ can arise.
    """
    return logits if rows is None else logits.masked_fill(~rows, torch.finfo(logits.dtype).min)


def cross_entropy(logits: Tensor, y: Tensor, rows: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """−log p_y, where p is the softmax over the rows that count.

    Arguments:
        logits: [B, C].
        y: output rows [B], each one that counts.
        rows: see ``masked``.
        reduction: "mean" or "sum" over the batch, or "none" for [B].
    """
    return F.cross_entropy(masked(logits, rows), y, reduction=reduction)


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, rows: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""One logistic regression for each row that counts, −q log σ(z) − (1 − q) log(1 − σ(z)), the mean over the batch.

    Its gradient in a logit is (σ(z) − q) over the number of samples, and with "mean" over that of rows. None reaches
    the targets.

    Arguments:
        logits: z [B, C].
        targets: q in [0, 1], [B, C].
        rows: a mask [C], True where a row counts; None counts all.
        reduction: over rows, "mean" or "sum".
    """
    if reduction not in ("mean", "sum"):
        raise suggest(reduction, ("mean", "sum"), "reduction")
    loss = F.binary_cross_entropy_with_logits(logits, targets.detach(), reduction="none")  # [B, C]
    rows = torch.ones_like(loss[0]) if rows is None else rows.to(loss.dtype)
    loss = (loss * rows).sum(-1).mean()
    return loss / rows.sum().clamp(min=1) if reduction == "mean" else loss


def distillation(
    logits: Tensor,
    teacher: Tensor,
    rows: Tensor | Sequence[Tensor | range] | None = None,
    temperature: float = 2.0,
    form: str = "kl",
    counted: Tensor | None = None,
) -> Tensor:
    r"""Keep the teacher's soft outputs: for q = softmax(teacher/τ), p = softmax(logits/τ), the batch mean of

    .. math:: \text{kl:}\quad \tau^2\,\mathrm{KL}(q\,\|\,p) = \tau^2 \sum_c q_c \log\frac{q_c}{p_c}
              \qquad\qquad \text{ce:}\quad -\sum_c q_c \log p_c

    Its gradient in a sample's logits is τ (p − q) for "kl", whose τ² keeps it from shrinking as τ grows
    (Hinton et al., 2015), and (p − q)/τ for "ce", the form of Li & Hoiem (2017). None reaches the teacher.

    Arguments:
        logits, teacher: [B, C].
        rows: the rows to distil, as in ``masked``; or a list of masks or ranges, one for each old task: each is
            a softmax of its own then, and the terms are summed (task-incremental learning).
        temperature: τ.
        form: "kl" or "ce".
        counted: more rows [C] that p, not q, is a softmax over: where the teacher's targets are zero.
    """
    if counted is not None:
        each = rows if isinstance(rows, Sequence) and not isinstance(rows, range) else [rows]
        parts = (_padded(logits, teacher, head, counted, temperature, form) for head in each)
        return sum(parts, logits.new_zeros(()))
    if isinstance(rows, Sequence) and not isinstance(rows, range):
        heads = (distillation(logits, teacher, head, temperature, form) for head in rows)
        return sum(heads, logits.new_zeros(()))
    if isinstance(rows, range):
        head = slice(rows.start, rows.stop, rows.step)
        return distillation(logits[:, head], teacher[:, head], None, temperature, form)
    log_q = F.log_softmax(masked(teacher.detach() / temperature, rows), -1)
    log_p = F.log_softmax(masked(logits / temperature, rows), -1)
    return _divergence(log_q, log_p, temperature, form)


def _padded(logits, teacher, rows, counted, temperature, form) -> Tensor:
    """Distillation of the rows of one softmax, which for the student has others too."""
    if isinstance(rows, range):
        number = torch.arange(logits.shape[-1], device=logits.device)
        rows = (number >= rows.start) & (number < rows.stop)
    log_q = F.log_softmax(masked(teacher.detach() / temperature, rows), -1)
    log_p = F.log_softmax(masked(logits / temperature, counted | rows), -1)
    return _divergence(log_q, log_p, temperature, form)


def _divergence(log_q, log_p, temperature: float, form: str) -> Tensor:
    if form == "kl":
        return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    if form == "ce":
        return -(log_q.exp() * log_p).sum(-1).mean()
    raise suggest(form, ("kl", "ce"), "form of distillation")


def quadratic(params: Tensors, anchor: Tensors, weight: Tensors) -> Tensor:
    """Σ_i w_i (θ_i − a_i)² over the tensors that ``weight`` names: what EWC, SI and MAS add to the loss.

    The gradient 2 w (θ − a) is written out, which takes a fraction of the time and memory of plain autograd.
    No gradient reaches anchor or weight. Raises InputError where a parameter is gone or has another shape than
    its anchor had.
    """
    refuse_changed(params, anchor, weight)
    return _Quadratic.apply(0, *(tensors[name] for tensors in (params, anchor, weight) for name in weight))


def refuse_changed(params: Tensors, *kept: Tensors) -> None:
    """Raise InputError unless every kept tensor still has a parameter of its name and shape."""
    for tensors in kept:
        for name, t in tensors.items():
            if name not in params or params[name].shape != t.shape:
                now = f"has shape {tuple(params[name].shape)} now" if name in params else "is no longer there"
                raise InputError(
                    f"The penalty keeps {name!r} near a value of shape {tuple(t.shape)}, but that parameter {now}: "
                    "let the network keep its shape over the tasks (a full head with masked rows, say)."
                )


def with_gradient(value: Tensor, params: Tensors, grads: Tensors) -> Tensor:
    """A scalar with this value, whose gradient is written out: ``grads[k]`` in ``params[k]``, by name.

    For a penalty whose value and gradient are one computation, done under ``torch.no_grad()``.
    """
    return _Given.apply(0, value, *(params[k] for k in grads), *grads.values())


class _Given(torch.autograd.Function):
    """(value, θ …, g …) -> value, with gradient g in θ, all with ``axes`` first axes that vmap has put there."""

    @staticmethod
    def forward(axes, value, *tensors):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.axes, _, *tensors = inputs
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])

    @staticmethod
    def backward(ctx, grad):
        scale = lambda g: grad.reshape((*grad.shape, *[1] * (g.dim() - ctx.axes)))
        given = ctx.saved_tensors
        return None, None, *(g * scale(g) for g in given), *[None] * len(given)

    @staticmethod
    def vmap(info, dims, axes, *tensors):
        return _Given.apply(axes + 1, *_stacked(info, dims[1:], tensors)), 0


class _Quadratic(torch.autograd.Function):
    """(θ …, a …, w …) -> Σ w (θ − a)², but not over the first ``axes`` axes, which vmap has put there."""

    @staticmethod
    def forward(axes, *tensors):
        return sum(_dot(w, (θ - a).square_(), axes) for θ, a, w in _triples(tensors))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.axes, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        def scale(θ):
            return (2 * grad).reshape((*grad.shape, *[1] * (θ.dim() - ctx.axes)))

        # in place on (θ − a), each tensor's temporary: fresh memory costs more here than arithmetic
        grads = [(θ - a).mul_(w).mul_(scale(θ)) for θ, a, w in _triples(ctx.saved_tensors)]
        return None, *grads, *[None] * (2 * len(grads))

    @staticmethod
    def vmap(info, dims, axes, *tensors):
        return _Quadratic.apply(axes + 1, *_stacked(info, dims[1:], tensors)), 0


def _stacked(info, dims, tensors):
    return (
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims, strict=True)
    )


def _triples(tensors):
    n = len(tensors) // 3
    return zip(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], strict=True)


def _dot(u, v, axes):
    u, v = (t.reshape(*t.shape[:axes], -1) for t in (u, v))
    return torch.linalg.vecdot(u, v) if axes else u @ v
