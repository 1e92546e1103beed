"""PyTorch's modules of attention: between mixers they run on kept tokens, as attention does that is written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException
from toys import HIDDEN, Captured, heads, matrix, tokens, toys

from simba_compile import Options, explain
from simba_compile.passes import Transformed, transform
from simba_compile.passes.attention import is_attention

torch.manual_seed(0)
module = nn.MultiheadAttention(HIDDEN, 2, batch_first=True).eval()
tokens_first = nn.MultiheadAttention(HIDDEN, 2, bias=False).eval()
of_two_sizes = nn.MultiheadAttention(HIDDEN, 2, kdim=HIDDEN, vdim=HIDDEN, add_zero_attn=True, batch_first=True).eval()
LAYERS = {
    f"a layer, {'norms first' if first else 'norms last'}, {activation}": nn.TransformerEncoderLayer(
        HIDDEN, 2, 12, activation=activation, batch_first=True, norm_first=first
    ).eval()
    for first in (False, True)
    for activation in ("relu", "gelu")
}
for parameter in (p for layer in (module, *LAYERS.values()) for p in layer.parameters()):
    nn.init.normal_(parameter)  # biases and norms, too


def later(h: Tensor) -> Tensor:
    """For each query the keys that it does not see."""
    return torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)


def padding(h: Tensor) -> Tensor:
    """For each sequence the keys that nobody sees; all queries see some."""
    gone = h[..., 0] > 0.3
    return gone & (torch.arange(h.shape[1]) > 0)


def by_hand(attention: nn.MultiheadAttention, h: Tensor, gone: Tensor | None, to: Tensor | None = None) -> Tensor:
    """What a module computes, written out, for queries in h and keys of it or of another value."""
    weights = attention.in_proj_weight.chunk(3)
    biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    to = h if to is None else to
    parts = [heads(F.linear(x, w, b)) for x, w, b in zip((h, to, to), weights, biases, strict=True)]
    attended = F.scaled_dot_product_attention(*parts, None if gone is None else ~gone)
    return F.linear(attended.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)


def layer_by_hand(layer: nn.TransformerEncoderLayer, h: Tensor, gone: Tensor | None) -> Tensor:
    def feed(x: Tensor) -> Tensor:
        return layer.linear2(layer.activation(layer.linear1(x)))

    if layer.norm_first:
        h = h + by_hand(layer.self_attn, layer.norm1(h), gone)
        return h + feed(layer.norm2(h))
    h = layer.norm1(h + by_hand(layer.self_attn, h, gone))
    return layer.norm2(h + feed(h))


Way = Callable[[Tensor], Tensor]
WAYS: dict[str, tuple[Way, Way]] = {  # by the module, and by hand
    "weights that nobody reads": (
        lambda h: h + module(h, h, h, attn_mask=later(h))[0],
        lambda h: h + by_hand(module, h, later(h)),
    ),
    "without weights": (
        lambda h: h + module(h, h, h, attn_mask=later(h), need_weights=False, is_causal=True)[0],
        lambda h: h + by_hand(module, h, later(h)),
    ),
    "without a mask": (lambda h: h + module(h, h, h)[0], lambda h: h + by_hand(module, h, None)),
    "numbers for a mask": (
        lambda h: h + module(h, h, h, attn_mask=torch.zeros(later(h).shape).masked_fill(later(h), -torch.inf))[0],
        lambda h: h + by_hand(module, h, later(h)),
    ),
    "padding": (
        lambda h: h + module(h, h, h, key_padding_mask=padding(h), need_weights=False)[0],
        lambda h: h + by_hand(module, h, padding(h)[:, None, None]),
    ),
    "padding and a mask": (
        lambda h: h + module(h, h, h, key_padding_mask=padding(h), attn_mask=later(h), is_causal=True)[0],
        lambda h: h + by_hand(module, h, padding(h)[:, None, None] | later(h)),
    ),
    "keys of another value": (
        lambda h: h + module(h, h.sin(), h.sin(), attn_mask=later(h))[0],
        lambda h: h + by_hand(module, h, later(h), h.sin()),
    ),
    "keys of no token": (
        lambda h: h + module(h, *[matrix.expand(h.shape[0], -1, -1)] * 2)[0],
        lambda h: h + by_hand(module, h, None, matrix.expand(h.shape[0], -1, -1)),
    ),
    "tokens first": (
        lambda h: h + tokens_first(*[h.transpose(0, 1)] * 3, attn_mask=later(h))[0].transpose(0, 1),
        lambda h: h + by_hand(tokens_first, h, later(h)),
    ),
    **{
        name: (
            lambda h, layer=layer: layer(h, src_mask=later(h)),
            lambda h, layer=layer: layer_by_hand(layer, h, later(h)),
        )
        for name, layer in LAYERS.items()
    },
    "a layer without a mask": (
        lambda h: next(iter(LAYERS.values()))(h),
        lambda h: layer_by_hand(next(iter(LAYERS.values())), h, None),
    ),
    "a layer with padding": (
        lambda h: next(iter(LAYERS.values()))(h, src_key_padding_mask=padding(h)),
        lambda h: layer_by_hand(next(iter(LAYERS.values())), h, padding(h)[:, None, None]),
    ),
    "a layer with padding and a mask": (
        lambda h: next(iter(LAYERS.values()))(h, src_mask=later(h), src_key_padding_mask=padding(h)),
        lambda h: layer_by_hand(next(iter(LAYERS.values())), h, padding(h)[:, None, None] | later(h)),
    ),
}
first, second, third = toys(3)
OPTIONS = {"min_tokens": 1, "schedule": [1.0, 0.7, 0.35]}


def transformed(way: Callable[[Tensor], Any], gradients: bool = False) -> tuple[Captured, Transformed]:
    """Three layers with the module's before the third."""
    captured = Captured(lambda h: third(way(second(first(h)))), tokens(), gradients=gradients)
    result = transform(captured.gm, Options.from_mapping(OPTIONS))
    assert [mixer.reason for mixer in result.mixers] == [None] * 3
    return captured, result


