"""Which neuron feeds which: derived from the user's own network by ``torch.fx``, not declared.

A neuron is one output of a linear layer or one output channel of a convolution. A network whose values are *names*
of neurons runs through the traced graph: layers read names and write new ones, reshapes move them, sums and products
tie them, since what is added up or multiplied number by number is recycled together or not at all.
"""

from dataclasses import dataclass

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.nn.modules import activation, batchnorm, dropout, pooling

from cl_lib.errors import InputError
from cl_lib.nets.dropout import SeedDropout
from cl_lib.nets.recurrent import Recurrent

INPUT = -1  # the name of everything that no neuron computes: inputs and constants
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def words(text: str) -> set[str]:
    return set(text.split())


MOVES = words(
    "flatten view reshape permute transpose contiguous squeeze unsqueeze chunk split unbind getitem cat concat stack "
    "expand expand_as size getattr dim movedim flip roll clone detach repeat narrow select"
)
ELEMENTWISE = words(
    "add sub mul div truediv neg abs pow square maximum minimum relu relu_ relu6 leaky_relu elu selu celu gelu silu "
    "mish tanh sigmoid hardtanh hardswish hardsigmoid softplus softsign exp clamp where dropout dropout1d dropout2d "
    "feature_dropout float double to type_as add_ mul_ sub_ iadd imul isub zeros_like ones_like"
)
REDUCTIONS = {"mean", "sum", "amax", "amin"}
POOLS = {f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg", "lp") for d in (1, 2, 3)}
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Identity, SeedDropout,
    activation.LogSigmoid, activation.Tanhshrink, activation.Hardshrink, activation.Softshrink, dropout._DropoutNd,
)  # fmt: skip
POOLING = (
    pooling._MaxPoolNd, pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd, nn.Upsample,
)  # fmt: skip
ACROSS = "it normalises over neurons together, so a new neuron changes what the old ones give"
PRODUCT = "it multiplies activations with one another, and a new neuron enters every such product and its softmax"
REASONS = {
    "layernorm": ACROSS, "layer_norm": ACROSS, "groupnorm": ACROSS, "group_norm": ACROSS, "rmsnorm": ACROSS,
    "rms_norm": ACROSS, "localresponsenorm": ACROSS, "local_response_norm": ACROSS, "normalize": ACROSS,
    "softmax": ACROSS, "log_softmax": ACROSS, "multiheadattention": PRODUCT, "scaled_dot_product_attention": PRODUCT,
    "transformerencoderlayer": PRODUCT, "transformerdecoderlayer": PRODUCT, "transformer": PRODUCT,
    "transformerencoder": PRODUCT, "matmul": PRODUCT, "bmm": PRODUCT, "einsum": PRODUCT, "baddbmm": PRODUCT,
}  # fmt: skip


def refuse(what: str, where: str = "", why: str = "") -> InputError:
    at = f" (at {where!r})" if where else ""
    why = why or REASONS.get(what.lower(), "no rule says which neurons it lets act on which")
    return InputError(
        f"Eidetic learning cannot guarantee anything about {what}{at}: {why}. Build the network from linear, "
        "convolution and recurrent layers, batch norm, pooling, activations, sums and element-wise products."
    )


@dataclass
class Layer:
    """What one layer writes and reads: ``rows`` ``[out]`` are its neurons' names; ``cols`` the names that it reads,
    ``[1, in]``, or ``[out, in / groups]`` of a grouped convolution, or None of a batch norm, whose neurons are those
    of the layer before it."""

    rows: Tensor
    cols: Tensor | None


@dataclass
class Structure:
    """Layers by name; ``units`` neurons, numbered from 0; the ``group`` ``[units]`` that each is scored within, an
    index into ``names``, which are those of the layers that compute them; ``prunable`` ``[units]``, which the
    outputs are not; ``head``, the name of the last layer."""

    layers: dict[str, Layer]
    units: int
    group: Tensor
    names: list[str]
    prunable: Tensor
    head: str

    def feeds(self) -> dict[str, set[str]]:
        """For each weighted layer the groups of neurons that it reads, the input being called ``input``."""
        return {
            name: {"input" if u == INPUT else self.names[int(self.group[u])] for u in layer.cols.unique().tolist()}
            for name, layer in self.layers.items()
            if layer.cols is not None
        }

    def to(self, device) -> "Structure":
        move = lambda t: None if t is None else t.to(device)
        layers = {k: Layer(move(v.rows), move(v.cols)) for k, v in self.layers.items()}
        return Structure(layers, self.units, move(self.group), self.names, move(self.prunable), self.head)


