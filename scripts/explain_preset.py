"""Print in what two presets of the paper differ, and where each value is from.

    python scripts/explain_preset.py gpt2_125m_adamw gpt2_125m_adamw_as_released

A preset is a file of configs/experiment/paper, as in experiment=paper/gpt2_125m_adamw. The source of a value
is the comment behind it in the YAML file that sets it, or else what that file says of itself at its top.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sophia_train.command_line import Parser
from sophia_train.config import CONFIGS, compose
from sophia_train.errors import ConfigError, exit_code_of
from sophia_train.schema_check import choices, join

FOLDER = CONFIGS / "experiment" / "paper"
RELEASED = "_as_released"
NAMES = {"name", "run_dir"}  # differ between any two


class Setting(NamedTuple):
    """A value, as YAML has it, and where it is from."""

    value: str
    source: str


ABSENT = Setting("-", "")


def presets() -> list[str]:
    """Names of all presets."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def settings(preset: str) -> dict[str, Setting]:
    """All settings of a preset by their full key.

    Raises:
        ConfigError: there is no such preset.
    """
    name = preset.removeprefix("experiment=").removeprefix("paper/")
    if name not in presets():
        base = name.removesuffix(RELEASED)
        reason = f"there is no such preset; {choices(name, presets())}"
        if base != name and base in presets():
            released = ", ".join(each.removesuffix(RELEASED) for each in presets() if each.endswith(RELEASED))
            reason = f"the official code released only {released}; use {base} or {base}_fair"
        raise ConfigError(f"{preset}: {reason}")
    experiment = f"experiment=paper/{name}"
    composed = OmegaConf.to_container(compose([experiment]), resolve=True)
    sources = _sources(experiment)
    leaves = {key: value for key, value in _leaves(composed) if key not in NAMES}
    return {key: Setting(_show(value), sources.get(key, "")) for key, value in leaves.items()}


def differences(first: str, second: str) -> dict[str, tuple[Setting, Setting]]:
    """The settings in which two presets differ; those that one of them lacks are `ABSENT` there.

    Raises:
        ConfigError: there is no such preset.
    """
    one, two = settings(first), settings(second)
    pairs = {key: (one.get(key, ABSENT), two.get(key, ABSENT)) for key in {**one, **two}}
    return {key: pair for key, pair in pairs.items() if pair[0].value != pair[1].value}


def _sources(experiment: str) -> dict[str, str]:
    """Where each value is from: the last file that sets a key has its say."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        files = loader.compute_defaults_list("train", [experiment], RunMode.RUN).defaults
    found: dict[str, str] = {}
    for file in files:
        path = CONFIGS / f"{file.config_path}.yaml"
        if path.is_file():  # and not one of Hydra's own
            text = path.read_text()
            package = "" if file.package == "_global_" else file.package or ""
            found |= {join(package, key): source for key, source in _comments(text).items()}
    return found


def _comments(text: str) -> dict[str, str]:
    """The comment behind each value of a YAML file, or else the first sentence of its head."""
    lines = text.splitlines()
    head = [line for line in lines if line.startswith("# ") and "@package" not in line]
    sentence = " ".join(line.removeprefix("# ") for line in head).partition(". ")[0].rstrip(".")
    found = {}
    for key, node in _nodes(yaml.compose(text)):
        end = node.end_mark
        _, _, comment = lines[end.line][end.column :].partition("#")
        found[key] = comment.strip() or sentence
    return found


def _nodes(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, yaml.MappingNode):
        yield prefix, node
        return
    for key, value in node.value:
        yield from _nodes(value, join(prefix, key.value))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield prefix, value
        return
    for key, each in value.items():
        yield from _leaves(each, join(prefix, str(key)))


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def table(first: str, second: str, found: Mapping[str, tuple[Setting, Setting]]) -> Table:
    """Lay out what differs in 80 columns: a key, the two values below it, their sources below them."""
    layout = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in (first, second):
        layout.add_column(heading, width=39, overflow="fold")
    for key, pair in found.items():
        layout.add_row()
        layout.add_row(Text(key, "bold"))
        layout.add_row(*(Text(f"  {each.value}") for each in pair))
        layout.add_row(*(Padding(Text(each.source, "dim"), (0, 0, 0, 2)) for each in pair))
    return layout


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("first", metavar="PRESET")
    parser.add_argument("second", metavar="PRESET")
    options = parser.parse_args(arguments)
    found = differences(options.first, options.second)
    if not found:
        sys.stdout.write(f"{options.first} and {options.second} do not differ\n")
        return
    Console(highlight=False, width=80).print(table(options.first, options.second, found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
