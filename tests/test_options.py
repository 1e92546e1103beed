"""The options: what is taken, what is refused and with which words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simba_compile import Options

DEFAULTS = {
    "keep": 0.1,
    "schedule": "linear",
    "every": 1,
    "criterion": "influence",
    "pool": "max",
    "dt_bias": "include",
    "placement": "scan",
    "protect_first": 0,
    "protect_last": 1,
    "min_tokens": 32,
    "seed": 0,
    "inner": "auto",
}


def test_defaults_are_the_contracts() -> None:
    assert dataclasses.asdict(Options()) == DEFAULTS
    assert Options.from_mapping(None) == Options.from_mapping({}) == Options()


def test_options_are_frozen_and_hashable() -> None:
    options = Options(schedule=[1, 0.5])
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.keep = 0.5  # type: ignore[misc]
    assert hash(options) == hash(Options(schedule=(1.0, 0.5)))
    assert options.schedule == (1.0, 0.5)


ODD: list[dict[str, Any]] = [  # what is no list of shares, too large a number, no name
    *({"schedule": odd} for odd in (np.array(0.5), iter([1.0, 0.5]), frozenset({1.0, 0.5}), {1.0: 0}.keys(), [10**400])),
    *({"keep": 10**400}, {"criterion": np.array(["recent", "random"])}, {"pool": ["max"]}),
]


def test_numbers_of_numpy_are_numbers() -> None:
    given_ = Options(keep=np.float32(0.25), schedule=np.array([1.0, 0.5]), min_tokens=np.int64(4), seed=np.uint8(7))
    assert given_ == Options(keep=0.25, schedule=(1.0, 0.5), min_tokens=4, seed=7)
    assert [type(value) for value in (given_.keep, given_.schedule[0], given_.min_tokens)] == [float, float, int]
    rising = {"schedule": np.array([0.5, 1.0])}
    for wrong in ({"keep": np.bool_(True)}, {"every": np.float64(2)}, rising, {"schedule": 0.5}, *ODD):
        with pytest.raises(ValueError, match="option"):
            Options(**wrong)


@given(keep=st.floats(0, 1, exclude_min=True), schedule=st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_every_valid_share_is_taken(keep: float, schedule: list[float]) -> None:
    falling = sorted(schedule, reverse=True)
    options = Options.from_mapping({"keep": keep, "schedule": falling})
    assert options.keep == keep and options.schedule == tuple(falling)


@pytest.mark.parametrize("keep", [1, 1.0, 1e-9, True])
def test_keep_may_be_a_whole_number_but_no_truth_value(keep: Any) -> None:
    if keep is True:
        with pytest.raises(ValueError, match="option keep is True"):
            Options(keep=keep)
    else:
        assert Options(keep=keep).keep == keep


WRONG: dict[str, list[Any]] = {
    "keep": [0, -0.1, 1.1, math.nan, math.inf, "0.1", None, [0.1], 1j],
    "schedule": ["", "lin", [], [0.5, 0.6], [1.5], [0.0], ["a"], [True], 0.5, None, {0.5}, [math.nan]],
    "every": [0, -1, 1.0, "1", True, None],
    "criterion": ["", "influenc", None, 1, ["influence"], b"recent"],
    "pool": ["mean", None, "MAX"],
    "dt_bias": [True, False, "yes", None],
    "placement": ["block", None, 0],
    "protect_first": [-1, 0.5, "0", True, None],
    "protect_last": [0, -1, 1.0, None],
    "min_tokens": [0, -5, 32.0, "32", None],
    "seed": [-1, 0.0, None, "0", 2**62],
    "inner": ["cudagraphs", "simba", None, 1],
}


def test_every_option_has_wrong_values_here() -> None:
    assert set(WRONG) == set(DEFAULTS)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        Options.from_mapping({name: value})
    message = str(error.value)
    assert message.startswith(f"option {name} is {value!r}; ")
    assert "must be" in message or "no share may be larger" in message


@pytest.mark.parametrize(
    ("given_name", "meant"),
    [("kep", "keep"), ("min_token", "min_tokens"), ("protect", "protect_last"), ("Pool", "pool")],
)
def test_unknown_names_come_with_the_nearest(given_name: str, meant: str) -> None:
    with pytest.raises(ValueError) as error:
        Options.from_mapping({given_name: 1})
    near = "protect_" if given_name == "protect" else meant
    assert repr(given_name) in str(error.value) and f"Did you mean {near}" in str(error.value)
    assert all(name in str(error.value) for name in DEFAULTS)


def test_options_may_come_ready_made() -> None:
    options = Options(keep=0.3, schedule=[1, 0.3])
    assert Options.from_mapping(options) is options
    assert Options.from_mapping(dataclasses.asdict(options)) == options


@pytest.mark.parametrize("given_options", ["keep=0.1", 0.1, [("keep", 0.1)], {"keep"}])
def test_options_that_are_no_dictionary(given_options: Any) -> None:
    with pytest.raises(ValueError, match=r"options is .*; it must be a dictionary such as {'keep': 0\.1}"):
        Options.from_mapping(given_options)


@pytest.mark.parametrize("name", [3, None, ("keep",)])
def test_names_that_are_no_text(name: Any) -> None:
    with pytest.raises(ValueError, match="is no option"):
        Options.from_mapping({name: 1})


@pytest.mark.parametrize(
    ("name", "least"), [("every", 1), ("protect_first", 0), ("protect_last", 1), ("min_tokens", 1), ("seed", 0)]
)
def test_whole_numbers_start_at_their_least(name: str, least: int) -> None:
    assert getattr(Options(**{name: least}), name) == least
    with pytest.raises(ValueError, match=rf"option {name} is {least - 1}; it must be a whole number of at least {least}"):
        Options(**{name: least - 1})


MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "a share": ({"keep": 0}, "option keep is 0; it must be a number above 0 and at most 1."),
    "a choice": (
        {"pool": "maxx"},
        "option pool is 'maxx'; it must be one of 'max', 'absmax', 'l2' (did you mean 'max'?).",
    ),
    "a choice like no other": ({"placement": "?"}, "option placement is '?'; it must be one of 'scan', 'layer'."),
    "a number": ({"every": 0}, "option every is 0; it must be a whole number of at least 1."),
    "a schedule": (
        {"schedule": "lin"},
        "option schedule is 'lin'; it must be one of 'linear', 'uniform' (did you mean 'linear'?), or a list of shares.",
    ),
    "a list": (
        {"schedule": [2]},
        "option schedule is [2]; it must be 'linear', 'uniform' or a list of numbers above 0 and at most 1.",
    ),
    "a list that grows": (
        {"schedule": [0.5, 0.6]},
        "option schedule is [0.5, 0.6]; no share may be larger than the one before it, for a token that left cannot come "
        "back.",
    ),
    "a name": (
        {"kep": 1},
        f"'kep' is no option of the simba backend. Did you mean keep? The options are {', '.join(DEFAULTS)}.",
    ),
    "a name like no other": (
        {"?": 1},
        f"'?' is no option of the simba backend. The options are {', '.join(DEFAULTS)}.",
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages(case: str) -> None:
    given_options, expected = MESSAGES[case]
    with pytest.raises(ValueError) as error:
        Options.from_mapping(given_options)
    assert str(error.value) == expected
