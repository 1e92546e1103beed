"""A short check for environments other than the pinned one: ``python tests/smoke_versions.py`` (docs/versions.md)."""

import torch
import transformers
from eager_reference import pruned_forward
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
                for layer, conv, ssm in zip(out.cache_params.layers, expected.conv_states, expected.ssm_states, strict=True):
                    torch.testing.assert_close(layer.conv_states[0], conv, atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(layer.recurrent_states[0], ssm, atol=1e-5, rtol=1e-5, check_dtype=False)
            print(f"{model_class.__name__} {options}: equal")


if __name__ == "__main__":
    main()
