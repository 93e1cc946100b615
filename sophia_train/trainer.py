"""The training loop: what one step does, and what happens between steps."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sophia_train import checkpoint
from sophia_train.collectives import sum_over_processes
from sophia_train.data.batches import Batch, Batches
from sophia_train.data.loader import Loader
from sophia_train.distributed import StopSignal
from sophia_train.errors import DataError, Interrupted
from sophia_train.evaluation import evaluate
from sophia_train.gradients import MicroBatch, accumulate_gradients, micro_batches
from sophia_train.health import HealthMonitor
from sophia_train.hessian.base import HessianUpdater, Replica
from sophia_train.models.gpt2 import GPT2
from sophia_train.models.losses import fused_cross_entropy
from sophia_train.optim.evaluation_weights import evaluation_weights
from sophia_train.optim.gamma import GammaRule
from sophia_train.optim.schedules import Schedule
from sophia_train.optim.shards import total_norm
from sophia_train.optim.statistics import hessian_statistics, optimizer_statistics
from sophia_train.saving import Checkpoints
from sophia_train.seeds import derive
from sophia_train.state import TrainState
from sophia_train.throughput import Throughput
from sophia_train.trackers.base import Tracker

logger = logging.getLogger("sophia_train")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The numbers of a training run; `configs/train.yaml` has their defaults and says what each is."""

    seed: int = field(metadata={"min": 0})
    batch_size: int = field(metadata={"min": 1})  # sequences a step, over all processes
    micro_batch_size: int | None = field(metadata={"min": 1})
    max_steps: int | None = field(metadata={"min": 1})
    max_tokens: int | None = field(metadata={"min": 1})
    max_seconds: float | None = field(metadata={"above": 0})
    stop_at_step: int | None = field(metadata={"min": 1})
    gradient_clip: float | None = field(metadata={"above": 0})
    max_skipped_steps: int = field(metadata={"min": 0})
    log_interval: int = field(metadata={"min": 1})
    eval_interval: int = field(metadata={"min": 1})
    eval_tokens: int | None = field(metadata={"min": 1})
    save_interval: int = field(metadata={"min": 1})
    save_in_background: bool
    keep_checkpoints: int = field(metadata={"min": 1})
    sample_interval: int | None = field(metadata={"min": 1})

    def total_steps(self, block_size: int) -> int:
        """Length of the run and of its schedule: the lesser of `max_steps` and `max_tokens`."""
        by_tokens = math.inf
        if self.max_tokens is not None:
            by_tokens = max(1, self.max_tokens // (self.batch_size * block_size))
        return int(min(by_tokens, math.inf if self.max_steps is None else self.max_steps))


class NotFiniteError(DataError):
    """Too many steps in a row were not finite; every process of the run raises this at the same step."""

    common = True


@dataclass(frozen=True)
class StepResult:
    """What one step read back from the device, the same on every process."""

    loss: float  # mean over the batch, nats a token
    grad_norm: float  # before clipping
    clipped: bool
    skipped: bool  # loss or gradient was not finite: there was no update of parameters and momentum
    stop_asked: bool  # some process was told to stop
    out_of_time: bool  # some process has reached max_seconds
    written: bool  # each process has written its part of the checkpoint that is being saved


class Trainer:
    """Trains a model: step, measure, evaluate, save.

    Args:
        config: the numbers.
        replica: the prepared model on this process.
        optimizer: any torch optimizer; learning rates of its groups are the peaks of the schedule.
        schedule: factor on the learning rates for each step.
        gamma: sets gamma for each step, if the optimizer has one.
        hessian: refreshes the optimizer's Hessian, if it has one.
        batches: this process's part of the batch of each step.
        validation: this process's validation micro-batches.
        trackers: take the metrics; a silent one on processes other than the first.
        run_dir: the run's folder; checkpoints go below it.
        throughput: measures; shared with `hessian`.
        manifest: what each checkpoint's manifest is to say of the run: its config, versions.
        sample: writes a text with the model.
        device: where the model is.
        total_steps: length of the run and of its schedule.
    """

    def __init__(
        self,
        config: TrainerConfig,
        *,
        replica: Replica,
        optimizer: Optimizer,
        schedule: Schedule,
        gamma: GammaRule,
        hessian: HessianUpdater,
        batches: Batches,
        validation: Iterable[tuple[Tensor, Tensor]],
        trackers: Tracker,
        run_dir: Path,
        throughput: Throughput,
        manifest: Mapping[str, Any],
        sample: Callable[[], str],
        device: torch.device,
        total_steps: int,
    ) -> None:
        self.config = config
        self.replica = replica
        self.model = replica.model
        self.unwrapped = cast(GPT2, getattr(replica.model, "module", replica.model))
        self.optimizer = optimizer
        self.schedule = schedule
        self.gamma = gamma
        self.hessian = hessian
        self.loader = Loader(batches, device)
        self.validation = validation
        self.trackers = trackers
        self.checkpoints = Checkpoints(
            run_dir / "checkpoints", config.keep_checkpoints, in_background=config.save_in_background
        )
        self.throughput = throughput
        self.manifest = manifest
        self.sample = sample
        self.device = device
        self.state = TrainState()
        self.validation_loss: float | None = None
        self.stop_signal = StopSignal()
        self.health = HealthMonitor(hessian.interval)
        self.total_steps = total_steps
        self._clock = time.perf_counter()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def train_step(self, batch: Batch) -> StepResult:
        """Make one update of the parameters."""
        config, state = self.config, self.state
        self.hessian.before(batch, state.step)
        loss = accumulate_gradients(
            self.model,
            micro_batches(batch.inputs, batch.targets, self.replica.micro_batch_size),
            fused_cross_entropy,
            tokens=batch.targets.numel(),
            no_sync=self.replica.no_sync,
            strict=self.replica.strict,
            dropout_seed=derive(config.seed, "dropout", state.step, self.replica.rank),
        )
        self.hessian.after_accumulation(batch, state.step)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = total_norm(p.grad for p in parameters if p.grad is not None)
        result = self._read_back(loss, norm)
        if not result.skipped:
            if result.clipped:
                assert config.gradient_clip is not None
                torch.nn.utils.clip_grads_with_norm_(parameters, config.gradient_clip, norm)
            factor = self.schedule(state.step, self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            self.gamma.adjust(self.optimizer, state.step, self.total_steps)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._advance(batch, result)
        return result

    def fit(self, between_steps: Callable[[], bool] = lambda: False) -> None:
        """Train until the run ends.

        Args:
            between_steps: called after each step but the last, and after what follows it; returns whether it
                took time that is not the training's.

        Raises:
            Interrupted: asked to stop before the end; the state is saved.
            NotFiniteError: too many steps in a row were not finite.
            OSError: a checkpoint or the metrics could not be written.
            DataError: a checkpoint is not on the disk as it was written.
        """
        config, state = self.config, self.state
        self._clock = time.perf_counter() - state.seconds
        if config.stop_at_step is not None and state.step >= config.stop_at_step:
            raise Interrupted(self._why_stopped())
        with self.stop_signal.listening(), self.checkpoints.finishing_after_errors():
            if self.replica.world_size > 1 and not self.replica.sharded:
                self._settle_buckets()
            if state.step == 0:
                self._log(self._evaluate())
            self.throughput.restart()
            while state.step < self.total_steps:
                result = self.train_step(self._next_batch())
                self._check_finite(result)
                last = state.step == self.total_steps or result.out_of_time
                stop = not last and (result.stop_asked or state.step == config.stop_at_step)
                metrics: dict[str, float] = {}
                if last or state.step % config.log_interval == 0:
                    metrics |= self._measure(result)
                if last or state.step % config.eval_interval == 0:
                    metrics |= self._evaluate()
                if metrics:
                    self._log(metrics)
                if config.sample_interval and (last or state.step % config.sample_interval == 0):
                    self._write_sample()
                if last or stop or state.step % config.save_interval == 0:
                    self.save()
                elif result.written:
                    self.checkpoints.finish()
                    self.throughput.restart()
                if last or stop:
                    self.checkpoints.finish()
                if stop:
                    raise Interrupted(self._why_stopped())
                if last:
                    break
                if between_steps():
                    self.throughput.restart()

    def save(self) -> None:
        """Save a checkpoint of the current state; with `save_in_background`, begin to.

        Raises:
            OSError, DataError: it, or the one before it, is not on the disk as it should be.
        """
        self.trackers.sync()
        self.state.seconds = time.perf_counter() - self._clock
        extra = {
            "state": dataclasses.asdict(self.state),
            "hessian": self.hessian.state_dict(),
            "validation_loss": self._finite_validation_loss(),
            **self.manifest,
        }
        self.checkpoints.save(self.state.step, self.unwrapped, self.optimizer, extra)
        self.throughput.restart()

    @property
    def finished(self) -> bool:
        """Whether the run has reached its last step or its time."""
        limit = self.config.max_seconds
        return self.state.step >= self.total_steps or (limit is not None and self.state.seconds >= limit)

    def restore(self, path: Path) -> None:
        """Take up the state of a checkpoint, bitwise.

        Raises:
            DataError: the checkpoint is damaged, or of a run on other data.
            ConfigError: it is of another model or optimizer.
        """
        manifest = checkpoint.restore(path, self.unwrapped, self.optimizer)
        for split, fingerprint in self.manifest["data"].items():
            if manifest["data"][split] != fingerprint:
                raise DataError(
                    f"the {split} tokens are not those that {path} was trained with; "
                    "bring them back, or choose another name= for a new run"
                )
        self.state = TrainState(**manifest["state"])
        self.hessian.load_state_dict(manifest["hessian"])
        loss = manifest["validation_loss"]
        self.validation_loss = math.nan if loss is None else loss
        self.checkpoints.restored(self.state.step)

    def _finite_validation_loss(self) -> float | None:
        """The loss as JSON has it, which knows no NaN: a model may have one before the run gives up."""
        loss = self.validation_loss
        return None if loss is None or not math.isfinite(loss) else loss

    def _settle_buckets(self) -> None:
        """Make a backward pass whose gradients are thrown away.

        After its first one, DDP cuts gradients into buckets anew, in the order in which they have come. A run
        that is resumed would sum them up in another order than the one before, and with other rounding.
        """
        shape = self.replica.micro_batch_size, self.unwrapped.config.block_size
        words = torch.zeros(shape, dtype=torch.int64, device=self.device)
        accumulate_gradients(
            self.model, [MicroBatch(words, words)], fused_cross_entropy, tokens=words.numel()
        )
        self.optimizer.zero_grad(set_to_none=True)

    def _next_batch(self) -> Batch:
        return self.loader.batch(self.state.step)

    def _read_back(self, loss: Tensor, norm: Tensor) -> StepResult:
        """Agree over the processes on how the step went: the one time that it waits for the device."""
        seconds = time.perf_counter() - self._clock
        asked = self.stop_signal.received is not None
        late = self.config.max_seconds is not None and seconds >= self.config.max_seconds
        world_size = self.replica.world_size
        flags = torch.tensor([asked, late, self.checkpoints.written], dtype=loss.dtype).to(
            self.device, non_blocking=True
        )
        read = torch.cat([torch.stack([loss / world_size, norm.to(loss) / world_size]), flags])
        sum_over_processes([read])
        mean_loss, grad_norm, any_asked, any_late, have_written = read.tolist()
        skipped = not (math.isfinite(mean_loss) and math.isfinite(grad_norm))
        clip = self.config.gradient_clip
        return StepResult(
            loss=mean_loss,
            grad_norm=grad_norm,
            clipped=not skipped and clip is not None and grad_norm > clip,
            skipped=skipped,
            stop_asked=any_asked > 0,
            out_of_time=any_late > 0,
            written=have_written == world_size,
        )

    def _advance(self, batch: Batch, result: StepResult) -> None:
        state, block_size = self.state, batch.inputs.shape[1]
        tokens = batch.targets.numel() * self.replica.world_size
        flops_per_token = self.unwrapped.flops_per_token()
        flops = flops_per_token * tokens
        hessian_flops = flops_per_token * self.hessian.pass_sequences(state.step) * block_size
        state.step += 1
        state.tokens += tokens
        state.flops += flops + hessian_flops
        state.skipped_steps += result.skipped
        state.consecutive_skipped_steps = (state.consecutive_skipped_steps + 1) * result.skipped
        self.throughput.add(tokens, flops, hessian_flops)

    def _check_finite(self, result: StepResult) -> None:
        if not result.skipped:
            return
        state, limit = self.state, self.config.max_skipped_steps
        what = f"step {state.step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}"
        logger.warning("%s; the update was skipped (%d so far)", what, state.skipped_steps)
        if state.consecutive_skipped_steps > limit:
            self.checkpoints.finish()
            self._log({"train/loss": result.loss})  # and with it what was spent
            raise NotFiniteError(
                f"{what}, and max_skipped_steps={limit} before it were not finite either; "
                "start anew (another name=) with a lower optimizer.lr or a longer schedule.warmup_steps"
            )

    def _measure(self, result: StepResult) -> dict[str, float]:
        names: dict[Tensor, str] = {p: name for name, p in self.unwrapped.named_parameters()}
        on_device = optimizer_statistics(self.optimizer) | hessian_statistics(self.optimizer, names)
        metrics = {
            "train/loss": result.loss,
            "optim/lr": self.optimizer.param_groups[0]["lr"],
            "optim/grad_norm": result.grad_norm,
            "optim/grad_clipped": float(result.clipped),
            "optim/skipped_steps": self.state.skipped_steps,
            **{name: value.item() for name, value in on_device.items()},
            **self.hessian.metrics(self.state.step),
            **self.throughput.report(),
        }
        for warning in self.health.warnings(metrics, self.state.step):
            logger.warning("step %d: %s", self.state.step, warning)
        return metrics

    def _evaluate(self) -> dict[str, float]:
        with evaluation_weights(self.optimizer):
            self.validation_loss = evaluate(self.model, self.validation, sum_over_processes, self.device)
        self.throughput.restart()
        return {"val/loss": self.validation_loss}

    def _write_sample(self) -> None:
        with evaluation_weights(self.optimizer):  # on all processes: a sharded model needs them all
            self.trackers.text("sample", self.sample(), self.state.step)
        self.throughput.restart()

    def _log(self, metrics: Mapping[str, float]) -> None:
        state = self.state
        seconds = time.perf_counter() - self._clock
        axes = {"step": state.step, "tokens": state.tokens, "seconds": seconds, "flops": state.flops}
        self.trackers.log({**axes, **metrics})

    def _why_stopped(self) -> str:
        stop = self.config.stop_at_step
        planned = stop is not None and self.state.step >= stop
        why = self.stop_signal.received or ("stop_at_step" if planned else "a signal to another process")
        return (
            f"stopped at step {self.state.step} of {self.total_steps} ({why}), saved; run it again to go on"
        )
