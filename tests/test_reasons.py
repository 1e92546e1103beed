"""Why a mixer stays dense: each reason that pruning gives, from a small function that has it; none is wrong or pruned."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toys import Captured, heads, matrix, tokens, toys

from simba_compile import Options
from simba_compile.passes import Transformed, transform

a, b, c = toys(3)
BOTH, SECOND = {"schedule": [0.6, 0.3]}, {"schedule": [1.0, 0.5]}
LAYER = {"placement": "layer"}


def attends_to_four(h: Tensor) -> Tensor:
    few = heads(h[:, :4] * 2)
    return h + F.scaled_dot_product_attention(heads(h), few, few).transpose(1, 2).flatten(2)


def keys_summed_up(h: Tensor) -> tuple[Tensor, Tensor]:
    """And cached."""
    h = a(h)
    keys = F.linear(h, matrix)
    h = h + F.scaled_dot_product_attention(heads(h), heads(keys), heads(keys)).transpose(1, 2).flatten(2)
    return b(h + keys.cumsum(1)), keys


def keys_summed_up_before(h: Tensor) -> tuple[Tensor, Tensor]:
    h = a(h)
    keys = F.linear(h, matrix)
    sums = keys.cumsum(1)
    h = h + sums + F.scaled_dot_product_attention(heads(h), heads(keys), heads(keys)).transpose(1, 2).flatten(2)
    return b(h), keys


def two_at_once(h: Tensor) -> Tensor:
    h = a(h)
    y, z = b.mixer(h), c.mixer(h)
    return h + (y + z)


def one_into_the_next(h: Tensor) -> Tensor:
    h = a(h)
    return h + c.mixer(b.mixer(h))


def tokens_before_the_batch(h: Tensor) -> Tensor:
    return b((a(h).transpose(0, 1) + h.transpose(0, 1)).transpose(0, 1))


def tokens_before_the_batch_and_behind_channels(h: Tensor) -> Tensor:
    return b((a(h).permute(2, 1, 0) + h.sin().permute(2, 1, 0)).permute(2, 1, 0))


def output_averaged(h: Tensor) -> Tensor:
    y = a.mixer(h)
    return b(h + y + y.mean(1, keepdim=True))


def heads_in_the_batch(h: Tensor) -> Tensor:
    h = a(h)
    rows = heads(h).flatten(0, 1)
    return b(h + F.scaled_dot_product_attention(rows, rows, rows).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2))


def channels_before_tokens(h: Tensor) -> Tensor:
    across = h.transpose(1, 2)
    for layer in (a, b):
        across = across + layer.mixer(across.transpose(1, 2)).transpose(1, 2)
    return across.transpose(1, 2)


def sum_under_autocast(h: Tensor) -> Tensor:
    h = a(h)
    y = F.linear(h, matrix)
    with torch.autocast("cpu", torch.bfloat16):
        total = y.cumsum(1)
    return b(h + total)


def written_after_it_was_read(h: Tensor) -> Tensor:
    other = h.clone()
    view = other[..., :3]
    h = a(h) + other
    view.mul_(2)
    return b(h + other)


def written_in_a_checkpoint(h: Tensor) -> Tensor:
    other = h.clone()
    h = a(h) + other
    checkpoint(lambda x: x.mul_(2), other, use_reentrant=False)
    return b(h + other)


def written_in_a_branch(h: Tensor) -> Tensor:
    other = h.clone()
    h = a(h) + other
    torch.cond(other.sum() > 0, lambda x: x.mul_(2), lambda x: x.mul_(3), (other,))
    return b(h + other)


def written_in_a_list(h: Tensor) -> Tensor:
    other = h.clone()
    h = a(h) + other
    torch._foreach_mul_([other.view(h.shape)], 2.0)
    return b(h + other)


def written_after_it_lost_tokens(h: Tensor) -> Tensor:
    h = a(h)
    wide = h.sin()
    F.relu(wide[..., :3], inplace=True)
    return b(h + wide)


def doubled_batch(h: Tensor) -> Tensor:
    h = a(h)
    both = b.mixer(torch.cat([h, h.flip(1)]))
    return h + both[: h.shape[0]] + both[h.shape[0] :].flip(1)


def in_the_shape_of_fewer(h: Tensor) -> Tensor:
    h = a(h)
    before = h.sin()
    h = b(h)
    return h + before.view(h.shape)


REASONS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any], list[str | None]]] = {
    "keys of four tokens": (
        lambda h: b(attends_to_four(a(h))),
        BOTH,
        ["the key of attention does not have one row for each token"] * 2,
    ),
    "keys that are summed up": (keys_summed_up, BOTH, ["cumsum reads keys or values of attention for all tokens"] * 2),
    "keys that attention reads later": (
        keys_summed_up_before,
        BOTH,
        ["sums reads keys or values of attention for all tokens"] * 2,
    ),
    "two mixers at once": (
        two_at_once,
        {"schedule": [0.6, 0.5, 0.3]},
        ["the mixers of this graph do not follow one another"] * 3,
    ),
    "one mixer into the next": (
        one_into_the_next,
        {"schedule": [0.6, 0.5, 0.3], **LAYER},
        [None, None, "another mixer stands between this one's scan and its residual add"],
    ),
    "an add onto the first stream": (
        lambda h: h + b.mixer(a(h))[:, -1:],
        {**BOTH, **LAYER},
        [None, "the layer's output does not have the tokens that its scan ran on"],
    ),
    "tokens before the batch": (tokens_before_the_batch, BOTH, ["transpose_.* has tokens that cannot be gathered"] * 2),
    "channels before tokens before the batch": (
        tokens_before_the_batch_and_behind_channels,
        BOTH,
        ["permute_.* has tokens that cannot be gathered"] * 2,
    ),
    "a mixer's output averaged": (
        output_averaged,
        BOTH,
        ["is needed for all tokens by mean_1, and is not defined for pruned ones"] * 2,
    ),
    "channels before tokens": (channels_before_tokens, BOTH, ["across_2 is the residual stream.* tokens in axis 2"] * 2),
    "attention with its heads in the batch": (
        heads_in_the_batch,
        BOTH,
        ["the query of attention does not have one row for each token"] * 2,
    ),
    "a sum under autocast": (
        sum_under_autocast,
        BOTH,
        ["is needed for all tokens by total within a no_grad or autocast of others"] * 2,
    ),
    "written after it was read": (
        written_after_it_was_read,
        BOTH,
        ["mul_ writes in place into what .* read for pruned tokens"] * 2,
    ),
    "written in a checkpoint": (
        written_in_a_checkpoint,
        BOTH,
        ["tag_activation_checkpoint writes in place into what .* read for pruned tokens"] * 2,
    ),
    "written in a branch": (
        written_in_a_branch,
        BOTH,
        ["cond writes in place into what .* read for pruned tokens"] * 2,
    ),
    "written in a list": (
        written_in_a_list,
        BOTH,
        ["_foreach_mul_ writes in place into what .* read for pruned tokens"] * 2,
    ),
    "written after it lost tokens": (
        written_after_it_lost_tokens,
        BOTH,
        ["relu writes in place into a value that has lost tokens"] * 2,
    ),
    "a doubled batch": (doubled_batch, SECOND, [None, "selective_scan_1 has tokens that cannot be told"]),
    "a doubled batch, by layers": (
        doubled_batch,
        {**SECOND, **LAYER},
        [None, "selective_scan_1 has tokens that cannot be told"],
    ),
    "half the tokens": (
        lambda h: b(a(h[:, : h.shape[1] // 2])),
        BOTH,
        [r"the length is \(s\d+//2\), made out of other sizes, in this graph"] * 2,
    ),
    "as many rows as the input has, and one more": (
        lambda h: b(a(torch.cat([h[:, :1], h], 1))).reshape(h.shape[0] * h.shape[1] + h.shape[0], 6),
        BOTH,
        [r"the size s\d+ is a part of the length, and not defined for pruned tokens"] * 2,
    ),
    "a shorter sequence from the second layer on": (
        lambda h: b(a(h).unflatten(1, (-1, 2)).sum(2)),
        BOTH,
        [None, "its tokens are others than the first mixer's: there are "],
    ),
    "the shape of fewer tokens": (
        in_the_shape_of_fewer,
        BOTH,
        [None, "would be needed with more tokens than it has"],
    ),
}


def run_with(result: Transformed, captured: Captured, length: int) -> Tensor:
    """The pruned graph with counts as large as the sequence, or else the dense one."""
    if result.pruned is None or result.plan is None:
        return result.dense(*captured.args)[0]
    return result.pruned(*captured.args, *[length] * len(result.plan.pruning))[0]


@pytest.mark.parametrize("name", REASONS)
def test_mixers_stay_dense_and_say_why(name: str) -> None:
    """Those before the one that cannot prune still do; with everything kept, the result is eager's."""
    function, options, expected = REASONS[name]
    captured = Captured(function, tokens())
    with torch.no_grad():
        result = transform(captured.gm, Options.from_mapping({"min_tokens": 1, **options}))
        found = run_with(result, captured, 20)
    reasons = [mixer.reason for mixer in result.mixers]
    assert [reason is None for reason in reasons] == [reason is None for reason in expected]
    for reason, wanted in zip(reasons, expected, strict=True):
        if wanted is not None:
            assert reason is not None
            assert re.search(wanted, reason)
    assert (result.pruned is None) == (None not in expected or options["schedule"][0] == 1)
    (eager, *_) = captured.result if isinstance(captured.result, tuple) else (captured.result,)
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-5)


