"""What must hold for the Triton kernels, on a GPU or, as a program, on the CPU in Triton's interpreter."""

import itertools
import math

import torch

from sophia_train.models import triton_cross_entropy
from sophia_train.models.fused_cross_entropy import _plain
from sophia_train.models.labels import token_keys
from sophia_train.optim import triton_sophia
from sophia_train.optim.sophia import _single_tensor_sophia

SHAPES = [(3, 5), (1500,), (1,), (7, 300), (2, 2, 600)]


def tensors(device, seed, aligned=True):
    """One float32 tensor of each shape; if not aligned, each begins in the middle of a word of 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in SHAPES:
        values = torch.randn(math.prod(shape) + 1, generator=generator).to(device)
        made.append((values[:-1] if aligned else values[1:]).view(shape))
    return made


def check_step(device):
    """Equal to the loop over parameters, for every setting, up to the rounding of fused operations."""
    choices = itertools.product(
        ("none", "momentum", "both"), ("max", "add"), (1.0, None), (False, True), (True, False)
    )
    for correction, mode, clip, maximize, aligned in choices:
        group = {
            "lr": 1e-2,
            "betas": (0.96, 0.99),
            "gamma": 0.05,
            "eps": 1e-3,
            "clip_threshold": clip,
            "weight_decay": 0.1,
            "eps_mode": mode,
            "bias_correction": correction,
            "maximize": maximize,
        }
        results = []
        for update in (triton_sophia.step, _single_tensor_sophia):
            params, grads, momenta, hessians = (tensors(device, seed, aligned) for seed in range(4))
            states = [
                {
                    "step": 3,
                    "exp_avg": momentum,
                    "hessian": hessian * 30,
                    "hessian_weight": torch.tensor(
                        0.3 * (index > 0), device=device
                    ),  # the first has no h yet
                }
                for index, (momentum, hessian) in enumerate(zip(momenta, hessians, strict=True))
            ]
            update(params, grads, states, group)
            results.append([*params, *(state["exp_avg"] for state in states)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=5e-5, atol=1e-6)


def check_all_finite(device):
    """A single NaN or infinity is found wherever it is, at the end of a block too."""
    for value in (math.nan, math.inf, -math.inf):
        for index in range(len(SHAPES)):
            for place in (0, -1):
                values = tensors(device, 1)
                assert triton_sophia.all_finite(values)
                values[index].view(-1)[place] = value
                assert not triton_sophia.all_finite(values)


def check_move_averages(device):
    """As `lerp`, or not at all."""
    averages, estimates = tensors(device, 1), tensors(device, 2, aligned=False)
    before = [average.clone() for average in averages]
    triton_sophia.move_averages(averages, estimates, 0.01, torch.tensor(False, device=device))
    assert all(map(torch.equal, averages, before))
    triton_sophia.move_averages(averages, estimates, 0.01, torch.tensor(True, device=device))
    for average, start, estimate in zip(averages, before, estimates, strict=True):
        torch.testing.assert_close(average, start.lerp(estimate, 0.01))


def check_cross_entropy(device):
    """Loss and gradient are the plain ones, with words in one block or more, with and without padding."""
    n = 9
    for words, columns in ((300, 320), (4096, 4096), (5000, 5056)):
        for sampled, narrow in itertools.product((False, True), (torch.float32, torch.bfloat16)):
            generator = torch.Generator().manual_seed(words)
            logits = (torch.randn(n, columns, generator=generator) * 3).to(device, narrow)
            marks = torch.randint(0, words, (n,), generator=generator)
            marks[0], marks[1] = 0, words - 1
            if sampled:
                marks = token_keys(torch.tensor([7]), n)[0]
            marks[4] = -1
            marks = marks.to(device)
            expected, of_logits = _plain(logits.clone(), marks, words, sampled, True)
            unchanged = logits.clone()
            alone = triton_cross_entropy.cross_entropy_(unchanged, marks, words, sampled, False)
            assert torch.equal(unchanged, logits)
            losses = triton_cross_entropy.cross_entropy_(logits, marks, words, sampled, True)
            assert torch.equal(losses, alone)
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
            tolerance = 1e-5 if narrow == torch.float32 else 0.01
            torch.testing.assert_close(logits, of_logits, rtol=tolerance, atol=1e-6)
            assert (logits[:, words:] == 0).all() and (logits[4] == 0).all()


CHECKS = [check_step, check_all_finite, check_move_averages, check_cross_entropy]

if __name__ == "__main__":
    for check in CHECKS:
        check("cpu")
        print(check.__name__)
