"""What only a GPU can show: `pytest -m gpu`."""

import dataclasses
import gzip
import json
import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from sophia_train import launch
from sophia_train.data.batches import Batch
from sophia_train.hessian import GNB, EmpiricalFisher, GradientMagnitude, Hutchinson, Replica
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.models.labels import sample_labels, token_keys
from sophia_train.models.losses import cross_entropy, fused_cross_entropy, sampled_cross_entropy
from sophia_train.optim import Sophia
from sophia_train.seeds import derive
from sophia_train.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = GPT2Config(n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=5000)


@pytest.fixture
def model():
    model = GPT2(CONFIG).cuda()
    model.initialize(0)
    return model


@pytest.fixture
def batch():
    rows = torch.randint(0, CONFIG.vocab_size, (8, 257), generator=torch.Generator().manual_seed(1)).cuda()
    return Batch(rows[:, :-1], rows[:, 1:], list(range(8)))


@pytest.mark.parametrize("name", ["step", "all_finite", "move_averages", "cross_entropy"])
def test_the_kernels_equal_plain_torch(name):
    import kernel_checks

    getattr(kernel_checks, f"check_{name}")("cuda")


@pytest.mark.parametrize("settings", [{}, {"bias_correction": "both"}, {"clip_threshold": None, "eps": 0.04}])
def test_the_fused_optimizer_is_the_default_and_follows_the_loop(settings):
    trained = {}
    for fused in (None, True, False):
        generator = torch.Generator("cuda").manual_seed(1)
        shapes = [(400, 300), (777,), (20, 30, 40)]
        params = [torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda")) for s in shapes]
        optimizer = Sophia(params, lr=3e-3, fused=fused, **settings)
        for step in range(20):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            if step % 3 == 0:
                estimates = {p: torch.rand(p.shape, generator=generator, device="cuda") * 50 for p in params}
                if step == 6:
                    estimates[params[1]][5] = torch.inf
                assert optimizer.update_hessian(estimates).item() == (step != 6)
            optimizer.step()
        trained[fused] = params
    for default, fused, loop in zip(*trained.values(), strict=True):
        assert torch.equal(default, fused)
        torch.testing.assert_close(fused, loop, rtol=1e-4, atol=1e-5)


def test_what_the_fused_optimizer_cannot_take_is_refused_by_name():
    optimizer = Sophia([torch.nn.Parameter(torch.randn(3, dtype=torch.float64).cuda())], fused=True)
    optimizer.param_groups[0]["params"][0].sum().backward()
    with pytest.raises(RuntimeError, match="float32"):
        optimizer.step()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_fused_loss_keeps_the_logits_of_one_chunk(compiled):
    hidden = torch.randn(16, 1024, 64, device="cuda", requires_grad=True)
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=64, block_size=8, vocab_size=50257)).cuda()
    targets = torch.randint(0, 50257, (16, 1024), device="cuda")
    loss = torch.compile(fused_cross_entropy) if compiled else fused_cross_entropy
    with torch.autocast("cuda", torch.bfloat16):
        loss(hidden, model.head, targets, 1024).backward()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(hidden, model.head, targets, 1024).backward()
    chunk = 1024 * 50304 * 2
    assert torch.cuda.max_memory_allocated() - before < 1.7 * chunk


