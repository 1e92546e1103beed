"""What users put around a model: pipelines, heads, adapters, hooks, caches of their own choice, prompts in parts."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import KEEP_FEW, close, pruned_exactly, random_ids, simba, tiny_model
from families import tiny_model as family_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerFast, pipeline
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

import simba_compile
from simba_compile import symbolic_length
from simba_compile.cli.models import going_on
from simba_compile.passes import Transformed


def reasons(graphs: list[Transformed]) -> set[str | None]:
    """Why the mixers of the test's graphs stay dense."""
    return {mixer.reason for graph in graphs for mixer in graph.mixers}


def test_a_pipeline(selected: list[Tensor]) -> None:
    """Texts of several lengths in a batch, compiled in place: at keep 1.0 they go on as they did."""
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, 64)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", padding_side="left")
    texts = [" ".join(f"w{i}" for i in random_ids(1, length)[0].tolist()) for length in (40, 25)]

    def write(new_tokens: int, **options: Any) -> Any:
        model = tiny_model(layers=1)
        if options:
            model.compile(backend="simba", options=options)
        writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        return writer(texts, max_new_tokens=new_tokens, do_sample=False, batch_size=2)

    assert write(2, keep=1.0) == write(2)
    assert not selected
    write(1, **KEEP_FEW)
    assert selected


class ReadsBatch(nn.Module):
    """A model that is given all its inputs in one object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        """Logits of the next token."""
        given = dict(batch) if hasattr(batch, "keys") else {"input_ids": batch.input_ids}
        return self.model(**given).logits[:, -1]


class ReadsAttribute(nn.Module):
    """A model behind another one, whose output it reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, given: ModelOutput) -> Tensor:
        """Logits of the next token."""
        return self.model(inputs_embeds=given.last_hidden_state).logits[:, -1]


class NamedBatch(NamedTuple):
    input_ids: Tensor


class DictBatch(dict[str, Any]):
    pass


class AnyBatch:
    """It has whatever it is asked for."""

    def __init__(self, input_ids: Tensor) -> None:
        self.input_ids = input_ids

    def __getattr__(self, name: str) -> None:
        if name == "keys":
            raise AttributeError(name)


@dataclasses.dataclass
class DataBatch:
    input_ids: Tensor
    origin: Any = None

    def __post_init__(self) -> None:
        """It is in itself."""
        self.origin = self


@pytest.mark.parametrize("kind", [dict, DictBatch, OrderedDict, BatchEncoding, UserDict, ModelOutput, NamedBatch, DataBatch])
def test_inputs_in_an_object(kind: Callable, selected: list[Tensor]) -> None:
    """The first length prunes as later ones do, whatever holds the inputs."""
    model = tiny_model(dtype=torch.float64, layers=2)
    compiled = simba(ReadsBatch(model), fullgraph=False, **KEEP_FEW)
    by_name = kind in (ModelOutput, NamedBatch, DataBatch)
    for length in (50, 40):
        ids = random_ids(2, length)
        with torch.no_grad():
            found = compiled(kind(input_ids=ids) if by_name else kind({"input_ids": ids}))
            expected = pruned_exactly(model, ids, **KEEP_FEW).logits[:, -1]
        close(found, expected, 1e-6)  # logits are float32
        assert [index.shape[1] for index in selected.copy()] and not selected.clear()


def test_a_dictionary_of_its_own_kind_may_have_any_keys() -> None:
    values = DictBatch({3: torch.zeros(1), "keys": torch.ones(1)})
    names = [f"dict.__getitem__(L, list(dict.keys(L))[{i}])" for i in (0, 1)]
    assert [name for name, _ in symbolic_length._arguments("L", values)] == names


def test_what_another_model_returns(selected: list[Tensor]) -> None:
    """Read as an attribute, as is usual, it prunes at its first length, too."""
    model = tiny_model(dtype=torch.float64, layers=2)
    compiled = simba(ReadsAttribute(model), fullgraph=False, **KEEP_FEW)
    for length in (50, 40):
        ids = random_ids(2, length)
        with torch.no_grad():
            found = compiled(BaseModelOutput(last_hidden_state=model.get_input_embeddings()(ids)))
            expected = pruned_exactly(model, ids, **KEEP_FEW).logits[:, -1]
        close(found, expected, 1e-6)  # logits are float32
        assert selected and not selected.clear()


