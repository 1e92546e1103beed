"""Find the mixers: from every scan, back to the projections and the convolution before it, forward to the residual add.

hidden ─ in_proj ─┬─ conv ─┬─────────── x ─┐
                  │        ├ x_proj ─ B, C ─┤
                  │        └ … ─ dt_proj ─ dt ─ selective_scan ─ out_proj ─ + ─ hidden'
                  └──────────────────── z ─┘                                │
residual ───────────────────────────────────────────────────────────────────┘
"""

import dataclasses
import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from simba_compile.kernels import ops  # noqa: F401  (registers torch.ops.simba)
from simba_compile.passes.tokens import CASTS, LINEAR, PRODUCTS, Length, suffix, value_of

SCAN = torch.ops.simba.selective_scan
CONV = torch.ops.simba.causal_conv1d
ADDS = {operator.add, torch.add, "add"}
SCALES = {operator.mul, torch.mul, "mul"}
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "softplus", "index")


@dataclasses.dataclass
class Mixer:
    """One Mamba mixer in a graph.

    Attributes
    ----------
    path : str
        Where the module sits in the model, like ``backbone.layers.3.mixer``.
    scan : Node
        Its ``simba::selective_scan``.
    x : Tensor
        What Dynamo saw as the scan's input: (batch, token, channel).
    add, residual : Node or None
        The residual add after it, and the operand of it that does not come from the scan.
    windows : list of Node
        Slices of the convolution's input that a cache keeps for decoding.
    entering_flops, scanned_flops, scoring_flops : int
        Arithmetic for one token that enters, one that is scanned, one that is scored.
    reason : str or None
        Why this mixer stays dense, where it does.
    """

    path: str
    scan: Node
    x: Tensor
    add: Node | None
    residual: Node | None
    windows: list[Node]
    entering_flops: int
    scanned_flops: int
    scoring_flops: int
    reason: str | None = None


def match(graph: Graph) -> list[Mixer]:
    """The mixers of a graph, in its order."""
    return [_mixer(node) for node in graph.nodes if node.target is SCAN]


def _mixer(scan: Node) -> Mixer:
    x, dt, A, B = (scan.args[i] for i in range(4))
    conv = _before(x, lambda node: node.target is CONV)  # type: ignore[arg-type]
    out_proj = _after(scan, lambda node: node.target in LINEAR)
    projections = {
        _before(B, lambda node: node.target in LINEAR),  # type: ignore[arg-type]
        _before(dt, lambda node: node.target in LINEAR | PRODUCTS),  # type: ignore[arg-type]
        None if conv is None else _before(conv.args[0], lambda node: node.target in LINEAR),  # type: ignore[arg-type]
    }
    add = _after(out_proj or scan, lambda node: _residual(node, scan) is not None)
    residual, reason = None, "no residual add follows its output"
    if add is not None:
        residual = _residual(add, scan)
    windows: list[Node] = []
    if conv is not None:
        uses = [user for source in _views_of(conv.args[0]) for user in source.users]  # type: ignore[arg-type]
        windows = [user for user in uses if suffix(user, Length(value_of(x)))]  # type: ignore[arg-type]
        if any(user.target is torch.nn.functional.pad for user in uses):
            residual, reason = None, "the prompt is shorter than the convolution"
    per_state = value_of(A).numel()  # type: ignore[arg-type]
    return Mixer(
        path=_path(scan),
        scan=scan,
        x=value_of(x),  # type: ignore[arg-type]
        add=add,
        residual=residual,
        windows=windows,
        # Two operations for each weight; in the scan seven for each state (Δ·A, exp, decay, two for B, two for C), in the
        # score four (A·S, exp, two for the sum).
        entering_flops=2 * sum(_weights(node) for node in projections) + 2 * _weights(conv),
        scanned_flops=2 * _weights(out_proj) + 7 * per_state,
        scoring_flops=4 * per_state,
        reason=None if residual is not None else reason,
    )


def _residual(node: Node, scan: Node) -> Node | None:
    """The operand of an add that passes the mixer by: what the mixer was made of, and not the output of another branch."""
    if node.target not in ADDS or len(node.all_input_nodes) != 2:
        return None
    outside = [source for source in node.all_input_nodes if not _reaches(scan, source)]
    if len(outside) != 1:
        return None
    origin = outside[0]
    while origin.target in CASTS | SCALES and isinstance(origin.args[0], Node) and len(origin.all_input_nodes) == 1:
        origin = origin.args[0]
    return outside[0] if _reaches(origin, scan) else None


def _weights(node: Node | None) -> int:
    """How many weights a projection or a convolution has."""
    if node is None:
        return 0
    weight = node.args[0] if node.target in PRODUCTS else node.args[1]
    return int(value_of(weight).numel())  # type: ignore[arg-type]


def _path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    name = list(stack.values())[-1][0]
    for prefix in ("L['self'].", "L['model'].", "L['fn'].", "self."):
        name = name.removeprefix(prefix)
    return name.replace("._modules", "").replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")


def _before(node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The nearest wanted node among what `node` is made of, nearest inputs first."""
    return _search([node], lambda found: found.all_input_nodes, wanted)


def _after(node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The nearest wanted node among what is made of `node`."""
    return _search(node.users, lambda found: found.users, wanted)


def _search(start: Iterable[Node], step: Callable[[Node], Iterable[Node]], wanted: Callable[[Node], bool]) -> Node | None:
    queue = list(start)
    seen = set(queue)
    for node in queue:  # grows while it is walked: breadth first
        if wanted(node):
            return node
        for found in step(node):
            if found not in seen:
                seen.add(found)
                queue.append(found)
    return None


def _reaches(source: Node, node: Node) -> bool:
    """Whether `node` is made of `source`."""
    return node is source or _search([node], lambda found: found.all_input_nodes, lambda found: found is source) is not None


def _views_of(node: Node) -> list[Node]:
    """The node and what it is a plain view or cast of, as far as one value goes."""
    found = [node]
    while found[-1].target in CASTS | {"transpose", torch.transpose} and isinstance(found[-1].args[0], Node):
        found.append(found[-1].args[0])
    return found
