"""How long a step takes: products of matrices, the exchange between GPUs, the optimizer, the Hessian."""

import math
from dataclasses import dataclass

from sophia_train.planning.planned_run import PlannedRun

PARAMETER_BYTES = 2  # FSDP2 gathers parameters in bf16
GRADIENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Communication:
    """Seconds on the links.

    Attributes:
        gather: making all parameters whole, once.
        reduce: averaging a gradient.
    """

    gather: float
    reduce: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, on the average over steps.

    Attributes:
        compute: forward and backward passes, without the Hessian's.
        exposed_communication: what of the communication no pass hides.
        optimizer: the update.
        hessian: refreshes; the exchange of their gradient, one in `interval` steps, is left out.
        communication: all of it, also what passes hide; no part of the sum.
    """

    compute: float
    exposed_communication: float
    optimizer: float
    hessian: float
    communication: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.exposed_communication + self.optimizer + self.hessian


def communication(run: PlannedRun) -> Communication:
    """Seconds of the collectives of a run, with W processes, N parameters and g bytes of a gradient's number.

    ddp   an all-reduce of the gradient: 2 (W - 1) / W g N bytes
    fsdp  an all-gather of the parameters, (W - 1) / W 2 N bytes, and a reduce-scatter of the gradient,
          (W - 1) / W g N bytes (Zhao et al., 2023)
    hsdp  as fsdp within a group, and an all-reduce of a shard of the gradient between groups, after it

    The seconds are these bytes over the rate of the slowest link; see `Cluster.ring_seconds`.
    """
    cluster, shards, parameters = run.cluster, run.shards, run.work.parameters
    copies = cluster.gpus // shards
    together = math.gcd(shards, cluster.gpus_per_node)  # of those that share a copy, on a node
    gradient = parameters * GRADIENT_BYTES[run.config.gradient_type]
    scatter = cluster.ring_seconds(gradient, shards, together)
    return Communication(
        gather=cluster.ring_seconds(parameters * PARAMETER_BYTES, shards, together),
        reduce=scatter
        + 2 * cluster.ring_seconds(gradient / shards, copies, cluster.gpus_per_node // together),
    )


def step_time(run: PlannedRun, mfu: float) -> StepTime:
    """Seconds of a step.

    compute    FLOPs / (GPUs x peak x MFU); recomputed blocks make a third more FLOPs
    exposed    a pass is 1 part forward and 2 backward, and 1 more where blocks are recomputed. The first
               forward pass of a step hides a gather, the last backward pass another one and the reduction;
               what is longer than its pass is exposed. Nothing hides the part of the embeddings, of each of
               them: they are needed first, and their gradient, theirs as the head's included, comes last.
    optimizer  bytes / (shards x memory bandwidth)
    hessian    compute x the sequences it sends forward and backward over those of the batch

    Args:
        run: which has its cluster for itself.
        mfu: model FLOPs utilisation of forward and backward passes.
    """
    cluster, work = run.cluster, run.work
    recomputing = run.config.activation_checkpointing == "blocks"
    parts = 4 if recomputing else 3
    compute = parts / 3 * work.flops / (cluster.gpus * cluster.card.peak_flops * mfu)
    links = communication(run)
    forward = compute / work.micro_batches / parts
    backward = (parts - 1) * forward
    # in bf16 FSDP2 sends the gradient of each micro-batch
    reductions = work.micro_batches if run.shards > 1 and run.config.gradient_type == "bf16" else 1
    total = 2 * links.gather + reductions * links.reduce
    model = run.config.model
    embeddings = model.n_embd * (model.padded_vocab_size + model.block_size) / work.parameters
    gather, reduce = (1 - embeddings) * links.gather, (1 - embeddings) * links.reduce
    return StepTime(
        compute=compute,
        exposed_communication=embeddings * total
        + max(0.0, gather - forward)
        + (reductions - 1) * max(0.0, reduce - backward)
        + max(0.0, gather + reduce - backward),
        optimizer=run.optimizer_bytes / (run.shards * cluster.card.memory_bandwidth),
        hessian=compute * work.hessian,
        communication=total,
    )
