"""What `simba_compile.explain` reports of a call, on models of a few thousand weights."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from conftest import KEEP_FEW, random_ids, simba, tiny_model
from eager_reference import counts
from torch import Tensor

import simba_compile
from simba_compile import backend
from simba_compile.passes import Transformed
from simba_compile.passes.tokens import LINEAR
from simba_compile.report import mixer_rows

UNIFORM = {"schedule": "uniform", "min_tokens": 4}
LENGTH, WORDS = 50, 70  # no width of a tiny model is 70
OPS = torch.ops.simba


def tokens_left(report: simba_compile.Report) -> list[int]:
    return [mixer.tokens_out for mixer in report.mixers]


@pytest.mark.parametrize("options", [KEEP_FEW, simba_compile.Options(**KEEP_FEW)])
def test_tokens_are_the_contracts(options: Any) -> None:
    with torch.no_grad():
        report = simba_compile.explain(tiny_model(layers=3), random_ids(2, LENGTH), options=options)
    assert tokens_left(report) == counts(LENGTH, 3, **KEEP_FEW)
    assert report.graphs == 1 and report.flops_pruned < report.flops_dense
    assert report.to_dict()["mixers"][0]["kind"] == "mamba1"


def test_the_length_is_the_sequences_whatever_the_call_reads_first() -> None:
    model = tiny_model(layers=3)

    def scaled(by: Tensor, ids: Tensor) -> Tensor:
        factor = by.sum()
        return model(ids).logits * factor

    with torch.no_grad():
        report = simba_compile.explain(scaled, torch.ones(4, 7), random_ids(2, LENGTH), options=KEEP_FEW)
    assert tokens_left(report) == counts(LENGTH, 3, **KEEP_FEW)


class Counting(torch.fx.Interpreter):
    """Runs a graph, and counts the operations of its projections, convolutions, scans and scores, one by one."""

    operations = 0

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if target in LINEAR | {OPS.linear} and args[1].shape[0] != WORDS:
            self.operations += 2 * args[0].numel() * args[1].shape[0]
        elif target is OPS.causal_conv1d:
            self.operations += 2 * args[0].numel() * args[1].shape[-1]
        elif target is OPS.selective_scan:
            self.operations += 7 * result[0].numel() * args[2].shape[1]
        elif target is OPS.influence:
            self.operations += 4 * args[0].numel() * args[2].shape[1]
        elif target is OPS.ssd_scan:
            self.operations += 5 * result[0].numel() * args[3].shape[-1]
        elif target is OPS.ssd_influence:
            self.operations += 2 * args[3].numel() + 3 * args[0].numel()
        return result


@pytest.mark.parametrize("placement", ["scan", "layer"])
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2", "codestral"])
def test_operations_are_those_that_run(family: str, placement: str) -> None:
    """Above all: in_proj makes the gate for the tokens that stay, where `explain` says so."""
    operations = []

    def counting(gm: torch.fx.GraphModule, inputs: list[Any], **given: Any) -> Any:
        found: list[Transformed] = []
        run = backend.simba(gm, inputs, observe=found.append, **given)

        def counted(*args: Any) -> Any:
            (result,) = found
            interpreter = Counting(result.pruned)  # type: ignore[arg-type]
            interpreter.run(*args, *result.plan.inputs(LENGTH))  # type: ignore[union-attr]
            operations.extend([interpreter.operations, sum(row.flops_pruned for row in mixer_rows(result, LENGTH))])
            return run(*args)

        return counted

    counting.__wrapped__ = backend.simba  # type: ignore[attr-defined]  # how capture knows the backend
    model = families.tiny_model(family, vocab_size=WORDS)
    compiled = torch.compile(model, backend=counting, options={**KEEP_FEW, "placement": placement})
    with torch.no_grad():
        compiled(random_ids(1, LENGTH), logits_to_keep=1)
    ran, reported = operations
    assert ran == reported


def test_a_score_is_counted_where_there_is_one() -> None:
    """By place or at random, tokens are ranked without arithmetic."""
    found = {}
    for criterion in ("influence", "recent", "random"):
        options = {**KEEP_FEW, "criterion": criterion}
        found[criterion] = simba_compile.explain(tiny_model(layers=2), random_ids(1, LENGTH), options=options).flops_pruned
    scores = 4 * 64 * 8 * LENGTH  # of the second mixer, by channel, state and token
    assert found["recent"] == found["random"] == found["influence"] - scores


@pytest.mark.parametrize(
    ("options", "call", "reason"),
    [
        ({"keep": 0.1, "min_tokens": 50}, {}, "there are no more tokens than min_tokens, which is 50"),
        (
            {**KEEP_FEW, "protect_first": 30},
            {"logits_to_keep": 20},
            "all tokens are protected: 30 at the start, 20 at the end",
        ),
        ({"keep": 0.995, "min_tokens": 4}, {}, "the shares leave all tokens"),
        ({"keep": 1.0}, {}, None),
    ],
)
def test_why_all_tokens_stay(options: dict[str, Any], call: dict[str, int], reason: str | None) -> None:
    with torch.no_grad():
        report = simba_compile.explain(tiny_model(layers=2), random_ids(2, LENGTH), options=options, **call)
    assert tokens_left(report) == [LENGTH] * 2
    assert {mixer.reason for mixer in report.mixers} == {reason}
    assert str(report).count("as above") == (reason is not None)  # a table tells a reason once


def test_a_call_without_mixers() -> None:
    report = simba_compile.explain(torch.sin, torch.randn(2, LENGTH))
    assert report.to_dict() == {"mixers": [], "flops_dense": 0, "flops_pruned": 0, "graphs": 1, "on_all_tokens": []}
    assert str(report) == "No Mamba mixer was found: the model runs as it is.\n"


def test_what_runs_on_all_tokens_is_named() -> None:
    """What treats tokens apart in a way that no pass knows, and what mixes them; not what is made of all tokens anyway."""
    first, second, third = tiny_model(layers=3).backbone.layers

    class Between(torch.nn.Module):
        def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
            return h + h.renorm(2, 2, 5.0) + h.cumsum(1).sin() + embedded.cumsum(1)

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.between = first, second, third, Between()

        def forward(self, h: Tensor) -> Tensor:
            return self.third(self.between(self.second(self.between(self.first(h), h)), h))

    stack = Stack()
    h = torch.randn(2, LENGTH, 32)
    torch._dynamo.mark_dynamic(h, 1)
    with torch.no_grad():
        report = simba_compile.explain(stack, h, options={"schedule": [1.0, 0.5, 0.3], "min_tokens": 4})
        dense = simba_compile.explain(stack, h, options={"keep": 1.0})
    assert tokens_left(report) == [50, 25, 15]
    assert len(report.on_all_tokens) == 2 and all(name.endswith("in between") for name in report.on_all_tokens)
    assert {name.partition("_")[0] for name in report.on_all_tokens} == {"renorm", "cumsum"}
    assert str(report).splitlines()[-1] == f"On all tokens, those that left too: {', '.join(report.on_all_tokens)}."
    assert not dense.on_all_tokens and "On all tokens" not in str(dense)


@pytest.mark.parametrize("tokens", [LENGTH + 1, LENGTH - 3, LENGTH // 2])
def test_a_sequence_of_another_length_has_its_own_tokens(tokens: int) -> None:
    """Three layers, and before the second one the sequence is made longer or shorter: from there on all is dense."""
    first, second, third = tiny_model(layers=3).backbone.layers
    change = {
        LENGTH + 1: lambda h: torch.cat([h[:, :1], h], 1),
        LENGTH - 3: lambda h: h[:, 3:],
        LENGTH // 2: lambda h: h.unflatten(1, (-1, 2)).sum(2),
    }[tokens]
    h = torch.randn(2, LENGTH, 32)
    with torch.no_grad():
        report = simba_compile.explain(lambda h: third(second(change(first(h)))), h, options={"keep": 0.5, **UNIFORM})
    assert [(row.tokens_in, row.tokens_out) for row in report.mixers] == [(LENGTH, 25), (tokens, tokens), (tokens, tokens)]
    (one, two, _) = report.mixers
    assert one.reason is None and "its tokens are others" in str(two.reason)
    assert two.flops_pruned == two.flops_dense == one.flops_dense * tokens / LENGTH


def test_a_fixed_length_is_the_reason() -> None:
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        report = simba_compile.explain(tiny_model(layers=2), random_ids(2, LENGTH), options=KEEP_FEW)
    assert tokens_left(report) == [LENGTH] * 2
    assert {mixer.reason for mixer in report.mixers} == {
        f"the length is fixed at {LENGTH} in this graph (torch.compile's dynamic=True may leave it open)"
    }


def test_a_length_that_the_graph_reads_off_a_tensor_is_the_reason() -> None:
    """No argument shows it before the graph runs."""
    model, ids, length = tiny_model(layers=2), random_ids(1, LENGTH), torch.tensor(30)

    def trimmed(ids: Tensor, length: Tensor) -> Tensor:
        tokens = length.item()
        torch._check(tokens >= 4)
        torch._check(tokens <= ids.shape[1])
        return model(ids[:, :tokens]).logits

    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        report = simba_compile.explain(trimmed, ids, length, options=KEEP_FEW)
        torch.testing.assert_close(simba(trimmed, **KEEP_FEW)(ids, length), trimmed(ids, length), rtol=1e-3, atol=1e-3)
    assert tokens_left(report) == [30] * 2 and report.graphs == 1
    assert all("no input of the graph has the length" in str(mixer.reason) for mixer in report.mixers)


def test_wrong_options_are_told_before_the_call() -> None:
    def never() -> None:
        raise AssertionError

    with pytest.raises(ValueError, match="Did you mean keep"):
        simba_compile.explain(never, options={"kep": 1})


def test_an_option_given_to_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep is an option of the backend.*options={'keep': 0\.5}"):
        simba_compile.explain(tiny_model(), random_ids(1, 40), keep=0.5)
