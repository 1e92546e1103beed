"""Padding on the right: the last position says nothing of the text, so the call runs dense, and says why."""

from __future__ import annotations

import logging
from collections.abc import Callable

import families
import pytest
import torch
from conftest import KEEP_FEW, random_ids
from torch import Tensor, nn

import simba_compile

LENGTH, PADDED = 48, 11


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba", "falcon_h1"])
def test_a_sequence_that_ends_in_padding_is_dense(
    family: str, selected: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = families.tiny_model(family)
    fast = torch.compile(model, backend="simba", options=KEEP_FEW)
    ids, right = random_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    right[1, -PADDED:] = 0
    left = right.flip(1)
    with caplog.at_level(logging.WARNING, "simba_compile"), torch.no_grad():
        for _ in range(2):
            out = fast(ids, attention_mask=right).logits
        assert not selected
        expected = model(ids, attention_mask=right).logits
        fast(ids, attention_mask=left)
        assert selected
    torch.testing.assert_close(out[right.bool()], expected[right.bool()], rtol=1e-4, atol=1e-4)
    assert caplog.text.count("ends in padding") == 1 and "pad on the left" in caplog.text


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_so_is_one_sequence_alone(family: str, selected: list[Tensor]) -> None:
    """The length of its mask has another symbol than that of its tokens, in most families."""
    fast = torch.compile(families.tiny_model(family), backend="simba", options=KEEP_FEW)
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    with torch.no_grad():
        fast(random_ids(1, LENGTH), attention_mask=mask)
        assert selected
        selected.clear()
        mask[0, -3:] = 0
        fast(random_ids(1, LENGTH), attention_mask=mask)
    assert not selected


def test_explain_says_so() -> None:
    model, ids = families.tiny_model("mamba"), random_ids(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    with torch.no_grad():
        pruned = simba_compile.explain(model, ids, options=KEEP_FEW, attention_mask=mask)
        mask[0, -1] = 0
        dense = simba_compile.explain(model, ids, options=KEEP_FEW, attention_mask=mask)
    assert pruned.mixers[-1].tokens_out < LENGTH and not any(mixer.reason for mixer in pruned.mixers)
    assert {mixer.tokens_out for mixer in dense.mixers} == {LENGTH}
    assert dense.flops_pruned == dense.flops_dense and all("padding" in str(mixer.reason) for mixer in dense.mixers)


class Embedder(nn.Module):
    """A backbone whose caller has a name of its own for the mask, or makes it."""

    def __init__(self, backbone: nn.Module, make_mask: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.backbone, self.make_mask = backbone, make_mask

    def forward(self, tokens: Tensor, given: Tensor) -> Tensor:
        """Hidden states, (batch, token, channel)."""
        return self.backbone(tokens, attention_mask=self.make_mask(tokens, given)).last_hidden_state


def other_masks(mask: Tensor) -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor | None], Tensor]]:
    """How the mask may come about, and of what besides the ids."""
    return {
        "another name": (lambda ids, given: given, mask),
        "bool": (lambda ids, given: given, mask.bool()),
        "of the ids": (lambda ids, given: (ids != 0).long(), torch.zeros(1)),
        "of the ids, by a method": (lambda ids, given: ids.ne(0), torch.zeros(1)),
        "of lengths": (lambda ids, given: (torch.arange(ids.shape[1])[None] < given[:, None]).long(), mask.sum(1)),
        "of padding": (lambda ids, given: ~given, ~mask.bool()),
    }


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("mamba", kind) for kind in other_masks(torch.ones(1, 1))), ("zamba2", "another name"), ("zamba2", "of the ids")],
)
def test_masks_of_another_name_or_made_in_the_model(family: str, kind: str, selected: list[Tensor]) -> None:
    right = torch.ones(2, LENGTH, dtype=torch.long)
    right[1, -PADDED:] = 0
    make_mask, given = other_masks(right)[kind]
    small = {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]} if family == "zamba2" else {}
    model = Embedder(families.tiny_model(family, **small).base_model, make_mask)
    fast = torch.compile(model, backend="simba", fullgraph=True, options=KEEP_FEW)
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        out = fast(ids * right, given)
        assert not selected
        expected = model(ids * right, given)
        whole = torch.ones_like(right)
        fast(ids, other_masks(whole)[kind][1])
        assert selected
    torch.testing.assert_close(out[right.bool()], expected[right.bool()], rtol=1e-4, atol=1e-4)


def test_weights_of_tokens_that_are_computed_from_the_tokens_are_no_masks(selected: list[Tensor]) -> None:
    """They would cost what they cost twice; and dropout would draw twice."""
    layers = families.tiny_model("mamba").backbone.layers

    def weighed(h: Tensor) -> Tensor:
        h = h * torch.relu(h.mean(-1, keepdim=True))
        h = h * torch.nn.functional.dropout(torch.ones_like(h[..., :1]), 0.5)
        for layer in layers:
            h = layer(h)
        return h

    with torch.no_grad():
        torch.compile(weighed, backend="simba", fullgraph=True, options=KEEP_FEW)(-torch.ones(2, LENGTH, 32))
    assert selected


def test_positions_are_no_masks(selected: list[Tensor]) -> None:
    """Rotary frequencies are multiplied by them, and the last one may be 0: of a sequence of one token, packed."""
    positions = torch.arange(LENGTH)[None] % (LENGTH - 1)
    with torch.no_grad():
        fast = torch.compile(families.tiny_model("zamba2"), backend="simba", fullgraph=True, options=KEEP_FEW)
        fast(random_ids(1, LENGTH), position_ids=positions)
    assert selected
