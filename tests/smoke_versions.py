"""A short check for environments other than the pinned one: ``python tests/smoke_versions.py`` (docs/versions.md)."""

import torch
import transformers
from conftest import cache_of, close, left_padding, random_ids
from eager_reference import pruned_forward
from families import FAMILIES as EVERY_FAMILY
from families import exact, tiny_model
from family_reference import pruned_forward as family_forward
from family_reference import reference_generate
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

FAMILIES = ((MambaForCausalLM, MambaConfig), (FalconMambaForCausalLM, FalconMambaConfig))
SETTINGS = ({}, {"placement": "layer"}, {"every": 2, "keep": 0.3})
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "residual_in_fp32": False}


def main() -> None:
    """Compare the backend with the eager reference; an AssertionError tells what differs."""
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for model_class, config_class in FAMILIES:
        for setting in SETTINGS:
            torch._dynamo.reset()
            options = {"keep": 0.2, "min_tokens": 4, **setting}
            model = model_class(config_class(**SIZES)).eval().double()
            fast = torch.compile(model, backend="simba", fullgraph=True, options=options)
            for batch, tokens in ((1, 40), (3, 57), (2, 80)):
                ids, mask = torch.randint(0, 64, (batch, tokens)), torch.ones(batch, tokens, dtype=torch.long)
                mask[0, :5] = 0
                with torch.no_grad():
                    expected = pruned_forward(model, ids, mask, **options)
                    out = fast(ids, attention_mask=mask, use_cache=True, output_hidden_states=True)
                torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
                for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
                    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
                for layer, conv, ssm in zip(cache_of(out).layers, expected.conv_states, expected.ssm_states, strict=True):
                    torch.testing.assert_close(layer.conv_states[0], conv, atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(layer.recurrent_states[0], ssm, atol=1e-5, rtol=1e-5, check_dtype=False)
            print(f"{model_class.__name__} {options}: equal")
    for family in EVERY_FAMILY:
        check_family(family)


def check_family(family: str) -> None:
    """One prompt, and what is generated after it, of a small model of this family."""
    torch._dynamo.reset()
    options = {"keep": 0.3, "min_tokens": 4}
    model, other = tiny_model(family, torch.float64), tiny_model(family, torch.float64)
    ids, mask = random_ids(2, 40), left_padding(2, 40)
    model.compile(backend="simba", options=options)
    with torch.no_grad(), exact(other):
        out = model(ids, attention_mask=mask)
        close(out.logits, family_forward(other, ids, mask, **options).logits, 1e-5)
        written, _ = reference_generate(other, ids, mask, 3, **options)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated[:, 40:], written)
    print(f"{family} {options}: equal")


if __name__ == "__main__":
    main()