def derive(network: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, Structure]:
    """The network, with a layer on every shortcut that needs one, and its structure, for inputs of one shape.

    A shortcut needs a layer where it adds a layer's input to what was computed from it: else both sides of the block
    would have to be owned by the same task. The layer is a 1 × 1 convolution (or a linear layer) that starts as the
    identity, so that the network starts as the same function. Raises ``InputError`` for what cannot be traced and
    for operations that the guarantee does not cover.
    """
    training = network.training
    network.eval()
    graph = trace(network)
    flow = run(network, graph, shape)
    if shortcuts := find_shortcuts(graph, network):
        network = insert(network, graph, shortcuts, flow)
        graph = network.graph
        flow = run(network, graph, shape)
    network.train(training)
    return network, flow.structure()


def trace(network: nn.Module) -> fx.Graph:
    try:
        return Tracer().trace(network)
    except (TypeError, fx.proxy.TraceError, RuntimeError, AttributeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"torch.fx cannot trace {type(network).__name__} ({reason}), so its structure cannot be found: write its "
            "forward without branches and loops that depend on the data."
        ) from error


class Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        ours = isinstance(module, SeedDropout | Recurrent | batchnorm._BatchNorm)
        return ours or super().is_leaf_module(module, name)


def run(network: nn.Module, graph: fx.Graph, shape: tuple[int, ...]) -> "Flow":
    flow = Flow(fx.GraphModule(network, graph))
    flow.answer = flow.run(torch.full((1, *shape), INPUT))
    return flow


