"""The Triton kernels as compiled for GPUs, in a simulator of PTX that checks all they do to memory (`ptx`), and itself."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl
import triton_targets
from ptx.launching import simulated
from ptx.memory import Fault, Memory
from ptx.parsing import Unknown, parse
from ptx.running import ORDERS, Launch, Order
from ptx.steps import Program

from simba_compile.cli import bench_kernels
from simba_compile.cli.device import Device
from simba_compile.kernels import gpu, reference
from simba_compile.kernels.gpu import runtime

SHAPE = {"batch": 2, "tokens": 37, "channels": 96, "states": 16}
SHAPES = {  # of what else takes longest
    "selective_scan": {"batch": 1},
    "influence": {"tokens": 20, "channels": 40},
    "ssd_scan": {"batch": 1},
    "selective_scan_backward": {"batch": 1, "tokens": 20, "channels": 40},
    "ssd_scan_backward": {"batch": 1, "channels": 32},
}


GROUPS_OF_WARPS = [("ssd_scan", "sm_90"), ("ssd_scan_backward", "sm_90")]


@pytest.mark.parametrize(("name", "target"), [*((name, "sm_80") for name in bench_kernels.CASES), *GROUPS_OF_WARPS])
def test_operator(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right, and without a fault, whichever warp is the first."""
    monkeypatch.setattr(bench_kernels.Case, "run", lambda case: gpu.KERNELS[case.operator](*case.args))
    with simulated(target, "random"):
        shape = SHAPE | SHAPES.get(name, {})
        if target == "sm_90":
            shape["channels"] = 64  # what warps multiply as a group, with wgmma
        assert bench_kernels.error(name, Device("cpu"), "bfloat16", shape) <= bench_kernels.most("bfloat16")


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        (r"fence\.proxy\.async\.shared::cta;", "no fence.proxy.async came since"),
        (r"wgmma\.fence\.sync\.aligned;", "no wgmma.fence came since"),
        (r"wgmma\.commit_group\.sync\.aligned;", "product under way"),
        (r"wgmma\.wait_group\.sync\.aligned 0;", "product under way"),
        (r"bar\.sync \t0;(?=(?:\s+(?:\.loc|shl|add)[^\n]+)*\s+fence\.proxy)", "race in shared memory|never set"),
    ],
)
def test_groups_of_warps(left_out: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton puts around their products is there for a reason, each instruction of it."""
    compile_for = triton_targets.compile_for

    def without(target: str, launch: triton_targets.Launch) -> triton_targets.Compiled:
        compiled = compile_for(target, launch)
        if launch.kernel.__name__ != "_outputs":
            return compiled
        ptx, times = re.subn(left_out, "", compiled.ptx)
        assert times
        return dataclasses.replace(compiled, ptx=ptx)

    monkeypatch.setattr(triton_targets, "compile_for", without)
    with simulated("sm_90"), pytest.raises(Fault, match=f"_outputs, .*({told})"):
        gpu.KERNELS["ssd_scan"](*bench_kernels.CASES["ssd_scan"](**SHAPE | {"batch": 1}).args)


# --- what the simulator sees -----------------------------------------------------------------------------------------


@triton.jit
def _shift(x, out, BLOCK: tl.constexpr, WAIT: tl.constexpr):
    """Each number to the place before it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at + 1)
    if WAIT:
        tl.debug_barrier()
    tl.store(out + at, value)