@pytest.mark.parametrize("settings", [{}, {"eps_mode": "add"}, {"clip_threshold": None, "eps": 0.04}])
def test_foreach_gives_the_bits_of_the_loop(settings):
    weights = []
    for foreach in (False, True):
        generator = torch.Generator("cuda").manual_seed(1)
        shapes = [(400, 300), (777,), (20, 30, 40)]
        params = [torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda")) for s in shapes]
        optimizer = Sophia(params, lr=3e-3, foreach=foreach, fused=False, **settings)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimizer.update_hessian(
                {p: torch.rand(p.shape, generator=generator, device="cuda") * 50 for p in params}
            )
            optimizer.step()
        weights.append(params)
    for loop, multi in zip(*weights, strict=True):
        assert torch.equal(loop, multi)


def test_the_optimizer_reads_nothing_back(model, batch):
    optimizer = Sophia(model.parameters())
    estimates = {p: torch.rand_like(p) for p in model.parameters()}
    model(batch.inputs, batch.targets).backward()
    with warnings.catch_warnings(action="ignore"):  # the mode announces itself as a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.update_hessian(estimates)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_bf16_losses_agree_with_float32(model, batch):
    keys = token_keys(torch.arange(8, device="cuda"), CONFIG.block_size)
    expected = [
        loss(model.transformer(batch.inputs), model.head, targets, 512).item()
        for loss, targets in ((cross_entropy, batch.targets), (sampled_cross_entropy, keys))
    ]
    expected.append(expected[0])
    model.compile()
    with torch.autocast("cuda", torch.bfloat16):
        found = [
            model(batch.inputs, targets, loss_fn=loss).item()
            for loss, targets in (
                (cross_entropy, batch.targets),
                (sampled_cross_entropy, keys),
                (fused_cross_entropy, batch.targets),
            )
        ]
    assert found == pytest.approx(expected, rel=2e-3)


def test_compiled_bf16_gradients_of_the_fused_loss_are_as_exact_as_plain_ones(model, batch):
    def gradient(loss_fn):
        model.zero_grad()
        model(batch.inputs, batch.targets, loss_fn=loss_fn).backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    exact = gradient(cross_entropy)
    model.compile()
    with torch.autocast("cuda", torch.bfloat16):
        errors = [
            (gradient(loss) - exact).norm() / exact.norm() for loss in (cross_entropy, fused_cross_entropy)
        ]
    assert errors[1] < 1.1 * errors[0] < 0.05


def test_labels_are_those_of_the_cpu_up_to_near_ties():
    logits = torch.randn(2000, 3000, generator=torch.Generator().manual_seed(0))
    keys = token_keys(torch.tensor([3]), 2000)[0]
    cpu, gpu = sample_labels(logits, keys), sample_labels(logits.cuda(), keys.cuda()).cpu()
    compiled = torch.compile(sample_labels)(logits.cuda(), keys.cuda()).cpu()
    assert (cpu == gpu).float().mean() > 0.999
    assert (cpu == compiled).float().mean() > 0.999


def test_the_estimate_in_compiled_bf16_agrees_with_float32(model, batch):
    exact = GNB(groups=4).estimate(Replica(model, 4), batch, 0)
    exact = {name: exact[p] for name, p in model.named_parameters()}
    model.compile()
    with torch.autocast("cuda", torch.bfloat16):
        rough = GNB(groups=4).estimate(Replica(model, 4), batch, 0)
    ratios = [rough[p].sum() / exact[name].sum() for name, p in model.named_parameters()]
    assert torch.stack(ratios).tolist() == pytest.approx([1.0] * len(ratios), rel=0.15)


@pytest.mark.parametrize("probe", ["gaussian", "rademacher"])
def test_hutchinson_compiled_in_bf16_agrees_with_float64_on_the_cpu(model, batch, probe):
    estimator = Hutchinson(probe=probe, micro_batch_size=4)
    counters["graph_break"].clear()
    with torch.autocast("cuda", torch.bfloat16):
        rough = estimator.estimate(Replica(model, 8), batch, 0)
    assert not counters["graph_break"]  # or it would not be compiled at all
    exact_model = GPT2(CONFIG).double()
    exact_model.load_state_dict(model.state_dict())
    on_cpu = Batch(batch.inputs.cpu(), batch.targets.cpu(), batch.sequences)
    # the probe of the GPU, whose generator is another
    probes = [
        estimator._probe(p, derive(0, "probe", index)).cpu().double()
        for index, p in enumerate(model.parameters())
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hutchinson, "_probe", lambda *_: probes.pop(0))
        exact = estimator.estimate(Replica(exact_model, 8), on_cpu, 0)
    for ours, reference in zip(model.parameters(), exact_model.parameters(), strict=True):
        error = (rough[ours].cpu() - exact[reference]).norm() / exact[reference].norm()
        assert error < 0.05


def test_estimators_read_nothing_back(model, batch):
    optimizer = Sophia(model.parameters())
    model(batch.inputs, batch.targets).backward()
    torch.cuda.synchronize()
    for estimator in (EmpiricalFisher(), GradientMagnitude(), GNB(), GNB(groups=4)):
        with warnings.catch_warnings(action="ignore"):  # the mode announces itself as a prototype
            if not estimator.reads_training_gradient:
                model.zero_grad()
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.update_hessian(estimator.estimate(Replica(model, 4), batch, 0))
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_blocks_need_less_memory_and_give_the_same_gradient(compiled, batch):
    peaks, gradients = [], []
    for recompute_blocks in (False, True):
        torch._dynamo.reset()
        model = GPT2(CONFIG).cuda()
        model.initialize(0)
        model.transformer.recompute_blocks = recompute_blocks
        if compiled:
            model.compile()
        for _ in range(2):  # the first pass compiles
            model.zero_grad()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(batch.inputs, batch.targets, loss_fn=fused_cross_entropy)
            loss.backward()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        del model, loss
    assert peaks[1] < peaks[0]
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()  # bf16, sums in any order


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_blocks_replay_their_dropout(compiled, batch):
    """Else the gradient is that of another function than the one whose values are compared here."""
    model = GPT2(dataclasses.replace(CONFIG, dropout=0.3)).cuda()
    model.initialize(0)
    model.transformer.recompute_blocks = True
    if compiled:
        model.compile()

    def loss():
        torch.manual_seed(5)
        return model(batch.inputs, batch.targets, loss_fn=fused_cross_entropy) / batch.targets.numel()

    loss().backward()
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    values, distance = [], 0.02
    for sign in (1, -2):
        with torch.no_grad():
            for p in parameters:
                p.add_(p.grad, alpha=sign * distance / norm.item())
        values.append(loss().item())
    slope = (values[0] - values[1]) / (2 * distance)
    assert slope == pytest.approx(norm.item(), rel=0.03)


@pytest.fixture
def small_run(tmp_path):
    """The arguments of a short run on a few bytes."""
    ids = (np.cumsum(np.random.default_rng(0).integers(1, 4, 60_000)) % 257).astype("<u2")
    ids[:50_000].tofile(tmp_path / "train.bin")
    ids[50_000:].tofile(tmp_path / "val.bin")
    return (
        f"data=token_files data.tokenizer=bytes data.path={tmp_path} model=gpt2_nano max_steps=14 "
        f"batch_size=16 micro_batch_size=8 schedule.warmup_steps=5 tracker=jsonl run_dir={tmp_path / 'run'}"
    ).split()


def test_a_trace_has_the_kernels_of_the_gpu(small_run, tmp_path):
    assert launch.run([*small_run, "optimizer=sophia_g", "profile=true"], train) == 0
    (trace,) = (tmp_path / "run" / "profile").glob("*.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {"kernel", "cpu_op"} <= {event.get("cat") for event in events}
    assert "hessian" in {event.get("name") for event in events}


@pytest.mark.filterwarnings("ignore:the .type, exc, tb. signature of throw:DeprecationWarning")  # torch's own
def test_a_full_gpu_ends_a_run_with_what_fits(small_run, tmp_path, capfd):
    torch.cuda.empty_cache()
    free = 100 * 2**20 + torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(free / torch.cuda.mem_get_info()[1])
    sizes = ["batch_size=128", "micro_batch_size=128", "model.block_size=256", "eval_tokens=256"]
    try:
        code = launch.run([*small_run, *sizes, "compile=false"], train)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 64
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "micro_batch_size=128 is too much for the memory of cuda" in errors[0]
    assert "use micro_batch_size=64," in errors[0]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["code"] == 64


@pytest.mark.parametrize("optimizer", ["adamw", "sophia_g_short", "sophia_h", "sophia_robust"])
def test_an_interrupted_run_goes_on(tmp_path, optimizer):
    ids = (np.cumsum(np.random.default_rng(0).integers(1, 4, 60_000)) % 257).astype("<u2")
    ids[:50_000].tofile(tmp_path / "train.bin")
    ids[50_000:].tofile(tmp_path / "val.bin")
    tiny = (
        f"data=token_files data.tokenizer=bytes data.path={tmp_path} model=gpt2_nano max_steps=40 "
        f"batch_size=16 micro_batch_size=8 schedule.warmup_steps=5 optimizer={optimizer} log_interval=1 "
        "eval_interval=20 save_interval=10 tracker=jsonl"
    ).split()
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert launch.run([*tiny, f"run_dir={whole}"], train) == 0
    assert launch.run([*tiny, f"run_dir={halves}", "stop_at_step=17"], train) == 75
    assert launch.run([*tiny, f"run_dir={halves}"], train) == 0
    losses = []
    for folder in (whole, halves):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["train/loss"] for record in records if "train/loss" in record])
    assert losses[0][:17] == pytest.approx(losses[1][:17], rel=1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # attention's backward pass adds in any order
