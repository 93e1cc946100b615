"""What is tuned, and between which values, in the words of `--space`.

optimizer.lr=log:1e-4..5e-3              a float, or an int if both ends are; log: equally likely by factors
schedule.warmup_steps=50,100,200         one of these
sophia_g:optimizer.gamma=0.005..0.05     for this optimizer only, or for it instead of what holds for all
"""

import math
import re
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from sophia_train.errors import ConfigError
from sophia_train.schema_check import close_to
from sophia_train.state import may_change

Space = Mapping[str, BaseDistribution]
"""What each tuned setting may be, by its key."""

DIGITS = 4
"""Significant digits of a tuned float: enough to tell values apart, and few enough to type again."""


def parse_spaces(texts: Sequence[str], optimizers: Sequence[str]) -> dict[str, dict[str, BaseDistribution]]:
    """Read every `--space`; returns the space of each optimizer.

    Raises:
        ConfigError: one of them is not of the form above, or there twice, or an optimizer has none.
    """
    spaces: dict[str, dict[str, BaseDistribution]] = {"": {}, **{name: {} for name in optimizers}}
    for text in texts:
        scoped, equals, values = text.partition("=")
        owner, _, key = scoped.rpartition(":")
        if not (equals and key and values):
            raise ConfigError(f"--space={text}: not of the form KEY=VALUES; use optimizer.lr=log:1e-4..5e-3")
        if owner not in spaces:
            hint = close_to(owner, optimizers) or f"use one of {', '.join(optimizers)}"
            raise ConfigError(f"--space={text}: {owner} is none of --optimizers; {hint}")
        if key in spaces[owner]:
            raise ConfigError(f"--space={text}: {scoped} is there twice; leave one of them out")
        if may_change(key) or key in ("seed", "optimizer"):
            raise ConfigError(f"--space={text}: {key} is the same for all trials; leave it out")
        spaces[owner][key] = _distribution(text, values)
    found = {name: {**spaces[""], **spaces[name]} for name in optimizers}
    for name, space in found.items():
        if not space:
            raise ConfigError(
                f"--space has nothing for {name}; add --space {name}:optimizer.lr=log:1e-4..5e-3"
            )
    return found


def override(key: str, value: object, distribution: BaseDistribution) -> str:
    """Write a tuned value as an override; a float is rounded to `DIGITS`, and stays in its range."""
    if isinstance(distribution, FloatDistribution):
        assert isinstance(value, float)
        value = min(max(float(f"{value:.{DIGITS}g}"), distribution.low), distribution.high)
    return f"{key}={value}"


def parameters(overrides: Sequence[str], space: Space) -> dict[str, object]:
    """Read the tuned values back from the overrides of a trial."""
    kinds: dict[type[BaseDistribution], type] = {FloatDistribution: float, IntDistribution: int}
    pairs = (text.split("=", 1) for text in overrides)
    return {key: kinds.get(type(space[key]), str)(text) for key, text in pairs}


def value_at(distribution: BaseDistribution, place: float) -> object:
    """The value at a place of a distribution: 0 is its lower end or first choice, 1 just beyond the last."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(place * len(distribution.choices))]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    whole = isinstance(distribution, IntDistribution)
    low, end = distribution.low, distribution.high + whole  # a whole number has what is up to the next one
    value = low * (end / low) ** place if distribution.log else low + place * (end - low)
    return min(math.floor(value), distribution.high) if whole else value


def ends(distribution: BaseDistribution) -> tuple[object, ...]:
    """The values that show whether a whole range may be used: both ends, or all choices."""
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low, distribution.high


def describe(distribution: BaseDistribution) -> str:
    """Write a distribution in the words of `--space`."""
    values = ends(distribution)
    if isinstance(distribution, CategoricalDistribution):
        return ",".join(map(str, values))
    return f"{'log:' if getattr(distribution, 'log', False) else ''}{values[0]}..{values[1]}"


def _distribution(text: str, values: str) -> BaseDistribution:
    if match := re.fullmatch(r"(log:)?(.+?)\.\.(.+)", values):
        low, high = (_number(text, end) for end in match.groups()[1:])
        if not low < high:
            raise ConfigError(f"--space={text}: there is nothing between {low} and {high}; write LOW..HIGH")
        if match[1] and low <= 0:
            raise ConfigError(f"--space={text}: log: needs a range above 0; use a LOW above 0")
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=bool(match[1]))
        return FloatDistribution(low, high, log=bool(match[1]))
    try:
        parsed = OverridesParser.create().parse_override(f"key={values}")
        choices = list(parsed.sweep_string_iterator()) if parsed.is_discrete_sweep() else []
    except HydraException:
        choices = []
    if len(set(choices)) < 2:
        raise ConfigError(
            f"--space={text}: no range and no choice of several values; write LOW..HIGH or VALUE,VALUE, "
            "and put what is fixed behind --"
        )
    return CategoricalDistribution(choices)


def _number(text: str, end: str) -> int | float:
    try:
        value = int(end) if re.fullmatch(r"[+-]?\d+", end) else float(end)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise ConfigError(f"--space={text}: {end} is not a number; write LOW..HIGH, such as 1e-4..5e-3")
    return value
