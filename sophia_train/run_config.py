"""The settings of a run, typed, and every check that needs the settings alone."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sophia_train import checkpoint, parallel, schema_check
from sophia_train.data.base import Data
from sophia_train.errors import ConfigError, MissingInputError
from sophia_train.hessian.base import Estimator, NoHessian
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.optim.gamma import FixedGamma, GammaRule
from sophia_train.optim.groups import choose, decay_groups
from sophia_train.optim.mixed import MixedOptimizer
from sophia_train.optim.schedules import Schedule
from sophia_train.schema_check import Settings, close_to, show
from sophia_train.trackers.base import Tracker
from sophia_train.trainer import TrainerConfig

TARGETS: dict[str, tuple[type, tuple[str, ...]]] = {
    "data": (Data, ("sophia_train.data",)),
    "schedule": (Schedule, ("sophia_train.optim",)),
    "hessian": (Estimator, ("sophia_train.hessian",)),
    "optimizer": (torch.optim.Optimizer, ("sophia_train.optim", "torch.optim", "pytorch_optimizer")),
    "gamma": (GammaRule, ("sophia_train.optim",)),
    "tracker": (Tracker, ("sophia_train.trackers",)),
}
"""What the `_target_` of a group must be, and the packages it may be from; nothing else is ever imported."""


WHOLE_TENSORS = {"Adafactor", "Shampoo", "SOAP", "MARS"}
"""Optimizers of the libraries that cannot work on sharded parameters: they mix them with plain tensors."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainerConfig):
    """All settings of a run; `configs/train.yaml` says what each is for.

    The groups but the model are what their YAML says: a `_target_` and its arguments, for `build`.
    """

    name: str
    run_dir: str
    precision: Literal["auto", "bf16", "fp32", "fp8"]
    compile: Literal["auto", "blocks", True, False]
    compile_cache: str | None
    activation_checkpointing: Literal["none", "blocks"]
    processes: int | None = field(metadata={"min": 1})
    parallel: Literal["ddp", "fsdp", "hsdp"]
    shard_processes: int | None = field(metadata={"min": 2})
    gradient_type: Literal["fp32", "bf16"]
    strict: bool
    sample_prompt: str
    sample_tokens: int = field(metadata={"min": 1})
    resume: str
    init_from: str | None
    dry_run: bool
    profile: bool

    model: GPT2Config
    data: Settings
    schedule: Settings
    hessian: Settings
    optimizer: Settings
    gamma: Settings
    tracker: dict[str, Settings]


def from_json(settings: Settings) -> RunConfig:
    """Check plain settings, such as `to_json` made, and type them; only known classes are ever built.

    Checked are keys, types and ranges, what the constructors say, and sections against each other.

    Raises:
        ConfigError: the first thing that is wrong, on one line: key, value, fix.
        MissingInputError: a folder named by a setting is not there.
        UnavailableError: the package of a library optimizer is not installed.
    """
    owners, sections = _owners(settings)
    schema_check.check_keys(owners, sections)
    if settings["precision"] in ("fp16", "float16", "half", 16):
        raise ConfigError(
            f"precision={settings['precision']}: Sophia's Hessian pass under a loss scaler gives NaN; "
            "use bf16, fp32 or auto"
        )
    for section, owner in owners.items():
        schema_check.check_values(section, owner, sections[section])
    for section in ("model", "data", "schedule", "hessian", "gamma"):
        _check_constructor(section, owners[section], [], sections[section])
    parameter = torch.nn.Parameter(torch.zeros(2, 2))  # an optimizer checks its settings against some
    optimizers = [section for section in owners if section.partition(".")[0] == "optimizer"]
    for section in optimizers:
        _check_constructor(section, owners[section], [[parameter]], sections[section])
    config = RunConfig(**{**settings, "model": GPT2Config(**settings["model"])})
    _check_text(config)
    _check_length(config)
    _check_batch(config)
    _check_parallel(config)
    _check_sharing(config)
    _check_estimator(config, owners["hessian"], [owners[section] for section in optimizers])
    _check_gamma(config, owners["gamma"], [owners[section] for section in optimizers])
    _check_start(config)
    return config


def to_json(config: RunConfig) -> Settings:
    """All settings, every reference resolved, as what JSON can hold."""
    return dataclasses.asdict(config)


def with_processes(config: RunConfig, processes: int) -> RunConfig:
    """Settle the number of processes of a run.

    Raises:
        ConfigError: the batch or the Hessian's part of it does not split evenly over them.
    """
    config = dataclasses.replace(config, processes=processes)
    _check_batch(config)
    _check_parallel(config)
    return config


def build(node: Mapping[str, Any], *arguments: Any, **extra: Any) -> Any:
    """Instantiate the class that a node names, with the node's arguments after `arguments`.

    Raises:
        ConfigError: the class is not from one of the packages in `TARGETS`.
        UnavailableError: its package is not installed.
    """
    packages = sorted({package for _, packages in TARGETS.values() for package in packages})
    owner = schema_check.find_class("_target_", node["_target_"], object, packages)
    return owner(*arguments, **{**_arguments(node), **extra})


