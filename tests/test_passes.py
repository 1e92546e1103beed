"""Each pass on a small graph of its own, and operations that look along the tokens, which must never come out wrong."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import eager_reference as eager
import pytest
import torch
import torch.nn.functional as F
from conftest import SELECTING, exact_casts, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import simba_compile.backend
from simba_compile import Options
from simba_compile.passes import Transformed, lower, prune
from simba_compile.passes.functional import make_functional
from simba_compile.passes.lower import linear_onto
from simba_compile.passes.match import match
from simba_compile.passes.plan import make_plan, shares
from simba_compile.passes.rows import make_rows
from simba_compile.passes.tokens import FLAT, NO_TOKENS, UNCLEAR, Length, suffix

OPS = torch.ops.simba
HIDDEN, WIDTH, STATES, RANK, TAPS = 6, 10, 3, 2, 4


class Toy(nn.Module):
    """A mixer in operators of ours, with an RMS norm before it and a residual add after it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.in_proj = nn.Linear(HIDDEN, 2 * WIDTH, bias=False)
        self.conv = nn.Parameter(torch.randn(WIDTH, TAPS))
        self.x_proj = nn.Linear(WIDTH, RANK + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(RANK, WIDTH)
        self.A = nn.Parameter(-torch.rand(WIDTH, STATES) - 0.1)
        self.out_proj = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """A layer, in float32."""
        wide = h.to(torch.float32)
        normed = self.norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)
        x, z = self.in_proj(normed).transpose(1, 2).chunk(2, dim=1)
        x = OPS.causal_conv1d(x.transpose(1, 2), self.conv, None, True)
        dt, B, C = torch.split(self.x_proj(x), [RANK, STATES, STATES], dim=-1)
        dt = self.dt_proj.weight @ dt.transpose(1, 2)
        z = z.transpose(1, 2)
        y, _ = OPS.selective_scan(x, dt.transpose(1, 2), self.A, B, C, None, z, self.dt_proj.bias, True, None)
        return h + self.out_proj(y)


class Captured:
    """A module's graph with symbolic batch and length, and the tensors that Dynamo runs it on."""

    def __init__(self, module: Callable, *inputs: Tensor) -> None:
        def backend(gm: GraphModule, _: Any) -> Callable:
            self.gm = gm

            def run(*args: Any) -> Any:
                self.args = args
                return gm(*args)

            return run

        torch._dynamo.reset()
        for value in inputs:
            torch._dynamo.mark_dynamic(value, 0)
            torch._dynamo.mark_dynamic(value, 1)
        with torch.no_grad():
            self.result = torch.compile(module, backend=backend, fullgraph=True)(*inputs)

    def targets(self, graph: GraphModule | None = None) -> list[Any]:
        """What its nodes call."""
        return [node.target for node in (graph or self.gm).graph.nodes if node.op.startswith("call")]

    def lowered(self) -> list[Any]:
        """What its nodes call once it is lowered; the results are the same."""
        lower(self.gm)
        with torch.no_grad():
            result = self.gm(*self.args)
        result = result[0] if isinstance(result, tuple) else result
        torch.testing.assert_close(result, self.result, rtol=1e-5, atol=1e-6)
        return self.targets()


@functools.cache
def toys(layers: int) -> nn.Module:
    """So many layers."""
    torch.manual_seed(layers)
    return nn.Sequential(*(Toy() for _ in range(layers)))


def tokens(length: int = 20) -> Tensor:
    """A batch of two sequences."""
    return torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(length))


# --- match and tokens ------------------------------------------------------------------------------------------------