def test_inputs_in_an_object_of_its_own_kind(selected: list[Tensor]) -> None:
    """The first length is dense, and says what to do; later ones prune."""
    compiled = simba(ReadsBatch(tiny_model(layers=2)), fullgraph=False, **KEEP_FEW)
    with torch.no_grad():
        for length in (50, 40):
            assert not selected
            compiled(AnyBatch(random_ids(2, length)))
    assert selected


# --- what is around the model in one graph ---------------------------------------------------------------------------


class Classifier(nn.Module):
    """A head on the last token; sizes are read before anything else is done."""

    def __init__(self, backbone: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone, self.pool, self.head = backbone, pool, nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Classes, (batch, 5)."""
        batch = ids.shape[0]
        hidden = self.backbone(ids).last_hidden_state
        return self.head(self.pool(hidden)).view(batch, 5)


@pytest.mark.parametrize("pool", [lambda h: h[:, -1], lambda h: h[torch.arange(h.shape[0]), -1], lambda h: h.mean(1)])
def test_a_classifier(pool: Callable[[Tensor], Tensor], selected: list[Tensor]) -> None:
    model, ids = tiny_model(dtype=torch.float64, layers=2), random_ids(2, 50)
    classifier = Classifier(model.backbone, pool).double()
    with torch.no_grad():
        found = simba(classifier, fullgraph=False, **KEEP_FEW)(ids)
        hidden = pruned_exactly(model, ids, **KEEP_FEW).hidden_states[-1]
    assert selected
    close(found, classifier.head(pool(hidden)), 1e-11)


def test_two_runs_of_a_model_in_one_graph_are_dense(graphs: list[Transformed]) -> None:
    """The tokens that one of them keeps say nothing of the other's."""
    model, ids = tiny_model(layers=2), random_ids(2, 50)

    def both_ways(ids: Tensor) -> Tensor:
        return model(ids).logits[:, -1] + model(ids.flip(1)).logits[:, -1]

    with torch.no_grad():
        close(simba(both_ways, **KEEP_FEW)(ids), both_ways(ids), 1e-5)
    assert len(graphs[0].mixers) == 4 and "do not follow one another" in str(reasons(graphs))


# --- adapters and hooks ----------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, as peft has it."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer, self.dropout = base, nn.Dropout(0.2)
        self.A, self.B = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        """Of the layer alone: Hugging Face reads it in training."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the adapter's."""
        return self.base_layer(x) + self.B(self.A(self.dropout(x))) * 2

    def merged(self) -> nn.Linear:
        """One layer that computes the same without dropout."""
        layer = copy.deepcopy(self.base_layer)
        layer.weight.data += 2 * self.B.weight.data @ self.A.weight.data
        return layer


def adapted_model(merge: bool) -> nn.Module:
    """Adapters on the projections of every mixer."""
    model = tiny_model(dtype=torch.float64, layers=3)
    for layer in model.backbone.layers:
        for name in ("in_proj", "x_proj", "out_proj"):
            adapter = Adapted(getattr(layer.mixer, name)).double().eval()
            setattr(layer.mixer, name, adapter.merged() if merge else adapter)
    return model


def test_adapters_prune_as_their_merged_weights_do(selected: list[Tensor]) -> None:
    with torch.no_grad():
        found = simba(adapted_model(merge=False), **KEEP_FEW)(random_ids(2, 50)).logits
        expected = pruned_exactly(adapted_model(merge=True), random_ids(2, 50), **KEEP_FEW).logits
    assert len(selected) == 2
    close(found, expected, 1e-6)


def test_adapters_with_dropout_are_trained_on_kept_tokens(graphs: list[Transformed]) -> None:
    model = adapted_model(merge=False).train()
    ids = random_ids(2, 50)
    simba(model, **KEEP_FEW)(ids, labels=ids).loss.backward()
    assert graphs[0].pruned is not None and reasons(graphs) == {None}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("of_a_layer", [True, False])
def test_full_length_shows_the_dropout_that_kept_tokens_had(of_a_layer: bool, selected: list[Tensor]) -> None:
    """A value that is dropped for kept tokens, and asked for at every position."""
    first, second = tiny_model(dtype=torch.float64, layers=2).backbone.layers
    matrix = torch.randn(32, 32, dtype=torch.float64)

    def with_dropout(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = first(h)
        dropped = F.dropout(F.linear(before, matrix) if of_a_layer else before.tanh(), 0.5)
        after = before + dropped
        return before, dropped, after, second(after)

    with torch.no_grad():
        before, dropped, after, _ = simba(with_dropout, schedule=[0.5, 0.2], min_tokens=2)(torch.randn(2, 30, 32).double())
    stayed = torch.zeros(2, 30, dtype=torch.bool).scatter(1, selected[0], True)
    assert stayed.sum() == 30 and 0.3 < (dropped == 0).double().mean() < 0.7
    torch.testing.assert_close((after - before)[stayed], dropped[stayed])
    if of_a_layer:
        assert torch.equal(after[~stayed], before[~stayed])  # they had left
    else:  # what only changes the stream goes on
        torch.testing.assert_close((after - before)[~stayed], dropped[~stayed])


def test_a_hook_that_changes_a_mixers_output(selected: list[Tensor]) -> None:
    """Doubling it is doubling out_proj."""
    hooked, scaled, ids = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64), random_ids(2, 50)
    for layer, other in zip(hooked.backbone.layers, scaled.backbone.layers, strict=True):
        layer.mixer.register_forward_hook(lambda module, args, output: output * 2)
        other.mixer.out_proj.weight.data *= 2
    with torch.no_grad():
        found, expected = simba(hooked, **KEEP_FEW)(ids).logits, pruned_exactly(scaled, ids, **KEEP_FEW).logits
    assert selected
    close(found, expected, 1e-6)


def test_a_hook_that_keeps_a_mixers_output(graphs: list[Transformed]) -> None:
    """It is asked for at every position, and defined for kept tokens alone: nothing is pruned, with the reason."""
    model, ids, kept = tiny_model(dtype=torch.float64), random_ids(2, 50), []
    mixer = model.backbone.layers[1].mixer
    mixer.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        logits = simba(model, **KEEP_FEW)(ids).logits
        close(logits, model(ids).logits, 1e-6)
    compiled, eager = kept
    close(compiled, eager, 1e-6)
    assert graphs[0].plan is None or not graphs[0].plan.pruning
    assert any("is not defined for pruned ones" in str(reason) for reason in reasons(graphs))


def test_names_of_modules_in_wrappers() -> None:
    """As `explain` shows them: without what Dynamo needs to find them."""

    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base = model

        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name)

        def forward(self, ids: Tensor) -> Any:
            return self.base(ids)

    model, ids = tiny_model(layers=1), random_ids(1, 40)
    with torch.no_grad():
        for wrapped, path in ((Wrapper(model), "base.backbone.layers.0.mixer"), (model.forward, "backbone.layers.0.mixer")):
            (mixer,) = simba_compile.explain(wrapped, ids).mixers
            assert mixer.path == path


