"""What is fused and moved when a graph is lowered, and what must be left as it is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from conftest import have_products_of_torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.testing._internal.two_tensor import TwoTensor
from toys import HIDDEN, OPS, Captured, half_written, heads, matrix, tokens, toys

from simba_compile import Options
from simba_compile.backend import compile_inner
from simba_compile.passes import lower, prune
from simba_compile.passes.edit import erase
from simba_compile.passes.length import value_of
from simba_compile.passes.lower import linear_onto, rates
from simba_compile.passes.match import match
from simba_compile.passes.plan import make_plan
from simba_compile.passes.rows import make_rows


def test_nodes_are_erased_once(recwarn: pytest.WarningsRecorder) -> None:
    """Also those that go with another one. FX warns of more, and a user's -W error would end the compilation."""
    graph = Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.sin, (x,))
    second = graph.call_function(torch.cos, (first,))
    read = graph.call_function(torch.tan, (x,))
    last = graph.call_function(torch.add, (second, first))
    graph.output(read)
    erase(last, first, second, last, read, x)
    assert [node.name for node in graph.nodes] == ["x", "tan", "output"] and not recwarn.list


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
    pruned, _ = prune(captured.gm, plan, options)
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


RESIDUALS: dict[str, tuple[Callable, int]] = {
    "right": (lambda h: h + F.linear(h, matrix), 1),
    "left": (lambda h: F.linear(h, matrix) + h, 1),
    "bias": (lambda h: h + F.linear(h, matrix, matrix[0]), 0),
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


@pytest.mark.parametrize("case", ["float", "half", "written", "updates", "rounded", "read", "double", "cpu"])
def test_lower_lays_out_the_rates_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, for score and scan, of A_log as it is there; not where it changes in between, nor where exp is of halves."""
    if case != "cpu":
        have_products_of_torch(monkeypatch)
    wide = torch.float64 if case == "double" else torch.float32
    A_log, B = torch.rand(HIDDEN, 3).to(torch.bfloat16 if case == "half" else wide), torch.randn(HIDDEN, 3, dtype=wide)

    def scan(h: Tensor) -> Tensor:
        logarithm = A_log * 2
        exp = torch.exp(logarithm.bfloat16().float() if case == "rounded" else logarithm.to(wide))
        if case == "written":
            logarithm.add_(1)
        A, b = -exp, h @ B
        if case == "updates":
            return OPS.state_update(A[None] * 2, h[:1, 0], h[:1, 0], A, b[:1, 0], b[:1, 0], None, None, None, True)
        score = OPS.influence(h, h, A, b, b, None, True, "max", True)
        if case == "read":
            score = score + A.flatten()[0]
        return OPS.selective_scan(h, h, A, b, b, None, None, None, True, None)[0] + score[:, :, None]

    captured = Captured(scan, tokens().to(wide))
    after = captured.lowered()
    laid_out = case in ("float", "half", "rounded")
    assert after.count(rates) == laid_out and (torch.exp in after) != laid_out
    if laid_out:
        (node,) = (node for node in captured.gm.graph.nodes if node.target is rates)
        assert value_of(node.args[0]).dtype == (torch.float32 if case == "float" else torch.bfloat16)


def test_rates_are_laid_out_for_the_kernels() -> None:
    A_log = torch.randn(5, 3, dtype=torch.bfloat16)
    assert torch.equal(rates(A_log), -torch.exp(A_log.float())) and rates(A_log).t().is_contiguous()
    A_log = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(rates(A_log).sum(), A_log)
    torch.testing.assert_close(gradient, -torch.exp(A_log), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["like", "sizes", "method", "read", "part", "itself", "out", "by name"])
def test_lower_leaves_what_is_written_over_unfilled(case: str) -> None:
    """The first states of a cache; zeros that something reads, or of which some stay, are zeros."""

    def state(h: Tensor) -> Tensor:
        memory = torch.ones(h.shape) if case == "out" else h
        seen = memory.view(-1)
        make = {"sizes": lambda: torch.zeros(h.shape), "method": lambda: h.new_zeros(h.shape)}
        make["out"] = lambda: torch.zeros(h.shape, out=memory)
        zeros = make.get(case, lambda: torch.zeros_like(h))()
        if case == "out":
            h = h + (seen * 2).view(h.shape)
        if case == "by name":
            return zeros.copy_(other=h)
        before = zeros * 2 if case == "read" else h
        place = zeros[:, :2] if case == "part" else zeros
        place.copy_(zeros if case == "itself" else h[:, :2] if case == "part" else h)
        return zeros + before

    filled = {torch.zeros, torch.zeros_like, "new_zeros"} & {*Captured(state, tokens()).lowered()}
    assert bool(filled) == (case not in ("like", "sizes", "method"))


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
    "the copy is returned": (lambda h: h.transpose(1, 2).contiguous().transpose(1, 2), 2),
    "a view of the copy is returned": (lambda h: h.transpose(1, 2).contiguous().transpose(1, 2)[:, :2], 2),
    "the input is returned": (lambda h: h.transpose(1, 2).transpose(1, 2), 2),
    "a view is written": (lambda h: (lambda x: x.transpose(1, 2).transpose(1, 2).copy_(-x) + x)(h.clone()), 0),
}


@pytest.mark.parametrize("case", TURNS)
def test_transposes_cancel_only_where_no_copy_is_needed(case: str) -> None:
    function, left = TURNS[case]
    assert Captured(function, tokens()).lowered().count("transpose") == left


SLICES: dict[str, tuple[Callable, bool]] = {  # and whether one is left
    "all of them": (lambda h: h[..., -h.shape[-1] :] + 1, False),
    "all tokens": (lambda h: h[:, -h.shape[1] :, :] + 1, False),
    "from the start": (lambda h: h[:, : h.shape[1]] + 1, False),
    "all but one": (lambda h: h[:, 1:] + 1, True),
    "a written one": (lambda h: (lambda x: x[:, -x.shape[1] :].mul_(2) + x)(h.clone()), False),
    "another axis": (lambda h: h[:, None] + 1, True),
    "in another order": (lambda h: h[:, torch.arange(h.shape[1] - 1, -1, -1)] + 1, True),
}


@pytest.mark.parametrize("case", SLICES)
def test_slices_that_take_all_are_left_out(case: str) -> None:
    function, is_left = SLICES[case]
    assert (operator.getitem in Captured(function, tokens()).lowered()) is is_left


JOINED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether it is a copy of one value
    "keys of a cache": (lambda h: torch.cat([h.new_empty(0), heads(h)], -2), True),
    "nothing last": (lambda h: torch.cat([heads(h), heads(h)[:, :, :0]], 2), True),
    "two": (lambda h: torch.cat([h.new_empty(0), heads(h), heads(h)], -2), False),
    "of another type": (lambda h: torch.cat([h.new_empty(0, dtype=torch.float64), heads(h)], -2), False),
    "alone": (lambda h: torch.cat([heads(h)], -2), False),
}


@pytest.mark.parametrize("case", JOINED)
def test_what_is_joined_with_nothing_is_copied(case: str) -> None:
    function, is_copied = JOINED[case]
    captured = Captured(function, tokens())
    assert (torch.cat not in captured.lowered()) is is_copied
    if case == "keys of a cache":  # a step would be compiled for each layout
        (result,) = compile_inner(captured.gm, "inductor")(*captured.args)
        assert result.is_contiguous()


def test_what_is_returned_is_no_input_itself() -> None:
    """A caller may change what is no number in it: its shape, whether it needs gradients."""
    captured = Captured(lambda h: (h[:, -h.shape[1] :], h.sum()), tokens())
    lower(captured.gm)
    assert operator.getitem in captured.targets()


def test_a_slice_without_gradients_is_left() -> None:
    """What it gives needs none, and what it is of does."""

    def function(h: Tensor) -> Tensor:
        with torch.no_grad():
            part = h[:, -h.shape[1] :]
        return part * 2 + h

    captured = Captured(function, tokens().requires_grad_(), gradients=True)
    assert operator.getitem in captured.lowered()


@pytest.mark.parametrize(
    "case",
    [
        *("scan", "window", "read", "read later", "zeros read", "twice", "another type", "another shape", "another layout"),
        *("detached", "not ours", "out", "part of it"),
    ],
)
def test_lower_keeps_what_an_operator_made_for_a_cache(case: str) -> None:
    """Without a copy of it; but where something else reads it, or it is not what the cache would hold, with one."""
    A = -torch.rand(HIDDEN, 3)

    def fill(h: Tensor) -> Tensor:
        B = h[..., :3].contiguous()
        y, state = OPS.selective_scan(h, h, A, B, B, None, None, None, True, None)
        window = OPS.last_tokens(h, 4, 1)
        make = {"window": lambda: window, "part of it": lambda: window[:, 1:], "not ours": lambda: h * 2}
        made = make.get(case, lambda: state)()
        before = made.sum() if case == "read" else y.sum()
        memory = torch.ones(h.shape[0], HIDDEN, 3)
        if case == "another shape":
            kept = torch.zeros(2, h.shape[0], HIDDEN, 3)
        elif case == "out":
            kept = torch.zeros(h.shape[0], HIDDEN, 3, out=memory)
        elif case == "another layout":
            kept = torch.zeros_like(h[:, :3].transpose(1, 2))
        else:
            kept = torch.zeros_like(made, dtype=torch.float64 if case == "another type" else None)
        if case == "zeros read":
            before = before + kept.sum()
        if case == "detached":
            with torch.no_grad():
                kept.copy_(made)
        else:
            kept.copy_(made)
        if case == "part of it":
            window.mul_(2)
        if case == "twice":
            kept = kept + torch.zeros_like(made).copy_(made)
        return kept * (made.sum() if case == "read later" else 2) + before + memory.sum()

    captured = Captured(fill, tokens(), gradients=case == "detached")
    assert ("copy_" in captured.lowered()) is (case not in ("scan", "window"))


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
