"""The settings of a run: composed by Hydra, then checked against the code that they are for.

`compose` takes override strings and returns settings that are known to fit; everything wrong with them is one
`ConfigError` that names key, value and fix. Hydra alone would let `+typo=1`, a typo in a YAML file and
`lr=6e-4x` pass.
"""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sophia_train.errors import ConfigError, MissingInputError
from sophia_train.run_config import RunConfig, build, from_json, to_json
from sophia_train.schema_check import Settings, choices, show

__all__ = ["CONFIGS", "RunConfig", "build", "compose", "expand", "from_json", "run_config", "to_json"]


_HERE = Path(__file__).resolve().parent
# A wheel has the folder inside the package, a clone beside it.
CONFIGS = next(folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir())


def compose(overrides: Sequence[str] = (), config_folder: Path | None = None) -> DictConfig:
    """Compose the settings of one run and check them.

    Args:
        overrides: Hydra overrides, such as `optimizer=adamw`, `optimizer.lr=3e-4`.
        config_folder: a folder searched before the project's own `configs`.

    Raises:
        ConfigError: a key, a choice or a value is wrong; nothing was built or written.
        MissingInputError: a folder named by a setting is not there.
        UnavailableError: the package of a library optimizer is not installed.
    """
    with _hydra(config_folder):
        folders = [CONFIGS] if config_folder is None else [config_folder, CONFIGS]
        lines = [_checked_override(each, folders) for each in _parse(overrides)]
        if config_folder is not None:
            lines.append(f"hydra.searchpath=['file://{config_folder.resolve()}']")
        config = hydra_compose("train", lines)
    from_json(_plain(config))
    return config


def expand(overrides: Sequence[str], config_folder: Path | None = None) -> list[list[str]]:
    """Expand a sweep, such as `optimizer=adamw,sophia_g seed=1,2`, into the overrides of each run.

    Runs that would share a run folder get names, or if that is not enough folders, of their own.

    Raises:
        ConfigError: as `compose`, for any of the runs.
    """
    suffixes, jobs = zip(*combinations(overrides, config_folder), strict=True)
    for key in ("name", "run_dir"):
        configs = [compose(job, config_folder) for job in jobs]
        if len({config.run_dir for config in configs}) == len(jobs):
            break
        for suffix, job, config in zip(suffixes, jobs, configs, strict=True):
            value = f"{config[key]}-{suffix}".replace("'", "\\'")
            job.append(f"{key}='{value}'")
    return list(jobs)


def combinations(overrides: Sequence[str], config_folder: Path | None = None) -> list[tuple[str, list[str]]]:
    """Combine the values of a sweep, and compose nothing.

    Returns:
        Of each run the settings that tell it from the others, as a part of a name, and its overrides.

    Raises:
        ConfigError: an override cannot be read.
    """
    with _hydra(config_folder):
        alternatives = [_alternatives(each) for each in _parse(overrides)]
    swept = [index for index, each in enumerate(alternatives) if len(each) > 1]
    return [
        (_file_name([job[index].lstrip("+~") for index in swept]), list(job))
        for job in itertools.product(*alternatives)
    ]


def run_config(config: DictConfig) -> RunConfig:
    """Type checked settings.

    Raises:
        ConfigError: as `compose`.
    """
    return from_json(_plain(config))


def _plain(config: DictConfig) -> Settings:
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        value: Any = OmegaConf.to_container(config, resolve=False)
        for part in str(error.full_key).split("."):
            value = value.get(part) if isinstance(value, dict) else value
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{error.full_key}={show(value)}: {reason}; give a value that exists") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@contextlib.contextmanager
def _hydra(config_folder: Path | None) -> Iterator[None]:
    """Hydra, set up to compose, with every one of its errors turned into a one-line `ConfigError`."""
    if not OmegaConf.has_resolver("at_most"):
        OmegaConf.register_new_resolver("at_most", _at_most)
    if config_folder is not None and not config_folder.is_dir():
        raise MissingInputError(f"--config-dir={config_folder}: there is no such folder")
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            yield
    except MissingConfigException as error:
        if not error.missing_cfg_file or error.options is None:
            raise ConfigError(_one_line(error)) from error
        group, _, choice = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
        raise ConfigError(
            f"{group}={choice}: there is no such choice; {choices(choice, list(error.options))}"
        ) from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(_one_line(error)) from error


def _at_most(limit: int, value: Any) -> Any:
    return min(limit, value) if isinstance(value, int) else value


def _parse(overrides: Sequence[str]) -> list[Override]:
    loader = GlobalHydra.instance().config_loader()
    try:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise ConfigError(
            f"{error.override}: not of the form key=value; put a value with special characters in quotes"
        ) from error
    for override in parsed:
        if not override.key_or_group:
            raise ConfigError(f"{override.input_line}: not of the form key=value; there is no key")
        if override.is_hydra_override():
            raise ConfigError(f"{override.input_line}: Hydra's own settings are fixed; use run_dir")
    return parsed


def _checked_override(override: Override, folders: Sequence[Path]) -> str:
    """Write an override so that Hydra takes it, known key or not: `from_json` then judges all alike."""
    line, group, value = str(override.input_line), override.key_or_group, override.value()
    if override.is_sweep_override():
        raise ConfigError(f"{line}: several values need -m, which makes a run of each; a list needs [ ]")
    if override.is_delete():
        return line
    if isinstance(value, dict) or not any((folder / group).is_dir() for folder in folders):
        return f"++{line.lstrip('+')}"
    several = group == "tracker" and isinstance(value, list)
    for choice in value if several and isinstance(value, list) else [value]:
        if not any((folder / group / f"{choice}.yaml").is_file() for folder in folders):
            known = sorted(
                path.relative_to(folder / group).with_suffix("").as_posix()
                for folder in folders
                for path in (folder / group).rglob("[!_]*.yaml")  # with _ begin the parts of others
            )
            raise ConfigError(f"{group}={show(choice)}: there is no such choice; {choices(choice, known)}")
    return line.lstrip("+")


def _alternatives(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{override.input_line}: cannot be enumerated; write the values with commas")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _file_name(parts: Sequence[str]) -> str:
    """Join the settings that tell runs apart to a name that any file system takes, and no two share."""
    exact = "-".join(parts)
    name = re.sub(r"[^\w.=-]+", "-", exact)
    if name == exact and len(name) <= 100:
        return name
    return f"{name[:90]}-{hashlib.blake2b(exact.encode(), digest_size=4).hexdigest()}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
