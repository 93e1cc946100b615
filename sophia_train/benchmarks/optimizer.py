"""The optimizer's step alone, on random gradients, next to AdamW's and to what moving the memory takes."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sophia_train.benchmarks import checkouts
from sophia_train.benchmarks.turns import SEED, provenance, times_faster
from sophia_train.config import RunConfig, compose, run_config
from sophia_train.distributed import start
from sophia_train.errors import ConfigError
from sophia_train.models.gpt2 import GPT2
from sophia_train.optim.groups import decay_groups
from sophia_train.run_config import build_optimizer

MODELS = ["gpt2_125m", "gpt2_355m", "gpt2_770m"]
WARMUP_CALLS = 2  # not timed, after a first one: compilation, optimizer state
COPY_BYTES = 8  # a float32 is read and written
FLOOR_BYTES = {  # a parameter's, in float32
    "step": 24,  # weight, gradient, momentum and h are read, weight and momentum written
    "update_hessian": 16,  # the estimate is read, to see that it is finite, and again; h is read and written
}
COPIES_AHEAD = 32  # milliseconds of a GPU's time, more than the host takes to start any call
GRADIENT_STD = 100.0  # Sophia clips about half of the coordinates then
ADAMW, COPY = "AdamW, fused", "copy"


@dataclass
class Contestant:
    """One way to do a piece of work on the same tensors, and what was measured of it."""

    name: str
    work: str  # a key of FLOOR_BYTES
    call: Callable[[], object]
    moved: Sequence[Tensor]  # what a call changes
    change: float = 0.0  # Euclidean norm of the change by a call
    seconds: list[float] = field(default_factory=list)  # of each call, behind other work
    idle_seconds: list[float] = field(default_factory=list)  # of each call, with nothing ahead of it


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Let the optimizers step by turns on the shapes of each of `options.models`; return what was measured.

    All work on the same weights and gradients, each with a state of its own.

    Raises:
        ConfigError: a model is unknown or too large, or the checkout is of another project.
        MissingInputError: the checkout of the official Sophia has no optimizer.
    """
    configs = {model: _configs(model) for model in options.models}
    official, versions = None, {}
    if options.official is not None:
        project = "Liuhong99/Sophia"
        official = checkouts.load("--official", options.official, "sophia.py", project, "SophiaG")
        versions = {"official": f"sophia.py {checkouts.digest(options.official / 'sophia.py')}"}
    device = start("fp32", 1).device
    compiles = options.compile or device.type == "cuda"
    models = []
    for model, runs in configs.items():
        try:
            models.append(_measure(model, runs, official, compiles, device, options.repeats))
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"--models {model}: weights, gradients and the state of all optimizers do not fit into the "
                "GPU's memory together; use a smaller one"
            ) from None
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "benchmark": "optimizer",
        "settings": {"models": options.models, "repeats": options.repeats, "compile": compiles, "seed": SEED},
        "environment": provenance(device, **versions),
        "results": models,
    }


def table(report: dict[str, Any]) -> Table:
    """Lay out the figures in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    for heading in ("ms", "over floor", "over AdamW", "from idle"):
        made.add_column(heading, justify="right")
    for model in report["results"]:
        made.add_row(f"{model['model']}, {model['parameters']:,} parameters")
        for row in model["rows"]:
            adamw = "-" if row["over_adamw"] is None else f"{row['over_adamw']:.2f}"
            figures = (f"{row['ms']:,.3f}", f"{row['over_floor']:.2f}", adamw, f"{row['idle_ms']:,.3f}")
            made.add_row(f"  {row['name']}", *figures)
    return made


def notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures were measured."""
    settings, env = report["settings"], report["environment"]
    rates = ", ".join(f"{model['copy_bytes_per_second'] / 1e9:,.0f}" for model in report["results"])
    official = [f"official: {env['official']}"] if "official" in env else []
    return "\n".join(
        [
            f"ms: of one call, median of {settings['repeats']} in turns; ratios: of neighbours",
            "ms and ratios: behind other work of the GPU, as a refresh is; from idle: ms with",
            "what the host takes to start it, as a step is, which follows a read-back",
            "floors: bytes that must be moved, at the rate of a copy in the same turns",
            f"copy: {rates} GB/s, read and written, of float32 as many as parameters",
            "over AdamW: the fused one's time",
            f"device: {env['device']}, {env['threads']} threads",
            f"versions: Python {env['python']}, torch {env['torch']}",
            *official,
        ]
    )