def empty_model(config: RunConfig) -> GPT2:
    """Build the model of a run without memory for its weights."""
    with torch.device("meta"):
        model = GPT2(config.model)
    model.transformer.recompute_blocks = config.activation_checkpointing == "blocks"
    return model


def build_optimizer(node: Mapping[str, Any], model: GPT2) -> torch.optim.Optimizer:
    """Build the optimizer of a run, over the decayed and the other parameters of a model.

    Where the node names `others`, each has the parameters that it wants, and the optimizer the rest.

    Raises:
        ConfigError: what an other wants is not there, or somebody else's, or nothing is left.
    """
    nodes = _optimizer_nodes(node)
    wanted = {section: each["parameters"] for section, each in nodes.items() if "parameters" in each}
    try:
        shares = choose(model, wanted)
    except ValueError as error:
        reason = str(error)
        section = next(name for name, words in wanted.items() if reason.partition(" ")[0] in words)
        raise ConfigError(f"{section}.parameters={show(wanted[section])}: {reason}") from error
    optimizers = []
    for section, each in nodes.items():
        names = shares[section if section in wanted else ""]
        if not names:
            taken = {name: words for name, words in wanted.items() if name != section}
            raise ConfigError(f"{section} has no parameters left beside {show(taken)}; take fewer there")
        settings = {key: value for key, value in each.items() if key not in ("others", "parameters")}
        optimizers.append(build(settings, decay_groups(model, names)))
    return MixedOptimizer(optimizers) if len(optimizers) > 1 else optimizers[0]