def test_match_finds_the_mixers_and_their_parts() -> None:
    captured = Captured(toys(2), tokens())
    make_rows(captured.gm.graph)
    mixers = match(captured.gm.graph)
    assert len(mixers) == 2
    assert [mixer.reason for mixer in mixers] == [None, None]
    (first_input,) = [
        node for node in captured.gm.graph.nodes if node.op == "placeholder" and Length(mixers[0].x).of(node) == 1
    ]
    assert mixers[0].residual is first_input
    assert mixers[1].residual is mixers[0].add
    per_state = WIDTH * STATES
    for mixer, name in zip(mixers, "01", strict=True):
        assert name in mixer.path.split(".")[-1]
        assert mixer.add is not None and [scan.target for scan in mixer.scans] == [OPS.selective_scan]
        assert mixer.windows == []
        projections = HIDDEN * WIDTH + WIDTH * (RANK + 2 * STATES) + RANK * WIDTH + WIDTH * TAPS
        assert mixer.entering_flops == 2 * projections
        gate = HIDDEN * WIDTH
        assert mixer.scanned_flops == 2 * (gate + WIDTH * HIDDEN) + 7 * per_state
        assert mixer.scoring_flops == 4 * per_state


def test_match_says_what_is_missing() -> None:
    layer = toys(1)[0]
    assert match(Captured(lambda h: layer.out_proj(h @ torch.ones(HIDDEN, WIDTH)), tokens()).gm.graph) == []

    def without_residual(h: Tensor) -> Tensor:
        x = layer.in_proj(h)[..., :WIDTH]
        B = layer.x_proj(x)[..., :STATES]
        return layer.out_proj(OPS.selective_scan(x, x, layer.A, B, B, None, None, None, True, None)[0])

    (mixer,) = match(Captured(without_residual, tokens()).gm.graph)
    assert mixer.reason == "no residual add follows its output"


def test_length_finds_the_token_axis() -> None:
    def function(h: Tensor) -> tuple[Tensor, ...]:
        return (
            h + 1,
            h.transpose(1, 2),
            h.mean(1),
            h.flatten(0, 1),
            h @ h.transpose(1, 2),
            h[:, 1:],
            h[:, -3:],
            h[:, :, 0],
        )

    captured = Captured(function, tokens())
    nodes = captured.gm.graph.output_node().args[0]
    (given_input,) = [
        n for n in captured.gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta["example_value"], Tensor)
    ]
    length = Length(given_input.meta["example_value"])
    assert length.is_symbolic
    assert [length.of(node) for node in nodes] == [1, 2, NO_TOKENS, FLAT, UNCLEAR, UNCLEAR, NO_TOKENS, 1]
    assert [suffix(node, length) for node in nodes] == [None] * 6 + [3, None]


# --- plan ------------------------------------------------------------------------------------------------------------


@functools.cache
def one_mixer() -> tuple[Any, Any]:
    """A graph and its mixer."""
    graph = Captured(toys(1), tokens()).gm.graph
    return graph, match(graph)[0]


@settings(max_examples=100)
@given(
    length=st.integers(1, 3000) | st.integers(1, 10**7),
    mixers=st.integers(1, 70),
    keep=st.floats(1e-3, 1),
    kind=st.sampled_from(["linear", "uniform", "list"]),
    every=st.integers(1, 5),
    limits=st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 100)),
)
def test_counts_are_the_contracts(
    length: int, mixers: int, keep: float, kind: str, every: int, limits: tuple[int, int, int]
) -> None:
    schedule = [keep ** (i / mixers) for i in range(mixers)] if kind == "list" else kind
    names = {"protect_first": limits[0], "protect_last": limits[1], "min_tokens": limits[2]}
    given_options = {"keep": keep, "schedule": schedule, "every": every, **names}
    graph, mixer = one_mixer()
    plan = make_plan(graph, [dataclasses.replace(mixer) for _ in range(mixers)], Options.from_mapping(given_options))
    assert plan is not None
    expected = eager.counts(length, mixers, **given_options)
    assert plan.counts(length) == expected
    assert plan.inputs(length) == [expected[i] for i in plan.pruning]
    drops = [i for i, (before, after) in enumerate(zip([length, *expected], expected, strict=False)) if after < before]
    assert set(drops) <= set(plan.pruning)


def test_a_plan_without_some_mixers() -> None:
    graph, mixer = one_mixer()
    plan = make_plan(graph, [dataclasses.replace(mixer) for _ in range(4)], Options(keep=0.1, min_tokens=1))
    assert plan is not None and plan.pruning == (1, 2, 3)
    shorter = plan.without(2, "because")
    assert shorter.pruning == (1,) and shorter.counts(1000) == [1000, 700, 700, 700]
    assert [m.reason for m in plan.mixers] == [None, None, "because", "because"]