class Flow(fx.Interpreter):
    """Runs a graph on names of neurons, int64 tensors of the shapes that one sample's values have."""

    def __init__(self, module: fx.GraphModule, names: "Flow | None" = None, above: str = ""):
        super().__init__(module)
        self.extra_traceback = False  # a refusal is one sentence
        self.names, self.above, self.at = names or self, above, {}
        if names is None:
            self.count, self.ties, self.layers, self.fixed = 0, [], {}, []

    def run_node(self, node):
        self.at[node] = value = super().run_node(node)
        return value

    # --- names ---------------------------------------------------------------------------------------------

    def fresh(self, n: int) -> Tensor:
        names = self.names
        names.count += n
        return torch.arange(names.count - n, names.count)

    def tie(self, a: Tensor, b: Tensor) -> Tensor:
        """Neurons that stand at the same place belong together; returns their names."""
        a, b = torch.broadcast_tensors(a, b)
        pairs = torch.stack([a.flatten(), b.flatten()], 1).unique(dim=0)
        pairs = pairs[(pairs != INPUT).all(1) & (pairs[:, 0] != pairs[:, 1])]
        self.names.ties.append(pairs)
        return torch.where(a == INPUT, b, a)

    def along(self, names: Tensor, dim: int) -> Tensor:
        """The name at each place along one dimension, whatever the place along the others."""
        lines = names.movedim(dim, -1).reshape(-1, names.shape[dim]).unique(dim=0)
        for line in lines[1:]:
            self.tie(lines[0], line)
        return lines.amax(0)

    # --- layers --------------------------------------------------------------------------------------------

    def weighted(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        linear = isinstance(layer, nn.Linear)
        cols = self.along(x, -1 if linear else 1)[None]
        if not linear and layer.groups > 1:
            cols = cols.view(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1).flatten(0, 1)
        known = self.names.layers.get(name)
        if known is None:
            self.names.layers[name] = known = Layer(self.fresh(len(layer.weight)), cols)
        else:
            self.tie(known.cols, cols)  # called again, as a recurrent cell is
        if linear:
            return known.rows.expand(*x.shape[:-1], -1)
        return spread(known.rows, like(layer, x))

    def normalised(self, name: str, layer, x: Tensor) -> Tensor:
        if not layer.track_running_stats:
            raise refuse(type(layer).__name__, name, "without running statistics its output depends on the batch")
        rows = self.along(x, 1)
        bare = rows == INPUT
        if bare.any():  # statistics of the input itself: the first task's, for ever
            rows = torch.where(bare, self.fresh(len(rows)), rows)
            self.names.fixed.append(rows[bare])
        self.names.layers[name] = Layer(rows, None)
        return spread(rows, x)

    def recurrent(self, name: str, layer: Recurrent, x: Tensor):
        """Each cell's own graph says how its state depends on itself; states at all times are the same neurons."""
        x = x if layer.batch_first else x.movedim(0, 1)
        last = []
        for level in layer.cells:
            outs = []
            for cell in level:
                prefix = f"{name}.{layer.name_of(cell)}"
                state = [self.fresh(cell.hidden_size)[None] for _ in range(cell.states)]
                graph = fx.symbolic_trace(cell)
                step = self.along(x, -1)[None]
                new = Flow(graph, self.names, prefix).run(step, *state)
                new = [self.tie(old, n) for old, n in zip(state, new, strict=True)]
                last.append(new)
                outs.append(new[0])
            x = torch.cat(outs, 1)[:, None].expand(-1, x.shape[1], -1)
        states = tuple(torch.stack(s) for s in zip(*last, strict=True))
        x = x if layer.batch_first else x.movedim(0, 1)
        return x, states if len(states) > 1 else states[0]

    # --- nodes ---------------------------------------------------------------------------------------------

    def call_module(self, target, args, kwargs):
        layer, name = self.fetch_attr(target), f"{self.above}.{target}" if self.above else target
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(layer, WEIGHTED):
            return self.weighted(name, layer, x)
        if isinstance(layer, batchnorm._BatchNorm):
            return self.normalised(name, layer, x)
        if isinstance(layer, Recurrent):
            if len(args) + len(kwargs) > 1:
                raise refuse("a recurrent layer with a given initial state", name)
            return self.recurrent(name, layer, x)
        if isinstance(layer, nn.Flatten | nn.Unflatten):
            return layer(x)
        if isinstance(layer, ACTIVATIONS):
            return x
        if isinstance(layer, POOLING):
            return self.pooled(layer, x)
        raise refuse(type(layer).__name__, name)

    def call_function(self, target, args, kwargs):
        return self.operation(target.__name__, super().call_function, target, args, kwargs)

    def call_method(self, target, args, kwargs):
        return self.operation(target, super().call_method, target, args, kwargs)

    def get_attr(self, target, args, kwargs):
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, nn.Parameter):
            raise refuse("a parameter outside of a layer", target)
        return torch.full(value.shape, INPUT) if isinstance(value, Tensor) else value

    def operation(self, name: str, call, target, args, kwargs):
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        listed = any(isinstance(a, list | tuple) and a and isinstance(a[0], Tensor) for a in args)
        if not (tensors or listed) or name in MOVES:
            return call(target, args, kwargs)
        if name in ELEMENTWISE:
            out = tensors[0]
            for other in tensors[1:]:
                out = self.tie(out, other)
            return out
        if name in POOLS:
            return self.pooled(lambda x: call(target, (x, *args[1:]), kwargs), tensors[0])
        if name in REDUCTIONS:
            return self.reduced(name, args, kwargs)
        raise refuse(name)

    def pooled(self, layer, x: Tensor) -> Tensor:
        return spread(self.along(x, 1), like(layer, x))

    def reduced(self, name: str, args, kwargs) -> Tensor:
        kwargs = {{"axis": "dim", "keepdims": "keepdim"}.get(k, k): v for k, v in kwargs.items() if k != "dtype"}
        high, low = torch.amax(*args, **kwargs), torch.amin(*args, **kwargs)
        if not torch.equal(high, low):
            raise refuse(f"{name} over neurons", why=ACROSS.replace("normalises over", "combines"))
        return high

    # --- the result ----------------------------------------------------------------------------------------

    def structure(self) -> Structure:
        pairs = torch.cat([*self.ties, torch.zeros(0, 2, dtype=torch.long)]).numpy()
        links = coo_array(([1] * len(pairs), (pairs[:, 0], pairs[:, 1])), shape=(self.count, self.count))
        label = torch.as_tensor(connected_components(links, directed=False)[1]).long() if self.count else pairs
        renamed = lambda t: None if t is None else torch.where(t == INPUT, INPUT, label[t.clamp(min=0)])
        layers = {name: Layer(renamed(layer.rows), renamed(layer.cols)) for name, layer in self.layers.items()}

        answer = self.answer[0] if isinstance(self.answer, Tensor) else torch.zeros(0)
        same = lambda layer: layer.cols is not None and torch.equal(layer.rows, answer)
        head = next((name for name, layer in self.layers.items() if same(layer)), None)
        if head is None:
            raise refuse("a network whose last layer is not linear", why="each task needs output rows of its own")
        if any((layer.cols == row).any() for layer in layers.values() if layer.cols is not None
               for row in layers[head].rows):  # fmt: skip
            raise refuse("logits that are read again", head, "each task needs output rows that nothing else reads")

        units = int(label.max()) + 1
        group, names = torch.full((units,), -1), []
        for name, layer in layers.items():
            new = layer.rows[group[layer.rows] < 0]
            if len(new):
                group[new] = len(names)
                names.append(name)
        prunable = torch.ones(units, dtype=torch.bool)
        for fixed in (layers[head].rows, *(label[f] for f in self.fixed)):
            prunable[fixed] = False
        return Structure(layers, units, group, names, prunable, head)


