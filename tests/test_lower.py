"""What is fused and moved when a graph is lowered, and what must be left as it is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import have_products_of_torch
from torch import Tensor
from torch.fx import Node
from torch.testing._internal.two_tensor import TwoTensor
from toys import HIDDEN, OPS, Captured, matrix, tokens, toys

from simba_compile import Options
from simba_compile.passes import lower, prune
from simba_compile.passes.lower import linear_onto
from simba_compile.passes.match import match
from simba_compile.passes.plan import make_plan
from simba_compile.passes.rows import make_rows
from simba_compile.passes.tokens import CASTS, value_of


def test_lower_fuses_a_layer() -> None:
    captured = Captured(toys(1), tokens())
    before = captured.targets()
    assert "pow" in before and "transpose" in before and "to" in before
    after = captured.lowered()
    assert after.count(OPS.rms_norm) == 1 and after.count(OPS.linear) == 4 and F.linear not in after
    assert not {"pow", "mean", torch.rsqrt, "to"} & set(after)
    assert after.count("transpose") <= 3 < before.count("transpose")  # in_proj's, and back for each of its halves


def test_lower_hands_the_gathers_to_the_scan() -> None:
    captured = Captured(toys(2), tokens(40))
    make_rows(captured.gm.graph)
    options = Options(keep=0.2, min_tokens=1)
    plan = make_plan(captured.gm.graph, match(captured.gm.graph), options)
    pruned = prune(captured.gm, plan, options)
    with torch.no_grad():
        before = pruned(*captured.args, 8)[0]
    assert captured.targets(pruned).count(OPS.gather) >= 6
    lower(pruned)
    after = captured.targets(pruned)
    assert after.count(OPS.gather) == 1  # that of the residual went into the product which it is added to
    (gathered,) = (node for node in pruned.graph.nodes if node.target is OPS.gather)
    (gate,) = gathered.users  # in_proj, whose gate is made for the tokens that stay alone
    assert gate.target is OPS.linear
    scans = [node for node in pruned.graph.nodes if node.target is OPS.selective_scan]
    assert [scan.args[-1] is None for scan in scans] == [True, False]
    assert scans[1].args[-1].target is OPS.select and scans[1].args[6] is gate
    with torch.no_grad():
        torch.testing.assert_close(pruned(*captured.args, 8)[0], before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("one_index", [True, False])
def test_lower_hands_gathers_by_one_index_to_the_scan(one_index: bool) -> None:
    first, second, A = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN), -torch.rand(HIDDEN, 3)

    def scan(h: Tensor, kept: Tensor, other: Tensor) -> Tensor:
        values = (h, F.linear(h, matrix), F.linear(h, first), F.linear(h, second))
        indices = (kept, kept, kept, kept if one_index else other)
        u, dt, b, c = (OPS.gather(value, index, 1) for value, index in zip(values, indices, strict=True))
        return OPS.selective_scan(u, dt, A, b, c, None, None, None, True, None)[0]

    captured = Captured(scan, tokens(), torch.tensor([[0, 3, 4], [1, 2, 7]]), torch.tensor([[1, 3, 4], [1, 5, 6]]))
    assert captured.lowered().count(OPS.gather) == (0 if one_index else 4)


def _gate_alone(h: Tensor, kept: Tensor) -> Tensor:
    x, z, y = F.linear(h, wide).split([HIDDEN, HIDDEN, HIDDEN], -1)
    return OPS.gather(z, kept, 1) + OPS.gather(h, kept, 1) + x.mean() + y.mean()


def _gate_read_twice(h: Tensor, kept: Tensor) -> Tensor:
    x, z = F.linear(h, wide).chunk(2, -1)
    return OPS.gather(z, kept, 1) + z.mean() + x.mean()


def _gate_first(h: Tensor, kept: Tensor) -> Tensor:
    z, x, y = F.linear(h, wide).split([HIDDEN, HIDDEN, HIDDEN], -1)
    return OPS.gather(z, kept, 1) + x.mean() + y.sin().mean()


def _projection_read_whole(h: Tensor, kept: Tensor) -> Tensor:
    projected = F.linear(h, wide)
    return OPS.gather(projected.chunk(2, -1)[1], kept, 1) + projected.mean()


def _one_piece(h: Tensor, kept: Tensor) -> Tensor:
    return OPS.gather(F.linear(h, wide).chunk(3, -1)[1], kept, 1)


def _split_of_tokens(h: Tensor, kept: Tensor) -> Tensor:
    return OPS.gather(F.linear(h, wide).split(20, 1)[0], kept, 1)


def _input_written(h: Tensor, kept: Tensor) -> Tensor:
    h = h + 1
    view = h.view(h.shape)
    x, z = F.linear(h, wide).chunk(2, -1)
    view.mul_(2)
    return OPS.gather(z, kept, 1) + x.mean() + view.mean()


def _under_autocast(h: Tensor, kept: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x, z = F.linear(h, wide).chunk(2, -1)
    return OPS.gather(z, kept, 1).float() + x.mean().float()


wide = torch.randn(3 * HIDDEN, HIDDEN)


@pytest.mark.parametrize(
    ("function", "projects_kept"),
    [
        (_gate_alone, True),
        (_gate_first, True),
        (_gate_read_twice, False),
        (_projection_read_whole, False),
        (_one_piece, False),
        (_split_of_tokens, False),
        (_input_written, False),
        (_under_autocast, False),
    ],
)
def test_lower_makes_the_gate_for_kept_tokens(function: Callable, projects_kept: bool) -> None:
    kept = torch.tensor([[0, 3, 4, 19], [1, 2, 7, 8]])
    captured = Captured(function, tokens(), kept)
    captured.lowered()
    products = [node for node in captured.gm.graph.nodes if node.target in {F.linear, torch._C._nn.linear, OPS.linear}]
    assert any(node.args[0].target is OPS.gather for node in products) == projects_kept
    if projects_kept:  # each of the pieces is made once, and the whole no more
        assert sum(int(value_of(node.args[1]).shape[0]) for node in products) == len(wide)


def normed(x: Tensor, dim: int | Sequence[int] = -1, eps: float = 1e-5) -> Tensor:
    """An RMS norm over some axis."""
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps)


weight = torch.rand(HIDDEN) + 0.5
NORMS: dict[str, tuple[Callable, int]] = {
    "plain": (lambda h: weight * normed(h), 1),
    "weight last": (lambda h: normed(h) * weight, 1),
    "no weight": (lambda h: normed(h), 1),
    "in halves": (lambda h: (weight.half() * normed(h.half().float()).half()).float(), 1),
    "in halves, with a weight in float32": (
        lambda h: (weight.half().float() * normed(h.half().float())).half().float(),
        1,
    ),
    "rounded after the weight, and read before": (
        lambda h: (lambda y: y.half() + y)(weight * normed(h.half().float())),
        0,
    ),
    "over tokens": (lambda h: weight * normed(h, 1), 0),
    "over a list of one": (lambda h: weight * normed(h, [-1]), 1),
    "over a tuple of one": (lambda h: weight * normed(h, (-1,)), 1),
    "over tokens in a tuple": (lambda h: weight * normed(h, (-2,)), 0),
    "cubes": (lambda h: weight * (h * torch.rsqrt(h.pow(3).abs().mean(-1, keepdim=True) + 1e-5)), 0),
    "of another": (lambda h: weight * (h * torch.rsqrt((h + 1).pow(2).mean(-1, keepdim=True) + 1e-5)), 0),
    "used twice": (lambda h: normed(h) * weight + normed(h), 2),
    "one weight for all": (lambda h: torch.full((1,), 2.0) * normed(h), 0),
    "written between": (lambda h: (lambda x: (lambda s, _: s * (x + 1))(normed(x), x.mul_(2)))(h.clone()), 1),
    "a copy written": (lambda h: (lambda x, _: weight * normed(x))(*half_written(h.clone())), 0),
    "itself written": (lambda h: (lambda x, _: weight * x)(*half_written(normed(h))), 0),
    "a copy of it written": (lambda h: (lambda x, _: weight * x)(*half_written(normed(h).clone())), 0),
}


def half_written(x: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and what it was multiplied through: a view, so that the write stays one."""
    return x, x.transpose(1, 2)[:, :3].mul_(2)


