"""What one step does: the gradient, its clipping, the learning rate, and steps that are not finite."""

import copy
import dataclasses
import json
import math
import threading
import time
import types

import pytest
import torch
from support import MODEL, build, records, result, start_trackers, text
from torch.nn.functional import cross_entropy

import sophia_train.throughput
import sophia_train.trainer
from sophia_train import checkpoint, durable
from sophia_train.hessian import HessianUpdater
from sophia_train.hessian.base import Estimator
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.trainer import NotFiniteError


def plain_loss(model, inputs, targets):
    """Mean loss as anybody would write it, from the model's logits."""
    logits = model(inputs)
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def gradient_at_the_update(trainer, model):
    """The gradient of the next step as the optimizer gets it, and what the step reported."""
    seen, step = {}, trainer.optimizer.step

    def capture():
        seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
        step()

    trainer.optimizer.step = capture
    reported = trainer.train_step(trainer._next_batch())
    return seen, reported


def norm(tensors):
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm().item()


def state_of(trainer, model):
    """Weights and optimizer state, copied."""
    states = trainer.optimizer.state
    return [
        [p.detach().clone() for p in model.parameters()],
        [copy.deepcopy(states[p]) for p in model.parameters() if p in states],
    ]


@pytest.mark.parametrize("micro_batch_size", [8, 3, 1])
class TestGradient:
    def test_is_that_of_the_mean_loss_clipped_as_a_whole(self, micro_batch_size, tmp_path):
        for clip in (0.01, 1e6, None):
            trainer, model = build(
                tmp_path / str(clip),
                dtype=torch.float64,
                micro_batch_size=micro_batch_size,
                gradient_clip=clip,
            )
            batch = trainer._next_batch()
            loss = plain_loss(model, batch.inputs, batch.targets)
            expected = torch.autograd.grad(loss, list(model.parameters()))
            whole = norm(expected)
            seen, reported = gradient_at_the_update(trainer, model)
            factor = 0.01 / (whole + 1e-6) if clip == 0.01 else 1  # torch adds 1e-6
            torch.testing.assert_close(
                list(seen.values()), [g * factor for g in expected], rtol=1e-9, atol=1e-12
            )
            assert math.isclose(reported.loss, loss.item(), rel_tol=1e-10)
            assert math.isclose(reported.grad_norm, whole, rel_tol=1e-9)
            assert reported.clipped == (clip == 0.01)

    def test_reaches_the_estimator_before_it_is_clipped(self, micro_batch_size, tmp_path):
        seen = []

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Reader(Estimator):
            reads_training_gradient = True

            def estimate(self, replica, batch, seed):
                seen.append(norm([p.grad for p in replica.model.parameters()]))
                return {p: p.grad.abs() for p in replica.model.parameters()}

        trainer, model = build(tmp_path / "run", micro_batch_size=micro_batch_size, gradient_clip=1e-3)
        parts = {"batch_size": trainer.config.batch_size, "seed": 0}
        trainer.hessian = HessianUpdater(Reader(interval=2), trainer.optimizer, trainer.replica, **parts)
        results = [trainer.train_step(trainer._next_batch()) for _ in range(4)]
        assert seen == pytest.approx([results[0].grad_norm, results[2].grad_norm], rel=1e-5)
        assert min(seen) > 10 * 1e-3 and all(each.clipped for each in results)


class TestLearningRate:
    def test_of_each_group_is_its_peak_times_the_schedule(self, tmp_path):
        trainer, model = build(tmp_path / "run")
        peaks = [3e-3, 7e-4]
        for group, peak in zip(trainer.optimizer.param_groups, peaks, strict=True):
            group["initial_lr"] = peak
        for step in range(12):
            trainer.train_step(trainer._next_batch())
            factor = trainer.schedule(step, 20)
            assert [group["lr"] for group in trainer.optimizer.param_groups] == [
                peak * factor for peak in peaks
            ]
            if step == 5:  # the peaks are the saved ones, not those at the moment of saving
                path = checkpoint.save(tmp_path, 6, model, trainer.optimizer, {})
                trainer, model = build(tmp_path / "run")
                checkpoint.restore(path, model, trainer.optimizer)
                trainer.state.step = 6

    def test_is_in_the_metrics(self, tiny, tmp_path):
        assert tiny(tmp_path, "optimizer.lr=0.01", "schedule.warmup_steps=2").code == 0
        rates = [record["optim/lr"] for record in records(tmp_path) if "optim/lr" in record]
        assert (
            rates[:2] == pytest.approx([0.01 / 3, 0.02 / 3])
            and rates[2] == 0.01
            and rates[5] < rates[4] < 0.01
        )