def test_shares_of_a_list_must_fit() -> None:
    assert shares(Options(schedule=[1.0, 0.5]), 2) == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"lists 2 shares.*3 mixers"):
        shares(Options(schedule=[1.0, 0.5]), 3)


def test_what_the_graph_reads_from_the_end_is_protected() -> None:
    model = toys(2)
    captured = Captured(lambda h: model(h)[:, -5:], tokens())
    plan = make_plan(captured.gm.graph, match(captured.gm.graph), Options(protect_last=2))
    assert plan is not None and plan.protect_last == 5


# --- prune and restore -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["scan", "layer"])
def test_prune_scores_selects_and_restores(placement: str) -> None:
    captured = Captured(toys(3), tokens(40))
    options = Options(keep=0.2, placement=placement, min_tokens=1, schedule=[1.0, 0.5, 0.2])
    plan = make_plan(captured.gm.graph, match(captured.gm.graph), options)
    assert plan is not None
    before = str(captured.gm.graph)
    pruned = prune(captured.gm, plan, options)
    assert str(captured.gm.graph) == before  # the dense graph is still there
    called = captured.targets(pruned)
    assert [called.count(op) for op in (OPS.influence, OPS.select, OPS.restore, OPS.selective_scan)] == [2, 2, 1, 3]
    names = [node.name for node in pruned.graph.nodes if node.op == "placeholder"]
    assert names[-2:] == ["kept_1", "kept_2"]
    with torch.no_grad():
        result = pruned(*captured.args, 20, 8)[0]
        everything = pruned(*captured.args, 40, 40)[0]
    assert result.shape == (2, 40, HIDDEN)
    torch.testing.assert_close(everything, captured.result, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # a token that left after the first layer shows that layer's output
        first = toys(3)[0](tokens(40))
    same = (result - first).abs().amax(-1) < 1e-5
    assert same.sum(1).tolist() == ([20, 20] if placement == "scan" else [0, 0])


def test_nothing_is_restored_where_a_suffix_is_read() -> None:
    model = toys(2)
    captured = Captured(lambda h: model(h)[:, -2:] * 2, tokens(40))
    options = Options(keep=0.2, min_tokens=1)
    plan = make_plan(captured.gm.graph, match(captured.gm.graph), options)
    pruned = prune(captured.gm, plan, options)
    assert OPS.restore not in captured.targets(pruned) and OPS.last_tokens in captured.targets(pruned)
    with torch.no_grad():
        torch.testing.assert_close(pruned(*captured.args, 40)[0], captured.result, rtol=1e-5, atol=1e-6)


# --- lower -----------------------------------------------------------------------------------------------------------


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


def normed(x: Tensor, dim: int = -1, eps: float = 1e-5) -> Tensor:
    """An RMS norm over some axis."""
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps)


weight = torch.rand(HIDDEN) + 0.5
matrix = torch.randn(HIDDEN, HIDDEN)
NORMS: dict[str, tuple[Callable, int]] = {
    "plain": (lambda h: weight * normed(h), 1),
    "weight last": (lambda h: normed(h) * weight, 1),
    "no weight": (lambda h: normed(h), 1),
    "in halves": (lambda h: (weight.half() * normed(h.half().float()).half()).float(), 1),
    "over tokens": (lambda h: weight * normed(h, 1), 0),
    "cubes": (lambda h: weight * (h * torch.rsqrt(h.pow(3).abs().mean(-1, keepdim=True) + 1e-5)), 0),
    "of another": (lambda h: weight * (h * torch.rsqrt((h + 1).pow(2).mean(-1, keepdim=True) + 1e-5)), 0),
    "used twice": (lambda h: normed(h) * weight + normed(h), 2),
    "one weight for all": (lambda h: torch.full((1,), 2.0) * normed(h), 0),
    "written between": (lambda h: (lambda x: (lambda s, _: s * (x + 1))(normed(x), x.mul_(2)))(h.clone()), 1),
}


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
        monkeypatch.setattr(importlib.import_module("simba_compile.passes.lower"), "_is_ours", lambda product: False)
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


