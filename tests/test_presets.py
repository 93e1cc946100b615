"""The presets of the paper: every value is that of the published tables, and says where it is from."""

import re

import pytest
import torch

from sophia_train.config import CONFIGS, build, compose, run_config, to_json
from sophia_train.errors import ConfigError
from sophia_train.models.gpt2 import GPT2
from sophia_train.run_config import build_optimizer

FOLDER = CONFIGS / "experiment" / "paper"
FILES = sorted(FOLDER.glob("*.yaml"))
PRESETS = [path.stem for path in FILES if not path.stem.startswith("_")]
OPTIMIZERS = ("adamw", "lion", "sophia_g", "sophia_h")
SIZES = ("30m", "125m", "355m", "540m", "770m", "1_5b")
RELEASED = [(size, optimizer) for size in ("125m", "355m", "770m") for optimizer in ("adamw", "sophia_g")]

# Width, heads, depth; learning rates in the order of OPTIMIZERS, None for what is not printed.
TABLE = {
    "30m": ((384, 6, 6), (1.2e-3, 4e-4, 1e-3, 1e-3)),
    "125m": ((768, 12, 12), (6e-4, 1.5e-4, 6e-4, 6e-4)),
    "355m": ((1024, 16, 24), (3e-4, 6e-5, 4e-4, 4e-4)),
    "540m": ((1152, 18, 30), (3e-4, None, 4e-4, 4e-4)),
    "770m": ((1280, 20, 36), (2e-4, None, 3e-4, 3e-4)),
    "1_5b": (None, (1.5e-4, None, 1.2e-4, 1.2e-4)),  # of a GPT-NeoX; Sophia-H's is levanter's
}
# What another source than the table confirms, of these rates.
CONFIRMED = {
    *(("125m", each) for each in ("adamw", "sophia_g", "sophia_h")),
    *(("355m", each) for each in ("adamw", "lion", "sophia_h")),
    *(("770m", each) for each in ("adamw", "sophia_g", "sophia_h")),
    ("1_5b", "sophia_h"),
}
BETAS = {"adamw": [0.9, 0.95], "lion": [0.95, 0.98], "sophia_g": [0.96, 0.99], "sophia_h": [0.96, 0.99]}
DECAY = {"adamw": 0.1, "lion": 0.2, "sophia_g": 0.2, "sophia_h": 0.2}
GAMMA = {"sophia_g": 0.05, "sophia_h": 0.01}
HESSIAN_BATCH = {"sophia_g": 240, "sophia_h": 32}

# The official code: rate, its end, decay, betas, rho, accumulation.
OFFICIAL = {
    ("125m", "adamw"): (6e-4, 3e-5, 0.1, [0.9, 0.95], None, 6),
    ("125m", "sophia_g"): (6e-4, 1.5e-5, 0.2, [0.965, 0.99], 0.05, 6),
    ("355m", "adamw"): (3e-4, 6e-5, 0.1, [0.9, 0.95], None, 8),
    ("355m", "sophia_g"): (7e-4, 1e-5, 0.2, [0.965, 0.99], 0.08, 8),
    ("770m", "adamw"): (2e-4, 1e-5, 0.1, [0.9, 0.95], None, 12),
    ("770m", "sophia_g"): (3e-4, 1e-5, 0.2, [0.965, 0.99], 0.05, 12),
}

printed = pytest.mark.parametrize(("size", "optimizer"), [(s, o) for s in SIZES for o in OPTIMIZERS])
released = pytest.mark.parametrize(("size", "optimizer"), RELEASED)
CACHE: dict[str, dict] = {}


def preset(name):
    if name not in CACHE:
        CACHE[name] = to_json(run_config(compose([f"experiment=paper/{name}"])))
    return CACHE[name]


def text_of(name):
    return (FOLDER / f"{name}.yaml").read_text()


def comment(name, key):
    return re.search(rf"^ *{key}: [^#\n]+# (.+)$", text_of(name), re.M)[1]


def test_there_is_one_for_each_size_optimizer_and_kind():
    paper = {f"gpt2_{size}_{optimizer}" for size in SIZES for optimizer in OPTIMIZERS}
    fair = {f"{name}_fair" for name in paper}
    as_released = {f"gpt2_{size}_{optimizer}_as_released" for size, optimizer in RELEASED}
    assert set(PRESETS) == paper | fair | as_released | {"sophia_lite"}


