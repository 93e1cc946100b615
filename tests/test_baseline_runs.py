"""What every optimizer of the configs owes a run, through the real trainer: one contract, for each of them.

New files in `configs/optimizer` are held to it without a line here.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import records, start_trackers

from sophia_train import checkpoint, distributed
from sophia_train.assembly import build_trainer
from sophia_train.collectives import sum_over_processes
from sophia_train.config import CONFIGS, compose, run_config
from sophia_train.data.token_files import Tokens, TokenShard
from sophia_train.data.tokenizers import load_tokenizer
from sophia_train.errors import Interrupted
from sophia_train.evaluation import evaluate
from sophia_train.models.gpt2 import GPT2
from sophia_train.optim.evaluation_weights import has_evaluation_weights
from sophia_train.optim.mixed import MixedOptimizer
from sophia_train.run_config import RunConfig, build_optimizer
from sophia_train.trackers.base import Trackers
from sophia_train.trackers.jsonl import JsonlTracker
from sophia_train.trainer import Trainer

CHOICES = sorted(path.stem for path in (CONFIGS / "optimizer").glob("*.yaml"))

TINY = (
    "data=token_files data.path=x model=gpt2_nano model.n_layer=1 model.n_head=2 model.n_embd=16 "
    "model.block_size=8 model.vocab_size=50 model.bias=true batch_size=8 micro_batch_size=8 max_steps=30 "
    "schedule.warmup_steps=3 log_interval=1 eval_interval=4 eval_tokens=400 save_interval=100 tracker=jsonl "
    "compile=false"
).split()
STOP = 13  # past a refresh of every Hessian, basis and root, and between two evaluations
FAST = {  # what learns within 30 steps, where 0.02 is not the learning rate for it
    "adafactor": ["optimizer.lr=0.5"],  # relative to the weights
    "adahessian": ["optimizer.lr=0.3", "optimizer.eps=0.03"],  # more than its noise of few estimates
    "lion": ["optimizer.lr=0.01"],
    "sgd": ["optimizer.lr=0.5"],
    "sophia_robust": ["optimizer.lr=0.02", "optimizer.others.adamw.lr=0.02"],
    "shampoo": ["optimizer.lr=0.1", "optimizer.others.adamw.lr=0.02"],
    "sophia_floor": ["optimizer.lr=0.2"],  # h is far below its floor: momentum / 0.04
    "sophia_g_no_clip": ["optimizer.lr=6e-4"],  # nothing bounds its steps
}
UNIFORM = float(np.log(50))  # nats a token, for whoever does not look at the token before


@pytest.fixture(params=CHOICES)
def choice(request):
    if "pytorch_optimizer" in (CONFIGS / "optimizer" / f"{request.param}.yaml").read_text():
        pytest.importorskip("pytorch_optimizer")
    return request.param


@functools.cache
def configured(choice: str, *overrides: str) -> RunConfig:
    return run_config(compose([*TINY, f"optimizer={choice}", *overrides]))


@dataclass
class Run:
    """A run in a folder, in this process."""

    trainer: Trainer
    folder: Path

    @property
    def model(self) -> GPT2:
        return self.trainer.unwrapped

    @property
    def newest(self) -> Path:
        path = checkpoint.latest(self.folder / "checkpoints")
        assert path is not None
        return path

    def fit(self) -> "Run":
        start_trackers(self.trainer, self.folder)
        try:
            self.trainer.fit()
        finally:
            self.trainer.trackers.close(0)
        return self


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Tokens of which each is one to three above the one before, so that there is something to learn."""
    path = tmp_path_factory.mktemp("data") / "tokens.bin"
    steps = np.random.default_rng(0).integers(1, 4, 2000)
    (np.cumsum(steps) % 50).astype("<u2").tofile(path)
    return Tokens([TokenShard(path, np.dtype("<u2"), 0, 2000)])