def test_lower_leaves_linear_layers_under_autocast_alone() -> None:
    def function(h: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(h, matrix)

    assert F.linear in Captured(function, tokens()).lowered()


def test_lower_drops_casts_that_do_nothing() -> None:
    assert "to" not in Captured(lambda h: h.to(torch.float32) + 1, tokens()).lowered()
    assert "float" not in Captured(lambda h: h.float() * 2, tokens()).lowered()
    assert "double" in Captured(lambda h: h.double().float(), tokens()).lowered()
    assert "to" in Captured(lambda h: h.to(torch.float32, copy=True), tokens()).lowered()


def test_lower_projects_rows() -> None:
    after = Captured(lambda h: (matrix @ h.transpose(1, 2)).transpose(1, 2), tokens()).lowered()
    assert OPS.linear in after and "transpose" not in after
    kept = Captured(lambda h: torch.matmul(h.transpose(1, 2), h), tokens()).lowered()
    assert F.linear not in kept


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


# --- operations that look along the tokens ---------------------------------------------------------------------------

TOKEN_MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda h: h,
    "layer norm": lambda h: h + F.layer_norm(h, (32,)),
    "mean": lambda h: h + h.mean(1, keepdim=True),
    "sum over T": lambda h: h + h.sum(1, keepdim=True) / h.shape[1],
    "mean of all": lambda h: h * h.abs().mean(),
    "largest": lambda h: h - h.amax(1, keepdim=True),
    "deviation": lambda h: h / h.std(1, keepdim=True),
    "cumsum": lambda h: h.cumsum(1) / 10,
    "flip": lambda h: h.flip(1),
    "roll": lambda h: torch.roll(h, 1, 1),
    "shift by cat": lambda h: h + torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1),
    "softmax": lambda h: h * torch.softmax(h, dim=1),
    "softmax of scores": lambda h: h + torch.softmax(h @ h.transpose(1, 2), -1) @ h,
    "doubled": lambda h: torch.cat([h, h], 1)[:, : h.shape[1]],
    "sorted": lambda h: h.sort(1).values,
    "first": lambda h: h + h[:, :1],
    "last": lambda h: h + h[:, -1:],
    "last three": lambda h: h + h[:, -3:].mean(1, keepdim=True),
    "pooled": lambda h: h + F.avg_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "scrambled": lambda h: h + h.reshape(h.shape[0], h.shape[2], h.shape[1]).transpose(1, 2),
    "flattened batch": lambda h: h + h.reshape(-1, 32).softmax(0).view(h.shape),
    "positions": lambda h: h + torch.arange(h.shape[1])[None, :, None] * 0.01,
    "batch mean": lambda h: h + h.mean(0, keepdim=True),
    "group norm": lambda h: h + F.group_norm(h.transpose(1, 2), 4).transpose(1, 2),
    "layer norm of tokens": lambda h: h + F.layer_norm(h, h.shape[1:]),
    "argmax": lambda h: h + h.argmax(1, keepdim=True) * 0.01,
    "in place": lambda h: h.clone().mul_(h.mean(1, keepdim=True)),
    "normalize": lambda h: F.normalize(h, dim=1) * 5,
    "interpolate": lambda h: h + F.interpolate(h.transpose(1, 2), scale_factor=2)[..., ::2].transpose(1, 2),
    "chunks of tokens": lambda h: h + torch.cat(h.chunk(2, 1)[::-1], 1),
    "softmax over the batch": lambda h: h + h * h.softmax(0),
    "over the length": lambda h: h + h / h.shape[1] * 10,
}


