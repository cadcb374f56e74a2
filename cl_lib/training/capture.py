"""A training step as a CUDA graph: recorded once, replayed without Python or launch overhead.

What a step reads must stay where it is: parameters, buffers and memory are updated in place, the batch is
copied into fixed tensors, the learning rate is a tensor. A step that cannot be recorded runs eagerly.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3


class Captured:
    """``step(batch) -> tensors`` recorded for each shape of batch; ``state()`` lists all tensors it changes."""

    def __init__(self, step: Callable, optimizer: torch.optim.Optimizer, state: Callable[[], list[Tensor]]):
        self.step, self.optimizer, self.state = step, optimizer, state
        self.graphs: dict = {}
        self.eager = False

    def __call__(self, batch):
        if self.eager:
            return self.step(batch)
        leaves, spec = pytree.tree_flatten(batch)
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        key = (str(spec), tuple((tuple(t.shape), t.dtype) for t in tensors))
        if key not in self.graphs:
            recorded = self._record(leaves, spec)
            if recorded is None:
                self.eager = True
                return self.step(batch)
            self.graphs[key] = recorded
        graph, fixed, results = self.graphs[key]
        torch._foreach_copy_(fixed, tensors)
        graph.replay()
        return pytree.tree_map(torch.clone, results)

    def _record(self, leaves: list, spec):
        fixed_leaves = [t.clone() if isinstance(t, Tensor) else t for t in leaves]
        fixed = [t for t in fixed_leaves if isinstance(t, Tensor)]
        batch = pytree.tree_unflatten(fixed_leaves, spec)
        before = [(t, t.detach().clone()) for t in self._all_state()]
        graph = torch.cuda.CUDAGraph()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.step(batch)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                results = self.step(batch)
        except RuntimeError as error:
            torch.cuda.synchronize()
            warnings.warn(f"This step cannot be captured as a CUDA graph and runs eagerly: {error}", stacklevel=2)
            return None
        finally:
            self._put_back(before)
        return graph, fixed, results

    def _all_state(self) -> list[Tensor]:
        moments = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return [*self.state(), *moments]

    @torch.no_grad()
    def _put_back(self, before: list) -> None:
        """Undo the warm-up; moments that it created start at zero, as the optimisers' own do."""
        known = {id(t) for t, _ in before}
        for t, old in before:
            t.copy_(old)
        for t in self._all_state():
            if id(t) not in known:
                t.zero_()