@pytest.mark.parametrize("micro_batch_size", [8, 7, 1])
def test_validation_loss_is_the_mean_over_the_first_blocks(micro_batch_size, tmp_path):
    trainer, model = build(tmp_path / "run", dtype=torch.float64, micro_batch_size=micro_batch_size)
    length = MODEL.block_size
    ids = torch.from_numpy(text(tmp_path).read(0, 400 // length * length + 1))
    inputs, targets = ids[:-1].view(-1, length), ids[1:].view(-1, length)
    with torch.no_grad():
        expected = plain_loss(model, inputs, targets).item()
    assert trainer._evaluate()["val/loss"] == pytest.approx(expected, rel=1e-12)
    assert trainer.validation_loss == pytest.approx(expected, rel=1e-12)


class TestNotFinite:
    @pytest.fixture
    def spoil(self, monkeypatch):
        """Puts a value into the gradient of the next steps, one for each step; None leaves it alone."""
        values, original = [], sophia_train.trainer.accumulate_gradients

        def accumulate(model, *arguments, **keywords):
            loss = original(model, *arguments, **keywords)
            value = values.pop(0)
            if value == "loss":
                return loss * math.nan
            if value is not None:
                next(iter(model.parameters())).grad.view(-1)[5] = value
            return loss

        monkeypatch.setattr(sophia_train.trainer, "accumulate_gradients", accumulate)
        return values

    @pytest.mark.parametrize("optimizer", ["sophia", "adamw"])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "loss", 1e38])
    def test_step_changes_nothing(self, value, optimizer, spoil, tmp_path):
        trainer, model = build(tmp_path / "run", optimizer=optimizer)
        spoil += [None, value, None]
        if value == 1e38:  # a gradient that is finite, but its norm is not
            spoil[:] = [None, torch.tensor(3e38), None]
        trainer.train_step(trainer._next_batch())
        before = state_of(trainer, model)
        reported = trainer.train_step(trainer._next_batch())
        assert reported.skipped and not reported.clipped
        torch.testing.assert_close(state_of(trainer, model), before, rtol=0, atol=0)
        assert all(p.grad is None for p in model.parameters())
        state = trainer.state
        assert (state.step, state.skipped_steps, state.consecutive_skipped_steps) == (2, 1, 1)
        assert state.tokens == 2 * 8 * MODEL.block_size
        assert not trainer.train_step(trainer._next_batch()).skipped
        assert (state.step, state.skipped_steps, state.consecutive_skipped_steps) == (3, 1, 0)
        assert all(p.isfinite().all() for p in model.parameters())

    def test_steps_in_a_row_end_the_run(self, spoil, tmp_path):
        trainer, model = build(tmp_path / "run", max_skipped_steps=2)
        spoil += [None, math.nan, math.nan, None, math.nan, math.nan, math.nan]
        start_trackers(trainer, tmp_path / "run")
        with pytest.raises(NotFiniteError, match=r"step 7: .*max_skipped_steps=2") as caught:
            trainer.fit()
        trainer.trackers.close(65)
        assert "resume" not in str(caught.value)  # a run is not resumed with another learning rate
        assert trainer.state.skipped_steps == 5
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("apart", [True, False])
def test_what_is_done_between_steps_is_said_to_take_time_apart_or_counts(apart, tmp_path, monkeypatch):
    now, late = time.perf_counter, 0.0

    def between_steps():
        nonlocal late
        if trainer.state.step != 4:
            return False
        late = 1000.0
        return apart

    clock = types.SimpleNamespace(perf_counter=lambda: now() + late)
    monkeypatch.setattr(sophia_train.throughput, "time", clock)
    trainer, _ = build(tmp_path / "run", max_steps=6)
    start_trackers(trainer, tmp_path / "run")
    trainer.fit(between_steps)
    trainer.trackers.close(0)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    spent = {record["step"]: record.get("perf/step_seconds", 0) for record in map(json.loads, lines)}
    assert [step for step, seconds in spent.items() if seconds > 900] == ([] if apart else [5])


