"""What several tests need: small runs of the command line, and one built by hand, as for float64."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from sophia_train import distributed, parallel
from sophia_train.collectives import sum_over_processes
from sophia_train.data.batches import Batches, validation_blocks
from sophia_train.data.token_files import Tokens, TokenShard
from sophia_train.data.units import Unit
from sophia_train.hessian import GNB, HessianUpdater, NoHessian, Replica
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.optim import Sophia
from sophia_train.optim.gamma import FixedGamma
from sophia_train.optim.groups import decay_groups
from sophia_train.optim.schedules import Cosine
from sophia_train.throughput import Throughput
from sophia_train.trackers.base import RunInfo, Silent, Trackers
from sophia_train.trackers.jsonl import JsonlTracker
from sophia_train.trainer import Trainer, TrainerConfig

MODEL = GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50, bias=True)
TRAINER = {
    "seed": 7,
    "batch_size": 8,
    "micro_batch_size": None,
    "max_steps": 20,
    "max_tokens": None,
    "max_seconds": None,
    "stop_at_step": None,
    "gradient_clip": 1.0,
    "max_skipped_steps": 2,
    "log_interval": 1,
    "eval_interval": 5,
    "eval_tokens": None,
    "save_interval": 5,
    "save_in_background": False,
    "keep_checkpoints": 3,
    "sample_interval": None,
}


def text(folder: Path, n: int = 2000) -> Tokens:
    """Write tokens with some order in them, so that there is something to learn."""
    path = folder / "tokens.bin"
    if not path.exists():
        steps = np.random.default_rng(0).integers(1, 4, n)
        (np.cumsum(steps) % MODEL.vocab_size).astype("<u2").tofile(path)
    return Tokens([TokenShard(path, np.dtype("<u2"), 0, n)])


def build(
    run_dir: Path,
    *,
    optimizer="sophia",
    dtype=torch.float32,
    micro_batch_size=8,
    groups=1,
    mode="ddp",
    strict=False,
    **changes,
):
    """Build a trainer on the processes that there are; returns it and its model."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = TrainerConfig(**{**TRAINER, **changes})
    accelerator = distributed.start("fp32", None)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    model = GPT2(changes.pop("model", MODEL)).to(dtype)
    model.initialize(config.seed)
    sharded = mode != "ddp" and world_size > 1
    prepared, no_sync = parallel.prepare(
        model,
        accelerator,
        mode if sharded else "ddp",
        shard_processes=2 if mode == "hsdp" else None,
        gradient_type=dtype,
    )
    if optimizer == "sophia":
        made, estimator = Sophia(decay_groups(model), lr=3e-3), GNB(interval=3, batch_size=4, groups=groups)
    else:
        made, estimator = torch.optim.AdamW(decay_groups(model), lr=3e-3, fused=True), NoHessian()
    replica = Replica(
        prepared,
        micro_batch_size,
        rank,
        world_size,
        sharded=sharded,
        strict=strict,
        no_sync=no_sync,
        autocast=accelerator.autocast,
        sum_over_processes=sum_over_processes,
    )
    throughput = Throughput(accelerator.device, world_size)
    tokens = text(run_dir.parent)
    trackers = Trackers(JsonlTracker()) if rank == 0 else Silent()
    trainer = Trainer(
        config,
        replica=replica,
        optimizer=made,
        schedule=Cosine(warmup_steps=3),
        gamma=FixedGamma(),
        hessian=HessianUpdater(
            estimator,
            made,
            replica,
            batch_size=config.batch_size,
            seed=config.seed,
            timed=throughput.hessian,
        ),
        batches=Batches(
            tokens,
            block_size=MODEL.block_size,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        ),
        validation=validation_blocks(tokens, MODEL.block_size, rank, world_size, micro_batch_size, 400),
        trackers=trackers,
        run_dir=run_dir,
        throughput=throughput,
        manifest={"config": {}, "data": {"train": tokens.fingerprint()}},
        sample=lambda: "",
        device=accelerator.device,
        total_steps=config.total_steps(MODEL.block_size),
    )
    return trainer, model


def start_trackers(trainer: Trainer, run_dir: Path) -> None:
    """Begin or go on with the metrics, as `train` does."""
    resumed_from = trainer.state.step or None
    trainer.trackers.start(RunInfo(run_dir, "test", {}, resumed_from, trainer.total_steps))


ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "data=token_files data.tokenizer=bytes model=gpt2_nano model.n_layer=1 model.n_head=2 model.n_embd=16 "
    "model.block_size=8 max_steps=6 batch_size=4 micro_batch_size=2 schedule.warmup_steps=2 log_interval=1 "
    "eval_interval=3 save_interval=2 keep_checkpoints=2 tracker=jsonl hessian.interval=2 eval_tokens=64"
).split()
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


@dataclass(frozen=True)
class Ended:
    """How a run of the command line ended."""

    code: int  # exit code, or minus the number of the signal that killed it
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def load_script(name: str) -> ModuleType:
    """Import a file of `scripts`."""
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class InMemory(Unit):
    """A unit of documents that are at hand."""

    def __init__(self, name, documents):
        self.name, self.stored_bytes = name, 1
        self._documents = documents

    def documents(self):
        yield from self._documents


class Runs:
    """Runs the command line, each time in a fresh child of one process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._server: subprocess.Popen | None = None

    def __call__(self, *arguments, **options) -> Ended:
        return self.wait(self.start(*arguments, **options))

    def start(self, *arguments, hooks=(), environment=None, cwd=None, timeout=120) -> tuple[int, Path]:
        """Start a run and go on; `hooks` are calls of functions of `worker_runs.py`: name, arguments."""
        self._count += 1
        output = self.folder / f"run_{self._count}"
        for name in ("stdout", "stderr"):
            output.with_suffix(f".{name}").touch()  # the run may be killed before it opens them
        request = {
            "start": [str(argument) for argument in arguments],
            "cwd": str(cwd or self.folder),
            "environment": environment or {},
            "hooks": list(hooks),
            "output": str(output),
            "timeout": timeout,
        }
        return self._ask(request)["pid"], output

    def wait(self, started: tuple[int, Path]) -> Ended:
        pid, output = started
        code = self._ask({"wait": pid})["code"]
        out, err = (output.with_suffix(f".{name}").read_text() for name in ("stdout", "stderr"))
        return Ended(code, out, err)

    def close(self) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.stdout.close()
            self._server.wait()

    def _ask(self, request):
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "worker_runs.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **ENVIRONMENT},
            )
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def records(run_dir: Path) -> list[dict]:
    """The metrics of a run without what a clock measured."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "perf/"))} for line in lines]


def result(run_dir: Path) -> dict:
    """What a run has come to: everything but clock readings and older checkpoints."""
    newest = max((run_dir / "checkpoints").glob("step_*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    return {
        "step": newest.name,
        "files": manifest["files"],  # with the digests of weights and optimizer state
        "state": {key: value for key, value in manifest["state"].items() if key != "seconds"},
        **{key: manifest[key] for key in ("optimizer", "hessian", "validation_loss")},
        "metrics": records(run_dir),
        "samples": {path.name: path.read_text() for path in run_dir.glob("samples/*")},
        "status": json.loads((run_dir / "status.json").read_text()),
        "temporary": [str(path) for path in run_dir.rglob(".*.tmp")],
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; nothing if it does not exist."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