@pytest.mark.parametrize("case", NORMS)
def test_lower_fuses_norms_and_only_norms(case: str) -> None:
    function, count = NORMS[case]
    captured = Captured(function, tokens())
    if case == "in halves":  # Hugging Face rounds before the weight, the operator after it
        captured.result = captured.result.half().float()
        lower(captured.gm)
        with torch.no_grad():
            torch.testing.assert_close(captured.gm(*captured.args)[0], captured.result, rtol=2e-3, atol=2e-3)
        assert captured.targets().count(OPS.rms_norm) == count
    else:
        assert captured.lowered().count(OPS.rms_norm) == count


RESIDUALS: dict[str, tuple[Callable, int]] = {
    "right": (lambda h: h + F.linear(h, matrix), 1),
    "left": (lambda h: F.linear(h, matrix) + h, 1),
    "bias": (lambda h: h + F.linear(h, matrix, weight), 0),
    "read twice": (lambda h: (lambda y: (h + y) * y)(F.linear(h, matrix)), 0),
    "one number": (lambda h: F.linear(h, matrix) + 1, 0),
    "broadcast": (lambda h: h[:, :1] + F.linear(h, matrix), 0),
    "broadcast batch": (lambda h: h[:1] + F.linear(h, matrix), 0),
    "scaled": (lambda h: torch.add(h, F.linear(h, matrix), alpha=2), 0),
    "flat": (lambda h: h[:, 0] + F.linear(h[:, 0], matrix), 0),
    "wider": (lambda h: (h.double() + F.linear(h, matrix)).float(), 0),
    "transposed": (lambda h: F.linear(h, matrix) + h.transpose(0, 1).contiguous().transpose(0, 1), 1),
    "itself": (lambda h: (lambda y: y + y)(F.linear(h, matrix)), 1),
    "written between": (lambda h: (lambda x: (lambda y, _: x + y)(F.linear(x, matrix), x.mul_(2)))(h.clone()), 0),
}


