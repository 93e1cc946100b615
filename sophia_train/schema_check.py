"""Compares plain settings with the fields and constructor parameters that will receive them."""

import dataclasses
import difflib
import importlib
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union

from torch.optim import Optimizer

from sophia_train.errors import ConfigError, UnavailableError

Settings = dict[str, Any]

# what constructors raise that do not like what they are given; libraries are not picky
_REFUSALS = (ValueError, TypeError, AssertionError, RuntimeError, ArithmeticError)


class Parameter(NamedTuple):
    """What a class takes under one name."""

    kind: Any
    required: bool
    limits: Mapping[str, float]


def parameters(owner: type) -> dict[str, Parameter]:
    """List what a class can be built with, by keyword; `**kwargs` is no licence for unknown keys.

    Metadata of a dataclass field, `min` and `above` (an exclusive minimum), becomes the limits of a number.
    The first parameter of a torch optimizer, the model's parameters, is no setting and is left out.
    """
    constructor = inspect.unwrap(owner.__init__)  # type: ignore[misc]
    try:
        kinds = typing.get_type_hints(constructor)
    except (NameError, TypeError):  # annotations of a library that are not there at run time
        kinds = {}
    fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
    limits = {each.name: each.metadata for each in fields}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {
        name: Parameter(kinds.get(name, Any), parameter.default is parameter.empty, limits.get(name, {}))
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind in named and name != "self"
    }
    if issubclass(owner, Optimizer):
        del found[next(iter(found))]
    return found


def find_class(key: str, target: Any, base: type, packages: Sequence[str]) -> type:
    """Import the class that a `_target_` names.

    Args:
        key: the target's full key, for messages.
        target: dotted path of a class.
        base: what it must be a concrete subclass of.
        packages: packages that it may come from; nothing outside them is imported.

    Raises:
        ConfigError: it is not from these packages, or no such class there.
        UnavailableError: its package is not installed.
    """
    if not isinstance(target, str) or not target.startswith(tuple(f"{name}." for name in packages)):
        raise ConfigError(f"{key}={show(target)} must be a class in {' or '.join(packages)}")
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = module_name.partition(".")[0]
        if error.name == package:
            raise UnavailableError(
                f"{key}={target}: {package} is not installed; run `pip install {package}`"
            ) from error
        if not (error.name and module_name.startswith(error.name)):
            raise
        raise ConfigError(f"{key}={target}: there is no module {module_name}") from error

    def fits(value: Any) -> bool:
        # The class itself, and not the module that it was imported into, has to be from the packages.
        own = inspect.isclass(value) and value.__module__.startswith(tuple(packages))
        return own and issubclass(value, base) and not inspect.isabstract(value) and value is not base

    found = getattr(module, name, None)
    if not fits(found):
        classes = [each for each, value in vars(module).items() if fits(value)]
        kind = base.__name__.lower()
        raise ConfigError(f"{key}={target}: no such {kind} in {module_name}; {choices(name, classes)}")
    return typing.cast(type, found)


def check_keys(owners: Mapping[str, type], settings: Mapping[str, Settings]) -> None:
    """Check that every key is known to the class that receives it, and that none is missing.

    Args:
        owners: the class behind each section, by the section's dotted name ("" is the root).
        settings: the keys and values of each section, without `_target_`.

    Raises:
        ConfigError: naming the key, its value and the nearest valid key.
    """
    taken = {section: parameters(owner) for section, owner in owners.items()}
    valid = [join(section, name) for section, known in taken.items() for name in known]
    for section, values in settings.items():
        for name, value in values.items():
            if name not in taken[section]:
                key = join(section, str(name))
                taker = f"{owners[section].__name__} takes" if section else "there is"
                raise ConfigError(f"{key}={show(value)}: {taker} no such key; {nearest(key, valid)}")
    for section, known in taken.items():
        for name, parameter in known.items():
            if settings[section].get(name) == "???" or (parameter.required and name not in settings[section]):
                key = join(section, name)
                raise ConfigError(f"{key} is not set; add {key}=<{describe(parameter.kind)}>")


def check_values(section: str, owner: type, settings: Settings) -> None:
    """Check the type, the length and the declared limits of every value.

    Raises:
        ConfigError: naming the key, its value and what it must be.
    """
    for name, (kind, _, limits) in parameters(owner).items():
        if name not in settings:
            continue
        key, value = join(section, name), settings[name]
        if not matches(value, kind):
            fix = ""
            if isinstance(value, float) and value.is_integer() and matches(int(value), kind):
                fix = f"; write {key}={int(value)}"
            elif isinstance(value, int | float) and matches("", kind):
                fix = f"; write {key}=\"'{value}'\""
            raise ConfigError(f"{key}={show(value)} must be {describe(kind)}{fix}")
        if value is not None and "min" in limits and value < limits["min"]:
            raise ConfigError(f"{key}={show(value)} must be at least {limits['min']}")
        if value is not None and "above" in limits and value <= limits["above"]:
            raise ConfigError(f"{key}={show(value)} must be above {limits['above']}")


