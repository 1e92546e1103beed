"""A decoding step of a whole Mamba-2 mixer: its kernel against its parts, and where it takes their place in a graph."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import cache_of, have_products_of_torch, left_padding, random_ids
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import Source, each_dtype, each_level, layouts, needs_native, seeds
from mixer_steps import assert_like_its_parts, assert_refused, assert_the_same_of_all_threads, assert_written_back
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from toys import lowered_step

from simba_compile.cli.models import going_on
from simba_compile.kernels import reference
from simba_compile.kernels.native import conv as native_conv
from simba_compile.kernels.native import mixer as native_mixer
from simba_compile.kernels.native import norm as native_norm
from simba_compile.kernels.native import ssd as native_ssd

OPS = torch.ops.simba


@st.composite
def steps(draw: st.DrawFn, dtype: torch.dtype) -> list[Any]:
    """The arguments of `ssd_mixer_update`."""
    source = Source(draw(seeds), dtype, draw(layouts))
    kind = draw(st.sampled_from([dtype, torch.float64 if dtype == torch.float64 else torch.float32]))
    batch, groups, size, states = (draw(st.integers(*ends)) for ends in ((0, 4), (1, 3), (1, 40), (1, 40)))
    heads, width = groups * draw(st.integers(1, 4)), draw(st.integers(1, 6))
    norm_groups = draw(st.sampled_from([0, 1, groups, heads]))
    inner = heads * size
    mixed = inner + 2 * groups * states

    def maybe(*shape: int) -> Tensor | None:
        return source.normal(*shape, dtype=kind) if draw(st.booleans()) else None

    return [
        source.normal(batch, heads, size, states, dtype=reference.compute_dtype(dtype)),
        source.normal(batch, mixed, width),
        source.laid_out(batch, 1, inner + mixed + heads),
        source.normal(mixed, width, dtype=kind),
        maybe(mixed),
        maybe(heads),
        source.normal(heads, dtype=kind),
        maybe(heads),
        maybe(inner) if norm_groups else None,
        1e-5,
        norm_groups,
    ]


def some(batch: int, heads: int, size: int, states: int, norm_groups: int = 1) -> list[Any]:
    """The same with one group, in float32 and contiguous."""
    inner = heads * size
    mixed = inner + 2 * states
    shapes = [(batch, heads, size, states), (batch, mixed, 4), (batch, inner + mixed + heads), (mixed, 4), (mixed,)]
    return [*(torch.randn(shape) for shape in (*shapes, (heads,), (heads,), (heads,), (inner,))), 1e-5, norm_groups]


def in_parts(state, window, projected, weight, bias, dt_bias, A_log, D, norm_weight, eps, norm_groups):  # type: ignore[no-untyped-def]
    """The same by the kernels of its parts."""
    (heads, size, states), mixed = state.shape[1:], window.shape[1]
    gate, x, dt = projected.flatten(0, -2).split([heads * size, mixed, heads], -1)
    between = (mixed - heads * size) // 2
    x, B, C = native_conv.conv_update(window, x, weight, bias, True).split([heads * size, between, between], -1)
    B, C = B.unflatten(-1, (-1, states)), C.unflatten(-1, (-1, states))
    x = x.unflatten(-1, (heads, size))
    y = native_ssd.ssd_state_update(state, x, dt, -A_log.to(state.dtype).exp(), B, C, D, dt_bias, True).flatten(1)
    y = native_norm.gated_norm(y, gate, norm_weight, eps, norm_groups) if norm_groups else y
    return y.view(*projected.shape[:-1], -1)


@needs_native
@each_level
@each_dtype
@settings(max_examples=15)
@given(data=st.data())
def test_ssd_mixer_update(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    assert_like_its_parts("ssd_mixer_update", data.draw(steps(dtype)), in_parts, level, data.draw(st.integers(1, 3)))


@needs_native
def test_more_heads_than_one_thread_takes() -> None:
    args = some(2, 9, 64, 128)
    assert_the_same_of_all_threads("ssd_mixer_update", args)


@needs_native
@pytest.mark.parametrize("held", [torch.float64, torch.bfloat16], ids=str)
def test_states_of_another_type(held: torch.dtype) -> None:
    assert_written_back("ssd_mixer_update", some(2, 3, 4, 5), held)


@needs_native
def test_what_c_takes_on_trust_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = some(2, 3, 4, 5)
    assert_refused("ssd_mixer_update", args, {2}, monkeypatch)
    for groups in (-1, 5, 24):
        with pytest.raises(ValueError, match=f"norm_groups is {groups}; expected 0 or a divisor of 12"):
            native_mixer.ssd_mixer_update(*args[:10], groups)
    with pytest.raises(ValueError, match="a width of 1 to 64"):
        native_mixer.ssd_mixer_update(args[0], torch.randn(2, 22, 65), args[2], torch.randn(22, 65), *args[4:])


# --- in a graph --------------------------------------------------------------------------------------------------------

HIDDEN, HEADS, SIZE, GROUPS, STATES = 6, 4, 5, 2, 3
INNER, BETWEEN = HEADS * SIZE, GROUPS * STATES
MIXED = INNER + 2 * BETWEEN


class Step(nn.Module):
    """A mixer's decoding step as Hugging Face writes it, on states of its own; a method for each part, to change one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_proj = nn.Parameter(torch.randn(INNER + MIXED + HEADS, HIDDEN))
        self.conv, self.conv_bias = nn.Parameter(torch.randn(MIXED, 1, 4)), nn.Parameter(torch.randn(MIXED))
        self.dt_bias, self.A_log = nn.Parameter(torch.randn(HEADS)), nn.Parameter(torch.rand(HEADS))
        self.D, self.norm = nn.Parameter(torch.ones(HEADS)), nn.Parameter(torch.rand(INNER))
        self.out_proj = nn.Parameter(torch.randn(HIDDEN, INNER))

    def forward(self, h: Tensor, window: Tensor, state: Tensor) -> Any:
        """(batch, 1, hidden) of a token."""
        A, D, bias = -torch.exp(self.A_log), self.D[:, None].expand(-1, SIZE), self.dt_bias[:, None].expand(-1, SIZE)
        gate, mixed, dt = F.linear(h, self.in_proj).split([INNER, MIXED, HEADS], -1)
        x = mixed.transpose(1, 2).squeeze(2)
        u = OPS.conv_update(window, x, self.conv.squeeze(1), self.conv_bias, self.silu)
        between = self.between(u, window, gate)
        x, B, C = self.pieces(u)
        B, C = B.reshape(len(u), -1, STATES), C.reshape(len(u), -1, STATES)
        dt = dt.transpose(1, 2).expand(-1, -1, SIZE)[:, :, 0]
        y = OPS.ssd_state_update(
            state, x.reshape(-1, HEADS, SIZE), self.step(dt), A, B, C, D[:, 0], bias[:, 0], self.softplus
        )
        return self.leave(y, gate, u), between

    silu, softplus = True, True

    def pieces(self, made: Tensor) -> tuple[Tensor, ...]:
        return torch.split(made, [INNER, BETWEEN, BETWEEN], -1)

    def step(self, dt: Tensor) -> Tensor:
        return dt

    def between(self, u: Tensor, window: Tensor, gate: Tensor) -> Any:
        return None

    def normed(self, y: Tensor, gate: Tensor) -> Tensor:
        return OPS.gated_norm(y, gate, self.norm, 1e-5, GROUPS)

    def leave(self, y: Tensor, gate: Tensor, u: Tensor) -> Tensor:
        return F.linear(self.normed(y.reshape(-1, 1, INNER), gate), self.out_proj)


