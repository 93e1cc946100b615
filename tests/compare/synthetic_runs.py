"""Run folders as the trainer leaves them, without training."""

import copy
import json

import torch

from sophia_train import checkpoint

CONFIG = {
    "seed": 1,
    "name": "run",
    "run_dir": "runs/run",
    "precision": "fp32",
    "compile": False,
    "processes": 1,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_steps": 100,
    "max_tokens": None,
    "max_seconds": None,
    "stop_at_step": None,
    "gradient_clip": 1.0,
    "eval_interval": 25,
    "eval_tokens": 640,
    "init_from": None,
    "model": {"n_layer": 2, "block_size": 16},
    "data": {"_target_": "sophia_train.data.sources.TokenFiles", "path": "books", "tokenizer": "gpt2"},
    "schedule": {
        "_target_": "sophia_train.optim.schedules.Cosine",
        "warmup_steps": 10,
        "final_lr_fraction": 0.05,
    },
    "gamma": {"_target_": "sophia_train.optim.gamma.FixedGamma"},
    "hessian": {"_target_": "sophia_train.hessian.base.NoHessian"},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.1},
    "tracker": {},
}
SOPHIA = {
    "optimizer": {"_target_": "sophia_train.optim.sophia.Sophia", "lr": 2e-3, "weight_decay": 0.2},
    "hessian": {"_target_": "sophia_train.hessian.gnb.GNB", "interval": 10},
    "gamma": {"_target_": "sophia_train.optim.gamma.FixedGamma"},
}
DATA = {"train": "a" * 64, "validation": "b" * 64}
ENVIRONMENT = {"commit": "c0ffee", "torch": "2.11.0", "device": "x86_64"}
LOSSES = (5.0, 4.0, 3.5, 3.2, 3.0)  # at steps 0, 25, 50, 75, 100


def write_run(folder, *, losses=LOSSES, data=DATA, environment=ENVIRONMENT, interval=25, **settings):
    """Write a run folder, such as `write_run(folder, seed=1, losses=..., **{"schedule.warmup_steps": 5})`."""
    config = copy.deepcopy(CONFIG)
    for key, value in {"name": folder.name, "run_dir": str(folder), **settings}.items():
        section, _, last = key.rpartition(".")
        (config[section] if section else config)[last] = value
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = []
    for number, loss in enumerate(losses):
        step = number * interval
        axes = {"step": step, "tokens": 64 * step, "seconds": 0.5 * step, "flops": 1e6 * step}
        lines.append(json.dumps({**axes, "val/loss": loss}).replace("NaN", '"NaN"') + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    step = (len(losses) - 1) * interval
    reason = "finished" if step == config["max_steps"] else "stopped"
    (folder / "status.json").write_text(json.dumps({"code": 0, "reason": reason, "step": step}))
    if data is not None:
        model = torch.nn.Linear(1, 1)
        checkpoint.save(
            folder / "checkpoints", step, model, torch.optim.SGD(model.parameters(), 1.0), {"data": data}
        )
    return folder


def write_study(folder, *, losses=(3.5, None, 3.2, 3.3), best=(), pruned=(), **settings):
    """Write the tuning of one optimizer as `scripts/tune.py` does, with the config of its best run.

    Such as `write_study(folder, best=["optimizer.lr=0.001"], **SOPHIA)`; `losses` has None where a trial
    diverged, `pruned` the numbers of those that were given up.
    """
    states = [
        "pruned" if n in pruned else "failed" if loss is None else "complete" for n, loss in enumerate(losses)
    ]
    history = [
        {"trial": number, "overrides": [], "loss": loss, "flops": 1e12, "seconds": 1.0, "state": state}
        for number, (loss, state) in enumerate(zip(losses, states, strict=True))
    ]
    complete = [each for each in history if each["state"] == "complete"]
    number = min(complete, key=lambda each: each["loss"])["trial"] if complete else 0
    run = write_run(folder / f"trial_{number:03d}", data=None, **settings)
    record = {
        "format_version": 1,
        "optimizer": folder.name,
        "trials": len(losses),
        "flops": 1e12 * len(losses),
        "best": {"overrides": list(best), "loss": losses[number], "run": run.name} if complete else None,
        "history": history,
    }
    (folder / "tuning.json").write_text(json.dumps(record, indent=2))
    return folder
