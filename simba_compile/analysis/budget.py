"""Find the list of shares with the best quality at a given share of the FLOPs."""

import itertools
from collections.abc import Callable, Sequence

Shares = tuple[float, ...]

STEPS = (0.2, 0.1, 0.05)
LEAST = 0.01
HALVINGS = 12
DIGITS = 4


def search(
    objective: Callable[[Shares], float],
    cost: Callable[[Shares], float],
    start: Sequence[float],
    budget: float,
    evaluations: int,
) -> tuple[Shares, float]:
    """Coordinate search over non-increasing lists of shares: one layer gets tokens, another pays for them.

    Every candidate spends the budget. The first one that is better than the best so far takes its place; where no exchange
    of a step's size is better, the next, smaller step is tried.

    Parameters
    ----------
    objective : callable
        What to make small, of a list of shares.
    cost : callable
        The share of the FLOPs that a list takes; it does not fall as any share rises.
    start : sequence of float
        Where to begin, at no more than the budget.
    budget : float
        The most that a list may cost.
    evaluations : int
        How often the objective may be asked, the start included.

    Returns
    -------
    tuple of float
        The best list found.
    float
        Its objective: at most that of the start.

    Raises
    ------
    ValueError
        Where the start costs more than the budget.
    """
    best = tuple(start)
    if cost(best) > budget + 10**-DIGITS:
        raise ValueError(f"the search starts from a list that takes {cost(best):.3f} of the FLOPs; the budget is {budget}.")
    score = objective(best)
    seen, asked = {best}, 1
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for gains, pays in itertools.permutations(range(len(best)), 2):
                candidate = exchange(best, gains, pays, step, cost, budget)
                if candidate is None or candidate in seen:
                    continue
                if asked == evaluations:
                    return best, score
                seen.add(candidate)
                found, asked = objective(candidate), asked + 1
                if found < score:
                    best, score, improved = candidate, found, True
    return best, score


def exchange(
    shares: Shares, gains: int, pays: int, step: float, cost: Callable[[Shares], float], budget: float
) -> Shares | None:
    """Give one layer a larger share, and take so much from another that the budget is kept.

    The layers before the one that gains have at least its share, those after the one that pays at most its own.

    Returns
    -------
    tuple of float or None
        None where the other layer has not enough to pay with, or nothing changes.
    """
    raised = [max(share, min(1.0, shares[gains] + step)) if i <= gains else share for i, share in enumerate(shares)]

    def paid(share: float) -> Shares:
        return tuple(min(have, share) if i >= pays else have for i, have in enumerate(raised))

    low, high = LEAST, raised[pays]
    if cost(paid(low)) > budget:
        return None
    if cost(paid(high)) <= budget:
        low = high  # nothing to pay: the budget was not spent
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if cost(paid(middle)) <= budget:
            low = middle
        else:
            high = middle
    found = tuple(round(share, DIGITS) for share in paid(low))
    return found if found != tuple(round(share, DIGITS) for share in shares) else None