def _configs(model: str) -> dict[str, RunConfig]:
    runs = {
        ADAMW: ["optimizer=adamw"],
        "AdamW, foreach": ["optimizer=adamw", "optimizer.fused=false", "optimizer.foreach=true"],
        "Sophia": ["optimizer=sophia_g"],
        "Sophia, foreach": ["optimizer=sophia_g", "optimizer.foreach=true"],
    }
    return {name: run_config(compose([f"model={model}", *overrides])) for name, overrides in runs.items()}


def _measure(
    name: str,
    configs: Mapping[str, RunConfig],
    official: ModuleType | None,
    compiles: bool,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    model = _model(configs[ADAMW], device)
    contestants = _contestants(model, configs, official, compiles)
    for contestant in contestants:
        contestant.change = _change(contestant)
    for contestant in contestants:
        for _ in range(WARMUP_CALLS):
            contestant.call()
    timed = {contestant.name: contestant for contestant in contestants}
    for _ in range(repeats):
        for contestant in contestants:
            contestant.seconds.append(_seconds(contestant.call, device, ahead=timed[COPY].call))
            contestant.idle_seconds.append(_seconds(contestant.call, device))
    parameters = sum(p.numel() for p in model.parameters())
    copy = timed.pop(COPY).seconds
    floors = {work: [number / COPY_BYTES * each for each in copy] for work, number in FLOOR_BYTES.items()}
    rows: list[dict[str, Any]] = []
    for work, floor in floors.items():
        moved = Contestant(f"{work}, floor: {FLOOR_BYTES[work]} bytes each", work, lambda: None, [])
        moved.seconds = moved.idle_seconds = floor
        doers = [moved, *(each for each in timed.values() if each.work == work)]
        rows += [_row(each, floor, timed[ADAMW]) for each in doers]
    return {
        "model": name,
        "parameters": parameters,
        "copy_bytes_per_second": COPY_BYTES * parameters / statistics.median(copy),
        "rows": rows,
    }


def _row(each: Contestant, floor: Sequence[float], adamw: Contestant) -> dict[str, Any]:
    return {
        "name": each.name,
        "work": each.work,
        "ms": 1000 * statistics.median(each.seconds),
        "idle_ms": 1000 * statistics.median(each.idle_seconds),
        "over_floor": times_faster(floor, each.seconds),
        "over_adamw": times_faster(adamw.seconds, each.seconds) if each.work == adamw.work else None,
        "change": each.change,
        "seconds": list(each.seconds),
    }


def _model(config: RunConfig, device: torch.device) -> GPT2:
    """Build a model with random weights and gradients; what they are does not matter for the times."""
    with torch.device("meta"):
        model = GPT2(config.model)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    for p in model.parameters():
        p.data.normal_(0.0, 0.02, generator=generator)
        p.grad = torch.empty_like(p).normal_(0.0, GRADIENT_STD, generator=generator)
    return model


def _contestants(
    model: GPT2, configs: Mapping[str, RunConfig], official: ModuleType | None, compiles: bool
) -> list[Contestant]:
    """Set up all that are to be compared, each Sophia with an h from one estimate, the squared gradient."""
    params = list(model.parameters())
    source = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    target = torch.ones_like(source)
    estimates = {p: p.grad.square() for p in params if p.grad is not None}
    optimizers = {name: build_optimizer(config.optimizer, model) for name, config in configs.items()}
    for name in ("Sophia", "Sophia, foreach"):
        optimizers[name].update_hessian(estimates)  # type: ignore[attr-defined]
    contestants = [Contestant(COPY, COPY, lambda: target.copy_(source), [target])]
    contestants += [
        Contestant(name, "step", optimizer.step, params) for name, optimizer in optimizers.items()
    ]
    settings = configs["Sophia"].optimizer
    if compiles:
        step = _compiled(model, settings, estimates)
        contestants.append(Contestant("Sophia's rule, torch.compile", "step", step, params))
    ours = optimizers["Sophia"]
    update = Contestant(
        "Sophia.update_hessian",
        "update_hessian",
        lambda: ours.update_hessian(estimates),  # type: ignore[attr-defined]
        _hessians(ours),
    )
    if official is None:
        return [*contestants, update]
    theirs = official.SophiaG(
        decay_groups(model),
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        rho=settings["gamma"],
        weight_decay=settings["weight_decay"],
    )
    theirs.update_hessian()
    return [
        *contestants,
        Contestant("official SophiaG.step", "step", lambda: theirs.step(bs=1), params),
        update,
        Contestant(
            "official SophiaG.update_hessian", "update_hessian", theirs.update_hessian, _hessians(theirs)
        ),
    ]


def _hessians(optimizer: Optimizer) -> list[Tensor]:
    return [state["hessian"] for state in optimizer.state.values()]


def _compiled(
    model: GPT2, settings: Mapping[str, Any], estimates: Mapping[nn.Parameter, Tensor]
) -> Callable[[], None]:
    """Return a step of Sophia's rule as torch compiles it, for the shapes of one model."""
    torch.compiler.reset()  # or after some models, it would give up and run the rule as it is
    compiled = torch.compile(_rule, dynamic=False)
    beta, of_hessian = settings["betas"]
    calls: list[tuple[list[list[Tensor]], float]] = []
    for group in decay_groups(model):
        params = group["params"]
        columns = [
            [p.detach() for p in params],
            [p.grad for p in params],
            [torch.zeros_like(p) for p in params],
            [(1 - of_hessian) * estimates[p] for p in params],
        ]
        calls.append((columns, settings["lr"] * group.get("weight_decay", settings["weight_decay"])))

    @torch.no_grad()
    def step() -> None:
        for columns, decay in calls:
            compiled(
                *columns,
                beta=beta,
                lr=settings["lr"],
                decay=decay,
                gamma=settings["gamma"],
                eps=settings["eps"],
                clip=settings["clip_threshold"],
            )

    return step


def _rule(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    hessians: list[Tensor],
    *,
    beta: float,
    lr: float,
    decay: float,
    gamma: float,
    eps: float,
    clip: float,
) -> None:
    """Step by Sophia's rule, written down as it is; `decay` is lr times the weight decay."""
    for param, grad, momentum, hessian in zip(params, grads, momenta, hessians, strict=True):
        momentum.lerp_(grad, 1 - beta)
        update = (momentum / (gamma * hessian).clamp_min(eps)).clamp(-clip, clip)
        param.mul_(1 - decay).sub_(lr * update)


def _change(contestant: Contestant) -> float:
    """Call it once, take back what that did to the tensors that it moves, and say how much it was."""
    before = [tensor.detach().clone() for tensor in contestant.moved]
    contestant.call()
    with torch.no_grad():
        norms = []
        for tensor, old in zip(contestant.moved, before, strict=True):
            norms.append(torch.linalg.vector_norm(tensor - old))
            tensor.copy_(old)
        return float(torch.linalg.vector_norm(torch.stack(norms)))


def _seconds(
    call: Callable[[], object], device: torch.device, ahead: Callable[[], object] = lambda: None
) -> float:
    """Time one call; on a GPU by events, from when all before it is done to its last kernel.

    Args:
        call: what to time.
        device: where it works.
        ahead: on a GPU, what keeps it busy while the host starts the call: copies for some milliseconds.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    for _ in range(COPIES_AHEAD):
        ahead()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
