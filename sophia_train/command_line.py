"""The command line around Hydra's overrides: its flags and its help."""

import argparse
import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sophia_train.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` for a wrong argument, where argparse would print its usage and exit with 2.

    Args:
        description: paragraphs, and indented lines, each with what is indented deeper below it.
        others: as argparse has them.
    """

    def __init__(self, description: str | None = None, **others: Any) -> None:
        super().__init__(description=description, formatter_class=_Wrapped, **others)

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise ConfigError(f"{message}; see --help")


class _Wrapped(argparse.RawDescriptionHelpFormatter):
    """Fits a description to the terminal, paragraph by paragraph and line by line where it is indented."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(_wrapped(part, width) for part in _parts(text))


def _parts(text: str) -> list[list[str]]:
    """Lines that belong together: paragraphs, and indented lines with those indented deeper below them."""
    parts: list[list[str]] = []
    for line in text.strip().splitlines():
        goes_on = parts and line.strip() and parts[-1][0].strip()
        if goes_on and (_indentation(line) > _indentation(parts[-1][0]) or not _indentation(parts[-1][0])):
            parts[-1].append(line)
        else:
            parts.append([line])
    return parts


def _wrapped(part: list[str], width: int) -> str:
    first, *rest = part
    deeper = " " * (_indentation(rest[0]) if rest else _indentation(first) and _indentation(first) + 4)
    name = re.match(r" +\S+(?: \S+)*   *", first)  # a word or two, and behind a gap what they mean
    if name and name.end() < len(first):
        deeper = " " * name.end()
    words = " ".join(line.strip() for line in [first[name.end() :] if name else first, *rest])
    start = name.group() if name else " " * _indentation(first)
    wrapper = textwrap.TextWrapper(width, start, deeper, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(words)


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def whole_number(text: str) -> int:
    """Read the value of an option that counts something: at least 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """Read the value of an option that measures something: finite and above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def before_and_after_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a script's own arguments from the overrides of runs, which stand behind `--`."""
    own = list(itertools.takewhile(lambda word: word != "--", arguments))
    return own, list(arguments[len(own) + 1 :])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Split the arguments into flags and overrides.

    Raises:
        ConfigError: a flag is unknown.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--launcher", default="basic")
    parser.add_argument("--config-dir", "-cd", type=Path)
    options = parser.parse_intermixed_args(arguments)
    if options.multirun and options.cfg:
        raise ConfigError("--cfg=job shows one run and -m starts several; use one of them")
    if options.launcher != "basic" and not options.multirun:
        raise ConfigError(f"--launcher={options.launcher} starts several runs; use it with -m")
    return options


def help_text(configs: Path) -> str:
    """Write what `--help` prints: usage, the groups with their choices, every key with its default."""
    groups = sorted(path for path in configs.iterdir() if path.is_dir() and path.name != "__pycache__")
    width = max(len(group.name) for group in groups) + 1
    choices = "\n".join(
        textwrap.fill(
            " ".join(sorted(path.stem if path.suffix else f"{path.name}/..." for path in group.iterdir())),
            79,
            initial_indent=f"  {group.name:<{width}}",
            subsequent_indent=" " * (width + 2),
        )
        for group in groups
    )
    keys = (configs / "train.yaml").read_text().partition("\n\n")[2].partition("\ntracker:")[0]
    return _HELP.format(choices=choices, keys=textwrap.indent(keys.rstrip(), "  "))


_HELP = """\
Train a GPT with Sophia or another optimizer.

usage: python -m sophia_train [experiment=NAME] [GROUP=CHOICE] [KEY=VALUE] ...

  python -m sophia_train experiment=demo          a first run, minutes on a CPU
  python -m sophia_train experiment=demo optimizer=adamw optimizer.lr=1e-3
  python -m sophia_train -m experiment=demo optimizer=adamw,sophia_g seed=1,2

flags:
  --help               this text
  --cfg job            show all settings of the run, also those in groups, such
                       as optimizer.lr; --resolve also fills in references
  -m                   one run after the other for each combination of values
                       that are separated by commas
  --launcher NAME      how -m starts them: basic, one after the other;
                       joblib:n_jobs=2, side by side on this machine; or
                       submitit:timeout_min=600,slurm_partition=gpu, on Slurm
  --config-dir FOLDER  search YAML files of your own before the built-in ones,
                       such as FOLDER/experiment/mine.yaml

groups and their choices:
{choices}

keys and their defaults:
{keys}
"""
