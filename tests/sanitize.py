"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``python tests/sanitize.py [seconds [seed]]``.

Builds them as setup.py does, with both sanitizers, into a temporary folder, and calls every kernel through its binding, at
every level that the CPU has, with random shapes (empty ones included), types, strides and indices, for so many seconds (60
by default). torch's tensors come from the sanitizer's allocator too, so that reading or writing next to one is seen. What is
computed from strided and overlapping views must be what is computed from contiguous copies, bit for bit.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SANITIZERS = "-fsanitize=address,undefined -fno-omit-frame-pointer -g1"
ROOT = Path(__file__).parents[1]


def build(folder: str) -> Path:
    """The shared library, in this folder."""
    flags = {"CFLAGS": SANITIZERS, "LDFLAGS": "-fsanitize=address,undefined", "CC": os.environ.get("CC", "gcc")}
    places = ["--build-lib", folder, "--build-temp", folder]
    command = [sys.executable, "setup.py", "-q", "build_ext", "--force", *places]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, check=True)
    (library,) = Path(folder).rglob("_native*.so")
    return library


def drive(path: str, seconds: float, seed: int) -> None:
    """Call every kernel until the time is up; runs in a process that has the sanitizers loaded."""
    import ctypes
    import math
    import random

    import torch
    from torch import Tensor

    from simba_compile.kernels import reference
    from simba_compile.kernels.native import binding
    from simba_compile.kernels.native import conv as native_conv
    from simba_compile.kernels.native import scan as native_scan
    from simba_compile.kernels.ops import dispatch

    library = ctypes.CDLL(path)
    binding.library = native_scan.library = functools.cache(lambda: library)
    chance, end, calls = random.Random(seed), time.monotonic() + seconds, 0
    torch.manual_seed(seed)

    def view(*shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of this shape whose memory ends where it ends, often with strides of its own."""
        way = chance.choice(["plain", "turned", "cut", "sparse", "repeated"])
        if way == "turned" and len(shape) > 1:
            return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
        if way == "cut":
            wider = torch.randn(*(size + 1 for size in shape)).to(dtype)
            return wider[tuple(slice(1, None) for _ in shape)]
        if way == "sparse":
            return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
        if way == "repeated":
            return torch.randn(1, *shape[1:]).to(dtype).expand(shape)
        return torch.randn(shape).to(dtype)

    def maybe(value: Tensor) -> Tensor | None:
        return value if chance.random() < 0.5 else None

    def parameter(dtype: torch.dtype, *shape: int) -> Tensor:
        return view(*shape, dtype=chance.choice([dtype, torch.float32, torch.float64]))

    def plain(value: object) -> object:
        return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value

    def kernel_of(name: str) -> Callable:
        return getattr(dispatch._native_module(name), name)

    def ssd_cases() -> dict[str, tuple[object, ...]]:
        """Calls of Mamba-2's kernels."""
        batch, tokens = chance.choice([0, 1, 2]), chance.choice([0, 1, 15, 16, 17, 63, 64, 65, 129, chance.randint(1, 150)])
        groups = chance.choice([1, 1, 2, 3])
        heads = groups * chance.randint(1, 9)
        channels = chance.choice([0, 1, 3, 4, 8, 15, 16, 17, 64, chance.randint(1, 80)])
        states = chance.choice([1, 2, 3, 8, 15, 16, 17, 64, 128, chance.randint(1, 300)])
        dtype, held = (chance.choice(list(binding.DTYPES)) for _ in range(2))
        one = functools.partial(view, batch, dtype=dtype)
        x, grad = one(tokens, heads, channels), one(tokens, heads, channels)
        dt = view(batch, tokens, heads, dtype=chance.choice([dtype, held]))
        B, C = (one(tokens, groups, states) for _ in range(2))
        A, D, bias = parameter(dtype, heads), maybe(parameter(dtype, heads)), maybe(parameter(dtype, heads))
        initial, grad_state = (maybe(view(batch, heads, channels, states, dtype=held)) for _ in range(2))
        softplus, limits = chance.random() < 0.5, chance.choice([(0.0, math.inf), (0.1, 0.7)])
        index = maybe(torch.randint(0, max(tokens, 1), (batch, chance.randint(0, 2 * tokens))))
        pool, in_decay = chance.choice(reference.POOLS), chance.random() < 0.5
        step = (one(heads, channels), view(batch, heads, dtype=dtype), A, one(groups, states), one(groups, states))
        state = torch.randn(batch, heads, channels, states, dtype=held)
        return {
            "ssd_scan": (x, dt, A, B, C, D, bias, softplus, *limits, initial, index),
            "ssd_scan_backward": (grad, grad_state, x, dt, A, B, C, D, bias, softplus, *limits, initial),
            "ssd_influence": (x, dt, A, B, C, bias, softplus, *limits, pool, in_decay),
            "ssd_state_update": (state, *step, D, bias, softplus, chance.random() < 0.5),
        }

    SIZES = (0, 1, 2), (1, 2, 4, 30, 90), (0, 1, 17, 90), (1, 17, 90)  # batch, tokens, depth, columns

    def linear_case() -> tuple[object, ...]:
        """x, weight, bias, add and index: a few rows and many, weights that fit a cache and that do not."""
        batch, tokens, depth, columns = (chance.choice(sizes) for sizes in SIZES)
        if chance.random() < 0.1:
            depth = columns = 420
        kept = chance.randint(1, tokens)
        index = torch.randint(0, tokens, (batch, kept)) if chance.random() < 0.5 else None
        rows = tokens if index is None else kept
        add = make(batch, tokens, columns)
        bias = maybe(parameter(dtype, columns))
        return make(batch, rows, depth), make(columns, depth), bias, maybe(add) if index is None else add, index

    def mixer_case() -> tuple[object, ...]:
        """A step of a whole mixer."""
        rank = chance.choice([1, 2, 7, 48])
        window, state = (torch.randn(batch, channels, size, dtype=held) for size in (width, states))
        projected = view(batch, *chance.choice([(), (1,)]), 2 * channels, dtype=dtype)
        x_proj, dt_proj = make(rank + 2 * states, channels), make(channels, rank)
        return state, window, projected, weight, bias, x_proj, dt_proj, maybe(parameter(dtype, channels)), A, D

    def ssd_mixer_case() -> tuple[object, ...]:
        """The same of Mamba-2."""
        groups, size = chance.choice([1, 2]), chance.choice([1, 3, 16, 64])
        heads = groups * chance.choice([1, 2, 5])
        inner = heads * size
        mixed, norm_groups = inner + 2 * groups * states, chance.choice([0, 1, heads])
        state, window = torch.randn(batch, heads, size, states, dtype=held), torch.randn(batch, mixed, width, dtype=held)
        projected = view(batch, *chance.choice([(), (1,)]), inner + mixed + heads, dtype=dtype)
        of_heads = (maybe(parameter(dtype, heads)), parameter(dtype, heads), maybe(parameter(dtype, heads)))
        filters = parameter(dtype, mixed, width), maybe(parameter(dtype, mixed))
        return state, window, projected, *filters, *of_heads, maybe(parameter(dtype, inner)), 1e-5, norm_groups

    while time.monotonic() < end:
        levels = [library.simba_set_level(level) for level in (0, 1, 2)]
        library.simba_set_level(chance.choice(levels))
        torch.set_num_threads(chance.choice([1, 2, 3]))
        dtype = chance.choice(list(binding.DTYPES))
        make = functools.partial(view, dtype=dtype)
        batch, tokens = chance.choice([0, 1, 2, 3]), chance.choice([0, 1, 2, 15, 16, 17, 33, chance.randint(1, 90)])
        channels = chance.choice([0, 1, 3, 4, 8, 15, 16, 17, 64, 65, chance.randint(1, 900)])
        states = chance.choice([1, 2, 3, 4, 5, 8, 16, 17, native_scan.MAX_STATES])
        width = chance.choice([1, 2, 3, 4, 5, native_conv.MAX_WIDTH])
        x, dt, z = (make(batch, tokens, channels) for _ in range(3))
        B, C = (make(batch, tokens, states) for _ in range(2))
        A, D, bias = parameter(dtype, channels, states), maybe(parameter(dtype, channels)), maybe(parameter(dtype, channels))
        z, softplus = maybe(z), chance.random() < 0.5
        index = None
        if tokens and chance.random() < 0.5:
            index = torch.randint(0, tokens, (batch, chance.randint(1, 2 * tokens)))[:, :: chance.choice([1, 2])]
        gate = z if z is None or index is None else make(batch, index.shape[1], channels)
        grad, grad_state = make(batch, tokens, channels), maybe(torch.randn(batch, channels, states))
        one = functools.partial(make, batch)
        k = chance.randint(0, tokens)
        first = chance.randint(0, k)
        scores = torch.randn(batch, tokens, dtype=torch.float64).masked_fill_(torch.rand(batch, tokens) < 0.2, torch.nan)
        weight = parameter(dtype, channels, width)
        held = chance.choice([dtype, torch.float32, torch.float64])
        normed, parts = chance.choice([x, x.to(held)]), chance.choice([1, 2]) if channels % 2 == 0 else 1
        cases = {
            "selective_scan": (x, dt, A, B, C, D, gate, bias, softplus, index),
            "selective_scan_backward": (grad, grad_state, x, dt, A, B, C, D, z, bias, softplus),
            "influence": (x, dt, A, B, C, bias, softplus, chance.choice(reference.POOLS), chance.random() < 0.5),
            "causal_conv1d": (x, weight, bias, softplus),
            "causal_conv1d_backward": (grad, x, weight, bias, softplus),
            "state_update": (
                *(torch.randn(batch, channels, states, dtype=held), one(channels), one(channels), A, one(states)),
                *(one(states), D, maybe(one(channels)), bias, softplus, chance.random() < 0.5),
            ),
            "conv_update": (torch.randn(batch, channels, width, dtype=held), one(channels), weight, bias, softplus),
            "rms_norm": (chance.choice([x, one(channels), make(channels)]) if channels else x, bias, 1e-5),
            "gated_norm": (normed, z, parameter(dtype, channels), 1e-5, parts, chance.choice([None, dtype, torch.float32])),
            "add_norm": (
                x.to(chance.choice([dtype, reference.compute_dtype(dtype)])),
                make(batch, tokens if index is None else index.shape[1], channels),
                D,
                1e-5,
                index,
            ),
            "select": (scores, k, first, chance.randint(0, k - first)),
            "linear": linear_case(),
            "mixer_update": mixer_case(),
            "ssd_mixer_update": ssd_mixer_case(),
        }
        if index is not None:
            cases["gather"] = (x if x.shape[2] < 2 or x.stride(2) == 1 else x.contiguous(), index)
        cases |= ssd_cases()
        for name, args in cases.items():
            kernel = kernel_of(name)
            results = kernel(*map(plain, args)), kernel(*args)
            for a, b in zip(*(out if isinstance(out, tuple) else (out,) for out in results), strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{name}: strides change the result (seed {seed})"
            calls += 2
        for name in ("selective_scan", "gather", "add_norm", "ssd_scan", "linear"):
            *args, index = cases.get(name, [None])
            if index is None or not index.numel() or chance.random() > 0.2:
                continue
            bad = index.contiguous().clone()
            tokens = args[3 if name == "linear" else 0].shape[1]
            bad.view(-1)[chance.randrange(bad.numel())] = chance.choice([-1, tokens, 2**62, -(2**62)])
            try:
                kernel_of(name)(*args, bad)
            except IndexError:
                calls += 1
            else:
                assert not args[0].numel(), f"{name} took an index out of range (seed {seed})"
    print(f"{calls} calls at {len(set(levels))} levels: nothing found")


def main() -> int:
    """Build, and drive in a process of its own."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 10**6
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder)
        runtimes = [
            subprocess.run(["gcc", f"-print-file-name=lib{name}.so"], stdout=-1, text=True, check=True).stdout.strip()
            for name in ("asan", "ubsan")
        ]
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python and torch keep what they have to the end
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, __file__, "--drive", str(library), str(seconds), str(seed)]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
    else:
        sys.exit(main())
