"""A decoding step of a whole Mamba-1 mixer: its kernel against its parts, and where it takes their place in a graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import cache_of, have_products_of_torch
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import Source, each_dtype, each_level, layouts, needs_native, seeds
from mixer_steps import assert_like_its_parts, assert_refused, assert_the_same_of_all_threads, assert_written_back
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves
from toys import Captured, lowered_step

from simba_compile.cli.models import going_on
from simba_compile.kernels import reference
from simba_compile.kernels.native import conv as native_conv
from simba_compile.kernels.native import linear as native_linear
from simba_compile.kernels.native import mixer as native_mixer
from simba_compile.kernels.native import scan as native_scan

OPS = torch.ops.simba


@st.composite
def steps(draw: st.DrawFn, dtype: torch.dtype) -> list[Any]:
    """The arguments of `mixer_update`."""
    source = Source(draw(seeds), dtype, draw(layouts))
    kind = draw(st.sampled_from([dtype, torch.float64 if dtype == torch.float64 else torch.float32]))
    batch, channels, states = draw(st.integers(0, 5)), draw(st.integers(1, 90)), draw(st.integers(1, 40))
    rank, width = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    small = 1 / channels**0.5

    def maybe(*shape: int) -> Tensor | None:
        return source.normal(*shape, dtype=kind) if draw(st.booleans()) else None

    return [
        source.normal(batch, channels, states, dtype=reference.compute_dtype(dtype)),
        source.normal(batch, channels, width),
        source.laid_out(batch, 1, 2 * channels),
        source.normal(channels, width, dtype=kind),
        maybe(channels),
        source.laid_out(rank + 2 * states, channels) * small,
        source.laid_out(channels, rank) * small,
        maybe(channels),
        source.normal(channels, states, dtype=kind),
        maybe(channels),
    ]


def some(batch: int, channels: int, states: int, width: int, rank: int) -> list[Tensor]:
    """The same, in float32 and contiguous."""
    shapes = [(batch, channels, states), (batch, channels, width), (batch, 2 * channels), (channels, width), (channels,)]
    shapes += [(rank + 2 * states, channels), (channels, rank), (channels,), (channels, states), (channels,)]
    return [torch.randn(*shape) for shape in shapes]


def in_parts(state, window, projected, weight, bias, x_proj, dt_proj, dt_bias, A_log, D):  # type: ignore[no-untyped-def]
    """The same by the kernels of its parts."""
    x, z = projected.flatten(0, -2).chunk(2, -1)
    u = native_conv.conv_update(window, x, weight, bias, True)
    sizes = [dt_proj.shape[1], state.shape[2], state.shape[2]]
    dt, B, C = native_linear.linear(u, x_proj, None, None, None).split(sizes, -1)
    dt, A = native_linear.linear(dt, dt_proj, None, None, None), -A_log.to(state.dtype).exp()
    return native_scan.state_update(state, u, dt, A, B, C, D, z, dt_bias, True).view(*projected.shape[:-1], -1)


@needs_native
@each_level
@each_dtype
@settings(max_examples=15)
@given(data=st.data())
def test_mixer_update(level: int, dtype: torch.dtype, data: st.DataObject) -> None:
    assert_like_its_parts("mixer_update", data.draw(steps(dtype)), in_parts, level, data.draw(st.integers(1, 3)))


@needs_native
def test_more_channels_than_one_thread_takes() -> None:
    args = some(2, 700, 16, 4, 30)
    args[5] /= 26
    assert_the_same_of_all_threads("mixer_update", args)


@needs_native
@pytest.mark.parametrize("held", [torch.float64, torch.bfloat16], ids=str)
def test_states_of_another_dtype_are_written_back(held: torch.dtype) -> None:
    assert_written_back("mixer_update", some(2, 7, 3, 4, 2), held)


@needs_native
def test_what_c_takes_on_trust_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = some(2, 7, 3, 4, 2)
    assert_refused("mixer_update", args, {2, 5, 6}, monkeypatch)
    many = torch.randn(2, 7, 300), torch.randn(602, 7), torch.randn(7, 300)
    with pytest.raises(ValueError, match="300 states"):
        native_mixer.mixer_update(many[0], *args[1:5], many[1], *args[6:8], many[2], args[9])
    with pytest.raises(ValueError, match="width of 65"):
        native_mixer.mixer_update(args[0], torch.randn(2, 7, 65), args[2], torch.randn(7, 65), *args[4:])


# --- in a graph --------------------------------------------------------------------------------------------------------

HIDDEN, CHANNELS, STATES, RANK = 6, 10, 3, 2


class Step(nn.Module):
    """A mixer's decoding step as Hugging Face writes it, on states of its own; a method for each part, to change one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_proj = nn.Parameter(torch.randn(2 * CHANNELS, HIDDEN))
        self.conv = nn.Parameter(torch.randn(CHANNELS, 1, 4))
        self.x_proj = nn.Parameter(torch.randn(RANK + 2 * STATES, CHANNELS) / 3)
        self.dt_proj = nn.Linear(RANK, CHANNELS)
        self.A_log, self.D = nn.Parameter(torch.rand(CHANNELS, STATES)), nn.Parameter(torch.ones(CHANNELS))
        self.out_proj = nn.Parameter(torch.randn(HIDDEN, CHANNELS))

    def forward(self, h: Tensor, window: Tensor, state: Tensor) -> Any:
        """(batch, 1, hidden) of a token."""
        A = self.rate()
        x, z = F.linear(h, self.in_proj).transpose(1, 2).chunk(2, 1)
        return self.after(A, x, z, window, state)

    def after(self, A: Tensor, x: Tensor, z: Tensor, window: Tensor, state: Tensor) -> Any:
        """What follows in_proj."""
        u = OPS.conv_update(window, x.squeeze(2), self.conv.squeeze(1), None, self.silu)
        between = self.between(u, window, z)
        dt, B, C = self.pieces(F.linear(u[:, None], self.x_proj))
        dt = self.dt_proj.weight @ dt.transpose(1, 2)
        bias = self.dt_proj.bias
        gate, dt = self.gate(z), dt[..., 0]
        y = OPS.state_update(state, u, dt, A, B[:, 0], C[:, 0], self.D, gate, bias, self.softplus)
        return self.leave(y, u), between

    silu, softplus = True, True

    def pieces(self, made: Tensor) -> tuple[Tensor, ...]:
        return torch.split(made, [RANK, STATES, STATES], -1)

    def rate(self) -> Tensor:
        return -torch.exp(self.A_log)

    def gate(self, z: Tensor) -> Tensor:
        return z[..., 0]

    def between(self, u: Tensor, window: Tensor, z: Tensor) -> Any:
        return None

    def leave(self, y: Tensor, u: Tensor) -> Tensor:
        return F.linear(y[..., None].transpose(1, 2), self.out_proj)


