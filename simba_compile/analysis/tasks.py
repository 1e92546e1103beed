"""What a model is scored on: held-out text, and associative recall."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from simba_compile.analysis import recall


class Task(Protocol):
    """Sequences of any length, and how to score a model's predictions at their ends.

    Attributes
    ----------
    unit : str
        What a value is.
    last : int
        Predictions at this many last positions are scored.
    """

    unit: str
    last: int

    def describe(self) -> dict[str, Any]:
        """What the task's values depend on, as plain data."""

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Sequences of this length, (sequences, tokens), and their targets, (sequences, last)."""

    def values(self, logits: Tensor, targets: Tensor) -> list[float]:
        """One value for each sequence, from logits of (sequences, last, vocabulary)."""


@dataclasses.dataclass
class RecallTask:
    """Whether the value of a planted key is the first choice (`simba_compile.analysis.recall`).

    Parameters
    ----------
    pairs, sequences, seed : int
        Pairs in a sequence, how many sequences, and where they come from.
    window : int, optional
        Plant pairs only among this many last tokens.
    """

    pairs: int
    sequences: int
    seed: int = 0
    window: int | None = None
    unit = "accuracy"
    last = 1

    def describe(self) -> dict[str, Any]:
        """See `Task`."""
        return {"task": "recall", **dataclasses.asdict(self)}

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        """See `Task`; the same sequences each time."""
        generator = torch.Generator().manual_seed(self.seed)
        return recall.sequences(self.sequences, tokens, self.pairs, generator, window=self.window)

    def values(self, logits: Tensor, targets: Tensor) -> list[float]:
        """See `Task`: 1 where it is, 0 where not."""
        return (logits[:, -1].argmax(-1) == targets[:, 0]).double().tolist()


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as a model reads it.

    Attributes
    ----------
    name : str
        Where it is from.
    ids : Tensor
        (tokens,) int64.
    bytes : Tensor
        (tokens,) int64: how many bytes of the text each token stands for.
    """

    name: str
    ids: Tensor
    bytes: Tensor

    def halves(self) -> tuple["Text", "Text"]:
        """The first and the second half: to choose settings on, and to score them on."""
        middle = len(self.ids) // 2
        first = Text(f"{self.name}, first half", self.ids[:middle], self.bytes[:middle])
        return first, Text(f"{self.name}, second half", self.ids[middle:], self.bytes[middle:])


def read_text(paths: Sequence[Path], model: str, vocabulary: int) -> Text:
    """Read files one after another.

    Parameters
    ----------
    paths : sequence of Path
        The files.
    model : str
        Whose tokenizer to use: a folder or a name on the Hub. One without a tokenizer reads bytes if its vocabulary has
        256 entries.
    vocabulary : int
        Its size.

    Raises
    ------
    OSError
        Where a file cannot be read, or there is no tokenizer.
    ValueError
        Where there is nothing in them, or the tokenizer does not say which bytes its tokens stand for.
    """
    data = b"".join(path.read_bytes() for path in paths)
    name = " ".join(path.name for path in paths)
    if not data:
        raise ValueError(f"{name} is empty.")
    if vocabulary == 256:
        ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        return Text(name, ids, torch.ones_like(ids))
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ValueError(f"the tokenizer of {model}, {kind}, does not say which bytes a token stands for.")
    text = data.decode("utf-8", errors="replace")
    # Not through transformers' call, which warns of texts longer than the model's own limit: they are cut into windows.
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if not tokens["input_ids"]:  # as of the tokenizer that transformers makes up for a folder without one
        raise ValueError(f"the tokenizer of {model} makes no tokens of {name}; is there one in it?")
    sizes = [len(text[start:end].encode()) for start, end in tokens["offset_mapping"]]
    return Text(name, torch.tensor(tokens["input_ids"], dtype=torch.int64), torch.tensor(sizes, dtype=torch.int64))


@dataclasses.dataclass
class TextTask:
    """Bits for each byte of the last tokens of windows of a text.

    Windows of every length end at the same places, so that all lengths are scored on the same tokens.

    Parameters
    ----------
    text : Text
    windows : int
        How many, spread evenly over the text.
    last : int
        Tokens that are scored at the end of each.
    longest : int
        The longest window that will be asked for: the first one ends after this many tokens.
    """

    text: Text
    windows: int
    last: int
    longest: int
    unit = "bits per byte"

    def __post_init__(self) -> None:
        room = len(self.text.ids) - self.longest - 1
        if room < 0:
            raise ValueError(
                f"{self.text.name} has {len(self.text.ids)} tokens: too few for a window of {self.longest} and the token "
                "after it."
            )
        if not 1 <= self.last <= self.longest:
            raise ValueError(f"{self.last} tokens are to be scored in windows of {self.longest}; expected 1 to all of them.")
        places = torch.linspace(0, room, self.windows).long()
        self.ends = (places + self.longest).unique()

    def describe(self) -> dict[str, Any]:
        """See `Task`."""
        shape = {"windows": len(self.ends), "last": self.last, "longest": self.longest}
        return {"task": "text", "text": self.text.name, "text_tokens": len(self.text.ids), **shape}

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor]:
        """See `Task`; the target of a position is the token after it."""
        read = self.ends[:, None] + torch.arange(-tokens, 0)
        scored = self._scored()
        return self.text.ids[read], self.text.ids[scored]

    def values(self, logits: Tensor, targets: Tensor) -> list[float]:
        """See `Task`: bits of a sequence's targets over the bytes of all targets, times the number of sequences.

        So that the mean over sequences is bits per byte, however many bytes a window's tokens stand for.
        """
        nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").double().sum(1)
        mean_bytes = self.text.bytes[self._scored()].sum().item() / len(self.ends)
        return (nats / math.log(2) / max(mean_bytes, 1)).tolist()

    def perplexity(self, bits_per_byte: float) -> float:
        """Perplexity of a token."""
        scored = self._scored()
        return 2 ** (bits_per_byte * self.text.bytes[scored].sum().item() / scored.numel())

    def _scored(self) -> Tensor:
        return self.ends[:, None] + torch.arange(1 - self.last, 1)
