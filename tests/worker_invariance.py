"""Run by torchrun: a few steps on as many processes as it is told, results into a file."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from support import build

from sophia_train.distributed import sum_over_processes
from sophia_train.hessian import (
    EmpiricalFisher,
    Estimator,
    GradientMagnitude,
    HessianUpdater,
    Hutchinson,
)


def first_step(folder: Path, micro_batch_size: int, groups: int) -> dict[str, torch.Tensor]:
    """Loss, gradient norm, gradient and Hessian average of the first step in float32."""
    trainer, model = build(
        folder / "run", micro_batch_size=micro_batch_size, groups=groups, gradient_clip=None
    )
    captured: dict[str, torch.Tensor] = {}
    step = trainer.optimizer.step

    def capture() -> None:
        captured.update({f"gradient/{n}": p.grad.clone() for n, p in model.named_parameters()})
        step()

    trainer.optimizer.step = capture
    result = trainer.train_step(trainer._next_batch())
    hessian = {f"hessian/{n}": trainer.optimizer.state[p]["hessian"] for n, p in model.named_parameters()}
    scalars = {"loss": torch.tensor(result.loss), "grad_norm": torch.tensor(result.grad_norm)}
    return {**captured, **hessian, **scalars}


def first_refresh(folder: Path, micro_batch_size: int, estimator: Estimator) -> dict[str, torch.Tensor]:
    """Hessian average after the first step in float64, of an estimator that `build` does not make."""
    trainer, model = build(folder / "run", micro_batch_size=micro_batch_size, dtype=torch.float64)
    trainer.hessian = HessianUpdater(
        estimator,
        trainer.optimizer,
        trainer.replica,
        batch_size=trainer.config.batch_size,
        seed=trainer.config.seed,
    )
    trainer.train_step(trainer._next_batch())
    return {f"hessian/{n}": trainer.optimizer.state[p]["hessian"] for n, p in model.named_parameters()}


def twenty_steps(folder: Path, micro_batch_size: int, optimizer: str) -> dict[str, torch.Tensor]:
    """Weights after 20 steps in float64, validation loss, and the tokens of every global batch."""
    trainer, model = build(
        folder / "run", micro_batch_size=micro_batch_size, optimizer=optimizer, dtype=torch.float64
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
    weights = {f"weight/{name}": p.detach() for name, p in model.named_parameters()}
    return {**weights, "validation": torch.tensor(loss, dtype=torch.float64), "batches": torch.stack(batches)}


if __name__ == "__main__":
    folder, micro_batch_size = Path(sys.argv[1]), int(sys.argv[2])
    hutchinson = Hutchinson(batch_size=4, micro_batch_size=micro_batch_size)
    results = {
        "groups_1": first_step(folder, micro_batch_size, 1),
        "groups_4": first_step(folder, micro_batch_size, 4),
        "hutchinson": first_refresh(folder, micro_batch_size, hutchinson),
        "empirical_fisher": first_refresh(folder, micro_batch_size, EmpiricalFisher()),
        "gradient_magnitude": first_refresh(folder, micro_batch_size, GradientMagnitude()),
        "sophia": twenty_steps(folder, micro_batch_size, "sophia"),
        "adamw": twenty_steps(folder, micro_batch_size, "adamw"),
    }
    together = torch.distributed.is_initialized()
    if not together or torch.distributed.get_rank() == 0:
        for name, tensors in results.items():
            save_file(
                {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors"
            )
    if together:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
