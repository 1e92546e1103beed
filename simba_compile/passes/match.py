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
from torch.fx import Graph, Node

from simba_compile.passes.tokens import CASTS, LINEAR, PRODUCTS, Length, suffix, value_of

SCAN = torch.ops.simba.selective_scan
CONV = torch.ops.simba.causal_conv1d
ADDS = {operator.add, torch.add, "add"}
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
    conv, in_proj, x_proj, dt_proj, out_proj : Node or None
        The operations around it; None where there is none of the kind.
    add, residual : Node or None
        The residual add, and its operand that does not come from the scan.
    windows : list of Node
        Slices of the convolution's input that a cache keeps for decoding.
    reason : str or None
        Why this mixer stays dense, where it does.
    """

    path: str
    scan: Node
    conv: Node | None
    in_proj: Node | None
    x_proj: Node | None
    dt_proj: Node | None
    out_proj: Node | None
    add: Node | None
    residual: Node | None
    windows: list[Node]
    reason: str | None = None

    @property
    def x(self) -> Node:
        """The scan's input, (batch, token, channel)."""
        return self.scan.args[0]  # type: ignore[return-value]


def match(graph: Graph) -> list[Mixer]:
    """The mixers of a graph, in its order."""
    return [_mixer(node) for node in graph.nodes if node.target is SCAN]


def _mixer(scan: Node) -> Mixer:
    x, dt, B = scan.args[0], scan.args[1], scan.args[3]
    conv = _before(x, lambda node: node.target is CONV)  # type: ignore[arg-type]
    out_proj = _after(scan, lambda node: node.target in LINEAR)
    add = _after(out_proj or scan, lambda node: node.target in ADDS and len(node.all_input_nodes) == 2)
    residual, reason = None, None
    if add is None:
        reason = "no residual add follows its output"
    else:
        outside = [source for source in add.all_input_nodes if not _reaches(scan, source)]
        if len(outside) == 1:
            residual = outside[0]
        else:
            reason = "the add after its output has no operand that passes it by"
    windows: list[Node] = []
    if conv is not None:
        length = Length(value_of(scan.args[0]))  # type: ignore[arg-type]
        sources = _views_of(conv.args[0])  # type: ignore[arg-type]
        windows = [user for source in sources for user in source.users if suffix(user, length)]
        padded = [user for source in sources for user in source.users if user.target in (torch.nn.functional.pad,)]
        if padded:
            reason = "the prompt is shorter than the convolution"
    return Mixer(
        path=_path(scan),
        scan=scan,
        conv=conv,
        in_proj=None if conv is None else _before(conv.args[0], lambda node: node.target in LINEAR),  # type: ignore[arg-type]
        x_proj=_before(B, lambda node: node.target in LINEAR),  # type: ignore[arg-type]
        dt_proj=_before(dt, lambda node: node.target in LINEAR | PRODUCTS),  # type: ignore[arg-type]
        out_proj=out_proj,
        add=add,
        residual=residual,
        windows=windows,
        reason=reason,
    )


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
