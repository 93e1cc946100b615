import dataclasses

import pytest
import torch
import torch.nn.functional as F

from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.models.labels import token_keys
from sophia_train.models.losses import fused_cross_entropy, sampled_cross_entropy

TINY = GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=37)


def tiny(**changes):
    model = GPT2(dataclasses.replace(TINY, **changes))
    model.initialize(1)
    return model


def words(*shape):
    return torch.randint(0, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def test_the_mean_loss_is_the_cross_entropy_of_the_logits():
    model, idx, targets = tiny(), words(3, 12), words(3, 12)
    targets[0, :5] = -1
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(model(idx, targets), expected)


def test_a_position_does_not_see_what_follows_it():
    model, idx = tiny(), words(1, 12)
    changed = idx.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % TINY.vocab_size
    torch.testing.assert_close(model(idx)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(idx)[:, 7:], model(changed)[:, 7:])


def test_padding_rows_are_neither_predicted_nor_trained():
    model = tiny()
    assert model.config.padded_vocab_size == 64
    assert model(words(2, 12)).shape == (2, 12, 37)
    model(words(2, 12), words(2, 12)).backward()
    embedding = model.transformer.wte.weight
    assert (embedding[37:] == 0).all() and (embedding.grad[37:] == 0).all()


def test_initial_weights_depend_on_name_and_seed_only():
    first, again, other = tiny(), tiny(), tiny()
    other.initialize(2)
    wider = tiny(n_layer=3)
    for (name, p), q, o in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.ndim == 1 or not torch.equal(p, o)
        if "c_proj" not in name:  # their scale depends on the depth
            assert torch.equal(p, dict(wider.named_parameters())[name])
    assert first.transformer.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert first.transformer.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_inverse_layer_scaling_changes_the_second_layer_only():
    plain, scaled = tiny(), tiny(scale_attn_by_inverse_layer_idx=True)
    x = torch.randn(1, 12, 16)
    for layer, same in ((0, True), (1, False)):
        a, b = plain.transformer.h[layer].attn(x * 30), scaled.transformer.h[layer].attn(x * 30)
        assert torch.equal(a, b) is same


def test_dropout_is_off_in_evaluation():
    model, idx = tiny(dropout=0.5), words(2, 12)
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def kept_and_gradients(recompute_blocks, backend=None, training=True, dtype=torch.float32, autocast=False):
    """Bytes that a forward pass keeps for the backward pass of training or GNB, and what both come to."""
    torch._dynamo.reset()
    model, idx = tiny(n_layer=3, dropout=0.3).to(dtype).train(training), words(3, 12)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.ndim > 1 else 1)  # away from the flat start
    model.transformer.recompute_blocks = recompute_blocks
    if backend is not None:
        model.compile(backend=backend)
    loss_fn, marks = fused_cross_entropy, idx.roll(-1, 1)
    if not training:
        loss_fn, marks = sampled_cross_entropy, token_keys(torch.arange(3), 12)
    kept = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(idx, marks, loss_fn=loss_fn)
    loss.backward()
    return sum(kept), [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("training", [True, False])  # False: the pass of GNB
@pytest.mark.parametrize("precision", [{"dtype": torch.float64}, {}, {"autocast": True}])
def test_recomputed_blocks_keep_less_and_change_no_bit(precision, training):
    before, expected = kept_and_gradients(False, training=training, **precision)
    after, found = kept_and_gradients(True, training=training, **precision)
    assert after < before / 2
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    "backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_recomputed_blocks_change_no_bit_of_a_compiled_model(backend):
    before, expected = kept_and_gradients(False, backend)
    after, found = kept_and_gradients(True, backend)
    assert after < 0.7 * before  # weights, which both count, are a good part of it
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_generation_is_a_function_of_its_seed_and_stays_in_the_vocabulary():
    model, prompt = tiny().eval(), words(2, 3)
    first, again = (model.generate(prompt, 30, seed=4) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (2, 33) and first.max() < 37
    assert torch.equal(first[:, :3], prompt)
    assert not torch.equal(first, model.generate(prompt, 30, seed=5))
    greedy = model.generate(prompt, 5, temperature=0)
    assert torch.equal(greedy, model.generate(prompt, 5, top_k=1, seed=9))


def test_flops_count_the_matrices():
    # per token: 2 FLOPs a weight forward and 4 backward, and the attention's two products over T positions
    c, model = TINY, tiny()
    hidden = c.n_layer * (12 * c.n_embd**2 + 2 * c.n_embd) + c.n_embd
    head = c.padded_vocab_size * c.n_embd
    attention = 12 * c.n_layer * c.n_embd * c.block_size
    assert model.flops_per_token() == 6 * (hidden + head) + attention


@pytest.mark.parametrize(
    "changes", [{"n_head": 3}, {"n_layer": 0}, {"dropout": 1.0}, {"vocab_size": -1}, {"block_size": 0}]
)
def test_impossible_sizes_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(TINY, **changes)
