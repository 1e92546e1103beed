"""How many tokens stay at each mixer (docs/method.md)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph

from simba_compile.options import OptionError, Options
from simba_compile.passes.length import Length, expression, value_of
from simba_compile.passes.match import Mixer
from simba_compile.passes.padding import padding_reader
from simba_compile.passes.tokens import suffix

SCALE = 2**20  # ratios are fractions of this, so that a count is integer arithmetic


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which mixers prune, and to how many tokens.

    Attributes
    ----------
    mixers : tuple of Mixer
        Those that the schedule counts, in graph order.
    ratios : tuple of int
        For each of them the share that stays after it, times 2^20.
    pruning : tuple of int
        The ones of them that drop tokens.
    protect_first, protect_last, min_tokens : int
        See `Options`; protect_last covers what the graph reads from the end.
    ends : dict of sympy.Expr to int
        The numbers of tokens read from the end that calls give (``logits_to_keep``, once it has varied), each with its place
        among a call's arguments. They are protected as well (`of_call`).
    length : Length
        Of the graph.
    ends_in_padding : callable
        Tells of the arguments of a call whether one of its sequences does.
    """

    mixers: tuple[Mixer, ...]
    ratios: tuple[int, ...]
    pruning: tuple[int, ...]
    protect_first: int
    protect_last: int
    min_tokens: int
    ends: dict[sympy.Expr, int]
    length: Length
    ends_in_padding: Callable[[Sequence[Any]], bool]

    def of_call(self, args: Sequence[Any]) -> "Plan":
        """The plan for a call with these arguments, in which `protect_last` covers what they say is read."""
        if not self.ends:
            return self
        return dataclasses.replace(self, protect_last=max(self.protect_last, *(args[at] for at in self.ends.values())))

    def protects(self, last: int | torch.SymInt) -> bool:
        """Whether so many of the last tokens stay in every call."""
        number = expression(last)
        return number in self.ends or (number.is_Integer and int(number) <= self.protect_last)

    def counts(self, tokens: int) -> list[int]:
        """Tokens left after each mixer for a sequence of this length."""
        least = min(tokens, max(self.min_tokens, self.protect_first + self.protect_last))
        left, counts = tokens, []
        for i, ratio in enumerate(self.ratios):
            if i in self.pruning:
                left = min(max((ratio * tokens + SCALE // 2) // SCALE, least), left)
            counts.append(left)
        return counts

    def inputs(self, tokens: int) -> list[int]:
        """What the pruned graph takes besides the dense one's inputs: the count of each pruning mixer.

        Before them `protect_last`, where calls say what it is.
        """
        counts = self.counts(tokens)
        protected = [self.protect_last] if self.ends else []
        return protected + [counts[i] for i in self.pruning]

    def why_all_stay(self, tokens: int) -> str:
        """Why `counts` drops none of a sequence of this length, where it drops none."""
        if tokens <= self.min_tokens:
            return f"there are no more tokens than min_tokens, which is {self.min_tokens}"
        if tokens <= self.protect_first + self.protect_last:
            return f"all tokens are protected: {self.protect_first} at the start, {self.protect_last} at the end"
        return "the shares leave all tokens"

    def without(self, first: int, reason: str) -> "Plan":
        """The plan in which mixer `first` and all after it stay dense; each of them, shared with this plan, notes why."""
        for mixer in self.mixers[first:]:
            mixer.reason = reason
        return dataclasses.replace(self, pruning=tuple(i for i in self.pruning if i < first))


def shares(options: Options, mixers: int) -> list[float]:
    """The share of the tokens that stays after each mixer.

    Raises
    ------
    OptionError
        Where a list was given whose length is not the number of mixers.
    """
    if isinstance(options.schedule, tuple):
        if len(options.schedule) != mixers:
            raise OptionError(
                f"option schedule lists {len(options.schedule)} shares and the model has {mixers} mixers; "
                "give one share for each mixer."
            )
        all_shares = list(options.schedule)
    elif options.schedule == "uniform" or mixers == 1:
        all_shares = [options.keep] * mixers
    else:
        all_shares = [1 - (1 - options.keep) * mixer / (mixers - 1) for mixer in range(mixers)]
    return [all_shares[mixer // options.every * options.every] for mixer in range(mixers)]


def ratios_of(options: Options, mixers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`Plan.ratios` and `Plan.pruning` of so many mixers."""
    ratios = tuple(round(share * SCALE) for share in shares(options, mixers))
    return ratios, tuple(i for i, ratio in enumerate(ratios) if ratio < (SCALE, *ratios)[i])


def make_plan(graph: Graph, mixers: list[Mixer], options: Options, partial: str | None = None) -> Plan | None:
    """The plan for a graph, or None where none of its mixers can prune (each says why in ``mixer.reason``)."""
    if not mixers:
        return None
    if partial:
        for mixer in mixers:
            mixer.reason = partial
        return None
    length = Length(mixers[0].x)
    if not length.is_symbolic:
        made, fixed = f"{length.tokens}, made out of other sizes,", f"fixed at {length.tokens}"
        hint = "" if length.symbols else " (torch.compile's dynamic=True may leave it open)"
        for mixer in mixers:
            mixer.reason = f"the length is {made if length.symbols else fixed} in this graph{hint}"
        return None
    for mixer in mixers:
        if (other := Length(mixer.x).tokens) != length.tokens:
            mixer.reason = f"its tokens are others than the first mixer's: there are {other} of them, not {length.tokens}"
    ratios, pruning = ratios_of(options, len(mixers))
    windows = {window for mixer in mixers for window in mixer.windows}
    read = [last for node in graph.nodes if node not in windows and (last := suffix(node, length)) is not None]
    ends = _given_by_calls(read, graph)
    plan = Plan(
        mixers=tuple(mixers),
        ratios=ratios,
        pruning=pruning,
        protect_first=options.protect_first,
        # A number that no argument is, one more than an argument say, is fixed by a guard, and with it that argument.
        protect_last=max([options.protect_last, *(int(last) for last in read if expression(last) not in ends)]),
        min_tokens=options.min_tokens,
        ends=ends,
        length=length,
        ends_in_padding=padding_reader(graph, [scan for mixer in mixers for scan in mixer.scans], length),
    )
    blocked = next((i for i, mixer in enumerate(mixers) if mixer.reason), None)
    return plan if blocked is None else plan.without(blocked, mixers[blocked].reason or "")


def _given_by_calls(numbers: Sequence[int | torch.SymInt], graph: Graph) -> dict[sympy.Expr, int]:
    """Those of the numbers that are arguments of the graph and vary, and the place of each among the arguments."""
    values = list(map(value_of, graph.find_nodes(op="placeholder")))
    places = {expression(value): place for place, value in enumerate(values) if isinstance(value, torch.SymInt)}
    varying = [expression(number) for number in numbers if not expression(number).is_Integer]
    return {number: places[number] for number in varying if number in places}
