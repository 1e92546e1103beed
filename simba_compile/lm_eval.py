"""The model type "simba" of EleutherAI's lm-evaluation-harness: a Hugging Face model whose contexts are pruned.

    python -m simba_compile.lm_eval --model simba --model_args pretrained=PATH,keep=0.1 --tasks lambada_openai

takes what ``lm_eval`` takes. The harness finds no models outside itself, so it has to be started here (or this module
imported before `lm_eval.simple_evaluate`). Every option of `simba_compile.Options` may stand among the model arguments.

Continuations are protected: only what stands before them is pruned, and `logits_to_keep` computes the logits of no other
token. Where a whole document is a continuation (``loglikelihood_rolling``), nothing is left to prune, and the model is
dense.
"""

import dataclasses
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from simba_compile.options import Options

OPTIONS = frozenset(field.name for field in dataclasses.fields(Options))


@register_model("simba")
class SimbaLM(HFLM):
    """`HFLM` with ``backend="simba"``.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As `HFLM`'s.
    device : str
        As `HFLM`'s, and the CPU unless given: it is where the kernels are native.
    **kwargs
        Options of the backend by name, and all that `HFLM` takes.

    Raises
    ------
    ValueError
        For options that are not valid.
    """

    def __init__(self, pretrained: Any, device: str = "cpu", **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
        options = Options.from_mapping(given)
        super().__init__(pretrained, backend="causal", device=device, **kwargs)
        # In place: `generate` then runs what is compiled.
        self.model.compile(backend="simba", options=dataclasses.asdict(options))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score continuations: log-likelihood, and whether each token is the first choice.

        Requests of one length make a batch. Padding on the right, as `HFLM` has it, would put padding where the score asks
        for the last token.
        """

        def shape(i: int) -> tuple[int, int]:
            _, context, continuation = requests[i]
            return -min(len(context) + len(continuation), self.max_length + 1), len(continuation)

        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        order = sorted(range(len(requests)), key=shape)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for (_, last), group in itertools.groupby(order, shape):
            members = list(group)
            for batch in (members[i : i + size] for i in range(0, len(members), size)):
                whole = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :] for i in batch]
                for i, answer in zip(batch, self._score(torch.tensor(whole, device=self.device), last), strict=True):
                    answers[i] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                progress.update(len(batch))
        progress.close()
        return answers

    @torch.no_grad()
    def _score(self, ids: torch.Tensor, last: int) -> list[tuple[float, bool]]:
        """Score the last tokens of sequences of one length."""
        read, targets = ids[:, :-1], ids[:, -last:]
        logits = self.model(read, use_cache=False, logits_to_keep=last).logits
        each = F.log_softmax(logits.float(), -1).gather(2, targets[..., None])[..., 0].sum(1)
        first = (logits.argmax(-1) == targets).all(1)
        return list(zip(each.tolist(), first.tolist(), strict=True))


if __name__ == "__main__":
    cli_evaluate()