def traces_layers() -> bool:
    """Whether this torch has sizes for the operation that a layer is in inference: 2.11 has none, and breaks the graph."""
    layer = next(iter(LAYERS.values()))
    with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False) as mode, torch.no_grad():
        try:
            layer(mode.from_tensor(tokens()))
        except UnsupportedOperatorException:
            return False
    return True


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", WAYS)
def test_a_module_runs_on_kept_tokens(name: str, gradients: bool) -> None:
    if name.startswith("a layer") and not gradients and not traces_layers():
        pytest.skip("this torch does not trace an encoder layer in inference")
    found = []
    for way in WAYS[name]:
        captured, result = transformed(way, gradients)
        assert result.pruned is not None and result.on_all_tokens == []
        with torch.no_grad():
            torch.testing.assert_close(result.pruned(*captured.args, 20, 20)[0], captured.result, rtol=1e-4, atol=1e-4)
            found.append(result.pruned(*captured.args, 14, 7)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["one type", "autocast"])
def test_one_sequence_and_autocast(autocast: bool) -> None:
    """Of one sequence, which axis has the tokens shows in no product of sizes; around the model, autocast is no matter."""
    between = nn.Sequential(first, second)
    h = tokens()[:1]
    torch._dynamo.mark_dynamic(h, 1)
    found = []
    for way in WAYS["weights that nobody reads"]:
        torch._dynamo.reset()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            report = explain(lambda h, way=way: third(way(between(h))), h, options=OPTIONS)
            assert report.on_all_tokens == () and report.mixers[-1].tokens_out == 7
            found.append(torch.compile(lambda h, way=way: third(way(between(h))), backend="simba", options=OPTIONS)(h))
    torch.testing.assert_close(*found, rtol=0.05 if autocast else 1e-4, atol=0.05 if autocast else 1e-4)


@pytest.mark.parametrize(
    "way",
    [
        lambda h: h + (lambda out: out[0] + out[1].sum(-1, keepdim=True))(module(h, h, h)),
        lambda h: h + module(h, h, h, attn_mask=later(h).expand(2 * h.shape[0], -1, -1))[0],
        lambda h: h + of_two_sizes(h, h, h)[0],
        lambda h: h + module(matrix[:1].expand(h.shape[0], 1, -1), h, h)[0],
    ],
    ids=["weights", "a mask for each head", "with zeros", "pooling"],
)
def test_other_calls_stay_what_they_are(way: Way) -> None:
    captured, result = transformed(way)
    assert result.pruned is not None
    assert not any(is_attention(node) for node in result.pruned.graph.nodes)
    assert any(node.target is F.multi_head_attention_forward for node in result.pruned.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(result.pruned(*captured.args, 20, 20)[0], captured.result, rtol=1e-4, atol=1e-4)
