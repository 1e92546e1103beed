"""Operations between mixers that look along the tokens, and other structures: dense with a reason or right, never wrong."""

from __future__ import annotations

from collections.abc import Callable

import eager_reference as eager
import pytest
import torch
import torch.nn.functional as F
from conftest import SELECTING, exact_casts, tiny_model
from torch import Tensor, nn
from toys import OPS

import simba_compile.backend
from simba_compile.passes import Transformed


def backwards(h: Tensor) -> Tensor:
    """The places of the tokens, the last one's first."""
    return torch.arange(h.shape[1] - 1, -1, -1)


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
    "flip of a sum": lambda h: h.cumsum(1).flip(1) / 10,
    "roll": lambda h: torch.roll(h, 1, 1),
    "roll by cat": lambda h: torch.cat([h[:, 1:], h[:, :1]], 1),
    "roll back by cat": lambda h: torch.cat((h[:, -1:, :], h[:, :-1]), dim=-2),
    "roll by hstack": lambda h: torch.hstack([h[:, 1:], h[:, :1]]),
    "flat roll by vstack": lambda h: (lambda x: torch.vstack([x[1:], x[:1]]).view(h.shape))(h.reshape(-1, 32)),
    "roll by dstack": lambda h: (lambda x: torch.dstack([x[..., 1:], x[..., :1]]))(h.transpose(1, 2)).transpose(1, 2),
    "roll by narrow": lambda h: torch.cat([h.narrow(1, 3, h.shape[1] - 3), h.narrow(1, 0, 3)], 1),
    "roll by names": lambda h: torch.roll(input=h, shifts=1, dims=1),
    "flip by name": lambda h: torch.flip(input=h, dims=(1,)),
    "index_select by name": lambda h: torch.index_select(input=h, dim=1, index=torch.arange(h.shape[1]).flip(0)),
    "roll of copies": lambda h: torch.cat([h[:, 1:].contiguous(), h[:, :1].clone()], 1),
    "roll of a longer one": lambda h: torch.cat([h[:, 1:], h[:, :1], h[:, :1]], 1)[:, :-1],
    "none and a roll": lambda h: torch.cat([torch.zeros(0, dtype=h.dtype), h[:, 1:], h[:, :1]], 1),
    "in order, by names": lambda h: torch.cat([h.narrow(1, 0, h.shape[1] - 1), h.narrow(dim=1, start=-1, length=1)], 1),
    "look ahead by cat": lambda h: h + torch.cat([h[:, 1:], h[:, -1:]], 1),
    "flat roll by cat": lambda h: (lambda x: torch.cat([x[1:], x[:1]], 0).view(h.shape))(h.reshape(-1, 32)),
    "channels swapped in a longer one": lambda h: (
        h + (lambda x: torch.cat([x[..., 8:], x[..., :8]], -1))(torch.cat([h, h[:, -1:]], 1))[:, :-1]
    ),
    "halves swapped": lambda h: torch.cat([h[:, h.shape[1] // 2 :], h[:, : h.shape[1] // 2]], 1),
    "two pieces swapped": lambda h: torch.cat([h[:, :2], h[:, 5:], h[:, 2:5]], 1),
    "ends swapped": lambda h: torch.cat([h[:, :-4], h[:, -2:], h[:, -4:-2]], 1),
    "first ones replaced": lambda h: torch.cat([torch.ones_like(h[:, :3]), h[:, 3:]], 1),
    "shift by cat onto the first": lambda h: h + torch.cat([h[:, :1], h[:, :-1]], 1),
    "shift by cat": lambda h: h + torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1),
    "softmax": lambda h: h * torch.softmax(h, dim=1),
    "attention": lambda h: h + torch.softmax(h @ h.transpose(1, 2) * 0.05, -1) @ h,
    "attention alone": lambda h: torch.softmax(h @ h.transpose(1, 2) * 0.05, -1) @ h * 2,
    "attention that is the stream": lambda h: torch.softmax(h @ h.transpose(1, 2) * 0.05, -1) @ h,
    "attention that is the stream, backwards": lambda h: F.scaled_dot_product_attention(*[h.flip(1)] * 3),
    "attention of weights": lambda h: h + (torch.softmax(h @ h.transpose(1, 2) * 0.05, -1) ** 2) @ h,
    "doubled": lambda h: torch.cat([h, h], 1)[:, : h.shape[1]],
    "sorted": lambda h: h.sort(1).values,
    "permuted": lambda h: h.gather(1, h.argsort(1)),
    "permuted by an index": lambda h: h[torch.arange(len(h))[:, None], h[..., 0].argsort(1)],
    "flipud": lambda h: torch.flipud(h.transpose(0, 1)).transpose(0, 1),
    "rotated": lambda h: h.rot90(2, (1, 2)),
    "stacked as columns": lambda h: torch.column_stack([h[:, 1:], h[:, :1]]),
    "scattered": lambda h: torch.zeros_like(h).scatter(1, h.argsort(1), h),
    "copied to an index": lambda h: torch.zeros_like(h).index_copy(1, backwards(h), h),
    "added to an index": lambda h: torch.zeros_like(h).index_add(1, backwards(h), h),
    "put to an index": lambda h: torch.index_put(torch.zeros_like(h), (torch.arange(len(h))[:, None], backwards(h)), h),
    "reduced to an index": lambda h: torch.zeros_like(h).scatter_reduce(1, h.argsort(1), h, "sum"),
    "scattered by truths": lambda h: h.masked_scatter(h > 0, h),
    "channels backwards": lambda h: h.flip(-1),
    "other channels": lambda h: h.index_select(-1, torch.arange(h.shape[2] - 1, -1, -1)),
    "first": lambda h: h + h[:, :1],
    "last": lambda h: h + h[:, -1:],
    "last three": lambda h: h + h[:, -3:].mean(1, keepdim=True),
    "pooled": lambda h: h + F.avg_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "scrambled": lambda h: h + h.reshape(h.shape[0], h.shape[2], h.shape[1]).transpose(1, 2),
    "flattened batch": lambda h: h + h.reshape(-1, 32).softmax(0).view(h.shape),
    "positions": lambda h: h + torch.arange(h.shape[1])[None, :, None] * 0.01,
    "positions in one channel": lambda h: h + (h[..., 0] + torch.arange(h.shape[1])[None] * 0.01)[..., None],
    "batch mean": lambda h: h + h.mean(0, keepdim=True),
    "group norm": lambda h: h + F.group_norm(h.transpose(1, 2), 4).transpose(1, 2),
    "layer norm of tokens": lambda h: h + F.layer_norm(h, h.shape[1:]),
    "argmax": lambda h: h + h.argmax(1, keepdim=True) * 0.01,
    "in place": lambda h: h.clone().mul_(h.mean(1, keepdim=True)),
    "normalize": lambda h: F.normalize(h, dim=1) * 5,
    "interpolate": lambda h: h + F.interpolate(h.transpose(1, 2), scale_factor=2)[..., ::2].transpose(1, 2),
    "chunks of tokens": lambda h: h + torch.cat(h.chunk(2, 1)[::-1], 1),
    "softmax over the batch": lambda h: h + h * h.softmax(0),
    "a row of the batch": lambda h: h + h[:1],
    "an index for one sequence": lambda h: h + h.gather(2, h.argsort(2)[:1, :, :3]).mean(2, keepdim=True),
    "an index into one sequence": lambda h: h + h.scatter(2, h.argsort(2)[:1, :, :3], 0.0),
    "gate": lambda h: h * torch.sigmoid(h),
    "over the length": lambda h: h + h / h.shape[1] * 10,
}


REORDERED = {
    *("flip", "flip by name", "flip of a sum", "roll", "roll by names", "index_select by name", "sorted", "permuted"),
    *("permuted by an index", "roll by cat", "roll back by cat", "roll by narrow", "roll of copies", "roll of a longer one"),
    *("none and a roll", "halves swapped", "two pieces swapped", "ends swapped", "flat roll by cat", "flipud", "rotated"),
    *("reduced to an index", "scattered by truths", "roll by hstack", "flat roll by vstack", "roll by dstack"),
    *(
        "attention that is the stream, backwards",
        "stacked as columns",
        "scattered",
        "copied to an index",
        "added to an index",
        "put to an index",
    ),
}
IN_PLACE = {
    *("shift by cat", "shift by cat onto the first", "look ahead by cat", "first ones replaced", "in order, by names"),
    *("channels backwards", "other channels", "mean", "cumsum", "gate", "channels swapped in a longer one"),
}


AMONG_KEPT = {"attention", "attention alone", "attention that is the stream"}


class Between(nn.Module):
    """Two blocks of Hugging Face's Mamba with a function of the stream between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = tiny_model(dtype=torch.float64, layers=2).backbone.layers
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        """The stream at the end."""
        return self.layers[1](self.function(self.layers[0](h)))


def acceptable(model: Between, h: Tensor, sizes: list[int], among_kept: bool) -> list[Tensor]:
    """What the pruned model may give: the function sees the restored stream, or those that are left.

    A token that has left may take part in the function or keep what it had. What follows begins on the kept ones.
    """
    results = []
    for those_who_left_take_part in (False,) if among_kept else (False, True):
        full, positions = h, torch.arange(h.shape[1]).expand(h.shape[0], -1)
        for i, (block, size) in enumerate(zip(model.layers, sizes, strict=True)):
            if i == 1:
                changed = model.function(full)
                if among_kept:
                    kept = model.function(eager._take(full, positions))
                    changed = full.scatter(1, positions[..., None].expand_as(kept), kept)
                elif not those_who_left_take_part:
                    kept = eager._take(changed, positions)
                    changed = full.scatter(1, positions[..., None].expand_as(kept), kept)
                full = changed
            inputs = eager._before_scan(block.mixer, block.norm(eager._take(full, positions)), None)
            index = eager.select(eager._scores(block.mixer, inputs, size, "influence", "max", "include"), size, 0, 1)
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
            monkeypatch.setattr(eager, "select", lambda s, k, first, last, original=eager.select: original(s, k, first, 3))
        with exact_casts():
            allowed = acceptable(model, h, sizes, name in AMONG_KEPT)
            dense = model(h)
    reasons = [mixer.reason for graph in found for mixer in graph.mixers]
    if name in REORDERED:
        assert "another order" in str(reasons)
    elif name in IN_PLACE:
        assert len(prunings) == 2
    is_dense = torch.allclose(out, dense, rtol=1e-7, atol=1e-7)
    if not prunings:
        assert is_dense and all(reasons) and reasons
        return
    assert len(prunings) == 2 or any(reasons)
    assert not is_dense
    assert any(torch.allclose(out, one, rtol=1e-7, atol=1e-7) for one in allowed), [(out - a).abs().max() for a in allowed]


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


STREAMS: dict[str, Step] = {
    "plain": lambda layer, h, _: layer(h),
    "a skip inside the block": lambda layer, h, _: (lambda normed: h + (layer.mixer(normed) + normed))(layer.norm(h)),
    "input added again": lambda layer, h, x: layer(h) + x,
    "half of it": lambda layer, h, x: layer(h) + 0.5 * x,
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_dropped_token_is_what_it_was_on_leaving(name: str, selected: list[Tensor]) -> None:
    layers, step = tiny_model(dtype=torch.float64, layers=2).backbone.layers, STREAMS[name]
    x = torch.randn(2, 24, 32, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        h = x
        for layer in layers:
            h = step(layer, h, x)
        return h

    with torch.no_grad():
        out = torch.compile(function, backend="simba", fullgraph=True, options={"keep": 0.3, "min_tokens": 2})(x)
        before = step(layers[0], x, x)
    dropped = torch.ones(2, 24, dtype=torch.bool).scatter(1, selected[0], False)
    torch.testing.assert_close(out[dropped], before[dropped], rtol=0, atol=1e-5)  # Hugging Face's scan is in float32
    assert (out - before)[~dropped].abs().amax(-1).min() > 1e-3


MATRIX = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda h: h,
    "scaled": lambda h: 0.7 * h,
    "bounded": torch.tanh,
    "a norm": lambda h: F.rms_norm(h, (32,)),
    "a norm in parts": lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5),
    "scaled by an add": lambda h: h + 0.1 * h,
    "twice": lambda h: h + h,
    "one more": lambda h: h + 1.0,
    "a deviation": lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + 1e-5).sqrt(),
    "an activation with an add": lambda h: 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044715 * h.pow(3)))),
}


BLOCKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of the stream, changed and as the mixer left it
    "nothing": lambda h, before: h,
    "an MLP": lambda h, before: h + F.silu(F.linear(F.rms_norm(h, (32,)), MATRIX)),
    "an MLP beside": lambda h, before: h + F.silu(F.linear(F.rms_norm(before, (32,)), MATRIX)),
    "a norm of both": lambda h, before: F.rms_norm(1.5 * h + F.silu(F.linear(h, MATRIX)), (32,)),
}


@pytest.mark.parametrize("behind", BLOCKS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_token_that_left_misses_what_layers_add_alone(
    name: str, behind: str, selected: list[Tensor], graphs: list[Transformed]
) -> None:
    """What else a model does to its stream in each layer goes on, and no layer runs on tokens that left."""
    layers, change, block = tiny_model(dtype=torch.float64, layers=3).backbone.layers, CHANGES[name], BLOCKS[behind]
    x = torch.randn(2, 24, 32, dtype=torch.float64)

    def step(layer: nn.Module, h: Tensor) -> Tensor:
        h = layer(h)
        return block(change(h), h)

    def without_layer(h: Tensor) -> Tensor:
        """The same for a token that has left."""
        return F.rms_norm(1.5 * change(h), (32,)) if behind == "a norm of both" else change(h)

    def function(x: Tensor) -> Tensor:
        return change(layers[2](step(layers[1], step(layers[0], x))))

    with torch.no_grad():
        out = torch.compile(function, backend="simba", options={"schedule": [1.0, 0.5, 0.3], "min_tokens": 2})(x)
        expected = change(without_layer(step(layers[0], x)))
    dropped = torch.ones(2, 24, dtype=torch.bool).scatter(1, selected[0], False)  # in the second layer
    torch.testing.assert_close(out[dropped], expected[dropped], rtol=1e-6, atol=1e-5)  # Hugging Face's scan is in float32
    assert (out - expected)[~dropped].abs().amax(-1).min() > 1e-3
    (result,) = graphs
    assert result.pruned is not None
    dense, pruned = ([node.target for node in gm.graph.nodes].count(OPS.linear) for gm in (result.dense, result.pruned))
    assert pruned == dense + 2  # the gates' parts of in_proj, for the tokens that stay


def test_behind_the_last_mixer_is_the_head(selected: list[Tensor]) -> None:
    """An add onto the final norm is the head's, which reads every token."""
    layers = tiny_model(dtype=torch.float64, layers=2).backbone.layers
    x = torch.randn(2, 24, 32, dtype=torch.float64)

    def head(h: Tensor) -> Tensor:
        h = F.rms_norm(h, (32,))
        return h + F.silu(F.linear(h, MATRIX))

    with torch.no_grad():
        out = torch.compile(
            lambda x: head(layers[1](layers[0](x))), backend="simba", options={"keep": 0.3, "min_tokens": 2}
        )(x)
        expected = head(layers[0](x))
    dropped = torch.ones(2, 24, dtype=torch.bool).scatter(1, selected[0], False)
    torch.testing.assert_close(out[dropped], expected[dropped], rtol=1e-6, atol=1e-5)
