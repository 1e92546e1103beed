"""What holds for the operator of a whole mixer's decoding step, of Mamba-1 and of Mamba-2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_inputs import assert_near, at_level, spoiled, threads, wide
from torch import Tensor

from simba_compile.kernels import reference
from simba_compile.kernels.native import mixer as native_mixer

OPS = torch.ops.simba


def copied(args: list[Any]) -> list[Any]:
    """The arguments with states of their own, which are written to."""
    return [args[0].clone(), args[1].clone(), *args[2:]]


def assert_like_its_parts(name: str, args: list[Any], in_parts: Callable[..., Tensor], level: int, count: int) -> None:
    """It gives what the kernels of its parts do, with so many threads; and what its definition does, where it is exact."""
    whole, parts = copied(args), copied(args)
    with at_level(level), threads(count):
        out = getattr(OPS, name)(*whole)
        if not out.numel():
            return
        expected = in_parts(*parts)
    dtype = args[2].dtype
    assert out.dtype == dtype and out.shape == expected.shape
    assert torch.equal(whole[1], parts[1])
    assert_near(whole[0], parts[0].double())  # the parts round what is between them as the whole does
    assert_near(out, expected.double())
    if dtype in (torch.float32, torch.float64):
        exact = copied(wide(args))
        assert_near(out, getattr(reference, name)(*exact))
        assert_near(whole[0], exact[0])


def assert_the_same_of_all_threads(name: str, args: list[Any]) -> None:
    """With one thread, two and three, to the last bit."""
    results = []
    for count in (1, 2, 3):
        given = copied(args)
        with threads(count):
            results.append((getattr(OPS, name)(*given), given[0], given[1]))
    exact = copied(wide(args))
    assert_near(results[0][0], getattr(reference, name)(*exact))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def assert_written_back(name: str, args: list[Any], held: torch.dtype) -> None:
    """States in another dtype than the kernel's are updated where they are."""
    step: Callable[..., Tensor] = getattr(native_mixer, name)
    expected, given = copied(args), copied(args)
    given[:2] = [value.to(held) for value in given[:2]]
    expected[:2] = [value.float() for value in given[:2]]
    torch.testing.assert_close(step(*given), step(*expected))
    torch.testing.assert_close(given[0], expected[0].to(held))
    torch.testing.assert_close(given[1], expected[1].to(held))


def assert_refused(name: str, args: list[Any], fixed: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tensor has something wrong about it; those at `fixed` places in another dtype, too. C is called no more."""
    step: Callable[..., Tensor] = getattr(native_mixer, name)
    step(*copied(args))
    monkeypatch.setattr(native_mixer, "call", lambda *_: pytest.fail("C was called"))
    for place, value in enumerate(args):
        for what, wrong in spoiled(value) if isinstance(value, Tensor) else ():
            if (place, what) == (2, "another rank") or (what == "whole numbers" and place not in fixed):
                continue  # a token axis of one; parameters and states are cast from any type
            with pytest.raises(ValueError, match="expected"):
                step(*args[:place], wrong, *args[place + 1 :])