@pytest.fixture(scope="module")
def start(tokens):
    """Build a run, or take it up where its folder has it: `start(folder, choice, *overrides)`."""

    def build(folder, choice, *overrides):
        overrides = [*FAST.get(choice, ["optimizer.lr=0.02"]), f"run_dir={folder}", *overrides]
        config = configured(choice, *overrides)
        accelerator = distributed.start("fp32", None)
        trackers = Trackers(JsonlTracker())
        tokenizer = load_tokenizer("bytes")
        trainer = build_trainer(config, None, (tokens, tokens), tokenizer, trackers, accelerator)
        if checkpoint.exists(folder):
            trainer.restore(checkpoint.find(folder))
        folder.mkdir(exist_ok=True)
        return Run(trainer, folder)

    return build


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The finished run of a choice, made once."""
    return functools.cache(lambda choice: start(tmp_path_factory.mktemp(choice) / "run", choice).fit())


def flat(tree):
    """State with tensors as what can be compared: type, shape, layout, device and bytes."""
    if isinstance(tree, torch.Tensor):
        content = tree.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(tree.dtype), list(tree.shape), tree.stride(), str(tree.device), content
    if isinstance(tree, dict):
        return {key: flat(value) for key, value in tree.items()}
    return [flat(value) for value in tree] if isinstance(tree, list | tuple) else tree


class TestRuns:
    def test_learns(self, choice, whole):
        losses = [line["val/loss"] for line in records(whole(choice).folder) if "val/loss" in line]
        assert losses[0] == pytest.approx(UNIFORM, abs=0.1)
        assert losses[-1] < UNIFORM - 0.5

    def test_goes_on_bitwise(self, choice, whole, start, tmp_path):
        folder = tmp_path / "run"
        with pytest.raises(Interrupted):
            start(folder, choice, f"stop_at_step={STOP}").fit()
        resumed, expected = start(folder, choice).fit(), whole(choice)
        assert flat(dict(resumed.model.state_dict())) == flat(dict(expected.model.state_dict()))
        assert flat(resumed.trainer.optimizer.state_dict()) == flat(expected.trainer.optimizer.state_dict())
        ours, theirs = (checkpoint.verify(run.newest) for run in (resumed, expected))
        for key in ("files", "optimizer", "hessian", "validation_loss"):
            assert ours[key] == theirs[key], key
        assert records(folder) == records(expected.folder)

    def test_saves_the_weights_that_it_evaluated(self, choice, whole, start, tmp_path):
        run = whole(choice)
        weights, manifest = checkpoint.load_weights(run.newest)
        other = start(tmp_path / "other", choice)
        checkpoint.load_parameters(other.model, weights, "it")
        trainer = other.trainer
        loss = evaluate(trainer.model, trainer.validation, sum_over_processes, trainer.device)
        assert loss == manifest["validation_loss"]

    def test_trains_on_with_the_weights_that_it_trained(self, choice, whole, start):
        run = whole(choice)
        saved, _ = checkpoint.load_weights(run.newest)
        again = start(run.folder, choice)
        trained = {name: p.detach().clone() for name, p in again.model.named_parameters()}
        assert flat(trained) == flat({name: p.detach() for name, p in run.model.named_parameters()})
        apart = has_evaluation_weights(again.trainer.optimizer)
        assert (run.newest / "training.safetensors").exists() == apart
        if apart:
            assert flat(trained) != flat(saved)
            again.trainer.optimizer.eval()
        assert flat({name: p.detach() for name, p in again.model.named_parameters()}) == flat(saved)


LATE = ("transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.ln_1.weight")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
    ),
]


def built(choice, *overrides, device="cpu"):
    """A model and its optimizer, as the file has it."""
    config = configured(choice, *overrides)
    model = GPT2(config.model).to(device)
    model.initialize(1)
    return model, build_optimizer(config.optimizer, model)


def step(model, optimizer, number, without=()):
    """Make a step with gradients, and estimates of a Hessian, that depend on its number only."""
    generator = torch.Generator().manual_seed(number)
    estimates = {}
    for name, p in model.named_parameters():
        gradient = torch.randn(p.shape, generator=generator) * 0.01
        estimates[p] = torch.rand(p.shape, generator=generator).add(0.01).to(p.device)
        p.grad = None if name in without else gradient.to(p.device)
    if hasattr(optimizer, "update_hessian"):
        assert optimizer.update_hessian(estimates)
    optimizer.step()


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def states_of(model, optimizer):
    """State by name, of those that have any; `eval` of a schedule-free one leaves empty ones behind."""
    states = {name: optimizer.state.get(p) for name, p in model.named_parameters()}
    return {name: flat(state) for name, state in states.items() if state}


def tensors_of(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


class TestSteps:
    def test_leaves_parameters_without_a_gradient_until_they_have_one(self, choice):
        model, optimizer = built(choice)
        before = weights_of(model)
        for number in range(12):
            step(model, optimizer, number, LATE)
        between = weights_of(model)
        for name in before:
            assert torch.equal(before[name], between[name]) == (name in LATE), name
        for number in range(12, 24):
            step(model, optimizer, number)
        for name, weight in weights_of(model).items():
            assert weight.isfinite().all() and not torch.equal(between[name], weight), name

    def test_a_checkpoint_keeps_who_has_no_state(self, choice, tmp_path):
        model, optimizer = built(choice)
        for number in range(2):
            step(model, optimizer, number, LATE)
        path = checkpoint.save(tmp_path, 2, model, optimizer, {})
        other, into = built(choice)
        step(other, into, 5)  # has state for all
        checkpoint.restore(path, other, into)
        assert states_of(other, into) == states_of(model, optimizer)
        assert not states_of(other, into).keys() & set(LATE) or hasattr(into, "update_hessian")
        saved = [
            checkpoint.verify(checkpoint.save(tmp_path / name, 2, *pair, {}))
            for name, pair in {"live": (model, optimizer), "restored": (other, into)}.items()
        ]
        assert saved[0] == saved[1]
        for number in range(2, 14):
            step(model, optimizer, number)
            step(other, into, number)
        assert flat(weights_of(other)) == flat(weights_of(model))

    def test_moves_each_group_by_its_learning_rate(self, choice):
        small = "optimizer.lr=1e-3"  # so that decay leaves nothing of second order in it
        model, optimizer = built(choice, small)
        twins = [built(choice, small) for _ in optimizer.param_groups]
        before = weights_of(model)
        for index, (_, twin) in enumerate(twins):
            twin.param_groups[index]["lr"] *= 2
        for number in range(11):
            for pair in ((model, optimizer), *twins):
                step(*pair, number)
        names = {p: name for name, p in model.named_parameters()}
        moved = {name: weight - before[name] for name, weight in weights_of(model).items()}
        for index, (twin_model, _) in enumerate(twins):
            doubled = {names[p] for p in optimizer.param_groups[index]["params"]}
            for name, weight in weights_of(twin_model).items():
                factor = 2 if name in doubled else 1
                distance = (weight - before[name] - factor * moved[name]).norm() / moved[name].norm()
                assert distance < 0.01, (index, name)

    @pytest.mark.parametrize("device", DEVICES)
    def test_keeps_its_state_finite_and_where_the_parameter_is(self, choice, device):
        model, optimizer = built(choice, device=device)
        for number in range(12):
            step(model, optimizer, number)
        for name, p in model.named_parameters():
            for tensor in [p.detach(), *tensors_of(optimizer.state[p])]:
                assert tensor.isfinite().all(), name
                assert tensor.device == p.device or tensor.ndim == 0, name  # torch counts steps on the CPU

    def test_has_the_values_of_its_file(self, choice):
        """No value is lost on the way, as it might be in the `**kwargs` that libraries take."""
        _, optimizer = built(choice)
        group = json.loads(json.dumps(optimizer.param_groups[0], default=str))
        first = getattr(optimizer, "optimizers", [optimizer])[0]
        for key, value in configured(choice).optimizer.items():
            if key not in ("_target_", "others"):
                assert group.get(key, getattr(first, key, None)) == value, key


class TestState:
    """What their state may look like, and a checkpoint gives back."""

    def test_an_optimizer_that_has_none_beside_one_that_has(self, tmp_path):
        def make():
            model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
            plain = torch.optim.SGD(model[0].parameters(), lr=0.1)
            return model, MixedOptimizer([plain, torch.optim.AdamW(model[1].parameters())])

        pairs = [make(), make()]
        step(*pairs[0], 0)
        checkpoint.restore(checkpoint.save(tmp_path, 1, *pairs[0], {}), *pairs[1])
        assert {name.partition(".")[0] for name in states_of(*pairs[1])} == {"1"}
        for pair in pairs:
            step(*pair, 1)
        assert flat(weights_of(pairs[1][0])) == flat(weights_of(pairs[0][0]))

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
    def test_tensors_keep_their_layout(self, order, tmp_path):
        """Products of matrices round differently for another one, so that a run would not go on bitwise."""
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        odd = torch.arange(24.0).reshape(2, 3, 4).permute(order)
        optimizer.state[model.weight]["nested"] = [odd, []]
        path = checkpoint.save(tmp_path, 1, model, optimizer, {})
        optimizer.state.clear()
        checkpoint.restore(path, model, optimizer)
        assert flat(optimizer.state[model.weight]["nested"]) == flat([odd, []])
        assert torch.equal(load_file(path / "optimizer.safetensors")["state/weight/nested/0"], odd)