class Between(nn.Module):
    """Two blocks of Hugging Face's Mamba with a function of the stream between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = tiny_model(dtype=torch.float64, layers=2).backbone.layers
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        """The stream at the end."""
        return self.layers[1](self.function(self.layers[0](h)))


def acceptable(model: Between, h: Tensor, sizes: list[int]) -> list[Tensor]:
    """What the pruned model may give: the function sees the restored stream.

    What follows the function may begin on all tokens or on the kept ones, and a token that has left may take part in
    the function or keep what it had.
    """
    results = []
    for all_enter in (False, True):
        for those_who_left_take_part in (False, True):
            full, positions = h, torch.arange(h.shape[1]).expand(h.shape[0], -1)
            for i, (block, size) in enumerate(zip(model.layers, sizes, strict=True)):
                if i == 1:
                    changed = model.function(full)
                    if not those_who_left_take_part:
                        kept = eager._take(changed, positions)
                        changed = full.scatter(1, positions[..., None].expand_as(kept), kept)
                    full = changed
                if i == 1 and all_enter:
                    inputs = eager._before_scan(block.mixer, block.norm(full), None).take(positions)
                else:
                    inputs = eager._before_scan(block.mixer, block.norm(eager._take(full, positions)), None)
                index = eager.select(
                    eager._scores(block.mixer, inputs, size, "influence", "max", "include"), size, 0, 1
                )
                positions = eager._take(positions, index)
                output, _ = eager._scan_and_after(block.mixer, inputs.take(index))
                output = eager._take(full, positions) + output
                full = full.scatter(1, positions[..., None].expand_as(output), output)
            results.append(full)
    return results


@pytest.mark.parametrize("name", TOKEN_MIXING)
def test_what_looks_along_the_tokens_is_never_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is one that the contract allows, or the model (or its end) stays dense, with the reason."""
    model = Between(TOKEN_MIXING[name]).eval()
    h = torch.randn(2, 24, 32, dtype=torch.float64)
    found: list[Transformed] = []
    original = simba_compile.backend.transform
    monkeypatch.setattr(simba_compile.backend, "transform", lambda *args: found.append(original(*args)) or found[-1])
    prunings: list[Tensor] = []
    select = SELECTING.select
    monkeypatch.setattr(SELECTING, "select", lambda *args: prunings.append(select(*args)) or prunings[-1])
    options = {"schedule": [0.7, 0.3], "min_tokens": 3, "protect_last": 1}
    if name == "last three":
        options["protect_last"] = 3
    with torch.no_grad():
        out = torch.compile(model, backend="simba", fullgraph=False, options=options)(h)
        sizes = eager.counts(24, 2, **options)
        if prunings:
            sizes = [*[index.shape[1] for index in prunings], *[prunings[-1].shape[1]] * (2 - len(prunings))]
        if name == "last three":
            monkeypatch.setattr(
                eager, "select", lambda s, k, first, last, original=eager.select: original(s, k, first, 3)
            )
        with exact_casts():
            allowed = acceptable(model, h, sizes)
            dense = model(h)
    reasons = [mixer.reason for graph in found for mixer in graph.mixers]
    is_dense = torch.allclose(out, dense, rtol=1e-7, atol=1e-7)
    if not prunings:
        assert is_dense and all(reasons) and reasons
        return
    assert len(prunings) == 2 or any(reasons)
    assert not is_dense
    assert any(torch.allclose(out, one, rtol=1e-7, atol=1e-7) for one in allowed), [
        (out - a).abs().max() for a in allowed
    ]


