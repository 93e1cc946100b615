"""Measured and estimated cost: throughput and memory."""

import time

import pytest
import torch

from sophia_train.memory import estimate_memory, plan_micro_batch, shrink_micro_batch
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.throughput import Throughput, peak_flops

CPU = torch.device("cpu")


def test_figures_are_of_the_steps_since_the_last_report():
    throughput = Throughput(CPU, world_size=2)
    begin = time.perf_counter()
    throughput.restart()
    with throughput.hessian():
        sum(range(100_000))
    for _ in range(4):
        throughput.add(tokens=1000, flops=1e9)
    figures = throughput.report()
    longest = time.perf_counter() - begin
    seconds = 4 * figures["perf/step_seconds"]
    assert 0 < seconds <= longest
    assert figures["perf/tokens_per_second"] == pytest.approx(4000 / seconds)
    assert 0 < figures["perf/hessian_share"] < 1
    assert "perf/mfu" not in figures  # nobody knows the peak of a CPU
    after = throughput.report()
    assert after["perf/tokens_per_second"] == 0 and after["perf/hessian_share"] == 0


def test_the_peak_of_an_unknown_device_is_not_invented():
    assert peak_flops(CPU) is None


@pytest.fixture
def model():
    config = GPT2Config(n_layer=4, n_embd=256, n_head=4, block_size=512)
    with torch.device("meta"):
        return GPT2(config)


@pytest.mark.parametrize("sequences", [1, 7, 48, 480])
@pytest.mark.parametrize("memory", [None, 10**9, 10**10, 10**12])
def test_a_planned_micro_batch_divides_the_sequences_and_fits(model, sequences, memory):
    size = plan_micro_batch(model, sequences, bf16=True, memory=memory)
    assert sequences % size == 0 and size <= 64
    if memory is not None and size > 1:
        assert estimate_memory(model, size, bf16=True).total <= 0.7 * memory
    if memory is None and size > 1:
        assert size * 512 <= 8192


def test_more_memory_never_plans_less(model):
    sizes = [plan_micro_batch(model, 480, True, 10**9 * 2**n) for n in range(10)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == 60


def test_the_estimate_counts_weights_gradients_and_two_moments(model):
    parameters = sum(p.numel() for p in model.parameters())
    small, large = (estimate_memory(model, size, bf16=True) for size in (1, 2))
    assert small.states == 16 * parameters == large.states
    assert large.activations == 2 * small.activations
    assert estimate_memory(model, 1, bf16=False).activations == 2 * small.activations


@pytest.mark.parametrize("bf16", [True, False])
def test_recomputed_blocks_need_the_activations_of_one(model, bf16):
    tokens, config = 4 * 512, model.config
    whole = estimate_memory(model, 4, bf16)
    model.transformer.recompute_blocks = True
    less = estimate_memory(model, 4, bf16)
    inputs = (2 if bf16 else 4) * tokens * config.n_embd * config.n_layer
    assert less.activations == whole.activations // config.n_layer + inputs < whole.activations
    assert (less.states, less.logits) == (whole.states, whole.logits)


def test_recomputed_blocks_let_more_sequences_fit(model):
    sizes = []
    for recompute_blocks in (False, True):
        model.transformer.recompute_blocks = recompute_blocks
        sizes.append(plan_micro_batch(model, 480, True, 2 * 10**9))
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("memory", [None, 10**9, 10**10, 10**12])
@pytest.mark.parametrize(("sequences", "too_large"), [(480, 480), (480, 60), (7, 7), (48, 3), (12, 2)])
def test_after_a_failure_at_most_half_is_tried(model, sequences, too_large, memory):
    size = shrink_micro_batch(model, sequences, True, memory, too_large)
    assert sequences % size == 0 and size <= too_large / 2
    assert size <= plan_micro_batch(model, sequences, True, memory)


def test_nothing_is_smaller_than_one_sequence(model):
    assert shrink_micro_batch(model, 480, True, 10**9, 1) is None