@pytest.mark.parametrize("name", PRESETS)
def test_each_builds_and_is_called_what_its_file_is_called(name):
    config = run_config(compose([f"experiment=paper/{name}"]))
    assert config.name == name
    for node in (config.data, config.schedule, config.hessian):
        build(node)
    with torch.device("meta"):
        build_optimizer(config.optimizer, GPT2(config.model))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_has_a_source_behind_it(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_" and lines[1].startswith("# ")
    assert max(map(len, lines)) <= 110
    for line in lines:
        if re.match(r" *\w+: +\S", line) and not line.startswith("name: "):
            source = line.partition(" # ")[2]
            assert re.search(r"paper|official code|levanter|ours|not verified|not given|not printed", source)


class TestPaper:
    @printed
    def test_shape_and_rate_are_the_table_s(self, size, optimizer):
        config = preset(f"gpt2_{size}_{optimizer}")
        shape, rates = TABLE[size]
        model = config["model"]
        if shape:
            assert (model["n_embd"], model["n_head"], model["n_layer"]) == shape
        rate = rates[OPTIMIZERS.index(optimizer)]
        source = comment(f"gpt2_{size}_{optimizer}", "lr")
        if rate is None:
            assert source.startswith("not printed; ours")
        else:
            assert config["optimizer"]["lr"] == rate
            assert ("not verified" in source) == ((size, optimizer) not in CONFIRMED)

    @printed
    def test_the_rest_is_the_settings_table_s(self, size, optimizer):
        config = preset(f"gpt2_{size}_{optimizer}")
        assert (config["batch_size"], config["model"]["block_size"]) == (480, 1024)
        assert (config["max_steps"], config["max_tokens"], config["gradient_clip"]) == (100_000, None, 1.0)
        assert config["schedule"]["_target_"].endswith(".Cosine")
        assert (config["schedule"]["warmup_steps"], config["schedule"]["final_lr_fraction"]) == (2000, 0.05)
        assert config["data"]["repo"] == "Skylion007/openwebtext"
        assert (config["model"]["dropout"], config["model"]["bias"]) == (0.0, False)
        assert config["model"]["scale_attn_by_inverse_layer_idx"] == (optimizer in ("adamw", "lion"))
        assert config["optimizer"]["betas"] == BETAS[optimizer]
        assert config["optimizer"]["weight_decay"] == DECAY[optimizer]

    @printed
    def test_so_is_sophia_s_own(self, size, optimizer):
        config = preset(f"gpt2_{size}_{optimizer}")
        hessian = config["hessian"]
        if optimizer not in GAMMA:
            assert hessian["_target_"].endswith(".NoHessian")
            return
        settings = config["optimizer"]
        assert (settings["gamma"], settings["eps"]) == (GAMMA[optimizer], 1e-12)
        assert (settings["clip_threshold"], settings.get("eps_mode", "max")) == (1.0, "max")
        assert settings.get("bias_correction", "none") == "none"
        assert hessian["_target_"].endswith({"sophia_g": ".GNB", "sophia_h": ".Hutchinson"}[optimizer])
        assert (hessian["interval"], hessian["batch_size"]) == (10, HESSIAN_BATCH[optimizer])
        assert hessian["refresh_at_start"] is True
        assert hessian.get("probe", "gaussian") == "gaussian"
        assert (hessian.get("gradient_clip"), hessian.get("groups", 1)) == (None, 1)

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_1_5b_says_that_it_is_not_the_paper_s(self, optimizer):
        head = text_of(f"gpt2_1_5b_{optimizer}").partition("defaults:")[0]
        assert "Not the paper's 1.5B" in head and "NeoX" in head and "Pile" in head


class TestAsReleased:
    @released
    def test_every_setting_is_the_official_code_s(self, size, optimizer):
        config = preset(f"gpt2_{size}_{optimizer}_as_released")
        rate, end, decay, betas, rho, _ = OFFICIAL[size, optimizer]
        settings, model = config["optimizer"], config["model"]
        assert settings["lr"] == rate
        assert settings["lr"] * config["schedule"]["final_lr_fraction"] == pytest.approx(end, rel=1e-9)
        assert (settings["weight_decay"], settings["betas"]) == (decay, betas)
        assert settings.get("gamma") == rho
        assert (model["n_embd"], model["n_head"], model["n_layer"]) == TABLE[size][0]
        assert model["scale_attn_by_inverse_layer_idx"] is True
        assert (model["dropout"], model["bias"]) == (0.0, False)
        assert (config["batch_size"], config["max_steps"]) == (480, 100_000)
        assert config["schedule"]["warmup_steps"] == 2000

    @pytest.mark.parametrize("size", ["125m", "355m", "770m"])
    def test_adamw_s_clip_and_eps_are_those_of_a_gradient_that_is_a_sum(self, size):
        config = preset(f"gpt2_{size}_adamw_as_released")
        losses = OFFICIAL[size, "adamw"][5]
        assert config["gradient_clip"] * losses == pytest.approx(1.0, rel=1e-12)
        assert config["optimizer"]["eps"] * losses == pytest.approx(1e-8, rel=1e-12)

    def test_such_a_gradient_makes_the_same_steps(self):
        losses, clip = 6, 1.0
        config = preset("gpt2_125m_adamw_as_released")
        torch.manual_seed(0)
        paths = []
        gradients = [torch.randn(50, dtype=torch.float64) * scale for scale in (1e-9, 1e-2, 1.0, 30.0)]
        eps = config["optimizer"]["eps"]
        for factor, limit, least in ((1, config["gradient_clip"], eps), (losses, clip, losses * eps)):
            weights = torch.nn.Parameter(torch.ones(50, dtype=torch.float64))
            optimizer = torch.optim.AdamW([weights], 1e-2, betas=(0.9, 0.95), eps=least)
            for gradient in gradients:
                weights.grad = factor * gradient
                # torch's own clip adds 1e-6 to the norm, which is no part of this
                weights.grad *= min(1.0, limit / weights.grad.norm().item())
                optimizer.step()
            paths.append(weights.detach())
        torch.testing.assert_close(paths[0], paths[1], rtol=1e-12, atol=0)
        assert (paths[0] - 1).abs().min() > 0

    @pytest.mark.parametrize("size", ["125m", "355m", "770m"])
    def test_sophia_s_hessian_is_the_official_code_s(self, size):
        config = preset(f"gpt2_{size}_sophia_g_as_released")
        hessian, settings = config["hessian"], config["optimizer"]
        assert hessian["_target_"].endswith(".GNB")
        assert (hessian["interval"], hessian["batch_size"], hessian["groups"]) == (10, None, 1)
        assert (hessian["refresh_at_start"], hessian["gradient_clip"]) == (False, 1.0)
        assert (settings["eps"], settings["eps_mode"], settings["clip_threshold"]) == (1e-15, "add", 1.0)
        assert config["gradient_clip"] == 1.0

    def test_what_stays_different_is_stated(self):
        head = " ".join(text_of("_as_released").partition("defaults:")[0].replace("#", "").split())
        assert "windows at random places" in head and "its Hessian takes windows of its own" in head

    @pytest.mark.parametrize("name", ["gpt2_540m_adamw", "gpt2_30m_sophia_g", "gpt2_125m_lion"])
    def test_what_was_not_released_is_one_line(self, name):
        with pytest.raises(ConfigError) as caught:
            compose([f"experiment=paper/{name}_as_released"])
        assert f"experiment=paper/{name}_as_released: there is no such choice" in str(caught.value)
        assert "\n" not in str(caught.value)


class TestFair:
    @pytest.mark.parametrize("size", SIZES)
    def test_only_the_optimizer_and_its_hessian_differ(self, size):
        first, *others = (preset(f"gpt2_{size}_{optimizer}_fair") for optimizer in OPTIMIZERS)
        for other in others:
            differing = {key for key in first if first[key] != other[key]}
            assert {"name", "run_dir", "optimizer"} <= differing
            assert differing <= {"name", "run_dir", "optimizer", "hessian"}
            assert first["optimizer"]["weight_decay"] == other["optimizer"]["weight_decay"] == 0.2

    @pytest.mark.parametrize("optimizer", ["adamw", "sophia_g"])
    def test_what_is_tuned_in_public_is_taken(self, optimizer):
        assert preset(f"gpt2_125m_{optimizer}_fair")["optimizer"]["lr"] == 1e-3
        assert "issue 31" in comment(f"gpt2_125m_{optimizer}_fair", "lr")

    @printed
    def test_what_is_not_says_so_and_keeps_the_paper_s_rate(self, size, optimizer):
        name = f"gpt2_{size}_{optimizer}"
        if (size, optimizer) in (("125m", "adamw"), ("125m", "sophia_g")):
            return
        assert preset(f"{name}_fair")["optimizer"]["lr"] == preset(name)["optimizer"]["lr"]
        assert "Tune it" in text_of(f"{name}_fair")


def test_sophia_lite_is_its_setting():
    config = preset("sophia_lite")
    assert (config["max_steps"], config["batch_size"], config["model"]["block_size"]) == (400, 512, 1024)
    assert config["optimizer"]["lr"] == 3e-4
    assert config["data"]["repo"] == "HuggingFaceFW/fineweb"
    assert config["hessian"]["_target_"].endswith(".GradientMagnitude")
    assert comment("sophia_lite", "max_steps").startswith("not verified")
