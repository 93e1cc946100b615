"""A run on a cluster, before there is either."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from sophia_train.errors import ConfigError
from sophia_train.memory import plan_micro_batch
from sophia_train.parallel import count_shards
from sophia_train.planning.cluster import Cluster
from sophia_train.planning.work import Work, optimizer_bytes, work_of
from sophia_train.run_config import RunConfig, empty_model, with_processes
from sophia_train.schema_check import show

MOST_MEMORY = 0.8  # of the card, for what surely fits: measured peaks are up to a quarter above the estimate


@dataclass(frozen=True)
class PlannedRun:
    """A run with its number of processes settled, and what its steps are.

    Attributes:
        config: settings of the run.
        cluster: what it is to run on.
        shards: processes that share a copy of the parameters.
        work: of a step.
        optimizer_bytes: that an update of the whole model moves.
    """

    config: RunConfig
    cluster: Cluster
    shards: int
    work: Work
    optimizer_bytes: int

    @property
    def memory_share(self) -> float:
        """Estimated memory over that of the card."""
        return self.work.memory.total / self.cluster.card.memory

    @property
    def fits(self) -> bool:
        """Whether the memory does, even where the estimate is a quarter too low."""
        return self.memory_share <= MOST_MEMORY


def planned_run(config: RunConfig, cluster: Cluster) -> PlannedRun:
    """Settle what a run would be on a cluster.

    Raises:
        ConfigError: the run does not go there, or is of a kind of which no speed is known.
    """
    _check(config, cluster)
    if config.parallel == "hsdp" and config.shard_processes is None:
        config = dataclasses.replace(config, shard_processes=cluster.gpus_per_node)
    config = with_processes(config, cluster.gpus)
    shards = count_shards(config.parallel, cluster.gpus, config.shard_processes)
    model = empty_model(config)
    micro_batch_size = config.micro_batch_size or plan_micro_batch(
        model, config.batch_size // cluster.gpus, True, cluster.card.memory, shards
    )
    return PlannedRun(
        config,
        cluster,
        shards,
        work_of(config, model, cluster.gpus, shards, micro_batch_size, bf16=True),
        optimizer_bytes(config, model),
    )


def what_fits(run: PlannedRun) -> str | None:
    """Overrides under which a run that does not fit would, the cheapest change first; None if none does."""
    recomputing: dict[str, Any] = {"activation_checkpointing": "blocks"}
    sharing: dict[str, Any] = {"parallel": "fsdp", "shard_processes": None}
    for change in ({}, recomputing, sharing, sharing | recomputing):
        try:
            other = planned_run(dataclasses.replace(run.config, micro_batch_size=None, **change), run.cluster)
        except ConfigError:  # one GPU has nobody to share with, and some estimators need whole gradients
            continue
        if other.fits:
            overrides = [
                f"{key}={value}"
                for key, value in change.items()
                if value not in (None, getattr(run.config, key))
            ]
            if run.config.micro_batch_size is not None:
                overrides.append(f"micro_batch_size={other.work.micro_batch_size}")
            return " ".join(overrides)
    return None


def _check(config: RunConfig, cluster: Cluster) -> None:
    known = {
        "precision": ("bf16", config.precision in ("auto", "bf16")),
        "compile": ("true", config.compile is not False),
        "strict": ("false", not config.strict),
        "processes": (cluster.gpus, config.processes in (None, cluster.gpus)),
    }
    for key, (value, fine) in known.items():
        if not fine:
            reason = f"gpus={cluster.gpus}" if key == "processes" else "speeds were measured otherwise"
            raise ConfigError(f"{key}={show(getattr(config, key))}, but {reason}; plan with {key}={value}")
