"""The prompt, up to the next token's logits: Hugging Face eager, and ours dense and pruned, on a smaller model.

    pytest benchmarks/test_prefill.py --benchmark-only

The full comparison, in turns and on mamba-130m's size, is ``simba bench``.
"""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

LAYERS, HIDDEN, VOCABULARY = 6, 384, 4096


@pytest.fixture(scope="module")
def model() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS)).eval()


@pytest.mark.parametrize("keep", [None, 1.0, 0.5, 0.3, 0.1], ids=lambda keep: "eager" if keep is None else f"keep {keep}")
@pytest.mark.parametrize("tokens", [512, 2048])
def test_prefill(benchmark, model: MambaForCausalLM, tokens: int, keep: float | None) -> None:  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    benchmark.group = f"prompt of {tokens} tokens"
    ids = torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    run = model if keep is None else torch.compile(model, backend="simba", options={"keep": keep})
    with torch.no_grad():
        benchmark.pedantic(
            run,
            args=(ids,),
            kwargs={"use_cache": False, "logits_to_keep": 1},
            rounds=2 if keep is None else 7,
            warmup_rounds=0 if keep is None else 1,
        )