def _optimizer_nodes(node: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The optimizer and those of its `others`, by section."""
    others = node.get("others") or {}
    return {"optimizer": node, **{f"optimizer.others.{name}": other for name, other in others.items()}}


def _owners(settings: Settings) -> tuple[dict[str, type], dict[str, Settings]]:
    """Find the class behind each section, and the keys and values that it is to take."""
    owners: dict[str, type] = {"": RunConfig}
    sections: dict[str, Settings] = {"": settings}
    if isinstance(settings.get("model"), dict):
        owners["model"], sections["model"] = GPT2Config, settings["model"]
    for group, (base, packages) in TARGETS.items():
        content = settings.get(group)
        if not isinstance(content, dict):
            continue  # its type is judged with that of all other keys
        nodes: Mapping[str, Any] = {group: content}
        if group == "tracker":
            nodes = {f"{group}.{name}": node for name, node in content.items()}
        if group == "optimizer":
            _check_others(content)
            nodes = _optimizer_nodes(content)
        for name, node in nodes.items():
            if not isinstance(node, dict) or "_target_" not in node:
                fix = (
                    f"add {name}._target_=<class>"
                    if ".others." in name
                    else f"choose one with {group}=<name>"
                )
                raise ConfigError(f"{name}={show(node)} has no _target_; {fix}")
            owners[name] = schema_check.find_class(f"{name}._target_", node["_target_"], base, packages)
            sections[name] = _arguments(node)
            if group == "optimizer":
                sections[name].pop("others" if name == group else "parameters", None)
    return owners, sections


def _arguments(node: Mapping[str, Any]) -> Settings:
    return {key: value for key, value in node.items() if key != "_target_"}


def _check_constructor(section: str, owner: type, first: list[Any], arguments: Settings) -> None:
    schema_check.check_constructor(section, arguments, lambda values: owner(*first, **values))


def _check_others(optimizer: Settings) -> None:
    """Check what says whose parameters are whose; the optimizers themselves are judged as any."""
    others = optimizer.get("others") or {}
    if not isinstance(others, dict):
        raise ConfigError(f"optimizer.others={show(others)} must be a mapping of names to optimizers")
    for name, other in others.items():
        words = other.get("parameters") if isinstance(other, dict) else None
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise ConfigError(
                f"optimizer.others.{name}.parameters={show(words)} must be a list of kinds "
                "or patterns of names, such as [embeddings]"
            )


def _check_sharing(config: RunConfig) -> None:
    if config.optimizer.get("others"):
        build_optimizer(config.optimizer, empty_model(config))


def _check_text(config: RunConfig) -> None:
    for key in ("name", "run_dir", "resume", "init_from", "compile_cache"):
        value = getattr(config, key)
        if value is not None and not (value.strip() and value.isprintable()):
            raise ConfigError(f"{key}={show(value)} must be text on one line; use {key}=<a name>")


def _check_length(config: RunConfig) -> None:
    if config.max_steps is None and config.max_tokens is None:
        raise ConfigError("max_steps=null and max_tokens=null: the schedule needs a length; set one of them")
    steps = config.total_steps(config.model.block_size)
    length = f"max_steps={steps}" if steps == config.max_steps else f"max_tokens={config.max_tokens}"
    length += "" if steps == config.max_steps else f" (steps: {steps})"
    warmup = build(config.schedule).warmup_steps
    if warmup >= steps:
        raise ConfigError(
            f"schedule.warmup_steps={warmup} leaves nothing of {length}; "
            f"use schedule.warmup_steps={steps // 10}"
        )
    if config.stop_at_step is not None and config.stop_at_step > steps:
        raise ConfigError(f"stop_at_step={config.stop_at_step} is beyond {length}; use {steps} or less")


def _check_batch(config: RunConfig) -> None:
    parts = {"processes": config.processes, "micro_batch_size": config.micro_batch_size}
    known = {key: value for key, value in parts.items() if value is not None}
    unit = math.prod(known.values())
    if config.batch_size % unit:
        multiple = config.batch_size // unit * unit
        raise ConfigError(
            f"batch_size={config.batch_size} is not a multiple of {' x '.join(known)} = "
            f"{' x '.join(map(str, known.values()))}; "
            f"use {f'{multiple} or ' if multiple else ''}{multiple + unit}"
        )
    estimator, processes = build(config.hessian), config.processes or 1
    try:
        estimator.check(config.batch_size, processes)
    except ValueError as error:
        size = min(estimator.size(config.batch_size), config.batch_size)
        fix = f"hessian.batch_size={max(1, size // processes) * processes}"
        fix = fix if str(error).startswith("batch_size") else f"hessian.groups={processes}"
        raise ConfigError(f"hessian.{error}; use {fix}") from error


def _check_parallel(config: RunConfig) -> None:
    if config.shard_processes is not None and config.parallel != "hsdp":
        raise ConfigError(
            f"shard_processes={config.shard_processes} is for parallel=hsdp, but parallel={config.parallel}; "
            "leave one out"
        )
    if config.processes is not None:
        parallel.count_shards(config.parallel, config.processes, config.shard_processes)
    modes = [f"parallel={config.parallel}"] if config.parallel != "ddp" else []
    for node in _optimizer_nodes(config.optimizer).values() if modes else ():
        if node["_target_"].rpartition(".")[2] in WHOLE_TENSORS:
            raise ConfigError(
                f"parallel={config.parallel}: {node['_target_']} needs whole tensors on each process; "
                "use parallel=ddp, or another optimizer"
            )
    estimator: Estimator = build(config.hessian)
    for mode in modes + ["strict=true"] * config.strict:
        if estimator.reduces_itself:
            groups = config.hessian.get("groups")
            what = f"hessian.groups={groups}" if groups else config.hessian["_target_"]
            fix = "hessian.groups=1" if groups else "hessian=gnb"
            raise ConfigError(
                f"{mode}: {what} makes more than a gradient of each process's sequences, and "
                f"gradients alone are reduced then; use {fix}, or leave {mode} out"
            )
    if not config.strict:
        return
    fixes = {
        "parallel": ("ddp", config.parallel == "ddp"),
        "micro_batch_size": (1, config.micro_batch_size in (None, 1)),
        "model.dropout": (0, config.model.dropout == 0),
        "gradient_type": ("fp32", config.gradient_type == "fp32"),
        "precision": ("fp32", config.precision in ("fp32", "auto")),
    }
    for key, (value, fine) in fixes.items():
        if not fine:
            raise ConfigError(f"strict=true goes with {key}={value} alone; use that, or strict=false")
    if config.processes is not None and config.processes.bit_count() != 1:
        raise ConfigError(f"strict=true and processes={config.processes}: it must be a power of 2")


def _check_estimator(config: RunConfig, hessian: type, optimizers: list[type]) -> None:
    takes = any(hasattr(optimizer, "update_hessian") for optimizer in optimizers)
    if not issubclass(hessian, NoHessian) and not takes:
        raise ConfigError(
            f"hessian._target_={config.hessian['_target_']} estimates a Hessian, but "
            f"optimizer._target_={config.optimizer['_target_']} takes none; "
            "use hessian=none or optimizer=sophia_g"
        )


def _check_gamma(config: RunConfig, rule: type, optimizers: list[type]) -> None:
    has_gamma = any(hasattr(optimizer, "unclipped_fraction") for optimizer in optimizers)
    if not issubclass(rule, FixedGamma) and not has_gamma:
        raise ConfigError(
            f"gamma._target_={config.gamma['_target_']} sets a gamma, but "
            f"optimizer._target_={config.optimizer['_target_']} has none; "
            "use gamma=fixed or optimizer=sophia_g"
        )


def _check_start(config: RunConfig) -> None:
    words = ["auto", "never", "must"]
    if config.resume not in words and not Path(config.resume).exists():
        hint = close_to(config.resume, words)
        wrong = ConfigError if hint else MissingInputError
        if hint or not checkpoint.exists(Path(config.run_dir)):  # which goes on without what it came from
            raise wrong(f"resume={config.resume}: no such folder; {hint or 'use auto, never, must or a run'}")
    if config.resume == "must" and config.init_from is not None:
        raise ConfigError(
            f"init_from={config.init_from} starts a new run, but resume=must continues one; leave one out"
        )