@triton.jit
def _total(x, out, BLOCK: tl.constexpr):
    """The sum of a block: across warps, through shared memory."""
    tl.store(out + tl.program_id(0), tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


@triton.jit(do_not_specialize=["differ"])
def _same_place(out, differ):
    """Each block stores there."""
    tl.store(out, 1.0 + differ * tl.program_id(0))


@pytest.mark.parametrize("order", ORDERS)
def test_a_race_between_warps(order: Order) -> None:
    """One overwrites what its neighbour has yet to read, or, in another order, has just read; a barrier between helps."""
    x = torch.arange(129, dtype=torch.float32)
    with simulated(order=order):
        runtime.launch(_shift, (1,), x, x, BLOCK=128, WAIT=True, num_warps=4)
        assert x.tolist() == [*range(1, 129), 128]
        with pytest.raises(Fault, match="race in the tensors"):
            runtime.launch(_shift, (1,), x, x, BLOCK=128, WAIT=False, num_warps=4)


@pytest.mark.parametrize("order", ORDERS)
def test_a_spare_warp_of_a_step_in_place(order: Order) -> None:
    """What `ssd_state_update` takes care not to have: it loads the state that another warp has, and may have updated."""
    head, B = torch.rand(2), torch.rand(1, 1, 8)
    args = torch.rand(1, 2, 4, 8), torch.rand(1, 2, 4), head[None], -head, B, B, head, head, True
    with simulated(order=order) as simulator, pytest.MonkeyPatch.context() as patch:
        gpu.KERNELS["ssd_state_update"](*args)
        patch.setattr(runtime, "launch", lambda *args, **more: simulator.launch(*args, **more | {"num_warps": 4}))
        with pytest.raises(Fault, match=r"_ssd_step, block .*race in the tensors"):
            gpu.KERNELS["ssd_state_update"](*args)


@pytest.mark.parametrize("order", ORDERS)
def test_a_race_between_blocks(order: Order) -> None:
    """No barrier puts these in an order."""
    x = torch.arange(65, dtype=torch.float32)
    with simulated(order=order), pytest.raises(Fault, match="race in the tensors"):
        runtime.launch(_shift, (2,), x, x, BLOCK=32, WAIT=True, num_warps=1)


def test_blocks_that_write_to_one_address() -> None:
    """The same number twice is no race, another one is."""
    out = torch.zeros(1)
    with simulated():
        runtime.launch(_same_place, (2,), out, 0)
        with pytest.raises(Fault, match="two warps write to one address"):
            runtime.launch(_same_place, (2,), out, 1)


def test_out_of_bounds() -> None:
    """Of a tensor's storage, by one number."""
    x, out = torch.zeros(64), torch.zeros(64)
    with simulated(), pytest.raises(Fault, match=r"_shift, block 1: warp 0, .*ld\.global.* out of bounds"):
        runtime.launch(_shift, (2,), x, out, BLOCK=32, WAIT=False, num_warps=1)


def test_few_states_have_no_spare_warps() -> None:
    """Two warps with the same numbers would both write their sum, and the last bits may differ."""
    x, dt, A = torch.randn(1, 20, 2, 4), torch.randn(1, 20, 2), -torch.ones(2)
    B, C = torch.randn(2, 1, 20, 1, 3)
    args = (x, dt, A, B, C, None, True, 0.0, 9.0, "max", True)
    with simulated("sm_80", "random"):
        scores = gpu.KERNELS["ssd_influence"](*args)
    torch.testing.assert_close(scores, reference.ssd_influence(*args), rtol=1e-5, atol=1e-5)


def test_a_view_at_an_odd_place() -> None:
    """Its compiled code does not load vectors."""
    x, out = torch.arange(129, dtype=torch.float32), torch.zeros(1)
    with simulated():
        runtime.launch(_total, (1,), x[1:], out, BLOCK=128, num_warps=1)
    assert out.item() == 64 * 129


@pytest.mark.parametrize("make", [lambda x: x.new_empty(x.shape), lambda x: torch.empty_like(x)])
def test_unset_memory(make: Callable[[Tensor], Tensor]) -> None:
    """New memory may be read where torch or a kernel has written."""
    with simulated():
        x, out = make(torch.zeros(128)), torch.zeros(1)
        with pytest.raises(Fault, match="never set"):
            runtime.launch(_total, (1,), x, out, BLOCK=128, num_warps=1)
        x[:64] = 2.0
        runtime.launch(_shift, (1,), torch.ones(65), x[64:], BLOCK=64, WAIT=False, num_warps=1)
        runtime.launch(_total, (1,), x, out, BLOCK=128, num_warps=4)
        assert out.item() == 64 * 3


# --- instructions, by hand -------------------------------------------------------------------------------------------


def by_hand(*lines: str, order: Order = "forward") -> list[int]:
    """Run two warps, and give what is in the 64 words of global memory then.

    Both memories begin at address 0. %r1 is the number of a thread, %r2 and %rd2 the address of its word.
    """
    begin = ("mov.u32 %r1, %tid.x", "shl.b32 %r2, %r1, 2", "cvt.u64.u32 %rd2, %r2")
    registers = ".reg .pred %p<4>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<9>;\n.reg .b64 %rd<9>;\n"
    code = "".join(line if line.endswith(":") else f"{line};\n" for line in (*begin, *lines, "ret"))
    memory = Memory("the tensors", 256)
    launch = Launch(memory, {}, blocks=1, warps=2, shared=256, order=order, random=random.Random(0))
    launch.run(Program(parse(f".visible .entry by_hand()\n{{\n{registers}{code}}}\n")))
    return memory.bytes.view(np.uint32).tolist()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["sub.s32 %r3, %r1, 9", "div.s32 %r4, %r3, 4"], lambda thread: int((thread - 9) / 4)),
        (["sub.s32 %r3, %r1, 9", "rem.s32 %r4, %r3, 4"], lambda thread: thread - 9 - 4 * int((thread - 9) / 4)),
        (["mul.hi.u32 %r4, %r1, 0x40000000"], lambda thread: thread >> 2),
        (["shl.b32 %r4, 1, %r1"], lambda thread: 1 << thread),
        (["shr.s32 %r4, 0x80000000, %r1"], lambda thread: -(1 << 31) >> thread),
        (["bfe.s32 %r4, %r1, 1, 3"], lambda thread: ((thread >> 1 & 7) ^ 4) - 4),
        (["prmt.b32 %r4, 0x80, 0x12345678, 0x8057"], lambda thread: 0xFF805612),
        (["popc.b32 %r4, %r1"], lambda thread: thread.bit_count()),
        (["sub.s32 %r3, %r1, 9", "cvt.s64.s32 %rd3, %r3", "mov.b64 {_, %r4}, %rd3"], lambda thread: -(thread < 9)),
        (["setp.gt.u32 %p1, %r1, 5", "@!%p1 mov.u32 %r4, 1", "@%p1 mov.u32 %r4, 2"], lambda thread: 1 + (thread > 5)),
        (["shfl.sync.up.b32 %r4, %r1, 2, 0, -1"], lambda thread: thread if thread % 32 < 2 else thread - 2),
        (["shfl.sync.down.b32 %r4, %r1, 2, 31, -1"], lambda thread: thread if thread % 32 > 29 else thread + 2),
        (["redux.sync.add.s32 %r4, %r1, -1"], lambda thread: 496 + 1024 * (thread > 31)),
        (["setp.gt.u32 %p1, %r1, 33", "vote.sync.ballot.b32 %r4, %p1, -1"], lambda thread: -4 * (thread > 31)),
        (["fma.rn.f32 %r4, 0f40000000, 0f40400000, 0f3F800000"], lambda thread: 0x40E00000),
        (["cvt.rn.bf16x2.f32 %r4, 0f3F808000, 0f3F818000"], lambda thread: 0x3F803F82),
        (["max.NaN.f32 %r3, 0f7FC00000, 0f3F800000", "max.f32 %r4, %r3, 0f3F800000"], lambda thread: 0x3F800000),
        (["setp.lt.f32 %p1, 0f7FC00000, 0f0", "selp.b32 %r4, 1, 0, %p1"], lambda thread: 0),
        (["setp.geu.f32 %p1, 0f7FC00000, 0f0", "selp.b32 %r4, 1, 0, %p1"], lambda thread: 1),
        (["mul.ftz.f32 %r4, 0f00800000, 0fBF000000"], lambda thread: 0x80000000),
        (["mov.b64 %rd3, {9, 0f3F800000}", "add.rn.f32x2 %rd3, %rd3, %rd3", "mov.b64 {_, %r4}, %rd3"], lambda _: 0x40000000),
        (["max.NaN.f32 %r4, 0f40000000, 0f7FC00000, 0f3F800000"], lambda thread: 0x7FC00000),
        (["redux.sync.max.NaN.f32 %r4, %r1, -1"], lambda thread: thread | 31),
        (["mov.b16 %rs1, 0x3FC0", "add.rn.f32.bf16 %r4, %rs1, 0f3F800000"], lambda thread: 0x40200000),
    ],
)
def test_what_instructions_compute(lines: list[str], expected: Callable[[int], int]) -> None:
    """In the low 32 bits, for each thread."""
    assert by_hand(*lines, "st.global.b32 [%rd2], %r4") == [expected(thread) & 0xFFFFFFFF for thread in range(64)]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("sin.approx.f32 %r3, %r1", "sin.approx.f32"),
        ("add.sat.s32 %r3, %r1, %r1", "add.sat.s32"),
        ("fma.rz.f32 %r3, %r1, %r1, %r1", "fma.rz.f32"),
        ("ld.volatile.shared.b32 %r3, [%r2]", "ld.volatile.shared.b32"),
        ("atom.global.add.u32 %r3, [%rd2], %r1", "atom.global.add.u32"),
        ("wgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 {%r3}, %rd2, %rd2, 1, 1, 1", "wgmma.mma_async"),
        ("mov.u32 %r3, %clock", "%clock"),
        ("@%p1 bar.sync 0", "bar.sync"),
        ("shfl.sync.idx.b32 %r3|%p1, %r1, 0, 31, -1", "%r3|%p1"),
        ("shfl.sync.idx.b32 %r3, %r1, 0, 31, 255", "some lanes"),
        ("{ add.s32 %r3, %r1, %r1", "{ add.s32"),
    ],
)
def test_what_is_unknown_is_refused(line: str, named: str) -> None:
    """By name; what does not depend on numbers, before anything runs."""
    with pytest.raises(Unknown, match=re.escape(named)):
        by_hand(line)


