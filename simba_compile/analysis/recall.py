"""Associative recall: keys and values planted in noise, one key asked for at the end.

    noise noise KEY VALUE noise … noise KEY VALUE noise QUERY KEY  →  VALUE

The whole answer lies in two tokens somewhere in the context, and what else is there is noise: the task on which a criterion
that finds the tokens that matter must differ from one that does not.
"""

import torch
from torch import Tensor

QUERY = 1
KEYS = range(2, 18)
VALUES = range(18, 34)
NOISE = range(34, 64)
VOCABULARY = 64
"""Token 0 is padding. A guess among the values is right one time in 16."""


def sequences(
    count: int, tokens: int, pairs: int, generator: torch.Generator, queries: int = 1, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw sequences.

    Parameters
    ----------
    count : int
        How many.
    tokens : int
        Length up to and with the first query.
    pairs : int
        Keys with a value, at most 16; no key twice, and no two pairs overlap.
    generator : torch.Generator
        Where they are drawn from.
    queries : int
        Keys asked for, one after another, each after the answer to the one before; at most `pairs`.
    window : int, optional
        Plant pairs only among this many tokens before the query. Anywhere unless given.

    Returns
    -------
    Tensor
        (count, tokens + 3 (queries - 1)) int64. It ends with the last key that is asked for.
    Tensor
        (count, queries) int64: the values to answer. The i-th is predicted at position tokens - 1 + 3 i.

    Raises
    ------
    ValueError
        Where the pairs do not fit.
    """
    context = tokens - 2
    room = context if window is None else min(window, context)
    if not 1 <= queries <= pairs <= min(room // 2, len(KEYS)):
        raise ValueError(
            f"{pairs} pairs and {queries} queries in the {room} tokens before the first query; expected 1 to {len(KEYS)} "
            "pairs of two tokens that fit, and at most as many queries."
        )
    ids = torch.randint(NOISE.start, NOISE.stop, (count, context), generator=generator)
    keys = KEYS.start + torch.rand(count, len(KEYS), generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(VALUES.start, VALUES.stop, (count, pairs), generator=generator)
    gaps = torch.rand(count, room - pairs, generator=generator).argsort(1)[:, :pairs].sort(1).values
    at = context - room + gaps + torch.arange(pairs)
    ids.scatter_(1, at, keys).scatter_(1, at + 1, values)
    asked = torch.rand(count, pairs, generator=generator).argsort(1)[:, :queries]
    answers = values.gather(1, asked)
    questions = torch.stack([torch.full_like(asked, QUERY), keys.gather(1, asked), answers], 2)
    return torch.cat([ids, questions.flatten(1)[:, :-1]], 1), answers
