"""The token reduction of another paper, to measure beside ours. Not part of the package.

*Rethinking Token Reduction for State Space Models* (Zhan et al., EMNLP 2024, arXiv 2410.14725) drops tokens between layers.
This is an implementation of our own, from the paper and from what its authors published
(github.com/wuyushuwys/ToR_SSM, read for its settings, not copied).

Theirs:

- a token's importance is the mean over channels of a layer's output, clipped at zero;
- the less important half of the tokens is connected to the more important half, each token to the one that is most similar
  by cosine; the most similar connections are reduced;
- hybrid: in the layer's output some of the connected tokens are pruned and the others merged into what they are connected
  to; in the residual stream all are merged; both with the same indices, and what stays keeps its order;
- seven layers of 64, from the 13th to the 43rd, every fifth, reduce by one ratio; half of the leaving tokens are pruned and
  half merged; what is merged is averaged.

Ours, where nothing was said or the size is another:

- which half is pruned: the less important one;
- the layers that reduce stand at the same depths, as shares of the layers (`places`);
- the last positions are protected, as our backend protects them: they are read, and take no part in the matching;
- the ratio is the one at which mixers, similarities and importances take as many operations as ours with its scores
  (`ratio_at`).

Between reductions layers run through ``torch.compile(backend="simba", options={"keep": 1.0})``: the same kernels as ours.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaForCausalLM

from simba_compile.capture import with_own_code

DEPTHS = tuple(depth / 64 for depth in (12, 17, 22, 27, 32, 37, 42))
PRUNED = 0.5  # of the tokens that leave; the others are merged
BATCH_TOKENS = 16384
DENSE: dict[str, Any] = {"keep": 1.0}


def places(layers: int) -> list[int]:
    """The layers after which tokens are reduced, from 0."""
    return sorted({int(depth * layers) for depth in DEPTHS})


def counts(tokens: int, layers: int, ratio: float, protected: int) -> list[int]:
    """Tokens left after each layer, of a sequence of so many.

    Parameters
    ----------
    ratio : float
        What is left after each reduction, in (0, 1]; one reduction takes at most the less important half.
    protected : int
        Positions at the end that always stay.
    """
    left, result = tokens, []
    for layer in range(layers):
        if layer in places(layers):
            half = max(0, left - protected) // 2
            left = max(math.ceil(left * ratio), left - half)
        result.append(left)
    return result


def flops(tokens: int, layers: int, ratio: float, protected: int, per_token: float, hidden: int) -> int:
    """Arithmetic of one sequence: of the mixers, and of the importances and similarities.

    Parameters
    ----------
    per_token : float
        A mixer's operations for one token.
    hidden : int
        The model's width.
    """
    before, total = tokens, 0.0
    for after in counts(tokens, layers, ratio, protected):
        total += before * per_token
        if after < before:
            free = before - protected
            total += 2 * (free // 2) * (free - free // 2) * hidden + 2 * free * hidden
        before = after
    return int(total)


def ratio_at(budget: float, tokens: int, layers: int, protected: int, per_token: float, hidden: int) -> float | None:
    """The largest ratio that takes at most so many operations, or None where even the smallest takes more."""
    low, high = 0.5, 1.0
    if flops(tokens, layers, low, protected, per_token, hidden) > budget:
        return None
    for _ in range(20):
        middle = (low + high) / 2
        if flops(tokens, layers, middle, protected, per_token, hidden) <= budget:
            low = middle
        else:
            high = middle
    return low


def connect(output: Tensor, leaving: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the tokens that leave, and what each of them is merged into.

    Parameters
    ----------
    output : Tensor
        (batch, token, channel): what a layer adds to the residual stream.
    leaving : int
        How many leave: at most half of those that are not protected.
    protected : int
        Positions at the end that take no part.

    Returns
    -------
    Tensor
        (batch, leaving): the positions that leave, the least important first.
    Tensor
        (batch, leaving): the position that each is most similar to, of the more important half.
    Tensor
        (batch, token - leaving): the positions that stay, ascending.
    """
    batch, tokens, _ = output.shape
    free = output[:, : tokens - protected]
    order = free.clamp(min=0).mean(-1).argsort(1)
    less, more = order.split([free.shape[1] // 2, free.shape[1] - free.shape[1] // 2], 1)
    direction = F.normalize(free, dim=-1)
    similarity, nearest = (_take(direction, less) @ _take(direction, more).mT).max(-1)
    chosen = similarity.topk(leaving, 1).indices.sort(1).values  # sorted: `less` begins with the least important
    gone = less.gather(1, chosen)
    into = more.gather(1, nearest.gather(1, chosen))
    stays = torch.ones(batch, tokens, dtype=torch.bool).scatter_(1, gone, False)
    return gone, into, stays.nonzero()[:, 1].view(batch, tokens - leaving)


def merge(x: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    """Every token averaged with those that are merged into it. The merged ones stand where they were."""
    batch, tokens, channels = x.shape
    rows = (into + torch.arange(batch)[:, None] * tokens).flatten()
    total = x.flatten(0, 1).index_add(0, rows, _take(x, gone).flatten(0, 1))
    count = torch.ones(batch * tokens).index_add_(0, rows, torch.ones(len(rows)))
    return (total / count[:, None]).view(batch, tokens, channels)


def reduce(output: Tensor, residual: Tensor, leaving: int, protected: int) -> Tensor:
    """A layer's output added to its residual stream, with so many tokens fewer: (batch, token - leaving, channel)."""
    gone, into, staying = connect(output, leaving, protected)
    pruned = int(leaving * PRUNED)
    merged = merge(residual, gone, into) + merge(output, gone[:, pruned:], into[:, pruned:])
    return _take(merged, staying)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return torch.ops.simba.gather(x, index, 1)


class TokenReduction:
    """A Mamba-1 of Hugging Face's, in float32 on the CPU, whose tokens are reduced at `places`.

    Parameters
    ----------
    model : MambaForCausalLM
        In evaluation mode.
    """

    def __init__(self, model: MambaForCausalLM) -> None:
        self.model = model
        self.layers = len(model.backbone.layers)
        blocks = list(model.backbone.layers)
        ends = [place + 1 for place in places(self.layers)]
        self.reducing = [_compiled(_up_to_mixer(blocks[i:end])) for i, end in zip([0, *ends], ends, strict=False)]
        self.rest = _compiled(_through(blocks[ends[-1] :]))

    @torch.no_grad()
    def __call__(self, ids: Tensor, ratio: float, last: int) -> Tensor:
        """Logits at the last positions.

        Parameters
        ----------
        ids : Tensor
            (batch, token) int64.
        ratio : float
            What each reduction leaves, in (0, 1].
        last : int
            Positions at the end that are protected, and whose logits are computed.

        Returns
        -------
        Tensor
            (batch, last, vocabulary).
        """
        backbone: Any = self.model.backbone
        left = counts(ids.shape[1], self.layers, ratio, last)
        stream = backbone.embeddings(ids)
        for place, run in zip(places(self.layers), self.reducing, strict=True):
            residual, output = run(stream)
            leaving = stream.shape[1] - left[place]
            stream = reduce(output, residual, leaving, last) if leaving else residual + output
        stream = self.rest(stream)
        return self.model.lm_head(backbone.norm_f(stream[:, -last:]))

    def logits(self, ids: Tensor, ratio: float, last: int) -> Iterator[Tensor]:
        """The same for many sequences of one length, in batches."""
        for part in ids.split(max(2, BATCH_TOKENS // ids.shape[1])):
            yield self(part, ratio, last)


def _through(blocks: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """Layers one after another."""

    def run(stream: Tensor) -> Tensor:
        for block in blocks:
            stream = block(stream)
        return stream

    return run


def _up_to_mixer(blocks: list[nn.Module]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Layers up to one that reduces: the residual stream before its mixer, and what the mixer adds to it."""
    *before, last = blocks

    def run(stream: Tensor) -> tuple[Tensor, Tensor]:
        for block in before:
            stream = block(stream)
        return stream, last.mixer(last.norm(stream))  # type: ignore[operator]

    return run


def _compiled(run: Callable) -> Callable:
    return torch.compile(with_own_code(run), backend="simba", options=DENSE)