class ReadsWhatIsBetween(Step):
    def between(self, u: Tensor, window: Tensor, z: Tensor) -> Any:
        return u * 2


class ReadsTheWindow(Step):
    def between(self, u: Tensor, window: Tensor, z: Tensor) -> Any:
        return window * 2


class Writes(Step):
    def between(self, u: Tensor, window: Tensor, z: Tensor) -> Any:
        return z.mul_(2).sum()


class AnotherRate(Step):
    def rate(self) -> Tensor:
        return -F.softplus(self.A_log)


class RateBeforeAWrite(Step):
    def rate(self) -> Tensor:
        A = super().rate()
        self.A_log.mul_(2)
        return A


class GateOfTheInput(Step):
    def gate(self, z: Tensor) -> Tensor:
        return F.silu(z)[..., 0]


class SwappedPieces(Step):
    def pieces(self, made: Tensor) -> tuple[Tensor, ...]:
        dt, C, B = super().pieces(made)
        return dt, B, C


class WithoutSilu(Step):
    silu = False


class WithoutSoftplus(Step):
    """Its steps are small, so that a negative one does no harm."""

    softplus = False

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.dt_proj.weight.mul_(0.01)
            self.dt_proj.bias.abs_()


class WiderProjection(Step):
    """in_proj makes something else besides, which another part of a layer might read."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Parameter(torch.randn(2 * CHANNELS + 4, HIDDEN))

    def forward(self, h: Tensor, window: Tensor, state: Tensor) -> Any:
        A = self.rate()
        x, z, _ = F.linear(h, self.in_proj).transpose(1, 2).split([CHANNELS, CHANNELS, 4], 1)
        return self.after(A, x, z, window, state)


class WiderSelection(Step):
    """x_proj makes something that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.x_proj = nn.Parameter(torch.randn(RANK + 2 * STATES + 5, CHANNELS) / 3)

    def pieces(self, made: Tensor) -> tuple[Tensor, ...]:
        return super().pieces(made[..., :-5])


class ReadTwice(Step):
    def leave(self, y: Tensor, u: Tensor) -> Tensor:
        return super().leave(y, u) + y.sum()


def lowered(module: nn.Module, batch: int, symbolic: bool) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """What the lowered graph of a step calls; its result and states, and those of the module."""
    return lowered_step(module, ((batch, 1, HIDDEN), (batch, CHANNELS, 4), (batch, CHANNELS, STATES)), symbolic)