def lowered(module: nn.Module, batch: int, symbolic: bool = False) -> list[Any]:
    """What the lowered graph of a step calls; its results and states are the module's."""
    targets, ours, theirs = lowered_step(
        module, ((batch, 1, HIDDEN), (batch, MIXED, 4), (batch, HEADS, SIZE, STATES)), symbolic
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return targets


@needs_native
@pytest.mark.parametrize(("batch", "symbolic"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("linear", [OPS.linear, F.linear], ids=["our-products", "torchs-products"])
def test_a_step_is_one_operator(linear: Any, batch: int, symbolic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products of torch, as on a GPU, too."""
    if linear is F.linear:
        have_products_of_torch(monkeypatch)
    assert lowered(Step(), batch, symbolic) == [linear, "squeeze", OPS.ssd_mixer_update, linear]


class WithoutNorm(Step):
    def normed(self, y: Tensor, gate: Tensor) -> Tensor:
        return y


class OfHeads(Step):
    """As falcon_h1's, whose gate has heads."""

    def leave(self, y: Tensor, gate: Tensor, u: Tensor) -> Tensor:
        return F.linear((y * F.silu(gate.reshape(-1, HEADS, SIZE))).reshape(-1, 1, INNER), self.out_proj)


class AnotherGate(Step):
    def normed(self, y: Tensor, gate: Tensor) -> Tensor:
        return super().normed(y, gate * 2)


class ReadTwice(Step):
    def normed(self, y: Tensor, gate: Tensor) -> Tensor:
        return super().normed(y, gate) + y


class GateWritten(Step):
    def normed(self, y: Tensor, gate: Tensor) -> Tensor:
        gate.mul_(2)
        return super().normed(y, gate)


class WeightWritten(Step):
    def normed(self, y: Tensor, gate: Tensor) -> Tensor:
        self.norm.mul_(2)
        return super().normed(y, gate)


class WeightMade(Step):
    def normed(self, y: Tensor, gate: Tensor) -> Tensor:
        return OPS.gated_norm(y, gate, self.norm * 2, 1e-5, GROUPS)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("module", [WithoutNorm, OfHeads, AnotherGate, ReadTwice, GateWritten, WeightWritten, WeightMade])
def test_the_norm_stays_where_it_is_another(module: type[Step], batch: int) -> None:
    targets = lowered(module(), batch)
    assert targets.count(OPS.ssd_mixer_update) == 1 and not {OPS.conv_update, OPS.ssd_state_update} & {*targets}
    assert (OPS.gated_norm in targets) == (module not in (WithoutNorm, OfHeads))


class ReadsWhatIsBetween(Step):
    def between(self, u: Tensor, window: Tensor, gate: Tensor) -> Any:
        return u * 2


class ReadsTheWindow(Step):
    def between(self, u: Tensor, window: Tensor, gate: Tensor) -> Any:
        return window * 2


class Writes(Step):
    def between(self, u: Tensor, window: Tensor, gate: Tensor) -> Any:
        return gate.mul_(2).sum()


class SwappedPieces(Step):
    def pieces(self, made: Tensor) -> tuple[Tensor, ...]:
        x, C, B = super().pieces(made)
        return x, B, C


class FewerGroups(Step):
    """Some of the convolution's channels are not read."""

    def pieces(self, made: Tensor) -> tuple[Tensor, ...]:
        return tuple(piece[:, :size] for piece, size in zip(super().pieces(made), (INNER, STATES, STATES), strict=True))


class WithoutSilu(Step):
    silu = False


class WithoutSoftplus(Step):
    softplus = False

    def step(self, dt: Tensor) -> Tensor:
        return dt * 0.01


class AnotherStep(Step):
    def step(self, dt: Tensor) -> Tensor:
        return dt + 1


class ReadsTheConvolutionAfter(Step):
    def leave(self, y: Tensor, gate: Tensor, u: Tensor) -> Tensor:
        return super().leave(y, gate, u) + u.sum()


class ChangesAutocast(Step):
    def between(self, u: Tensor, window: Tensor, gate: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return None


KEPT = [
    ReadsWhatIsBetween, ReadsTheWindow, Writes, SwappedPieces, FewerGroups, WithoutSilu, WithoutSoftplus, AnotherStep,
    ReadsTheConvolutionAfter, ChangesAutocast,
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("module", KEPT)
def test_other_steps_stay_in_parts(module: type[Step], batch: int) -> None:
    targets = lowered(module(), batch)
    assert OPS.ssd_mixer_update not in targets
    assert targets.count(OPS.ssd_state_update) == targets.count(OPS.conv_update) == 1


@needs_native
@pytest.mark.parametrize("family", ["mamba2", "bamba", "nemotron_h", "zamba2", "granitemoehybrid", "falcon_h1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_decodes_with_it(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps give what they give in parts, to the last bit, and so its states; padded, too."""
    model = tiny_model(family, dtype)
    calls: list[tuple[Any, ...]] = []
    kernel: Callable = native_mixer.ssd_mixer_update
    monkeypatch.setattr(native_mixer, "ssd_mixer_update", lambda *args: calls.append(args) or kernel(*args))
    ids, mask = random_ids(2, 40), left_padding(2, 40)
    with torch.no_grad():
        prompt = model(ids, attention_mask=mask, use_cache=True)

    def decode() -> list[Tensor]:
        torch._dynamo.reset()
        out = copy.deepcopy(prompt)
        compiled = torch.compile(copy.deepcopy(model), backend="simba")
        with torch.no_grad():
            made = []
            for i in range(1, 5):
                longer = torch.cat([mask, mask.new_ones(2, i)], 1)
                made.append(compiled(ids[:, i : i + 1], attention_mask=longer, **going_on(out), use_cache=True).logits)
        layers = [layer for layer in cache_of(out).layers if hasattr(layer, "recurrent_states")]
        states = tree_leaves([[layer.recurrent_states, layer.conv_states] for layer in layers])
        return [*made, *(state for state in states if state is not None)]

    whole = decode()
    assert calls and len(calls) % 4 == 0
    assert {args[6].dtype for args in calls} == {dtype}  # of A_log, which no cast widens
    assert {args[10] > 0 for args in calls} == {family != "falcon_h1"}
    monkeypatch.setattr(sys.modules["simba_compile.passes.lower"], "fuse_ssd_step", lambda node: None)
    count = len(calls)
    for a, b in zip(whole, decode(), strict=True):
        assert torch.equal(a, b)
    assert len(calls) == count