def test_an_error_does_not_take_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    failed = threading.Event()

    def slow(operation, path):
        if (operation, path.suffix) == ("write", ".safetensors"):
            assert failed.wait(60)

    def fail():
        if trainer.state.step == 3:
            failed.set()
            raise ZeroDivisionError

    monkeypatch.setattr(durable, "before", slow)
    trainer, _ = build(tmp_path, save_interval=2, save_in_background=True)
    start_trackers(trainer, tmp_path)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(between_steps=fail)
    trainer.trackers.close(70)
    assert checkpoint.verify(checkpoint.latest(trainer.checkpoints.folder))["step"] == 2


class TestNotFiniteRun:
    """The same through the command line."""

    def test_a_step_is_skipped_counted_and_warned_of(self, tiny, tmp_path):
        ended = tiny(tmp_path, hooks=[["spoil_gradient", [2], "nan"]])
        assert ended.code == 0 and "step 3: loss" in ended.err and "gradient norm nan" in ended.err
        assert [record.get("optim/skipped_steps") for record in records(tmp_path)] == [None, 0, 0, 1, 1, 1, 1]
        assert records(tmp_path)[3]["optim/grad_norm"] == "NaN"
        assert result(tmp_path)["state"]["skipped_steps"] == 1
        assert result(tmp_path)["state"]["consecutive_skipped_steps"] == 0

    @pytest.mark.parametrize("optimizer", [["optimizer=sophia_g"], ["optimizer=adamw", "~hessian.interval"]])
    @pytest.mark.parametrize("steps", [[0], [0, 1, 2], [2], [3, 4]])
    def test_is_resumed_exactly(self, steps, optimizer, tiny, tmp_path):
        spoil = {"hooks": [["spoil_gradient", steps, "inf"]]}
        assert tiny(tmp_path / "whole", *optimizer, **spoil).code == 0
        last = steps[-1] + 1
        assert tiny(tmp_path / "parts", *optimizer, f"stop_at_step={last}", **spoil).code == 75
        assert tiny(tmp_path / "parts", *optimizer).code == 0
        assert result(tmp_path / "parts") == result(tmp_path / "whole")

    def test_too_many_end_it_with_a_checkpoint_that_goes_on(self, tiny, tmp_path):
        overrides = ["max_skipped_steps=2", "save_interval=1"]
        ended = tiny(tmp_path, *overrides, hooks=[["spoil_gradient", [2, 3, 4], "nan"]])
        assert ended.code == 65 and len(ended.errors) == 1 and "Traceback" not in ended.err
        assert "step 5" in ended.errors[0] and "max_skipped_steps=2" in ended.errors[0]
        status = json.loads((tmp_path / "status.json").read_text())
        assert (status["code"], status["step"]) == (65, 5) and status["reason"] in ended.errors[0]
        newest = checkpoint.latest(tmp_path / "checkpoints")
        assert checkpoint.verify(newest)["state"]["consecutive_skipped_steps"] == 2
        assert tiny(tmp_path, *overrides).code == 0

    @pytest.mark.parametrize("tracker", ["jsonl", "console"])
    def test_of_a_model_that_is_broken_from_the_start(self, tracker, tiny, tmp_path):
        config = GPT2Config(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=257, bias=False)
        model = GPT2(config)
        model.initialize(0)
        with torch.no_grad():
            next(iter(model.parameters()))[40:60] = math.inf
        optimizer = torch.optim.AdamW(model.parameters())
        manifest = {"config": {"model": dataclasses.asdict(config)}}
        checkpoint.save(tmp_path / "broken" / "checkpoints", 1, model, optimizer, manifest)
        overrides = ["max_skipped_steps=4", "eval_interval=1", "save_interval=1", f"tracker={tracker}"]
        ended = tiny(tmp_path / "run", f"init_from={tmp_path / 'broken'}", *overrides)
        assert ended.code == 65 and len(ended.errors) == 1 and "Traceback" not in ended.err, ended
        again = tiny(tmp_path / "run", f"init_from={tmp_path / 'broken'}", *overrides)
        assert again.code == 65 and "step 5" in again.errors[0]
        short = tiny(tmp_path / "short", f"init_from={tmp_path / 'broken'}", *overrides, "max_steps=3")
        assert short.code in (0, 65) and "Traceback" not in short.err, short