def restored_without_gradients(h: Tensor) -> Tensor:
    h = a(h)
    with torch.no_grad():
        shift = h.cumsum(1)
    return h + shift + h.cumsum(1)


def made_without_gradients(h: Tensor) -> Tensor:
    h = a(h)
    with torch.no_grad():
        y = F.linear(h, matrix)
    return h * y + y.cumsum(1) + h.cumsum(1)


@pytest.mark.parametrize("function", [restored_without_gradients, made_without_gradients])
def test_copies_made_without_gradients_serve_there_alone(function: Callable[[Tensor], Tensor]) -> None:
    """What is restored under no_grad has no gradient: after it, it is restored anew."""

    def gradient(run: Callable[..., Any], *more: int) -> Tensor:
        inputs = [value.detach().clone().requires_grad_() if value is h else value for value in captured.args]
        (given,) = (value for value, before in zip(inputs, captured.args, strict=True) if value is not before)
        run(*inputs, *more)[0].square().sum().backward()
        assert given.grad is not None
        return given.grad

    h = tokens().requires_grad_()
    captured = Captured(function, h, gradients=True)
    expected = gradient(captured.gm)
    result = transform(captured.gm, Options(keep=0.5, min_tokens=1))
    assert result.pruned is not None
    torch.testing.assert_close(gradient(result.pruned, 20), expected, rtol=1e-4, atol=1e-4)
    few = gradient(result.pruned, 10)
    assert few.isfinite().all() and not torch.allclose(few, expected, rtol=0.01)
