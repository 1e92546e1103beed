"""The options of the backend, validated in one place."""

import dataclasses
import difflib
import itertools
import numbers
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

CHOICES = {
    "criterion": ("influence", "uniform", "random", "recent"),
    "pool": ("max", "absmax", "l2"),
    "dt_bias": ("include", "exclude"),
    "placement": ("scan", "layer"),
    "inner": ("auto", "inductor", "aot_eager", "eager"),
}
LIMIT = 2**62  # of whole numbers: torch's have 64 bits, and what is computed from these has to fit, too
LEAST = {"every": 1, "protect_first": 0, "protect_last": 1, "min_tokens": 1, "seed": 0}


class OptionError(ValueError):
    """An option that is not valid; the message names it, its value and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="simba", options={...})`` takes, as a dictionary or as this.

    Parameters
    ----------
    keep : float
        Share of the tokens that is left after the last mixer, in (0, 1]. 1 is the dense model.
    schedule : {"linear", "uniform"} or sequence of float
        How the share falls over the mixers: evenly from 1 to `keep`; `keep` from the first mixer on; or the shares
        themselves, one for each mixer, in (0, 1], none larger than the one before.
    every : int
        Prune at every k-th mixer only.
    criterion : {"influence", "uniform", "random", "recent"}
        What ranks the tokens. All but "influence" are there to compare with.
    pool : {"max", "absmax", "l2"}
        How a token's influence is pooled over channels: the largest signed one, the largest magnitude, the L2 norm.
    dt_bias : {"include", "exclude"}
        Whether the decay in the score counts the bias of Δ ("include": the exact gradient) or not (as in the paper).
    placement : {"scan", "layer"}
        Where a layer drops its tokens: before its scan, or from its output.
    protect_first, protect_last : int
        How many positions at the start (0 or more) and at the end (1 or more) of the sequence always stay.
    min_tokens : int
        No layer is left with fewer tokens than this.
    seed : int
        For ``criterion="random"``.
    inner : {"auto", "inductor", "aot_eager", "eager"}
        What compiles the rest of the graph; "auto" is eager: on the CPU as fast as Inductor, and compiled sooner.

    Raises
    ------
    ValueError
        For a value of the wrong type or out of range; the message names the option, the value and what is allowed.
    """

    keep: float = 0.1
    schedule: str | tuple[float, ...] = "linear"
    every: int = 1
    criterion: str = "influence"
    pool: str = "max"
    dt_bias: str = "include"
    placement: str = "scan"
    protect_first: int = 0
    protect_last: int = 1
    min_tokens: int = 32
    seed: int = 0
    inner: str = "auto"

    def __post_init__(self) -> None:
        if not _is_share(self.keep):
            raise OptionError(f"option keep is {self.keep!r}; it must be a number above 0 and at most 1.")
        object.__setattr__(self, "keep", float(self.keep))
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise OptionError(f"option {name} is {value!r}; {_one_of(value, allowed)}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least:
                raise OptionError(f"option {name} is {value!r}; it must be a whole number of at least {least}.")
            if int(value) >= LIMIT:
                raise OptionError(f"option {name} is {value}; it must be below 2**62.")
            object.__setattr__(self, name, int(value))
        if isinstance(self.schedule, str):
            if self.schedule not in ("linear", "uniform"):
                hint = _one_of(self.schedule, ("linear", "uniform"))
                raise OptionError(f"option schedule is {self.schedule!r}; {hint[:-1]}, or a list of shares.")
        else:
            object.__setattr__(self, "schedule", _shares(self.schedule))

    @classmethod
    def from_mapping(cls, options: "Mapping[str, Any] | Options | None") -> "Options":
        """Options from what `torch.compile` was given: a dictionary, or `Options` already.

        Raises
        ------
        ValueError
            For an unknown name too, with the nearest known one, and for what is no dictionary.
        """
        if isinstance(options, cls):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options is {options!r}; it must be a dictionary such as {{'keep': 0.1}}, or an Options.")
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options or {}:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise OptionError(f"{name!r} is no option of the simba backend.{hint} The options are {', '.join(names)}.")
        return cls(**(options or {}))

    @property
    def prunes(self) -> bool:
        """Whether they ask for fewer than all tokens."""
        least = self.schedule[-1] if isinstance(self.schedule, tuple) else self.keep
        return least < 1


def _is_share(value: Any) -> bool:
    """Whether it is a number in (0, 1], NumPy's too."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and bool(0 < value <= 1)  # type: ignore[operator]


def _one_of(value: Any, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), allowed, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"it must be one of {', '.join(map(repr, allowed))}{hint}."


def _shares(schedule: Any) -> tuple[float, ...]:
    given = f"option schedule is {schedule!r}; "
    try:
        shares = [] if isinstance(schedule, Mapping | Set | Iterator) else list(schedule)  # an iterator is read once only
    except TypeError:
        shares = []
    if not shares or not all(map(_is_share, shares)):
        raise OptionError(given + "it must be 'linear', 'uniform' or a list of numbers above 0 and at most 1.")
    if any(later > earlier for earlier, later in itertools.pairwise(shares)):
        raise OptionError(given + "no share may be larger than the one before it, for a token that left cannot come back.")
    return tuple(map(float, shares))