def like(layer, x: Tensor) -> Tensor:
    """A tensor of the shape that a layer makes of one of the shape of x."""
    dtype = layer.weight.dtype if isinstance(layer, WEIGHTED) else torch.float32
    with torch.no_grad():
        return layer(torch.zeros(x.shape, dtype=dtype))


def spread(channels: Tensor, x: Tensor) -> Tensor:
    """Names ``[C]`` at every position of a tensor ``[1, C, …]``."""
    return channels.view(1, -1, *[1] * (x.dim() - 2)).expand(x.shape)


# --- shortcuts ----------------------------------------------------------------------------------------------

SUMS = {"add", "iadd", "add_"}


def find_shortcuts(graph: fx.Graph, network: nn.Module) -> list[tuple[fx.Node, fx.Node]]:
    """Sums and those of their terms that a layer reads on the way to the other term: ``(sum, term)``.

    Layers that are called more than once are cells of a recurrence: their states stay tied instead.
    """
    modules, calls = dict(network.named_modules()), {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], (*WEIGHTED, Recurrent)):
            calls.setdefault(node.target, []).append(node)
    once = {nodes[0] for nodes in calls.values() if len(nodes) == 1}
    makers, before = {}, {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        before[node] = {node}.union(*(before[i] for i in inputs))
        makers[node] = {node} if node in once else set().union(*(makers[i] for i in inputs))
    found = []
    for node in graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        terms = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if node.op in ("call_method", "call_function") and name in SUMS and len(terms) == 2:
            for term, other in (terms, terms[::-1]):
                if any(makers[layer.args[0]] & makers[term] for layer in before[other] & once):
                    found.append((node, term))
                    break
    return found


def insert(network: nn.Module, graph: fx.Graph, shortcuts: list, flow: Flow) -> fx.GraphModule:
    """The network with a layer on each shortcut."""
    for node in graph.nodes:
        if node.op == "call_function" and "dropout" in getattr(node.target, "__name__", ""):
            raise refuse("a functional dropout beside a shortcut", why="it cannot be traced: use nn.Dropout")
    like = next(network.parameters())
    module = fx.GraphModule(network, graph)
    for i, (node, term) in enumerate(shortcuts):
        names = flow.at[term]
        dim = next((d for d in range(1, names.dim()) if (names != names.select(d, 0).unsqueeze(d)).any()), 1)
        n = names.shape[dim]
        if dim == names.dim() - 1:
            layer = nn.Linear(n, n, bias=False)
            nn.init.eye_(layer.weight)
        else:
            layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[names.dim() - 3](n, n, 1, bias=False)
            nn.init.dirac_(layer.weight)
        module.add_submodule(f"shortcut_{i}", layer.to(like))
        with module.graph.inserting_before(node):
            new = module.graph.call_module(f"shortcut_{i}", (term,))
        node.args = tuple(new if a is term else a for a in node.args)
    module.graph.lint()
    module.recompile()
    return module