Step = Callable[[nn.Module, Tensor, Tensor], Tensor]  # layer, stream, what the model was given
STRUCTURES: dict[str, Step] = {
    "no residual": lambda layer, h, _: layer.mixer(h),
    "scaled residual": lambda layer, h, _: 0.5 * h + layer.mixer(layer.norm(h)),
    "norm after": lambda layer, h, _: layer.norm(h + layer.mixer(h)),
    "side by side": lambda layer, h, x: h + layer.mixer(x),
    "mean added": lambda layer, h, _: h + layer.mixer(h) + h.mean(1, keepdim=True),
    "both directions": lambda layer, h, _: h + layer.mixer(h) + layer.mixer(h.flip(1)).flip(1),
    "input added again": lambda layer, h, x: layer(h) + x,
    "input concatenated": lambda layer, h, x: layer(torch.cat([h, x], -1)[..., ::2]),
    "gated": lambda layer, h, _: h + torch.sigmoid(h) * layer.mixer(layer.norm(h)),
    "same layer twice": lambda layer, h, _: layer(layer(h)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_other_structures_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense with the reason and equal to eager; or pruned, and equal to eager where everything is kept."""
    layers = tiny_model(dtype=torch.float64, layers=2).backbone.layers
    h = torch.randn(2, 24, 32, dtype=torch.float64)
    found: list[Transformed] = []
    original = simba_compile.backend.transform
    monkeypatch.setattr(simba_compile.backend, "transform", lambda *args: found.append(original(*args)) or found[-1])

    def function(x: Tensor) -> Tensor:
        h = x
        for layer in layers:
            h = STRUCTURES[name](layer, h, x)
        return h

    with torch.no_grad():
        with exact_casts():
            dense = function(h)
        out = torch.compile(function, backend="simba", options={"keep": 0.3, "min_tokens": 2})(h)
    assert out.shape == dense.shape and out.isfinite().all()
    if all(graph.pruned is None for graph in found):
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
        assert any(mixer.reason for graph in found for mixer in graph.mixers)
        return
    torch._dynamo.reset()  # with counts as large as the sequence, the rewritten graph is the dense one
    monkeypatch.setattr(
        simba_compile.backend,
        "run_by_length",
        lambda result, mode=None: lambda *args: result.pruned(*args, *[24] * len(result.plan.pruning)),
    )
    with torch.no_grad():
        everything = torch.compile(function, backend="simba", options={"keep": 0.3, "min_tokens": 2})(h)
    torch.testing.assert_close(everything, dense, rtol=1e-5, atol=1e-5)


# --- functional, and gathers before what they gather -----------------------------------------------------------------


IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], list[Any]]] = {
    "read before and after": (lambda h: (lambda w, s: (w.mul_(2), w + s)[1])(h + 1, h.sum()), ["mul"]),
    "by an operator": (lambda h: operator.itruediv(h + 1, 2), [operator.truediv]),
    "scatter": (
        lambda h: (lambda m: (m.scatter_(2, h.argmax(2, keepdim=True), 1.0), h * m)[1])(torch.zeros_like(h)),
        ["scatter"],
    ),
    "an input": (lambda h: h.mul_(2), ["mul_"]),
    "a view": (lambda h: (lambda w: (w[:, :3].mul_(2), w)[1])(h + 1), ["mul_"]),
    "seen through a view": (lambda h: (lambda w, v: (w.mul_(2), v + 1)[1])(*(lambda w: (w, w[:, :3]))(h + 1)), ["mul_"]),
    "another type": (lambda h: (h.half() + 1).mul_(h), ["mul_"]),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_writes_on_values_of_their_own_become_ordinary(case: str) -> None:
    function, expected = IN_PLACE[case]
    h = tokens()
    captured = Captured(function, h)
    make_functional(captured.gm.graph)
    captured.gm.recompile()
    writing = {"mul", "mul_", "scatter", "scatter_", operator.truediv, operator.itruediv, operator.mul, operator.imul}
    assert [target for target in captured.targets() if target in writing][: len(expected)] == expected
    torch.testing.assert_close(captured.gm(*[x.clone() if isinstance(x, Tensor) else x for x in captured.args])[0],
                               function(tokens()) if case != "an input" else 2 * h)  # fmt: skip


def test_gathers_go_before_what_is_computed_from_one_value() -> None:
    index = torch.tensor([[0, 3, 5], [1, 2, 19]])
    captured = Captured(lambda h: OPS.gather(F.silu((2 * h).float()), index, 1), tokens())
    after = captured.lowered()
    assert after.index(OPS.gather) < after.index(F.silu)
    twice = Captured(lambda h: (lambda y: OPS.gather(y, index, 1).sum() + y)(F.silu(h)), tokens())
    after = twice.lowered()
    assert after.index(F.silu) < after.index(OPS.gather)  # all of it is needed anyway


GATED: dict[str, tuple[Callable, int]] = {
    "two groups": (lambda h: gated(h, h + 1, 2), 1),
    "one group": (lambda h: gated(h, h + 1, 1), 1),
    "in float32": (lambda h: weight * groups_normed(h.float() * F.silu((h + 1).float()), 2).to(h.dtype), 1),
    "no gate": (lambda h: weight * groups_normed(h * torch.sigmoid(h), 2), 0),
    "a gate of one channel": (lambda h: gated(h, h[..., :1], 2), 0),
}


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