@pytest.mark.parametrize("order", ORDERS)
def test_a_race_in_shared_memory(order: Order) -> None:
    """A thread may read what one of the other warp stored before a barrier, and overwrite it after the next."""
    exchange = ("xor.b32 %r3, %r2, 128", "st.shared.b32 [%r2], %r1", "bar.sync 0", "ld.shared.b32 %r4, [%r3]")
    end = "st.global.b32 [%rd2], %r4"
    assert by_hand(*exchange, end, order=order) == [*range(32, 64), *range(32)]
    assert by_hand(*exchange, "bar.sync 0", "st.shared.b32 [%r2], 7", end, order=order) == [*range(32, 64), *range(32)]
    with pytest.raises(Fault, match="race in shared memory"):
        by_hand(*exchange, "st.shared.b32 [%r2], 7", end, order=order)
    with pytest.raises(Fault, match=r"never set|race in shared memory"):
        by_hand(*(line for line in exchange if line != "bar.sync 0"), end, order=order)


def test_faults_in_shared_memory() -> None:
    """What was never set, what is beyond its end, and what is not aligned."""
    for line, told in (
        ("ld.shared.b32 %r3, [%r2]", "never set"),
        ("st.shared.b32 [%r2+4], 0", "out of bounds"),
        ("st.shared.v2.b32 [%r2], {%r1, %r1}", "no multiple"),
    ):
        with pytest.raises(Fault, match=f"warp ., {line[:12]}.*{told}"):
            by_hand(line)


