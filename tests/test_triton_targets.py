"""Every Triton kernel, as its launcher starts it, compiled for real GPUs: it fits, nothing spills, hot loops are short."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")
import triton_targets
from triton_targets import TARGETS, check, compile_for, count, record

from simba_compile.kernels import gpu
from simba_compile.kernels.ops import dispatch

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
BATCH, TOKENS, CHANNELS, STATES = 2, 4096, 5120, 16  # the 2.8b model's widths


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor that has no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def scored(dtype: torch.dtype, pool: str, softplus: bool = True, bias: bool = True) -> tuple[Any, ...]:
    """The arguments of `influence`."""
    x, B, A = empty(BATCH, TOKENS, CHANNELS, dtype=dtype), empty(BATCH, TOKENS, STATES, dtype=dtype), (CHANNELS, STATES)
    return x, x, empty(*A, dtype=F32), B, B, empty(CHANNELS, dtype=dtype) if bias else None, softplus, pool, bias


def step(dtype: torch.dtype, states: int) -> tuple[Any, ...]:
    """The arguments of `state_update`."""
    x, B, D = empty(BATCH, CHANNELS, dtype=dtype), empty(BATCH, states, dtype=dtype), empty(CHANNELS, dtype=dtype)
    state, A = empty(BATCH, CHANNELS, states, dtype=F32), empty(CHANNELS, states, dtype=F32)
    return state, x, x, A, B, B, D, x, D, True, states == 16


def mixer_step(dtype: torch.dtype, states: int, rank: int, batch: int = 1) -> tuple[Any, ...]:
    """The arguments of `mixer_update`, whose kernel makes the steps, too, where the batch is small."""
    state, window = empty(batch, CHANNELS, states, dtype=F32), empty(batch, CHANNELS, 4, dtype=dtype)
    projected, filters = empty(batch, 1, 2 * CHANNELS, dtype=dtype), empty(CHANNELS, 4, dtype=dtype)
    x_proj, dt_proj = empty(rank + 2 * states, CHANNELS, dtype=dtype), empty(CHANNELS, rank, dtype=dtype)
    D, A_log = empty(CHANNELS, dtype=dtype), empty(CHANNELS, states, dtype=dtype)
    return state, window, projected, filters, D, x_proj, dt_proj, D, A_log, D


def mamba2(dtype: torch.dtype, pool: str, states: int = 128) -> tuple[Any, ...]:
    """The arguments of `ssd_influence`: 80 heads of 64 channels."""
    x, dt, B = (empty(BATCH, TOKENS, *shape, dtype=dtype) for shape in ((80, 64), (80,), (1, 128)))
    head, B = empty(80, dtype=F32), B[..., :states]
    return x, dt, head, B, B, head, True, 0.0, 1e6, pool, True


def normed(channels: int) -> tuple[Tensor, Tensor]:
    """Gate and weight of `gated_norm`; the gate is a piece of a wider tensor."""
    return empty(BATCH, TOKENS, 2 * channels)[..., :channels], empty(channels, dtype=F32)


def added(stream: torch.dtype, kept: int | None) -> tuple[Any, ...]:
    """The arguments of `add_norm` but its index: a residual in its own dtype, what is added, weight and eps."""
    x = empty(BATCH, TOKENS if kept is None else kept, 2560)
    return empty(BATCH, TOKENS, 2560, dtype=stream), x, empty(2560), 1e-5


def conv(dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of `causal_conv1d`."""
    return empty(BATCH, TOKENS, CHANNELS, dtype=dtype), empty(CHANNELS, 4, dtype=dtype), empty(CHANNELS, dtype=dtype), True


def scan(dtype: torch.dtype, states: int, batch: int = 1, kept: int | None = None) -> tuple[Any, ...]:
    """The arguments of `selective_scan`, which runs in chunks at batch 1."""
    x, BC = empty(batch, TOKENS, CHANNELS, dtype=dtype), empty(batch, TOKENS, 2 * states, dtype=dtype)
    D = empty(CHANNELS, dtype=dtype)
    index = None if kept is None else empty(batch, kept, dtype=torch.int64)
    return x, x, empty(CHANNELS, states, dtype=F32), BC[..., :states], BC[..., states:], D, x[:, :kept], D, True, index


def scan_backward(dtype: torch.dtype, states: int) -> tuple[Any, ...]:
    """The arguments of `selective_scan_backward`."""
    inputs = scan(dtype, states)
    return inputs[0], empty(1, CHANNELS, states, dtype=F32), *inputs[:-1]


