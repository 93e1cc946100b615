"""Sophia in transformers' Trainer: h is the estimate that one makes by hand from what the Trainer did."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import flat
from torch.utils.data import SequentialSampler

from sophia_train.hessian import GNB, EmpiricalFisher, GradientMagnitude, Hutchinson, NoHessian, Replica
from sophia_train.optim import Sophia
from sophia_train.seeds import derive

LENGTH, WORDS = 6, 11
DISTRIBUTED = {"gnb": GNB(), "hutchinson": Hutchinson(), "empirical_fisher": EmpiricalFisher()}


@pytest.fixture(scope="module")
def SophiaCallback(transformers):
    from sophia_train.hessian.transformers_callback import SophiaCallback

    return SophiaCallback


def gpt2(transformers, attention="sdpa", dropout=0.1):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=8,
        n_positions=LENGTH,
        vocab_size=WORDS,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
        attn_pdrop=dropout,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # without it the Trainer divides by all labels, first ones too
    return model


def sequences(n=24):
    """Word ids, padded at the left in places, and some labels taken out."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for number in range(n):
        ids = torch.randint(0, WORDS, (LENGTH,), generator=generator)
        mask, labels = torch.ones(LENGTH, dtype=torch.int64), ids.clone()
        if number % 3 == 0:
            mask[:2], labels[:3] = 0, -100
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def make_trainer(transformers, folder, model, optimizer, callbacks, **changes):
    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    settings = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **changes,
    }
    made = InOrder(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=sequences(),
        eval_dataset=sequences(4),
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    return made


def sophia(model):
    return Sophia(model.parameters(), lr=1e-2, betas=(0.9, 0.0))  # h is the last estimate


def watcher(transformers):
    """A callback that copies weights, gradients and h ahead of each update; put it behind SophiaCallback."""

    class Watch(transformers.TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_pre_optimizer_step(self, args, state, control, model, optimizer, **_):
            states = optimizer.optimizer.state
            h = [states[p]["hessian"] if p in states else torch.zeros_like(p) for p in model.parameters()]
            self.seen.append(
                (
                    copy.deepcopy(model.state_dict()),
                    flat(p.grad for p in model.parameters()),
                    flat(h).clone(),
                )
            )

    return Watch()


class Hidden(torch.nn.Module):
    """A model of transformers, called as ours are: made here, not by the package."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, targets, loss_fn):
        ids, mask = inputs.unbind(-1)
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return loss_fn(logits, lambda x: x, targets)


def by_hand(estimator, model, rows, seed):
    """The estimate for a micro-batch, through `Estimator.estimate` and targets that are shifted in a loop."""
    from sophia_train.data.batches import Batch

    ids, mask = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask"))
    targets = torch.full_like(ids, -1)
    for i, row in enumerate(rows):
        for t in range(LENGTH - 1):
            if row["labels"][t + 1] != -100:
                targets[i, t] = row["labels"][t + 1]
    replica = Replica(Hidden(model), len(rows))
    inputs = torch.stack([ids, mask], dim=-1)
    estimates = estimator.estimate(replica, Batch(inputs, targets, list(range(len(rows)))), seed)
    model.zero_grad()
    return flat(estimates[p] for p in model.parameters())


OWN_PASS = [GNB(interval=2), GNB(interval=3, groups=3), Hutchinson(interval=2), GNB(interval=2, batch_size=2)]


@pytest.mark.parametrize("estimator", OWN_PASS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_h_is_the_estimate_of_the_last_micro_batch(
    transformers, SophiaCallback, estimator, attention, tmp_path
):
    model, watch = gpt2(transformers, attention), watcher(transformers)
    callback = SophiaCallback(estimator, seed=3)
    trainer = make_trainer(transformers, tmp_path, model, sophia(model), [callback, watch])
    trainer.train()
    rows, other = sequences(), gpt2(transformers, attention)
    expected = None
    for step, (weights, _, h) in enumerate(watch.seen):
        if estimator.due(step):
            other.load_state_dict(weights)
            last = [rows[i % len(rows)] for i in range(6 * step + 3, 6 * step + 6)]
            expected = by_hand(estimator, other, last[: estimator.batch_size], derive(3, "hessian", step, 0))
        torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-7)
        assert expected.any()
    assert len(watch.seen) == 5 and not model._forward_pre_hooks


@pytest.mark.parametrize("norm", [1e-2, 1e6])
@pytest.mark.parametrize("estimator", [EmpiricalFisher(interval=2), GradientMagnitude(interval=2)])
def test_free_estimators_read_the_gradient_of_all_micro_batches(
    transformers, SophiaCallback, estimator, norm, tmp_path
):
    model, watch = gpt2(transformers), watcher(transformers)
    trainer = make_trainer(
        transformers, tmp_path, model, sophia(model), [SophiaCallback(estimator), watch], max_grad_norm=norm
    )
    trainer.train()
    rows, other = sequences(), gpt2(transformers).eval()
    expected = None
    for step, (weights, used, h) in enumerate(watch.seen):
        if estimator.due(step):
            other.load_state_dict(weights)
            step_rows = [rows[i % len(rows)] for i in range(6 * step, 6 * step + 6)]
            tokens = sum(int((row["labels"][1:] != -100).sum()) for row in step_rows)
            assert tokens == 2 * 3 + 4 * 5
            expected = tokens * used**2 if isinstance(estimator, EmpiricalFisher) else used.abs()
            if norm == 1e-2:
                assert used.norm().item() == pytest.approx(1e-2, rel=1e-3)  # after clipping
        torch.testing.assert_close(h, expected, rtol=1e-6, atol=0)
    # without dropout the gradient is the mean over the tokens counted, which is what B means
    model = gpt2(transformers, dropout=0.0)
    watch = watcher(transformers)
    trainer = make_trainer(
        transformers, tmp_path, model, sophia(model), [watch], max_steps=1, max_grad_norm=1e6
    )
    weights = copy.deepcopy(model.state_dict())
    trainer.train()
    other.load_state_dict(weights)
    total = 0.0
    for row in rows[:6]:
        logits = other(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0]
        total = total + F.cross_entropy(logits[:-1], row["labels"][1:], reduction="sum")
    gradient = flat(torch.autograd.grad(total / 26, list(other.parameters())))
    torch.testing.assert_close(watch.seen[0][1], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", [GNB(interval=2), Hutchinson(interval=2), EmpiricalFisher(interval=2)])
def test_with_bf16(transformers, SophiaCallback, estimator, tmp_path):
    found = {}
    for bf16 in (False, True):
        model, watch = gpt2(transformers, dropout=0.0), watcher(transformers)
        trainer = make_trainer(
            transformers, tmp_path, model, sophia(model), [SophiaCallback(estimator), watch], bf16=bf16
        )
        seen = []
        model.lm_head.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.dtype))
        trainer.train()
        # training and estimate alike
        assert set(seen) == {torch.bfloat16 if bf16 else torch.float32}
        found[bf16] = watch.seen[0][2]
    assert not torch.equal(found[True], found[False])
    assert found[True].isfinite().all()
    assert (found[True] - found[False]).norm() < 0.2 * found[False].norm()


def test_evaluation_in_between_changes_nothing(transformers, SophiaCallback, tmp_path):
    found = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        # dropout would draw other masks: evaluation uses up random numbers
        model, watch = gpt2(transformers, dropout=0.0), watcher(transformers)
        callback = SophiaCallback(EmpiricalFisher(interval=2))
        make_trainer(transformers, tmp_path, model, sophia(model), [callback, watch], **changes).train()
        found.append(watch.seen[-1][2])
    assert torch.equal(*found)


def test_a_resumed_run_goes_on_in_step(transformers, SophiaCallback, tmp_path):
    def run(resume):
        model = gpt2(transformers, dropout=0.0)
        trainer = make_trainer(
            transformers,
            tmp_path,
            model,
            sophia(model),
            [SophiaCallback(GNB(interval=2))],
            save_strategy="steps",
            save_steps=3,
            lr_scheduler_type="constant",
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return flat(p.detach() for p in model.parameters())

    torch.testing.assert_close(run(False), run(True), rtol=0, atol=0)


@pytest.mark.parametrize(
    "estimator", [GNB(), Hutchinson(), EmpiricalFisher(), GradientMagnitude()], ids=lambda e: type(e).__name__
)
def test_an_optimizer_that_takes_no_hessian_is_refused(transformers, SophiaCallback, estimator, tmp_path):
    model = gpt2(transformers)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = make_trainer(transformers, tmp_path, model, optimizer, [SophiaCallback(estimator)])
    with pytest.raises(ValueError, match=f"{type(estimator).__name__} .* AdamW takes none"):
        trainer.train()
    make_trainer(transformers, tmp_path, model, optimizer, [SophiaCallback(NoHessian())], max_steps=1).train()


@pytest.mark.slow  # a second Python imports transformers, twice
def test_on_two_processes_h_is_the_mean_of_their_estimates(transformers, tmp_path):
    folder = Path(__file__).parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, str(folder / "worker_transformers.py"), str(tmp_path)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": f"{folder.parent}",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows, model = sequences(), gpt2(transformers, dropout=0.0)
    for name, estimator in DISTRIBUTED.items():
        (_, gradient, h), (_, _, other) = (torch.load(tmp_path / f"{name}_{rank}.pt") for rank in (0, 1))
        assert torch.equal(h, other)
        if name == "empirical_fisher":
            expected = 26 * gradient**2
        else:  # both have 13 targets
            parts = [
                by_hand(estimator, model, rows[3 * rank : 3 * rank + 3], derive(3, "hessian", 0, rank))
                for rank in (0, 1)
            ]
            expected = sum(parts) / 2
        torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-6)


class TestRefused:
    @pytest.fixture
    def start(self, transformers, SophiaCallback, tmp_path):
        def start(model=None, estimator=None, **changes):
            model = model or gpt2(transformers)
            callback = SophiaCallback(estimator or GNB())
            make_trainer(transformers, tmp_path, model, sophia(model), [callback], **changes).train()

        return start

    def test_inputs_without_labels(self, transformers, SophiaCallback, tmp_path):
        model = gpt2(transformers)

        def loss(outputs, labels, num_items_in_batch=None):
            return outputs.logits.square().mean()

        trainer = make_trainer(transformers, tmp_path, model, sophia(model), [SophiaCallback(GNB())])
        trainer.compute_loss_func = loss
        trainer.train_dataset = [{"input_ids": row["input_ids"]} for row in sequences()]
        with pytest.raises(ValueError, match="labels"):
            trainer.train()

    def test_label_smoothing_which_takes_labels_from_the_model(self, start):
        with pytest.raises(ValueError, match="label smoothing"):
            start(label_smoothing_factor=0.1)

    def test_models_that_are_no_causal_language_models(self, transformers, start):
        config = transformers.BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=WORDS
        )
        with pytest.raises(ValueError, match="ForMaskedLM"):
            start(transformers.BertForMaskedLM(config))

    def test_scaled_gradients(self, transformers, SophiaCallback):
        class Arguments:
            fp16, max_grad_norm, n_gpu = True, 0.0, 1

        model = gpt2(transformers)
        for estimator, refused in ((EmpiricalFisher(), True), (GNB(), False)):
            callback = SophiaCallback(estimator)
            keywords = {"model": model, "optimizer": sophia(model)}
            if refused:
                with pytest.raises(ValueError, match="still scaled"):
                    callback.on_train_begin(Arguments(), None, None, **keywords)
            else:
                callback.on_train_begin(Arguments(), None, None, **keywords)
                callback.on_train_end(Arguments(), None, None, **keywords)
        assert not model._forward_pre_hooks


def test_the_hook_of_a_training_that_failed_is_not_left_twice(transformers, SophiaCallback, tmp_path):
    model = gpt2(transformers)
    callback = SophiaCallback(EmpiricalFisher(interval=1))

    class Fail(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(transformers, tmp_path, model, sophia(model), [callback, Fail()]).train()
    watch = watcher(transformers)
    make_trainer(transformers, tmp_path, model, sophia(model), [callback, watch]).train()
    _, used, h = watch.seen[0]
    torch.testing.assert_close(h, 26 * used**2, rtol=1e-6, atol=0)
    assert not model._forward_pre_hooks


@pytest.fixture(autouse=True, scope="module")
def quiet(transformers):
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)
