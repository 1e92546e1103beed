"""Run compiled Triton kernels in the simulator of PTX (`ptx`), at any size, and print a line for each call.

    python tests/run_compiled.py influence ssd_scan --tokens 500 --order backward --target sm_90
    python tests/run_compiled.py --odd

names cases of ``simba bench`` (all of them if none is named); with --odd, operators, at shapes and layouts that no model
has: single tokens, channels and states, views at odd places, tokens along the last axis, scores that are no numbers. A line
says how far results are off the definition in float64, or what the kernel did wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from kernel_inputs import wide
from ptx.launching import simulated
from ptx.memory import Fault
from ptx.parsing import Unknown
from ptx.running import ORDERS
from torch import Tensor
from triton_targets import TARGETS

from simba_compile.cli.bench_kernels import CASES, SMALL, TYPES, most, off
from simba_compile.kernels import gpu, reference

INF, NAN = math.inf, math.nan


Call: TypeAlias = tuple[str, tuple[Any, ...]]  # an operator and its arguments


def cases(names: list[str], shape: dict[str, int], dtype: torch.dtype) -> Iterator[Call]:
    """Those of the benchmark, with this type in place of bfloat16."""
    for name in names or CASES:
        case = CASES[name](**shape)
        halves = [isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in case.args]
        args = [value.to(dtype) if half else value for half, value in zip(halves, case.args, strict=True)]
        yield case.operator, tuple(args)


def odd_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Every operator but the whole steps of mixers at odd shapes."""

    def odd(*size: int) -> Tensor:
        """A view that begins one number into its storage."""
        return torch.randn(math.prod(size) + 1, dtype=dtype)[1:].view(size)

    def turned(batch: int, rows: int, columns: int) -> Tensor:
        """One whose rows are next to each other."""
        return torch.randn(batch, columns, rows, dtype=dtype).transpose(1, 2)

    def single(*size: int) -> Tensor:
        """In float32, at an odd place."""
        return torch.randn(math.prod(size) + 1)[1:].view(size)

    def falling(*size: int) -> Tensor:
        return -torch.rand(size)

    for channels, states in ((1, 1), (5, 3), (33, 16), (7, 200)):
        x, dt, z, B, C = odd(2, channels), odd(2, channels), odd(2, channels), odd(2, states), odd(2, states)
        A, D = falling(channels, states), single(channels)
        yield "state_update", (single(2, channels, states), x, dt, A, B, C, D, z, D, True, True)
        yield "state_update", (turned(2, channels, states), x, dt.abs(), A, B, C, None, None, None, False)
    for channels, width in ((1, 4), (130, 4), (65, 2), (3, 1)):
        yield "conv_update", (odd(2, channels, width), odd(2, channels), odd(channels, width), odd(channels), True)
        yield "conv_update", (turned(2, channels, width), odd(2, channels), odd(channels, width), None, False)
    for heads, size, states, groups in ((1, 1, 1, 1), (4, 4, 16, 2), (2, 5, 3, 1), (2, 3, 200, 1), (2, 8, 8, 2)):
        step = odd(2, heads, size), odd(2, heads).abs(), falling(heads), odd(2, groups, states), odd(2, groups, states)
        yield "ssd_state_update", (single(2, heads, size, states), *step, single(heads), single(heads), True, True)
        yield "ssd_state_update", (single(2, heads, states, size).mT, *step, None, None, False)
    for batch, tokens, channels, states in ((1, 1, 1, 1), (1, 37, 33, 3), (2, 20, 5, 40), (1, 9, 2, 256)):
        x, dt, z = odd(batch, tokens, channels), odd(batch, tokens, channels), odd(batch, tokens, channels)
        A, B, C, D = falling(channels, states), odd(batch, tokens, states), odd(batch, tokens, states), single(channels)
        yield "influence", (x, dt, A, B, C, D, True, "max", True)
        yield "influence", (x, dt.abs(), A, B, C, None, False, "l2", False)
        yield "influence", (turned(batch, tokens, channels), dt, A, B, C, D, True, "absmax", False)
        index = torch.randperm(tokens)[: max(1, tokens // 2)].sort()[0].expand(batch, -1).contiguous()
        yield "selective_scan", (x, dt, A, B, C, D, z[:, : index.shape[1]], D, True, index)
        yield "selective_scan", (turned(batch, tokens, channels), dt, A, B, C, None, None, None, True, None)
        state = single(batch, channels, states)
        yield "selective_scan_backward", (z, state, x, dt, A, B, C, D, dt, D, True)
        yield "selective_scan_backward", (z, None, x, dt, A, B, C, None, None, None, True)
    for batch, tokens, channels in ((3, 5, 7), (2, 3, 1), (1, 2, 4100)):
        yield "rms_norm", (odd(batch, tokens, channels), single(channels), 1e-5)
        yield "rms_norm", (turned(batch, tokens, channels), None, 1e-5)
    index = torch.tensor([[0, 3], [2, 4], [1, 2]])
    yield "add_norm", (single(3, 5, 7), odd(3, 2, 7), single(7), 1e-5, index)
    yield "add_norm", (turned(2, 3, 4100), odd(2, 3, 4100), None, 1e-5, None)
    yield "gated_norm", (odd(2, 3, 24), odd(2, 3, 24), single(24), 1e-5, 3)
    yield "gated_norm", (single(2, 3, 24), odd(2, 3, 24), single(24), 1e-5, 3, torch.bfloat16)
    yield "gather", (odd(3, 9, 5), torch.randint(0, 9, (3, 4)), 1)
    yield "gather", (turned(1, 9, 40), torch.randint(0, 9, (1, 4)), 1)
    yield "gather", (odd(2, 9), torch.randint(0, 9, (2, 5)), 1)
    for batch, tokens, channels, width in ((2, 1, 1, 4), (1, 200, 70, 3)):
        x, weight, bias = odd(batch, tokens, channels), odd(channels, width), odd(channels)
        yield "causal_conv1d", (x, weight, bias, True)
        yield "causal_conv1d", (turned(batch, tokens, channels), weight, None, False)
        yield "causal_conv1d_backward", (odd(batch, tokens, channels), x, weight, bias, True)
    for tokens, kept in ((1, 1), (5, 2), (1024, 1000), (1025, 7)):
        scores = torch.randn(2, tokens, dtype=torch.float64)
        scores[scores > 1], scores[scores < -1] = NAN, -INF
        scores[:, ::3], scores[:, 1::9] = 0.0, -0.0
        yield "select", (scores, kept, 0, 1)
    for batch, tokens, heads, size, groups, states in ((1, 1, 1, 1, 1, 1), (1, 40, 2, 5, 2, 3), (2, 33, 2, 8, 1, 20)):
        x, dt, A = odd(batch, tokens, heads, size), odd(batch, tokens, heads), falling(heads)
        B, C = odd(batch, tokens, groups, states), odd(batch, tokens, groups, states)
        inputs, head, state = (x, dt, A, B, C), single(heads), single(batch, heads, size, states)
        yield "ssd_influence", (*inputs, head, True, 0.0, 9.0, "l2", True)
        yield "ssd_influence", (*inputs, None, True, 0.1, 0.5, "max", False)
        yield "ssd_scan", (*inputs, head, head, True, 0.0, INF, state, None)
        yield "ssd_scan", (*inputs, None, None, True, 0.1, 0.5, None, None)
        grad = single(batch, tokens, heads, size)
        yield "ssd_scan_backward", (grad, state, *inputs, head, head, True, 0.0, INF, state)


def error(operator: str, args: tuple[Any, ...]) -> float:
    """How far the launcher's results are off, and what it updates in place, as `simba bench` has it.

    Where the definition gives no finite number, the same one is right.
    """
    exact_args = wide([*args])
    results, exact = gpu.KERNELS[operator](*args), getattr(reference, operator)(*exact_args)
    pairs = list(zip(results, exact, strict=True)) if isinstance(exact, tuple) else [(results, exact)]
    pairs += [pair for pair in zip(args, exact_args, strict=True) if isinstance(pair[0], Tensor)]
    compared: list[tuple[Tensor, Tensor]] = []
    for one, other in pairs:
        one, other = (value if value.dtype == torch.int64 else value.double() for value in (one, other))
        finite = other.isfinite()
        if not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()):
            return INF
        if finite.any() and not torch.equal(one[finite], other[finite]):
            least = other[finite].min()
            compared.append((one.where(finite, least), other.where(finite, least)))
    return off(compared, operator)


def main() -> None:
    """Run what the command line names; the exit status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CASE", help=", ".join({**CASES, **gpu.KERNELS}))
    parser.add_argument("--odd", action="store_true", help="odd shapes and layouts")
    parser.add_argument("--target", default="sm_80", choices=[name for name in TARGETS if name.startswith("sm")])
    parser.add_argument("--dtype", default="bfloat16", choices=TYPES)
    parser.add_argument("--order", default="random", choices=ORDERS, help="of warps, and of blocks")
    parser.add_argument("--seed", default=0, type=int, help="of a random order, and of the numbers")
    for size, usual in SMALL.items():
        parser.add_argument(f"--{size}", default=usual, type=int)
    given = parser.parse_args()
    if unknown := set(given.names) - (gpu.KERNELS if given.odd else CASES).keys():
        parser.error(f"unknown: {', '.join(unknown)}")
    torch.manual_seed(given.seed)
    shape, dtype, wrong = {size: getattr(given, size) for size in SMALL}, TYPES[given.dtype], 0
    calls = odd_calls(dtype) if given.odd else cases(given.names, shape, dtype)
    for operator, args in calls:
        if given.odd and given.names and operator not in given.names:
            continue
        begin = time.monotonic()
        with simulated(given.target, given.order, given.seed):
            try:
                found = error(operator, args)
                right, told = found <= most(given.dtype), f"off by {found:.1e}"
            except (Fault, Unknown) as refused:
                right, told = False, f"{type(refused).__name__}: {refused}"
        wrong += not right
        shapes = " ".join(str(list(value.shape)) for value in args if isinstance(value, Tensor))
        print(f"{'right' if right else 'WRONG'} {operator} {shapes}: {told}, {time.monotonic() - begin:.0f} s", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
