import pytest
import torch

from sophia_train.optim.groups import decay_groups
from sophia_train.optim.schedules import WSD, Constant, Cosine, Linear


@pytest.mark.parametrize("schedule", [Cosine, Linear, WSD, Constant])
def test_warms_up_in_a_line_to_the_peak_and_never_exceeds_it(schedule):
    factors = [schedule(warmup_steps=10)(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == 1.0 and max(factors) == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize("schedule", [Cosine, Linear])
def test_ends_just_above_its_final_fraction(schedule):
    final = schedule(warmup_steps=10, final_lr_fraction=0.05)(999, 1000)
    assert 0.05 < final < 0.06


def test_cosine_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.05)
    ours = Cosine(warmup_steps=0, final_lr_fraction=0.05)
    for step in range(50):
        assert ours(step, 50) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_wsd_is_flat_until_its_decay():
    schedule = WSD(warmup_steps=0, decay_fraction=0.2, final_lr_fraction=0.0)
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[:80] == [1.0] * 80
    assert factors[90] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Cosine(warmup_steps=-1), "warmup_steps"),
        (lambda: Linear(final_lr_fraction=1.5), "final_lr_fraction"),
        (lambda: WSD(decay_fraction=-0.1), "decay_fraction"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_only_matrices_of_linear_maps_are_decayed():
    model = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(5, 4),
            "norm": torch.nn.LayerNorm(4),
            "linear": torch.nn.Linear(4, 5),
        }
    )
    model["linear"].weight = model["embedding"].weight  # a tied head follows its embedding
    model["hidden"] = torch.nn.Linear(4, 4)
    decayed, rest = decay_groups(model)
    assert [id(p) for p in decayed["params"]] == [id(model["hidden"].weight)]
    assert "weight_decay" not in decayed and rest["weight_decay"] == 0.0
    assert len(rest["params"]) == len(list(model.parameters())) - 1