def ssd_scan(dtype: torch.dtype, states: int, kept: int | None = None) -> tuple[Any, ...]:
    """The arguments of `ssd_scan`: 80 heads of 64 channels."""
    x, dt, B = (empty(BATCH, TOKENS, *shape, dtype=dtype) for shape in ((80, 64), (80,), (1, states)))
    head, initial = empty(80, dtype=F32), empty(BATCH, 80, 64, states, dtype=F32)
    index = None if kept is None else empty(BATCH, kept, dtype=torch.int64)
    return x, dt, head, B, B, head, head, True, 0.0, 1e6, initial, index


def ssd_backward(dtype: torch.dtype, states: int) -> tuple[Any, ...]:
    """The arguments of `ssd_scan_backward`."""
    inputs = ssd_scan(dtype, states)
    return empty(*inputs[0].shape, dtype=F32), inputs[-2], *inputs[:-1]


def ssd_step(dtype: torch.dtype, states: int) -> tuple[Any, ...]:
    """The arguments of `ssd_state_update`."""
    x, dt, B, head = empty(BATCH, 80, 64, dtype=dtype), empty(BATCH, 80), empty(BATCH, 1, states, dtype=dtype), empty(80)
    return empty(BATCH, 80, 64, states, dtype=F32), x, dt, head, B, B, head, head, True, states == 128


def ssd_mixer_step(dtype: torch.dtype, states: int) -> tuple[Any, ...]:
    """The arguments of `ssd_mixer_update`."""
    inner = 80 * 64
    mixed = inner + 2 * states
    state, window, weight = empty(1, 80, 64, states, dtype=F32), *(empty(*n, mixed, 4, dtype=dtype) for n in ((1,), ()))
    projected, head = empty(1, 1, inner + mixed + 80, dtype=dtype), empty(80, dtype=dtype)
    return state, window, projected, weight, empty(mixed, dtype=dtype), head, head, head, empty(inner, dtype=dtype), 1e-5, 1