def test_asynchronous_copies() -> None:
    """They are there when they were waited for, and to the other warp after a barrier."""
    copy = ("st.global.b32 [%rd2], %r1", "cp.async.ca.shared.global [%r2], [%rd2], 4", "cp.async.commit_group")
    wait, read = "cp.async.wait_group 0", ("xor.b32 %r3, %r2, 128", "ld.shared.b32 %r4, [%r3]")
    end = ("bar.sync 0", "st.global.b32 [%rd2], %r4")
    assert by_hand(*copy, wait, "bar.sync 0", *read, *end) == [*range(32, 64), *range(32)]
    for early in ((*copy, "bar.sync 0", *read), (*copy, wait, *read), (*copy, "ld.shared.b32 %r4, [%r2]")):
        with pytest.raises(Fault, match=r"never set|race in shared memory"):
            by_hand(*early)


def test_lanes_on_different_ways() -> None:
    """Each counts up to its own number, and all meet again to exchange what they have."""
    count = ("mov.b32 %r3, 0", "and.b32 %r4, %r1, 31", "$again:", "setp.ge.s32 %p1, %r3, %r4", "@%p1 bra $end")
    loop = ("add.s32 %r3, %r3, 1", "bra.uni $again", "$end:")
    exchange = ("shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1", "st.global.b32 [%rd2], %r5")
    assert by_hand(*count, *loop, *exchange) == 2 * [lane ^ 1 for lane in range(32)]
    with pytest.raises(Fault, match="different ways"):
        by_hand("setp.lt.s32 %p1, %r1, 9", "@%p1 bra $end", *exchange, "$end:")
    with pytest.raises(Fault, match="wait for them at a barrier"):
        by_hand("setp.lt.s32 %p1, %r1, 32", "@%p1 bra $end", "bar.sync 0", "$end:")