def check_constructor(section: str, settings: Settings, construct: Callable[[Settings], object]) -> None:
    """Build what a section describes, so that its own checks run.

    Raises:
        ConfigError: the constructor refused; names the key that it refused, which is the one without which
            it would not have.
    """
    try:
        construct(settings)
    except _REFUSALS as error:
        reason = " ".join(str(error).split())
        for name, value in settings.items():
            if reason.startswith(name):
                raise ConfigError(f"{section}.{reason}") from error
            others = {key: other for key, other in settings.items() if key != name}
            if _builds(construct, others):
                raise ConfigError(f"{section}.{name}={show(value)} is not possible: {reason}") from error
        values = " ".join(f"{section}.{name}={show(value)}" for name, value in settings.items())
        raise ConfigError(f"{values}: {reason}") from error


def _builds(construct: Callable[[Settings], object], settings: Settings) -> bool:
    try:
        construct(settings)
    except _REFUSALS:
        return False
    return True


def matches(value: Any, kind: Any) -> bool:
    """Whether a value from YAML or JSON is of an annotated type; true for types that tell nothing."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return any(matches(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in arguments)
    if kind in (None, type(None)):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, str)
    container = origin or kind
    if not isinstance(container, type):
        return True
    if issubclass(container, tuple) and arguments and arguments[-1] is not Ellipsis:
        return (
            isinstance(value, list)
            and len(value) == len(arguments)
            and all(matches(item, argument) for item, argument in zip(value, arguments, strict=True))
        )
    if issubclass(container, Mapping):
        return isinstance(value, dict)
    if issubclass(container, Iterable) and container is not str and container.__module__ != "torch":
        return isinstance(value, list) and all(
            matches(item, each) for item in value for each in arguments[:1]
        )
    return dataclasses.is_dataclass(container) and isinstance(value, dict) or isinstance(value, container)


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}


def describe(kind: Any) -> str:
    """Say what a value of an annotated type looks like in YAML."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(
            dict.fromkeys(describe(each) for each in arguments if each in _WORDS or _is_made(each))
        )
    if origin is Literal:
        return "one of " + ", ".join(show(word) for word in arguments)
    if kind in _WORDS:
        return _WORDS[kind]
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}: [{', '.join(describe(argument) for argument in arguments)}]"
    if isinstance(origin or kind, type) and issubclass(origin or kind, Mapping):
        return "a mapping"
    return "a list" if origin else getattr(kind, "__name__", "a value")


def _is_made(kind: Any) -> bool:
    """Whether a type is made of other types, rather than a class that no YAML value is of."""
    return typing.get_origin(kind) is not None and not isinstance(kind, TypeVar)


def nearest(key: str, valid: Sequence[str]) -> str:
    """Name the valid key that was probably meant by an unknown one, or the keys of its section."""
    section, _, name = key.rpartition(".")
    siblings = {each.rpartition(".")[2]: each for each in valid if each.rpartition(".")[0] == section}
    everywhere = {each.rpartition(".")[2]: each for each in valid}
    for candidates, cutoff in ((siblings, 0.6), (everywhere, 0.8)):
        close = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
        if name in everywhere or close:
            return f"did you mean {everywhere[name] if name in everywhere else candidates[close[0]]}?"
    if not section:
        return "--help lists all keys"
    return f"its keys are {', '.join(siblings)}" if siblings else "it takes none"


def close_to(word: Any, valid: Sequence[str]) -> str:
    """Ask for the valid word that was probably meant; empty if none is close."""
    close = [] if word is None else difflib.get_close_matches(str(word), valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


def choices(word: Any, valid: Sequence[str]) -> str:
    """Name the valid word that was probably meant, and all of them."""
    return close_to(word, valid) or f"choose from {', '.join(valid) or 'another place'}"


def join(section: str, name: str) -> str:
    """Full key of a name in a section."""
    return f"{section}.{name}" if section else name


def show(value: Any) -> str:
    """Write a value on one line, as it would stand in YAML."""
    if isinstance(value, str) and value and value.isprintable() and not value.isspace():
        return value
    return json.dumps(value, default=str)
