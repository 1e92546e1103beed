"""Find the mixers: from every scan, back to the projections and the convolution before it, forward to the residual add.

hidden ─ in_proj ─┬─ conv ─┬─────────── x ─┐
                  │        ├ x_proj ─ B, C ─┤
                  │        └ … ─ dt_proj ─ dt ─ selective_scan ─ out_proj ─ + ─ hidden'
                  └──────────────────── z ─┘                                │
residual ───────────────────────────────────────────────────────────────────┘

In Mamba-2, B, C come out of the convolution and dt out of in_proj, and a norm takes the gate after the scan. A mixer of
several Mamba heads (zamba) has a scan for each head, behind one convolution.
"""

import dataclasses
import itertools
import operator
import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from simba_compile.passes.effects import is_inplace
from simba_compile.passes.length import Length, value_of
from simba_compile.passes.pieces import pieces_of
from simba_compile.passes.scans import CONV, MAMBA1, MIXER_OPERATORS, SCANS
from simba_compile.passes.tokens import CASTS, LINEAR, MUL, PRODUCTS, VIEWS, inputs_with_tokens, suffix
from simba_compile.passes.walk import made_of, reached

ADDS = {operator.add, torch.add, "add"}
SEVERAL = "the mixers of this graph do not follow one another, as if a model ran twice in it; compile the model by itself"


@dataclasses.dataclass
class Mixer:
    """One Mamba mixer in a graph.

    Attributes
    ----------
    path : str
        Where the module sits in the model, like ``backbone.layers.3.mixer``.
    scans : list of Node
        Its scan, or one for each of its heads.
    conv : Node or None
        Its convolution.
    x : Tensor
        What Dynamo saw as the (first) scan's input: (batch, token, ...).
    add, residual : Node or None
        The residual add after it, and the operand of it that does not come from the scan.
    windows : list of Node
        Slices of the convolution's input that a cache keeps for decoding.
    entering_flops, scanned_flops, scoring_flops : int
        Arithmetic for one token that enters, one that is scanned, one that is scored. The gate is made for those that are
        scanned (`lower.project_kept`).
    reason : str or None
        Why this mixer stays dense, where it does.
    """

    path: str
    scans: list[Node]
    conv: Node | None
    x: Tensor
    add: Node | None
    residual: Node | None
    windows: list[Node]
    entering_flops: int
    scanned_flops: int
    scoring_flops: int
    reason: str | None = None

    @property
    def kind(self) -> str:
        """Either "mamba1" or "mamba2"."""
        return SCANS[self.scans[0].target].kind  # type: ignore[index]


def match(graph: Graph) -> list[Mixer]:
    """The mixers of a graph, in its order."""
    scans = [node for node in graph.nodes if node.target in SCANS]
    heads: dict[Node, list[Node]] = {}  # by the convolution that they share, where they have one
    for scan in scans:
        heads.setdefault(_convolution(scan) or scan, []).append(scan)
    mixers = [_mixer(group) for group in heads.values()]
    if not all(_reaches(before.scans[0], after.scans[0]) for before, after in itertools.pairwise(mixers)):
        for mixer in mixers:
            mixer.reason = mixer.reason or SEVERAL
    return mixers


def _convolution(scan: Node) -> Node | None:
    found = _before(scan.args[0], lambda node: node.target in MIXER_OPERATORS)  # type: ignore[arg-type]
    return found if found is not None and found.target is CONV else None  # else the scan of the layer before


def _mixer(scans: list[Node]) -> Mixer:
    scan = scans[0]
    x, dt, _, B = scan.args[:4]
    conv = _convolution(scan)
    length = Length(value_of(x))
    weighted = LINEAR | PRODUCTS
    out_proj = _after(scan, lambda node: node.target in weighted)
    projections = {_before(source, lambda node: node.target in weighted) for source in (B, dt)}  # type: ignore[arg-type]
    gate = 0
    if conv is not None:
        in_proj = _before(conv.args[0], lambda node: node.target in weighted)  # type: ignore[arg-type]
        projections.add(in_proj)
        gate = _gate_weights(in_proj, scans)
    add = _after(out_proj or scan, lambda node: _residual(node, scan) is not None)
    residual = None if add is None else _residual(add, scan)
    windows: list[Node] = []
    reason = None if residual is not None else "no projection and residual add follow its scan"
    if conv is not None:
        sources = [source for source in _views_of(conv.args[0]) if source is not residual]  # type: ignore[arg-type]
        uses = [user for source in sources for user in source.users]
        windows = [user for user in uses if suffix(user, length) and _is_only_kept(user)]
        if length.of(conv) < 0:  # what it reads has another length than the prompt
            reason = "it goes on from a cache, or the prompt is shorter than the convolution"
        elif any(user.op == "output" for user in uses):
            reason = "all that its convolution reads is returned, as for a cache that records its past"
    work = [_arithmetic(head) for head in scans]
    return Mixer(
        path=path_of(scan),
        scans=scans,
        conv=conv,
        x=value_of(x),
        add=add,
        residual=residual,
        windows=windows,
        # Two operations for each weight.
        entering_flops=2 * (sum(_weights(node) for node in projections) + _weights(conv) - gate),
        scanned_flops=2 * (_weights(out_proj) + gate) + sum(scanned for scanned, _ in work),
        scoring_flops=sum(scored for _, scored in work),
        reason=reason,
    )


