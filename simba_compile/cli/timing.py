"""Time calls side by side."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one contender took.

    Parameters
    ----------
    runs : tuple of float
        Seconds of each run.
    """

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median run, in seconds: what is compared, for a disturbed run does not move it."""
        return statistics.median(self.runs)

    def to_dict(self) -> dict[str, object]:
        """The runs and what sums them up."""
        return {"median": self.median, "min": min(self.runs), "max": max(self.runs), "runs": list(self.runs)}


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def side_by_side(
    calls: Mapping[str, Callable[[], object]],
    repeats: Mapping[str, int],
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Time contenders in turns, so that a slow minute of the machine meets all of them.

    Parameters
    ----------
    calls : mapping
        The contenders by name, warmed up.
    repeats : mapping
        How often each of them runs; one that runs less often than others has its runs spread over the rounds.
    before : callable
        Is told the name before each run.

    Returns
    -------
    dict of str to Timing
    """
    rounds = max(repeats[name] for name in calls)
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if (turn + 1) * repeats[name] // rounds > turn * repeats[name] // rounds:
                before(name)
                runs[name].append(seconds(call))
    return {name: Timing(tuple(taken)) for name, taken in runs.items()}