# Each operator with arguments that reach each of its configurations.
CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "influence-bf16": ("influence", lambda: scored(BF16, "max")),
    "influence-fp32-l2": ("influence", lambda: scored(F32, "l2")),
    "influence-no-softplus": ("influence", lambda: scored(BF16, "absmax", softplus=False, bias=False)),
    "ssd_influence": ("ssd_influence", lambda: mamba2(BF16, "l2")),
    "ssd_influence-few": ("ssd_influence", lambda: mamba2(F32, "max", states=3)),
    "scan-16": ("selective_scan", lambda: scan(BF16, 16, kept=512)),
    "scan-64": ("selective_scan", lambda: scan(F32, 64)),
    "scan-256": ("selective_scan", lambda: scan(F32, 256, batch=128)),
    "scan-backward-16": ("selective_scan_backward", lambda: scan_backward(BF16, 16)),
    "scan-backward-64": ("selective_scan_backward", lambda: scan_backward(F32, 64)),
    "ssd-bf16": ("ssd_scan", lambda: ssd_scan(BF16, 128, kept=512)),
    "ssd-fp32": ("ssd_scan", lambda: ssd_scan(F32, 64)),
    "ssd-backward-bf16": ("ssd_scan_backward", lambda: ssd_backward(BF16, 128)),
    "ssd-backward-fp32": ("ssd_scan_backward", lambda: ssd_backward(F32, 64)),
    "ssd-step-128": ("ssd_state_update", lambda: ssd_step(BF16, 128)),
    "ssd-step-16": ("ssd_state_update", lambda: ssd_step(F32, 16)),
    "select": ("select", lambda: (empty(BATCH, 2 * TOKENS, dtype=F64), 1024, 0, 1)),
    "select-short": ("select", lambda: (empty(BATCH, TOKENS // 5, dtype=F64), 100, 0, 1)),
    "gather-rows": ("gather", lambda: (empty(BATCH, TOKENS, CHANNELS), empty(BATCH, 512, dtype=torch.int64), 1)),
    "gather-numbers": ("gather", lambda: (empty(BATCH, TOKENS), empty(BATCH, 512, dtype=torch.int64), 1)),
    "conv": ("causal_conv1d", lambda: conv(BF16)),
    "conv-backward": ("causal_conv1d_backward", lambda: (empty(BATCH, TOKENS, CHANNELS), *conv(BF16))),
    "conv-step": ("conv_update", lambda: (empty(1, CHANNELS, 4), empty(1, CHANNELS), *conv(BF16)[1:])),
    "state-4": ("state_update", lambda: step(BF16, 4)),
    "state-16": ("state_update", lambda: step(BF16, 16)),
    "state-256": ("state_update", lambda: step(F32, 256)),
    "mixer-2.8b": ("mixer_update", lambda: mixer_step(BF16, 16, 160)),
    "mixer-largest": ("mixer_update", lambda: mixer_step(F32, 16, 256)),
    "mixer-64": ("mixer_update", lambda: mixer_step(F32, 64, 64)),
    "mixer-many": ("mixer_update", lambda: mixer_step(BF16, 16, 160, batch=64)),
    "ssd-mixer-2.7b": ("ssd_mixer_update", lambda: ssd_mixer_step(BF16, 128)),
    "ssd-mixer-fp32": ("ssd_mixer_update", lambda: ssd_mixer_step(F32, 64)),
    "norm-2560": ("rms_norm", lambda: (empty(BATCH, TOKENS, 2560), empty(2560), 1e-5)),
    "norm-16": ("rms_norm", lambda: (empty(BATCH, TOKENS, 16), None, 1e-5)),
    "gated-norm": ("gated_norm", lambda: (empty(BATCH, TOKENS, CHANNELS, dtype=F32), *normed(CHANNELS), 1e-5, 1)),
    "gated-norm-rounded": (
        "gated_norm",
        lambda: (empty(BATCH, TOKENS, CHANNELS, dtype=F32), *normed(CHANNELS), 1e-5, 1, BF16),
    ),
    "gated-norm-groups": ("gated_norm", lambda: (empty(BATCH, TOKENS, 4096), *normed(4096), 1e-5, 8)),
    "add-norm": ("add_norm", lambda: (*added(F32, None), None)),
    "add-norm-kept": ("add_norm", lambda: (*added(F32, 512), empty(BATCH, 512, dtype=torch.int64))),
    "add-norm-halves": ("add_norm", lambda: (*added(BF16, None), None)),
}


def test_every_operator_is_compiled() -> None:
    """None is missing above."""
    assert {name for name, _ in CASES.values()} == gpu.KERNELS.keys()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(target: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the target's shared memory, with neither stack nor spilled registers."""
    if target == "gfx942":
        monkeypatch.setattr(torch.version, "hip", "6.4")  # what a launcher asks to know where it is
    name, arguments = CASES[case]
    check(target, record(gpu.KERNELS[name], *arguments()))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_loop_of_influence(dtype: torch.dtype) -> None:
    """For each (token, channel, state): one exponential, three additions or products at most, no store, five instructions.

    The exponent is one product, its weighted sum one fused product; (A − m) once for the tokens of a group, w once for its
    channels. Loads: A once for four tokens and four neighbouring channels, B once for four channels, C for all 16.
    """
    pool = "max" if dtype == BF16 else "l2"  # as in CASES, so that it is not compiled again
    built = check("sm_90", record(gpu.KERNELS["influence"], *scored(dtype, pool)))[-1]
    loops = built.loops()
    states = max((loop for loop in loops if not loop["STG.E.64"]), key=lambda loop: loop["MUFU.EX2"])
    pairs = 2 * 4 * 128 // 32  # of token and channel, for each thread, and two states at once
    assert states["MUFU.EX2"] == pairs
    assert sum(states[name] for name in ("FFMA", "FMUL", "FADD")) <= 3 * pairs
    assert states["LDG.E.128"] == 2  # of A; anything else would read a line for each channel
    assert count(states, "LDG", "LDS", "LDL") <= 2 * (1 + 4 + 1)
    assert count(states, "STG", "STS", "STL", "SHFL") == 0
    assert states.total() <= 5 * pairs

    # Once for each (token, channel), whatever its states: softplus, a power of two, its share of the pool. A third of these
    # instructions are for the logarithms of values near to underflow, and seldom run.
    group = next(loop for loop in loops if loop["STG.E.64"])
    assert group["MUFU.EX2"] <= (2 if dtype == BF16 else 3) * 4 * 128 // 32
    assert count(group, "SHFL") <= 2 * 5 + 4 * 2 * 5 * (1 if dtype == BF16 else 2)  # of base, and of the pools, both ways
    assert group.total() <= (96 if dtype == BF16 else 124) * 4 * 128 // 32


def test_loop_of_selective_scan() -> None:
    """For each (token, channel, state): one exponential, three additions or products and two for its part of the sum over n.

    What is done once for a token and channel (softplus, gate, D) stands beside: 24 for each of them, and 3 exponentials or
    reciprocals. A lane has all states of its channel: nothing is exchanged but B and C, by one shuffle and one store to
    shared memory for a token, from where they come as vectors of 4. 12 instructions a state in all, 8 without the outputs.
    """
    chunk, _, outputs = check("sm_90", record(gpu.KERNELS["selective_scan"], *scan(BF16, 16, kept=512)))
    tokens, pairs = 2, 2 * 16  # of a group, for each thread
    for built, arrays in ((chunk, 1), (outputs, 2)):
        (loop,) = built.loops()
        assert pairs <= count(loop, "MUFU") <= pairs + 3 * tokens
        sums = 3 * pairs if built is chunk else 4.5 * pairs
        assert count(loop, "FFMA", "FMUL", "FADD") <= sums + 24 * tokens
        assert count(loop, "LDS") <= arrays * pairs // 4
        assert count(loop, "LDG") <= 3 * tokens + 2 * arrays + 8
        assert count(loop, "SHFL") <= arrays * tokens
        assert count(loop, "STS") <= arrays * tokens and count(loop, "STG", "STL") <= tokens
        assert loop.total() <= (8 if built is chunk else 12) * pairs


def test_loop_of_causal_conv1d() -> None:
    """Tokens come and go as vectors of eight channels, once for each place of the window; the weights stay in registers."""
    (built,) = check("sm_90", record(gpu.KERNELS["causal_conv1d"], *conv(BF16)))
    (loop,) = built.loops()
    vectors = 32 * 64 // 128 // 8  # of a tile, for each thread
    assert loop["LDG.E.128"] == count(loop, "LDG", "LDS", "LDL") == 4 * vectors
    assert loop["STG.E.128"] == count(loop, "ST") == vectors


def test_rows_of_dt_proj_in_a_step() -> None:
    """Each is one load, and a sum over the lanes of a warp, which waits for no other and needs no shared memory."""
    built = check("sm_90", record(gpu.KERNELS["mixer_update"], *mixer_step(BF16, 16, 160)))[-1]
    rows = 8
    assert len(re.findall(r"LDG\.E\.128", built.sass)) == rows + 2  # the state and the rank's numbers
    assert len(re.findall("SHFL", built.sass)) <= 5 * rows + 4
    assert built.shared == 0 and "BAR.SYNC" not in built.sass


def test_spills_are_seen() -> None:
    """Held to 32 registers the kernel spills, and the harness says so."""
    launch = record(gpu.KERNELS["influence"], *scored(BF16, "max"))[-1]
    launch.constants["maxnreg"] = 32
    with pytest.raises(AssertionError, match="spills"):
        check("sm_90", [launch])


ONES: dict[str, tuple[Any, ...]] = {
    "influence": (*(empty(1, 1, 1),) * 2, empty(1, 1), *(empty(1, 1, 1),) * 2, empty(1), True, "max", True),
    "selective_scan": (
        *(empty(1, 1, 1),) * 2, empty(1, 1), *(empty(1, 1, 1),) * 2, empty(1), empty(1, 1, 1), empty(1), True,
        empty(1, 1, dtype=torch.int64),
    ),
    "selective_scan_backward": (
        empty(1, 1, 1), empty(1, 1, 1, dtype=F32), *(empty(1, 1, 1),) * 2, empty(1, 1), *(empty(1, 1, 1),) * 2, empty(1),
        empty(1, 1, 1), empty(1), True,
    ),
    "ssd_influence": (
        empty(1, 1, 1, 1), empty(1, 1, 1), empty(1), *(empty(1, 1, 1, 1),) * 2, empty(1), True, 0.0, 1.0, "l2", True,
    ),
    "ssd_scan": (
        empty(1, 1, 1, 1), empty(1, 1, 1), empty(1), *(empty(1, 1, 1, 1),) * 2, empty(1), empty(1), True, 0.0, 1.0,
        empty(1, 1, 1, 1, dtype=F32), empty(1, 1, dtype=torch.int64),
    ),
    "ssd_scan_backward": (
        empty(1, 1, 1, 1), None, empty(1, 1, 1, 1), empty(1, 1, 1), empty(1), *(empty(1, 1, 1, 1),) * 2, empty(1), empty(1),
        True, 0.0, 1.0, None,
    ),
    "ssd_state_update": (
        empty(1, 1, 1, 1), empty(1, 1, 1), empty(1, 1), empty(1), *(empty(1, 1, 1),) * 2, empty(1), empty(1), True,
    ),
    "state_update": (
        empty(1, 1, 1), *(empty(1, 1),) * 2, empty(1, 1), *(empty(1, 1),) * 2, empty(1), empty(1, 1), empty(1), True,
    ),
    "mixer_update": (
        empty(1, 1, 16), empty(1, 1, 1), empty(1, 1, 2), empty(1, 1), empty(1), empty(33, 1), empty(1, 1), empty(1),
        empty(1, 16), empty(1),
    ),
    "ssd_mixer_update": (
        empty(1, 1, 1, 1), empty(1, 3, 1), empty(1, 1, 5), empty(3, 1), empty(3), *(empty(1),) * 4, 1e-5, 1,
    ),
    "select": (empty(1, 1, dtype=F64), 1, 0, 1),
    "gather": (empty(1, 1, 1), empty(1, 1, dtype=torch.int64), 1),
    "causal_conv1d": (empty(1, 1, 1), empty(1, 1), empty(1), True),
    "causal_conv1d_backward": (empty(1, 1, 1), empty(1, 1, 1), empty(1, 1), empty(1), True),
    "conv_update": (empty(1, 1, 1), empty(1, 1), empty(1, 1), empty(1), True),
    "rms_norm": (empty(1, 1, 1), empty(1), 1e-5),
    "gated_norm": (empty(1, 1, 1), empty(1, 1, 1), empty(1), 1e-5, 1),
    "add_norm": (empty(1, 1, 1, dtype=F32), empty(1, 1, 1), empty(1), 1e-5, empty(1, 1, dtype=torch.int64)),
}  # fmt: skip


# --- what the interpreter does not show ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", gpu.KERNELS)
def test_sizes_of_one_compile(name: str) -> None:
    """Triton writes an argument of 1 into the code: as a constant, not as a tensor, and the interpreter does not."""
    check("sm_90", record(gpu.KERNELS[name], *ONES[name]))


@pytest.mark.parametrize("case", [name for name in CASES if name != "gather-numbers"])
def test_one_compilation_serves_all_lengths(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for masks, whose rows are as far apart as they are long: that loads wide numbers is worth a second one.

    So is a small block to select among few: all lengths of a case here are of one block.
    """
    name, arguments = CASES[case]
    compiled = []
    for tokens in (4096, 4097, 1000):
        monkeypatch.setattr(sys.modules[__name__], "TOKENS", tokens)
        sources = [launch.source() for launch in record(gpu.KERNELS[name], *arguments())]
        compiled.append([(source.name, source.signature, source.constants, source.attrs, rest) for source, rest in sources])
    assert compiled[0] == compiled[1] == compiled[2]


def test_shifts_are_of_64_bits() -> None:
    """A score has 64, and the search shifts by up to 56. The counter of a loop has 32, but in the interpreter any number."""
    built = check("sm_90", record(gpu.KERNELS["select"], *CASES["select"][1]()))[0]
    types = re.findall(r"arith\.sh\w+ [^:]*: (?:tensor<(?:\d+x)+)?(i\d+)", built.ttir)
    assert types and set(types) == {"i64"}


def test_offsets_along_a_normed_row_are_of_64_bits() -> None:
    """Where the tokens are last, entries of a row are as far apart as the sequence is long."""
    x = empty(BATCH, CHANNELS, TOKENS).transpose(1, 2)
    built = check("sm_90", record(gpu.KERNELS["rms_norm"], x, empty(CHANNELS), 1e-5))[0]
    types = re.findall(r"tt\.addptr .*(i\d+)>? ", built.ttir)
    assert types and set(types) == {"i64"}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(("size", "states"), [(1, 1), (4, 8), (4, 16), (5, 16), (64, 128)])
def test_steps_in_place_have_no_spare_threads(target: str, size: int, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spare thread holds a number a second time: it may read the state after the first has updated it.

    Those of one warp run in step, and read before they write. AMD's warps are of 64.
    """
    monkeypatch.setattr(torch.version, "hip", "6.4" if target == "gfx942" else None)
    x, state = empty(1, 3, size), empty(1, 3, size, states, dtype=F32)
    heads, B = empty(3, dtype=F32), empty(1, 1, states)
    for launches, held in (
        (record(gpu.KERNELS["ssd_state_update"], state, x, x[..., 0], heads, B, B, heads, heads, True), "BLOCK_P"),
        (record(gpu.KERNELS["state_update"], *step(F32, states)), "BLOCK_C"),
        (record(gpu.KERNELS["mixer_update"], *mixer_step(F32, states, size))[1:], "BLOCK_C"),
    ):
        constants = launches[0].constants
        numbers = constants[held] * constants["BLOCK_N"]
        assert constants["num_warps"] == 1 or numbers >= TARGETS[target].warp_size * constants["num_warps"]


@pytest.mark.parametrize("case", ["ssd-bf16", "ssd-fp32", "ssd-backward-bf16", "ssd_influence", "norm-2560", "gated-norm"])
def test_numbers_as_double_make_no_other_arithmetic(case: str) -> None:
    """Inductor passes Python's floats as double; what is computed with them stays in float32, and so fast."""
    name, arguments = CASES[case]
    for launch in record(gpu.KERNELS[name], *arguments()):
        wide = check("sm_90", [dataclasses.replace(launch, number="fp64")])[0]
        tensors = [re.findall(r"tensor<(?:\d+x)+f64", text) for text in (wide.ttir, compile_for("sm_90", launch).ttir)]
        assert len(tensors[0]) == len(tensors[1]), launch.kernel.__name__


# --- what Inductor is shown ------------------------------------------------------------------------------------------


@pytest.fixture
def taken_for_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the CPU for a GPU of the H100's kind while a graph is traced; nothing runs on it."""
    import triton

    class Driver:
        @staticmethod
        def get_current_target() -> Any:
            return triton_targets.TARGETS["sm_90"]

    monkeypatch.setattr(dispatch, "GPU", "cpu")
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver())
    yield
    triton.runtime.driver._active = before


def test_inductor_sees_the_kernels(taken_for_gpu: None) -> None:
    """AOTAutograd's graph has the kernels' launches in place of our operators, and knows what each of them writes."""
    simba = torch.ops.simba

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, A: Tensor, B: Tensor, window: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            scores = simba.influence(x, x, A, B, B, None, True, "max", True)
            kept = simba.gather(x, simba.select(scores, 5, 0, 1), 1)
            return simba.rms_norm(kept, None, 1e-5), simba.conv_update(window, x[:, -1], weight, None, True)

    with FakeTensorMode(shape_env=ShapeEnv()):
        sizes = ((2, 40, 8), (8, 4), (2, 40, 4), (2, 8, 4), (8, 4))
        graph = aot_export_module(Layer(), [torch.empty(size) for size in sizes], trace_joint=False)[0].graph
    nodes = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(nodes) == 3 + 1 + 1 + 1 + 1
    assert not [node for node in graph.nodes if "simba" in str(node.target)]
    assert sorted(nodes[-1].kwargs["tensors_to_clone"]) == ["out", "state"]


WRITTEN = {
    "_chunk_sums": "sums", "_suffix_sums": "sums", "_chunk_scores": "partial", "_products": "products",
    "_head_scores": "partial", "_gather": "out",
    "_select": "index scores",  # of the scores Inductor cannot tell: a copy of eight bytes a token
    "chunk_kernel": "sums ends", "carry_kernel": "ends", "scan_kernel": "y last",
    "adjoint_kernel": "sums ends", "gradient_kernel": "dx ddt dA dB dC dD dz dbias",
    "_states": "held last", "_outputs": "y",
    "_to_x": "dx", "_to_B_and_C": "dB dC from_start to_end through", "_to_dt": "ddt dA dD",
    "_conv": "out", "_conv_through_silu": "inner dweight dbias", "_conv_to_input": "dx", "_conv_step": "state out",
    "_state_step": "state out", "_ssd_step": "state out", "_rms_norm": "out", "_add_norm": "total out",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_inductor_knows_what_is_written(case: str, taken_for_gpu: None) -> None:
    """Neither less than a kernel writes, nor more: Inductor copies what it takes for written."""
    name, arguments = CASES[case]
    given = arguments()

    class Call(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            rest = iter(tensors)
            args = [next(rest) if isinstance(value, Tensor) else value for value in given]
            results = getattr(torch.ops.simba, name)(*args)
            return results if isinstance(results, tuple) else (results,)

    with FakeTensorMode(shape_env=ShapeEnv()):
        tensors = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            for value in given
            if isinstance(value, Tensor)
        ]
        graph = aot_export_module(Call(), tensors, trace_joint=False)[0].graph
    nodes = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert nodes
    for node in nodes:
        kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        while not hasattr(kernel, "__name__"):  # with its number of warps around it
            kernel = kernel.fn
        assert sorted(node.kwargs["tensors_to_clone"]) == sorted(WRITTEN[kernel.__name__].split()), kernel.__name__