@needs_native
@pytest.mark.parametrize(("batch", "symbolic"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("linear", [OPS.linear, F.linear], ids=["our-products", "torchs-products"])
def test_a_step_is_one_operator(linear: Any, batch: int, symbolic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products of torch, as on a GPU, too."""
    if linear is F.linear:
        have_products_of_torch(monkeypatch)
    targets, ours, theirs = lowered(Step(), batch, symbolic)
    assert [target for target in targets if target is not linear] == ["squeeze", OPS.mixer_update]
    assert targets.count(linear) == 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class ChangesAutocast(Step):
    def between(self, u: Tensor, window: Tensor, z: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return None


KEPT = [
    ReadsWhatIsBetween, ReadsTheWindow, Writes, AnotherRate, RateBeforeAWrite, GateOfTheInput, SwappedPieces, WithoutSilu,
    WithoutSoftplus, WiderProjection, WiderSelection, ReadTwice, ChangesAutocast,
]  # fmt: skip


@pytest.mark.parametrize("module", KEPT)
@pytest.mark.parametrize("batch", [1, 3])
def test_other_steps_stay_in_parts(module: type[Step], batch: int) -> None:
    targets, ours, theirs = lowered(module(), batch, False)
    assert OPS.mixer_update not in targets and targets.count(OPS.state_update) == targets.count(OPS.conv_update) == 1
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


LAID = {  # whether it is a view, and how many views the graph then has of A_log
    "as it is": (lambda A: A, True, 0),
    "repeated as Mamba-2 does": (lambda A: A[:, None, None].expand(-1, 5, 6)[:, 0, 0], True, 0),
    "other heads": (lambda A: A[[3, 2, 1, 0]], False, 1),
    "one head for all": (lambda A: A[:1].expand(4), True, 2),
    "the later heads": (lambda A: A[1:], True, 1),
}


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("laid", LAID)
def test_the_update_makes_A_of_its_logarithm(laid: str, kind: torch.dtype, written: bool) -> None:
    """Where it is a view, unchanged; of halves it may be the copy that was made in time."""
    A_log, (lay, is_view, views) = torch.rand(4).to(kind), LAID[laid]

    def step(x: Tensor) -> Tensor:
        parameter = A_log * 1
        A = lay(-torch.exp(parameter.float()))
        if written:
            parameter.add_(1)
        heads = x.unflatten(-1, (A.shape[0], -1))
        B = heads[:, :1]
        state = heads[..., None] * B[:, :, None]
        return OPS.ssd_state_update(state, heads, x[:, : A.shape[0]], A, B, B, None, None, True)

    after = Captured(step, Source(0, torch.float32, "plain").normal(2, 12)).lowered()
    halves = kind == torch.bfloat16
    assert after.count(torch.exp) == (not is_view or (written and not halves))
    assert after.count("float") == (halves and (written or views > 0))


def test_weights_of_another_kind_meet_torchs_products() -> None:
    """Quantised ones show a type like others, and need not know our operators."""
    module = Step()
    weight = module.x_proj.detach()
    module.x_proj = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    targets, ours, theirs = lowered(module, 3, False)
    assert F.linear in targets and OPS.mixer_update not in targets
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(*(value.a if isinstance(value, TwoTensor) else value for value in (a, b)))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_decodes_with_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a Hugging Face model after a prompt are as near to its steps in float64 as eager's are; so are its states."""
    model = tiny_model("mamba", dtype)
    exact_model = copy.deepcopy(model).double()
    rates: list[torch.dtype] = []
    kernel = native_mixer.mixer_update
    monkeypatch.setattr(native_mixer, "mixer_update", lambda *args: rates.append(args[8].dtype) or kernel(*args))
    ids = torch.arange(40)[None].repeat(2, 1)

    def decode(prefill: nn.Module, step: Any) -> list[Tensor]:
        out = prefill(ids, use_cache=True)
        made = [step(ids[:, i : i + 1], **going_on(out), use_cache=True).logits for i in range(4)]
        return [*made, *tree_leaves([[layer.recurrent_states, layer.conv_states] for layer in cache_of(out).layers])]

    torch._dynamo.reset()
    with torch.no_grad():
        ours = decode(model, torch.compile(model, backend="simba"))
        eager, exact = decode(model, model), decode(exact_model, exact_model)
    assert rates == [dtype] * (4 * model.config.num_hidden_layers)  # of A_log, which no cast widens
    for a, b, c in zip(ours, eager, exact, strict=True):
        off, allowed = ((value.double() - c).norm() for value in (a, b))
        assert off <= 1.2 * allowed + 4 * torch.finfo(torch.float32).eps * c.norm()
