"""Run by torchrun: transformers' Trainer for one update on each estimator, what was seen into files."""

import sys
from pathlib import Path

import torch

sys.modules["torchvision"] = None  # see the fixture `transformers`

if __name__ == "__main__":
    import transformers
    from test_transformers_callback import DISTRIBUTED, gpt2, make_trainer, sophia, watcher

    from sophia_train.distributed import end_process
    from sophia_train.hessian.transformers_callback import SophiaCallback

    folder = Path(sys.argv[1])
    for name, estimator in DISTRIBUTED.items():
        model, watch = gpt2(transformers, dropout=0.0), watcher(transformers)
        trainer = make_trainer(
            transformers,
            folder,
            model,
            sophia(model),
            [SophiaCallback(estimator, seed=3), watch],
            gradient_accumulation_steps=1,
            max_steps=1,
            ddp_backend="gloo",
        )
        trainer.train()
        torch.save(watch.seen[0], folder / f"{name}_{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
    end_process(0)
