"""The harness's model type, on a tiny model and a task of two documents that lies in a temporary folder."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eager_reference import pruned_forward
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

lm_eval = pytest.importorskip("lm_eval", reason="the extra simba_compile[lm-eval] is not installed")

WORDS = ["<pad>", "the", "cat", "dog", "sat", "ran", "on", "mat", "and", "then", "far", "away"]
CONTEXT = "the cat sat on the mat and then the dog ran away and then " * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "tiny"
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, state_size=4, initializer_range=0.5)
    MambaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    choices = ["the mat", "the far away and then"]
    lines = [{"context": CONTEXT + end, "choices": choices, "answer": 0} for end in ("sat on", "ran")]
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tiny.yaml").write_text(
        f"""task: simba_tiny
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder / "documents.jsonl"}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return folder


def scores(kind: str, model: Path, task: Path, **options: object) -> list[float]:
    """Log-likelihoods of all choices of all documents, by the harness's own evaluator."""
    import simba_compile.lm_eval  # noqa: F401  (registers the model)

    given = {"pretrained": str(model), "device": "cpu", **options}
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=given,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(task), include_defaults=False),
        tasks=["simba_tiny"],
        batch_size=2,
        log_samples=True,
        bootstrap_iters=0,
    )
    return [likelihood for sample in found["samples"]["simba_tiny"] for (likelihood, _), *_ in sample["resps"]]


def test_dense_is_the_harness_own(model: Path, task: Path) -> None:
    ours = scores("simba", model, task, keep=1.0)
    assert len(ours) == 4
    assert ours == pytest.approx(scores("hf", model, task), abs=1e-4)


def test_the_context_is_pruned_and_the_continuation_is_not(model: Path, task: Path) -> None:
    pruned = scores("simba", model, task, keep=0.1, min_tokens=1)
    assert max(abs(a - b) for a, b in zip(pruned, scores("hf", model, task), strict=True)) > 1e-3
    # The same by hand, with the five words of the continuation protected.
    words = (CONTEXT + "sat on the far away and then").split()
    ids = torch.tensor([[WORDS.index(word) for word in words]])
    options = {"keep": 0.1, "min_tokens": 1}
    run = torch.compile(MambaForCausalLM.from_pretrained(model).eval(), backend="simba", options=options)
    with torch.no_grad():
        logits = run(ids[:, :-1], use_cache=False, logits_to_keep=5).logits
    each = F.log_softmax(logits, -1).gather(2, ids[:, -5:, None])
    assert pruned[1] == pytest.approx(each.sum().item(), abs=1e-4)


def test_bad_options_are_told(model: Path, task: Path) -> None:
    with pytest.raises(ValueError, match="option keep is 2"):
        scores("simba", model, task, keep=2)


@pytest.mark.parametrize("last", [None, 2, 3])
def test_continuations_share_graphs(model: Path, last: int | None) -> None:
    """Whatever their lengths, and so do whole documents, of which nothing is pruned."""
    from simba_compile.lm_eval import SimbaLM

    options = {"keep": 0.1, "min_tokens": 1}
    harness = SimbaLM(str(model), **options)
    plain = MambaForCausalLM.from_pretrained(model).eval()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for length in (9, 14, 22, 31, 47):
        ids = torch.randint(1, len(WORDS), (1, length))
        scored = length // last if last else length - 1
        ((total, _),) = harness._score(ids, scored)
        expected = pruned_forward(plain, ids[:, :-1], logits_to_keep=scored, **options).logits
        each = F.log_softmax(expected, -1).gather(2, ids[:, -scored:, None])
        assert total == pytest.approx(each.sum().item(), abs=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first length's, and one for all