# --- caches ----------------------------------------------------------------------------------------------------------


def test_a_static_cache_is_not_pruned_into(graphs: list[Transformed]) -> None:
    """Its entries carry no marks: what the mixers before it would drop, decoding would see."""
    model, ids = family_model("bamba"), random_ids(2, 40)
    given = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, **given)
    model.compile(backend="simba", options=KEEP_FEW)
    assert torch.equal(model.generate(ids, **given), expected)
    assert "attention reads its keys from a cache of a fixed size" in reasons(graphs)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba", "zamba2", "falcon_h1"])
def test_the_second_part_of_a_prompt(family: str, graphs: list[Transformed]) -> None:
    """With the cache of the first: nothing is dropped, and it is what Hugging Face gives for this call."""
    model, ids = family_model(family), random_ids(2, 40)
    with torch.no_grad():
        cache = going_on(model(ids[:, :30], use_cache=True))
        found = simba(model, **KEEP_FEW)(ids[:, 30:], **copy.deepcopy(cache), use_cache=True).logits
        expected = model(ids[:, 30:], **cache, use_cache=True).logits
    close(found, expected, 1e-4)
    assert "it goes on from a cache" in str(reasons(graphs))


def test_one_graph_serves_all_further_parts_of_a_prompt(graphs: list[Transformed]) -> None:
    """However many keys the cache has."""
    model, ids = family_model("bamba", num_hidden_layers=2, attn_layer_indices=[1]), random_ids(2, 60)
    compiled = simba(model, **KEEP_FEW)
    with torch.no_grad():
        cache = going_on(model(ids[:, :30], use_cache=True))
        theirs = copy.deepcopy(cache)
        for first, last in ((30, 40), (40, 47), (47, 60)):
            out = compiled(ids[:, first:last], **cache, use_cache=True)
            expected = model(ids[:, first:last], **theirs, use_cache=True)
            close(out.logits, expected.logits, 1e-4)
            cache, theirs = going_on(out), going_on(expected)
    assert len(graphs) == 1