def _residual(node: Node, scan: Node) -> Node | None:
    """The operand of an add that passes the mixer by: what the mixer was made of, and not the output of another branch."""
    if node.target not in ADDS or len(node.all_input_nodes) != 2:
        return None
    outside = [source for source in node.all_input_nodes if not _reaches(scan, source)]
    if len(outside) != 1:
        return None
    origin = outside[0]
    length = Length(value_of(scan.args[0]))
    while origin.target in CASTS | MUL:  # a factor without tokens may come first: 0.5 * h
        factors = list(inputs_with_tokens(origin, length))
        if len(factors) != 1:
            break
        (origin,) = factors
    return outside[0] if _reaches(origin, scan) else None


def _arithmetic(scan: Node) -> tuple[int, int]:
    """Floating-point operations for one token that is scanned, and for one that is scored.

    Mamba-1: for each state seven in the scan (Δ·A, exp, decay, two for B, two for C), four in the score (A·S, exp, two for
    the sum). Mamba-2: five for each state (decay, two for B, two for C); the score takes a product C·B for each group, two
    for each of its numbers, and three for each channel.
    """
    kind = SCANS[scan.target]  # type: ignore[index]
    named = kind.named(scan.args)
    if kind is MAMBA1:
        states = value_of(named["A"]).numel()
        return 7 * states, 4 * states
    channels = value_of(named["x"]).shape[2:].numel()
    groups = value_of(named["B"]).shape[2:]
    return 5 * channels * groups[1], 2 * groups.numel() + 3 * channels


def _weights(node: Node | None) -> int:
    """How many weights a projection or a convolution has: those of the operand that does not vary with the call."""
    if node is None:
        return 0
    values = [value_of(operand) for operand in node.args[:2]]
    fixed = [value for value in values if all(isinstance(size, int) for size in value.shape)]
    weights = [value for value in fixed if isinstance(value, torch.nn.Parameter)] or fixed
    return weights[-1].numel() if weights else 0


def _gate_weights(in_proj: Node | None, scans: list[Node]) -> int:
    """How many weights of in_proj make what the scores do not need: the gate."""
    if in_proj is None or in_proj.target not in LINEAR:
        return 0
    read = [value for scan in scans for value in SCANS[scan.target].scored_of(scan.args)]  # type: ignore[index]
    scored = [value for value in read if isinstance(value, Node)]
    spared = [piece for piece in pieces_of(in_proj) if not any(_reaches(piece.node, value) for value in scored)]
    return sum(piece.last - piece.first for piece in spared) * value_of(in_proj.args[1]).shape[1]


def name_of(node: Node) -> str:
    """A node's name, with the module that computes it, which is what a person can look for in the model."""
    path = path_of(node)
    return node.name if path == node.name else f"{node.name} in {path}"


def path_of(node: Node) -> str:
    """The module that computes a node, as the model names it; the node's own name where it is in none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    name = re.sub(r"\['?(\w+)'?\]", r".\1", list(stack.values())[-1][0])  # L['self'].layers[0] is L.self.layers.0
    return re.sub(r"^(self|L\.args\.\d+|[LG]\.\w+)\.", "", re.sub(r"\.(__dict__|__self__|_modules)\b", "", name))


def _before(node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The nearest wanted node among what `node` is made of, nearest inputs first."""
    return next(filter(wanted, made_of(node)), None)


def _after(node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The nearest wanted node among what is made of `node`."""
    return next(filter(wanted, reached(node.users, lambda found: found.users)), None)


def _reaches(source: Node, node: Node) -> bool:
    """Whether `node` is made of `source`."""
    return source in made_of(node)


def _is_only_kept(node: Node) -> bool:
    """Whether nothing is computed from a value in this call: it is returned, or written into a cache."""
    uses = [user for user in node.users if user.op != "output" and not is_inplace(user)]
    return all(use.target in CASTS | VIEWS and _is_only_kept(use) for use in uses)


def _views_of(node: Node) -> list[Node]:
    """The node and what it is a plain view or cast of, as far as one value goes."""
    found = [node]
    while found[-1].target in CASTS | {"transpose", torch.transpose} and isinstance(found[-1].args[0], Node):
        found.append(found[-1].args[0])
    return found
