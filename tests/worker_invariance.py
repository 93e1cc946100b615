"""Run by torchrun: a few steps on as many processes as it is told, results into a file."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from support import build

from sophia_train.collectives import sum_over_processes
from sophia_train.distributed import end_process
from sophia_train.hessian import (
    EmpiricalFisher,
    Estimator,
    GradientMagnitude,
    HessianUpdater,
    Hutchinson,
)

Tensors = dict[str, torch.Tensor]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all of its rows, also if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def first_step(folder: Path, micro_batch_size: int, groups: int = 1, **settings) -> Tensors:
    """Loss, gradient norm, gradient and Hessian average of the first step in float32."""
    trainer, model = build(
        folder / "run", micro_batch_size=micro_batch_size, groups=groups, gradient_clip=None, **settings
    )
    captured: Tensors = {}
    step = trainer.optimizer.step

    def capture() -> None:
        captured.update({f"gradient/{n}": whole(p.grad).clone() for n, p in model.named_parameters()})
        step()

    trainer.optimizer.step = capture
    result = trainer.train_step(trainer._next_batch())
    metrics = trainer._measure(result)
    statistics = {key: torch.tensor(value) for key, value in metrics.items() if key.startswith("optim/")}
    scalars = {"loss": torch.tensor(result.loss), "grad_norm": torch.tensor(result.grad_norm)}
    return {**captured, **hessian(trainer, model), **scalars, **statistics}


def first_refresh(folder: Path, micro_batch_size: int, estimator: Estimator, **settings) -> Tensors:
    """Hessian average after the first step in float64, of an estimator that `build` does not make."""
    trainer, model = build(folder / "run", micro_batch_size=micro_batch_size, dtype=torch.float64, **settings)
    trainer.hessian = HessianUpdater(
        estimator,
        trainer.optimizer,
        trainer.replica,
        batch_size=trainer.config.batch_size,
        seed=trainer.config.seed,
    )
    trainer.train_step(trainer._next_batch())
    return hessian(trainer, model)


def hessian(trainer, model) -> Tensors:
    """The Hessian average of each parameter."""
    state = trainer.optimizer.state
    return {f"hessian/{name}": whole(state[p]["hessian"]) for name, p in model.named_parameters()}


def twenty_steps(
    folder: Path, micro_batch_size: int, optimizer: str, dtype: torch.dtype = torch.float64, **settings
) -> Tensors:
    """Weights after 20 steps, validation loss, and the tokens of every global batch."""
    trainer, model = build(
        folder / "run", micro_batch_size=micro_batch_size, optimizer=optimizer, dtype=dtype, **settings
    )
    batches = []
    for _ in range(20):
        batch = trainer._next_batch()
        everything = torch.zeros(trainer.config.batch_size, batch.inputs.shape[1], dtype=torch.int64)
        everything[batch.sequences] = batch.inputs
        sum_over_processes([everything])
        batches.append(everything)
        trainer.train_step(batch)
    loss = trainer._evaluate()["val/loss"]
    weights = {f"weight/{name}": whole(p.detach()) for name, p in model.named_parameters()}
    return {**weights, "validation": torch.tensor(loss, dtype=torch.float64), "batches": torch.stack(batches)}


def exchanges(folder: Path, micro_batch_size: int, mode: str) -> Tensors:
    """How often a step gathers parameters and reduces gradients."""
    trainer, _ = build(folder / "run", micro_batch_size=micro_batch_size, mode=mode, optimizer="adamw")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.train_step(trainer._next_batch())
    counts = {each.key: each.count for each in profile.key_averages()}
    of = {"gather": "c10d::_allgather_base_", "reduce": "c10d::_reduce_scatter_base_"}
    return {what: torch.tensor(counts.get(name, 0)) for what, name in of.items()}


def results(folder: Path, micro_batch_size: int, mode: str) -> dict[str, Tensors]:
    """All results of one way to share the model out, by their names."""
    size = {"micro_batch_size": micro_batch_size, "mode": mode}
    found = {
        "groups_1": first_step(folder, **size),
        "empirical_fisher": first_refresh(folder, estimator=EmpiricalFisher(), **size),
        "gradient_magnitude": first_refresh(folder, estimator=GradientMagnitude(), **size),
        "sophia": twenty_steps(folder, optimizer="sophia", **size),
        "adamw": twenty_steps(folder, optimizer="adamw", **size),
    }
    many = {"micro_batch_size": 1, "batch_size": 16, "mode": mode}
    found["micro_batches"] = twenty_steps(folder, optimizer="sophia", **many)
    found |= {f"exchanges_{each}": exchanges(folder, each, mode) for each in (1, 2)}
    if mode == "ddp":
        hutchinson = Hutchinson(batch_size=4, micro_batch_size=micro_batch_size)
        strict = {"dtype": torch.float32, "strict": True, "micro_batch_size": 1}
        found |= {
            "groups_4": first_step(folder, groups=4, **size),
            "hutchinson": first_refresh(folder, estimator=hutchinson, **size),
            "strict_sophia": twenty_steps(folder, optimizer="sophia", **strict),
            "strict_adamw": twenty_steps(folder, optimizer="adamw", **strict),
            "strict_odd": twenty_steps(folder, optimizer="sophia", **strict, batch_size=12),
        }
    return found


if __name__ == "__main__":
    folder, micro_batch_size = Path(sys.argv[1]), int(sys.argv[2])
    found = {
        f"{mode}/{name}": tensors
        for mode in sys.argv[3:]
        for name, tensors in results(folder, micro_batch_size, mode).items()
    }
    together = torch.distributed.is_initialized()
    if not together or torch.distributed.get_rank() == 0:
        for name, tensors in found.items():
            path = folder / f"{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    if together:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    end_process(0)
