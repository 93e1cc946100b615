"""Published results as curves to draw under one's own, each with its source."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from sophia_train.compare.groups import shape_of, size_name
from sophia_train.compare.runs import Run
from sophia_train.errors import ConfigError

Kind = Literal["published", "digitised", "community", "unverified"]

DATA = "openwebtext"
"""Name of the text of all reference results; it is in the name of its repository and of its folder."""

VOCABULARY = 50257
"""Words of GPT-2's tokenizer; a loss in nats a token of another one is another quantity."""

DEFAULT = ("paper", "released")
"""Drawn unless others are asked for: the paper, and the plots of the official repository."""

NEAR = 0.1
"""Largest relative difference of two sizes that are called the same: 124M and 125M."""

OUR_NAMES = {"Sophia-G": "Sophia GNB", "Sophia-H": "Sophia Hutchinson", "Muon": "Muon + AdamW"}
"""Optimizers by their authors' names, as the classes here are called."""

UNITS = {"M": 10**6, "B": 10**9}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One published run.

    Attributes:
        name: of the publication, as `--reference` has it.
        kind: how sure its points are; `kinds` says it in words.
        optimizer: as its authors call it.
        size: of the model, as its authors call it.
        tokens: target tokens seen at each point, increasing.
        losses: of the validation, nats a token, at each point.
        source: where it stands.
        note: what to know about it.
    """

    name: str
    kind: Kind
    optimizer: str
    size: str
    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    source: str
    note: str

    @property
    def parameters(self) -> int:
        """The size as a number."""
        return _parameters(self.size)

    @property
    def our_optimizer(self) -> str:
        """What `Group.optimizer` calls it."""
        return OUR_NAMES.get(self.optimizer, self.optimizer)

    @property
    def label(self) -> str:
        """What a legend calls it."""
        return f"{self.optimizer} {self.size}, {self.name} ({self.kind})"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published speed-up over AdamW at one size, in steps; attributes are as those of `Curve`."""

    name: str
    kind: Kind
    optimizer: str
    size: str
    speed_up: float
    source: str
    note: str

    @property
    def parameters(self) -> int:
        """The size as a number."""
        return _parameters(self.size)


@dataclass(frozen=True)
class Reference:
    """What is drawn under a comparison.

    Attributes:
        curves: of the publications that were asked for, all sizes.
        claims: of the same.
        reason: why these, or why none, as a sentence.
    """

    curves: tuple[Curve, ...]
    claims: tuple[Claim, ...]
    reason: str

    def near(self, parameters: int) -> list[Curve]:
        """Curves of models of one size."""
        return [curve for curve in self.curves if abs(curve.parameters / parameters - 1) <= NEAR]


NO_REFERENCE = Reference((), (), "No published results were asked for.")
NOT_COMPARABLE = (
    "None are drawn: they are on OpenWebText with GPT-2's tokenizer, which these runs are not known to be, "
    "and losses on other text do not compare."
)
COMPARABLE = (
    "They are on OpenWebText, with held-out batches and an evaluation of their authors: the paper's own "
    "table and plot of one run are 0.01 apart, and no smaller difference to them means anything."
)
ON_OTHER_DATA = (
    "They are on OpenWebText with GPT-2's tokenizer, which these runs are not known to be: the losses do "
    "not compare."
)


def choose(runs: Sequence[Run], names: Sequence[str] | None = None) -> Reference:
    """Choose published results to draw under runs: those of their size, or all for runs of several sizes.

    Args:
        runs: at least one.
        names: of publications; `none` alone for none; None for `DEFAULT` where all runs are comparable.

    Raises:
        ConfigError: there is no publication of that name.
    """
    known = list(dict.fromkeys(curve.name for curve in curves()))
    for name in names or ():
        if name not in (*known, "none"):
            raise ConfigError(
                f"--reference {name}: there is no such result; choose of {' '.join(known)} none"
            )
    if names and "none" in names:
        return NO_REFERENCE
    comparable = all(is_comparable(run) for run in runs)
    if names is None and not comparable:
        return Reference((), (), NOT_COMPARABLE)
    wanted = names or DEFAULT
    asked_for = tuple(curve for curve in curves() if curve.name in wanted)
    reason = COMPARABLE if comparable else ON_OTHER_DATA
    if len({shape_of(run) for run in runs}) > 1:
        return Reference(asked_for, tuple(claim for claim in claims() if claim.name in wanted), reason)
    size = runs[0].parameters
    of_that_size = tuple(Reference(asked_for, (), "").near(size))
    if not of_that_size:
        return Reference((), (), f"None of {' '.join(wanted)} is of a model of {size_name(size)}.")
    return Reference(of_that_size, (), reason)


def is_comparable(run: Run) -> bool:
    """Whether a run's loss is of the text and the words that the reference results are of."""
    places = (str(run.settings.get(f"data.{key}", "")).lower() for key in ("repo", "path"))
    return run.settings.get("model.vocab_size") == VOCABULARY and any(DATA in place for place in places)


def curves() -> tuple[Curve, ...]:
    """All published curves, in the order of the file."""
    return tuple(
        Curve(
            **{key: value for key, value in each.items() if key not in ("points", "batch_tokens")},
            tokens=tuple(step * each["batch_tokens"] for step, _ in each["points"]),
            losses=tuple(loss for _, loss in each["points"]),
        )
        for each in _content()["curves"]
    )


def claims() -> tuple[Claim, ...]:
    """All published speed-ups."""
    return tuple(Claim(**each) for each in _content()["speed_ups"])


def kinds() -> dict[str, str]:
    """What each kind of a point means."""
    return dict(_content()["kinds"])


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((files(__package__) / "reference_curves.json").read_text())
    return content


def _parameters(size: str) -> int:
    return round(float(size[:-1]) * UNITS[size[-1]])