def sums(nodes: Iterable[Node]) -> int:
    """How many of them are products that add a residual themselves."""
    return sum(node.target is linear_onto or (node.target is OPS.linear and node.args[3] is not None) for node in nodes)


@pytest.fixture(params=["cpu", "elsewhere"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lower as for the CPU, where linear layers are ours, and as for other devices, where they are torch's."""
    if request.param == "elsewhere":
        have_products_of_torch(monkeypatch)
    return request.param


@pytest.mark.parametrize("case", RESIDUALS)
def test_lower_fuses_residual_adds_and_only_those(case: str, device: str) -> None:
    function, count = RESIDUALS[case]
    h = tokens()
    kept = h.clone()
    captured = Captured(function, h)
    captured.lowered()
    assert sums(captured.gm.graph.nodes) == count
    assert (OPS.linear in captured.targets()) == (device == "cpu")
    assert torch.equal(h, kept)


def test_lower_overwrites_only_what_it_gathered_itself(device: str) -> None:
    for function in (
        lambda h, index: OPS.gather(h, index, 1) + F.linear(h, matrix),
        lambda h, index: (lambda g: (g + F.linear(h, matrix)) * g)(OPS.gather(h, index, 1)),
    ):
        h, index = tokens(), torch.arange(20).expand(2, 20).contiguous()
        kept = h.clone()
        captured = Captured(function, h, index)
        captured.lowered()
        captured.lowered()  # runs it again on the same inputs
        assert torch.equal(h, kept)


def test_lower_gathers_the_residual_in_the_product() -> None:
    def function(h: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return OPS.gather(h, index, 1) + F.linear(x, matrix)

    after = Captured(function, tokens(20), tokens(5), torch.arange(3, 8).expand(2, 5)).lowered()
    assert OPS.gather not in after and OPS.linear in after

    def read_twice(h: Tensor, x: Tensor, index: Tensor) -> Tensor:
        gathered = OPS.gather(h, index, 1)
        return (gathered + F.linear(x, matrix)) * gathered

    after = Captured(read_twice, tokens(20), tokens(5), torch.arange(3, 8).expand(2, 5)).lowered()
    assert OPS.gather in after and OPS.linear in after


def test_lower_leaves_sums_with_columns_alone() -> None:
    """They have the operands of a product."""
    after = Captured(lambda h: matrix[:, :1] + h.transpose(1, 2), tokens()).lowered()
    assert OPS.linear not in after and F.linear not in after


@pytest.mark.parametrize("write", [False, True])
def test_lower_gathers_in_the_scan_only_what_stays_as_it_is(write: bool) -> None:
    A = -matrix.exp()

    def function(h: Tensor, index: Tensor) -> Tensor:
        x = h.clone()
        gathered = OPS.gather(x, index, 1)
        if write:
            half_written(x)
        y, _ = OPS.selective_scan(*[gathered] * 2, A, *[gathered] * 2, None, None, None, True, None)
        return y + x.mean()

    index = torch.tensor([[0, 3, 5], [1, 2, 19]])
    assert (OPS.gather in Captured(function, tokens(), index).lowered()) == write


def test_lower_leaves_linear_layers_under_autocast_alone(device: str) -> None:
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)

    def product_within(h: Tensor, index: Tensor) -> Tensor:
        with autocast:
            return F.linear(h, matrix)

    def sum_within(h: Tensor, index: Tensor) -> Tensor:
        product = F.linear(h, matrix)
        with autocast:
            return h + product

    def both_within(h: Tensor, index: Tensor) -> Tensor:
        kept = OPS.gather(h.bfloat16(), index, 1)
        with autocast:
            return kept + F.linear(kept.sin(), matrix)

    for function in (product_within, sum_within, both_within):
        targets = Captured(function, tokens(), torch.arange(3, 8).expand(2, 5)).lowered()
        assert linear_onto not in targets
        assert F.linear in targets or function is sum_within  # whose product is alone outside


@pytest.mark.parametrize("case", ["vector", "one bias for all", "no axis"])
def test_lower_leaves_linear_layers_of_other_shapes_to_torch(case: str) -> None:
    """A vector for a matrix, a bias that is no vector with a number for each row."""
    weight, bias = matrix[0] if case == "vector" else matrix, torch.ones(1 if case == "one bias for all" else ())
    targets = Captured(lambda h: F.linear(h, weight, bias), tokens(100)).lowered()
    assert OPS.linear not in targets


def test_lower_leaves_quantised_weights_to_torch(device: str) -> None:
    """They need know nothing but linear layers: no slices, no transposes, no operators of ours."""
    square, broad = (TwoTensor(value, value.clone()) for value in (matrix, wide))

    def function(h: Tensor, kept: Tensor) -> Tensor:
        x, z, y = F.linear(h + F.linear(h, square), broad).split([HIDDEN, HIDDEN, HIDDEN], -1)
        return OPS.gather(z, kept, 1) + x.mean() + y.mean()

    targets = Captured(function, tokens(), torch.tensor([[0, 3, 4, 19], [1, 2, 7, 8]])).lowered()
    assert targets.count(F.linear) == 2
    assert OPS.linear not in targets and linear_onto not in targets


def test_lower_drops_casts_that_do_nothing() -> None:
    assert "to" not in Captured(lambda h: h.to(torch.float32) + 1, tokens()).lowered()
    assert "float" not in Captured(lambda h: h.float() * 2, tokens()).lowered()
    assert "double" in Captured(lambda h: h.double().float(), tokens()).lowered()
    assert "to" in Captured(lambda h: h.to(torch.float32, copy=True), tokens()).lowered()


@pytest.mark.parametrize("case", ["half", "written", "narrowed"])
def test_lower_leaves_the_widening_to_the_operator(case: str) -> None:
    """Of a bias and D in half precision, that nobody writes in between; what narrows stays."""
    given = torch.float64 if case == "narrowed" else torch.bfloat16
    kind = given if case == "narrowed" else torch.float32
    A, B, D = -torch.rand(HIDDEN, 3, dtype=kind), torch.randn(HIDDEN, 3, dtype=kind), torch.randn(HIDDEN).to(given)

    def scan(h: Tensor) -> Tensor:
        bias, b = D * 2, h @ B
        widened = bias.float()
        if case == "written":
            bias.add_(1)
        return OPS.selective_scan(h, h, A, b, b, D.to(torch.float32), None, widened, True, None)[0]

    captured = Captured(scan, tokens().to(kind))
    after = captured.lowered()
    assert after.count("float") + after.count("to") == {"half": 0, "written": 1, "narrowed": 2}[case]


def test_lower_projects_rows() -> None:
    after = Captured(lambda h: (matrix @ h.transpose(1, 2)).transpose(1, 2), tokens()).lowered()
    assert OPS.linear in after and "transpose" not in after
    column = torch.randn(4, 1)
    for product in (
        lambda h: torch.matmul(h.transpose(1, 2), h),
        lambda h: h @ h.transpose(1, 2),  # no matrix
        lambda h: column @ h.unsqueeze(1).transpose(1, 2),  # no rows
    ):
        kept = Captured(product, tokens()).lowered()
        assert not {F.linear, OPS.linear} & {*kept} and {operator.matmul, torch.matmul} & {*kept}


TURNS: dict[str, tuple[Callable, int]] = {  # and how many transposes are left
    "twice": (lambda h: h.transpose(1, 2).transpose(1, 2) + 1, 0),
    "with a copy between": (lambda h: h.transpose(1, 2).contiguous().transpose(1, 2) + 1, 0),
    "other axes": (lambda h: h.transpose(1, 2).transpose(0, 1) + 1, 2),
    "read before it is written": (
        lambda h: (lambda x: (lambda y, _: y + x)(x.transpose(1, 2).contiguous().transpose(1, 2), x.copy_(-x)))(h.clone()),
        2,
    ),
    "written before the second": (
        lambda h: (lambda x: (lambda t, _: t.transpose(1, 2) + x)(x.transpose(1, 2).contiguous(), x.copy_(-x)))(h.clone()),
        2,
    ),
    "the copy is written": (
        lambda h: (lambda y: y.copy_(-y) + h)(h.transpose(1, 2).contiguous().transpose(1, 2)),
        2,
    ),
    "a view is written": (lambda h: (lambda x: x.transpose(1, 2).transpose(1, 2).copy_(-x) + x)(h.clone()), 0),
}


@pytest.mark.parametrize("case", TURNS)
def test_transposes_cancel_only_where_no_copy_is_needed(case: str) -> None:
    function, left = TURNS[case]
    assert Captured(function, tokens()).lowered().count("transpose") == left


def test_gathers_go_before_what_is_computed_from_one_value() -> None:
    index = torch.tensor([[0, 3, 5], [1, 2, 19]])
    captured = Captured(lambda h: OPS.gather(F.silu((2 * h).float()), index, 1), tokens())
    after = captured.lowered()
    assert after.index(OPS.gather) < after.index(F.silu)
    both = Captured(lambda h: OPS.gather(h * F.silu(h), index, 1), tokens()).lowered()
    assert both.index(F.silu) < both.index(OPS.gather)  # else two are gathered
    written = Captured(
        lambda h: (lambda z: (lambda y, _: OPS.gather(y, index, 1))(F.silu(z), z.mul_(2)))(h.clone()), tokens()
    ).lowered()
    assert written.index(F.silu) < written.index("mul_") < written.index(OPS.gather)
    twice = Captured(lambda h: (lambda y: OPS.gather(y, index, 1).sum() + y)(F.silu(h)), tokens())
    after = twice.lowered()
    assert after.index(F.silu) < after.index(OPS.gather)  # all of it is needed anyway


GATED: dict[str, tuple[Callable, int]] = {
    "two groups": (lambda h: gated(h, h + 1, 2), 1),
    "one group": (lambda h: gated(h, h + 1, 1), 1),
    "not grouped": (lambda h: weight * normed(h * F.silu(h + 1)), 1),
    "not grouped, and the product is written": (
        lambda h: (lambda y, _: weight * normed(y))(*half_written(h * F.silu(h + 1))),
        0,
    ),
    "not grouped, over tokens": (lambda h: weight * normed(h * F.silu(h + 1), 1), 0),
    "in float32": (lambda h: weight * groups_normed(h.float() * F.silu((h + 1).float()), 2).to(h.dtype), 1),
    "no gate": (lambda h: weight * groups_normed(h * torch.sigmoid(h), 2), 0),
    "no product": (lambda h: weight * groups_normed(h.sin(), 2), 0),
    "groups across tokens": (lambda h: weight * normed((h * F.silu(h + 1)).view(len(h), -1, 3)).view(h.shape), 0),
    "a gate of one channel": (lambda h: gated(h, h[..., :1], 2), 0),
    "one token": (lambda h: gated(h[:, 0], h[:, 0] + 1, 2), 1),
    "a write elsewhere": (lambda h: (lambda x, _: gated(h, h + 1, 2) + x)(*half_written(h.clone())), 1),
    "an update reads what the gate is a part of": (lambda h: _updated(h), 1),
    "a gate written": (lambda h: (lambda z, y, _: weight * groups_normed(h * y, 2))(*silu_written(h.clone())), 0),
    "a product written": (lambda h: (lambda y, _: weight * groups_normed(y, 2))(*half_written(h * F.silu(h + 1))), 0),
}


def _updated(h: Tensor) -> Tensor:
    """A step of Mamba-2: what reads the projection writes to a window, not to the projection."""
    x, z, _ = F.linear(h, wide).chunk(3, -1)
    step = OPS.conv_update(torch.zeros(len(h), HIDDEN, 4), x[:, 0], torch.ones(HIDDEN, 4), None, True)
    return gated(x + step[:, None], z, 2)


def silu_written(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gate, applied and then written to."""
    return z, F.silu(z), half_written(z)[1]


def groups_normed(h: Tensor, groups: int) -> Tensor:
    """As Hugging Face writes it."""
    grouped = h.view(*h.shape[:-1], groups, h.shape[-1] // groups)
    return (grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + 1e-5)).view(*h.shape[:-1], h.shape[-1])


def gated(h: Tensor, z: Tensor, groups: int) -> Tensor:
    """The norm after the scan of Mamba-2."""
    return weight * groups_normed(h * F.silu(z), groups)


@pytest.mark.parametrize("case", GATED)
def test_fuse_gated_norm(case: str) -> None:
    function, count = GATED[case]
    assert Captured(function, tokens()).lowered().count(OPS.gated_norm) == count


def some(h: Tensor, batch: int) -> Tensor:
    """Four of the tokens, the same of each sequence."""
    return OPS.gather(h, torch.tensor([[0, 3, 4, 19]]).expand(batch, -1), 1)


def norm_of_sum(stream: Tensor, x: Tensor) -> Tensor:
    """What the layers of a model in halves do between one another, its stream in float32."""
    total = stream + x
    return normed(total.half().float()).half() + total


def _sum_read_first(h: Tensor) -> Tensor:
    total = h + h.half()
    return total.sum() + normed(total.half().float()).half()


def _rounded_read_twice(h: Tensor) -> Tensor:
    rounded = (h + h.half()).half()
    return normed(rounded.float()).half() + rounded.float()


def _stream_written(h: Tensor) -> Tensor:
    stream = h.clone()
    total = stream + h.half()
    stream.mul_(2)
    return normed(total.half().float()).half() + stream


def _sum_written(h: Tensor) -> Tensor:
    total = h + h.half()
    rounded = total.half()
    total.mul_(2)
    return normed(rounded.float()).half() + total


def _source_written(h: Tensor) -> Tensor:
    source = h.clone()
    stream = some(source, len(h))
    source.mul_(2)
    return norm_of_sum(stream, h[:, :4].half()) + source.mean()


def _channels_turned(h: Tensor) -> Tensor:
    order = torch.arange(HIDDEN).flip(0).expand(len(h), -1)
    return norm_of_sum(OPS.gather(h, order, 2), h.half())


SUMS: dict[str, tuple[Callable, list[bool]]] = {  # for each that is fused, whether it gathers the stream, too
    "a wider stream": (lambda h: norm_of_sum(h, h.half()), [False]),
    "the stream last": (lambda h: norm_of_sum(h.half(), h), [False]),
    "kept tokens": (lambda h: norm_of_sum(some(h, len(h)), h[:, :4].half()), [True]),
    "kept tokens, the stream last": (lambda h: norm_of_sum(h[:, :4].half(), some(h, len(h))), [True]),
    "kept tokens of one stream": (lambda h: norm_of_sum(some(h[:1], len(h)), h[:, :4].half()), [False]),
    "kept tokens that are read again": (
        lambda h: (lambda k: norm_of_sum(k, h[:, :4].half()) + k)(some(h, len(h))),
        [False],
    ),
    "kept tokens whose source is written": (_source_written, [False]),
    "channels that are gathered": (_channels_turned, [False]),
    "one type": (lambda h: (lambda y: weight * normed(y) + y)(h + h.sin()), [False]),
    "nothing but the norm is read": (lambda h: weight * normed(h + h.sin()), [False]),
    "the norm in float32": (lambda h: weight * normed(h + h.half()), []),
    "a stream in float64": (lambda h: norm_of_sum(h.double(), h.half()), []),
    "one row for all": (lambda h: weight * normed(h + weight), []),
    "a number": (lambda h: weight * normed(h + 1), []),
    "a share": (lambda h: weight * normed(torch.add(h, h.sin(), alpha=2)), []),
    "a sum that is read first": (_sum_read_first, []),
    "a rounded sum that is read twice": (_rounded_read_twice, []),
    "a stream written between": (_stream_written, []),
    "a sum written between": (_sum_written, []),
}


@pytest.mark.parametrize("case", SUMS)
def test_fuse_add_norm(case: str) -> None:
    function, gathers = SUMS[case]
    captured = Captured(function, tokens())
    captured.lowered(2e-3)  # of halves, one may be rounded the other way
    fused = [node for node in captured.gm.graph.nodes if node.target is OPS.add_norm]
    assert [node.args[4] is not None for node in fused] == gathers


ROUNDED: dict[str, tuple[Callable, int]] = {  # and how many casts are left
    "to halves": (lambda h: gated(h, h + 1, 2).to(torch.bfloat16), 0),
    "as another value": (lambda h: gated(h, h + 1, 2).type_as(weight.half()), 0),
    "twice": (lambda h: gated(h, h + 1, 2).half().bfloat16(), 1),
    "read as it is, too": (lambda h: (lambda y: y.half() + y)(gated(h, h + 1, 2)), 1),
    "to whole numbers": (lambda h: gated(h, h + 1, 2).to(torch.int64), 1),
    "a gate written between": (
        lambda h: (lambda z, n: (lambda y, _: y.half() + z.half())(gated(n, z, 2), z.mul_(2)))(h.clone(), h + 1),
        2,
    ),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_the_gated_norm_rounds_itself(case: str) -> None:
    function, left = ROUNDED[case]
    after = Captured(function, tokens()).lowered()
    assert after.count(OPS.gated_norm) == 1
    assert sum(target in CASTS for target in after) == left
