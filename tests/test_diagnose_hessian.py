"""How good the estimators are: the truths against curvlinops, the scores, and the script around them."""

import copy
import dataclasses
import json
import math
import runpy
import shutil
from pathlib import Path

import curvlinops
import matplotlib.image
import pytest
import scipy.stats
import torch
from oracle import CONFIG, batch, exact_diagonal, flat

from sophia_train.compare import estimators
from sophia_train.compare.estimators import Layers, Truth, compare, estimates
from sophia_train.data.batches import Batch
from sophia_train.hessian import GNB, EmpiricalFisher, GradientMagnitude, Hutchinson
from sophia_train.models.gpt2 import GPT2

SCRIPT = Path(__file__).parents[1] / "scripts" / "diagnose_hessian.py"
LAYERS = ["overall", "wte", "wpe", "h.0", "ln_f"]


@pytest.fixture(scope="module")
def model():
    made = GPT2(CONFIG).double()
    made.initialize(3)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(10 if p.ndim > 1 else 1)  # away from the flat start
    return made


@pytest.fixture(scope="module")
def truths(model):
    return [estimators.find_truth(name, model, batch(), 2, 0) for name in ("Gauss-Newton", "Hessian")]


def test_small_models_have_the_exact_diagonals(model, truths):
    operators = (curvlinops.GGNLinearOperator, curvlinops.HessianLinearOperator)
    for truth, operator in zip(truths, operators, strict=True):
        assert truth.kind == "exact" and truth.noise == 0
        expected = flat(exact_diagonal(model, batch(), operator).values())
        torch.testing.assert_close(
            truth.diagonal, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item()
        )
    assert (truths[0].diagonal - truths[1].diagonal).abs().max() > 1e-2  # they are two


def test_the_exact_diagonals_are_of_any_number_of_chunks(model, truths, monkeypatch):
    monkeypatch.setattr(estimators, "CHUNK_NUMBERS", {"cpu": 20000})
    torch.testing.assert_close(estimators.gauss_newton_diagonal(model, batch()), truths[0].diagonal)
    monkeypatch.setattr(estimators, "MICRO_BATCH", 3)
    torch.testing.assert_close(estimators.hessian_diagonal(model, batch()), truths[1].diagonal)


def test_targets_that_do_not_count_are_not_in_the_gauss_newton_diagonal(model):
    inputs, targets, _ = batch(2)
    data = Batch(inputs, targets.clone(), [0, 1])
    data.targets[0, 1:] = -1
    ours = estimators.gauss_newton_diagonal(model, data)
    alone = (
        Batch(data.inputs[:1, :1], data.targets[:1, :1], [0]),
        Batch(data.inputs[1:], data.targets[1:], [0]),
    )
    first, second = (estimators.gauss_newton_diagonal(model, each) for each in alone)
    torch.testing.assert_close(ours, (first + 4 * second) / 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misscaled(GNB):
    def estimate(self, *arguments):
        return {p: 3 * value for p, value in super().estimate(*arguments).items()}


def scores(model, estimator, truth, refreshes, size=4, pool=4):
    stream = estimates(estimator, model, batch(pool), size, refreshes, 1)
    return compare("it", model, stream, [truth])[0].scores


def test_an_unbiased_estimator_is_reported_as_one(model, truths):
    rademacher = Hutchinson(probe="rademacher")
    for estimator, truth in ((GNB(), truths[0]), (GNB(groups=4), truths[0]), (rademacher, truths[1])):
        found = scores(model, estimator, truth, 100)
        assert list(found) == LAYERS
        for score in found.values():
            assert abs(score.bias) < 4 * score.bias_error
        assert found["overall"].bias_error < (0.3 if truth is truths[0] else 2)  # so that it says something


def test_a_wrong_scale_is_reported_as_bias(model, truths):
    score = scores(model, Misscaled(), truths[0], 150)["overall"]
    assert score.bias == pytest.approx(2.0, abs=4 * score.bias_error) and score.bias_error < 0.6
    plain = scores(model, GNB(), truths[0], 150)["overall"]
    assert score.bias == pytest.approx(3 * (1 + plain.bias) - 1)
    assert score.variance == pytest.approx(9 * plain.variance)
    assert score.rank_one == pytest.approx(plain.rank_one)


def test_sub_batches_of_a_larger_pool_are_unbiased_too(model):
    truth = estimators.find_truth("Gauss-Newton", model, batch(8), 2, 0)
    one = scores(model, GNB(), truth, 200, size=2, pool=8)["overall"]
    assert abs(one.bias) < 4 * one.bias_error < 1
    # the training gradient varies with its sequences, and not without
    assert scores(model, EmpiricalFisher(), truth, 9, size=2, pool=8)["overall"].variance > 0.1
    assert scores(model, EmpiricalFisher(), truth, 9, size=8, pool=8)["overall"].variance == 0


@pytest.mark.parametrize("estimator", [GNB(groups=2), Hutchinson(), EmpiricalFisher(), GradientMagnitude()])
def test_estimates_under_autocast_are_close(model, estimator):
    narrow = copy.deepcopy(model).float()
    plain, rounded = (next(estimates(estimator, narrow, batch(), 4, 1, 1, bf16))[0] for bf16 in (False, True))
    difference = (plain - rounded).norm() / plain.norm()
    assert 0 < difference < 0.1
    assert all(p.grad is None for p in narrow.parameters())


def test_the_scores_are_those_of_the_formulas(model, truths):
    stream = list(estimates(GNB(), model, batch(), 4, 31, 1))
    (found,) = compare("it", model, iter(stream), truths[:1])
    stacked, truth = torch.stack([one for one, _ in stream]), truths[0].diagonal
    sizes = [p.numel() for p in model.parameters()]
    first = slice(0, sizes[0])
    for name, part in (("overall", slice(None)), ("wte", first), ("ln_f", slice(-sizes[-1], None))):
        ours, x, t = found.scores[name], stacked[:, part], truth[part]
        assert ours.bias == pytest.approx((x.mean(0).sum() / t.sum() - 1).item())
        assert ours.bias_error == pytest.approx((x.sum(1).std() / math.sqrt(31) / t.sum()).item())
        assert ours.variance == pytest.approx((x.var(0).sum() / t.square().sum()).item())
        alive = t != 0
        assert alive.all() == (name == "ln_f")  # the rows of the embedding that pad it have no effect
        ranks = sorted(scipy.stats.spearmanr(each[alive], t[alive]).statistic for each in x)
        assert ours.rank_one == pytest.approx(ranks[15])
        assert ours.rank_mean == pytest.approx(scipy.stats.spearmanr(x.mean(0)[alive], t[alive]).statistic)
    assert min(times := [seconds for _, seconds in stream]) <= found.seconds <= max(times)


@pytest.mark.parametrize("values", [50, 4])
def test_rank_correlations_are_those_of_scipy(values):
    a, b = torch.randint(0, values, (2, 60), generator=torch.Generator().manual_seed(1)).double()
    b = b + a / 3
    expected = scipy.stats.spearmanr(a, b).statistic
    assert estimators.rank_correlation(a, b) == pytest.approx(expected, abs=1e-12)
    assert estimators.rank_correlation(a, -(a**3)) == pytest.approx(-1)
    assert math.isnan(estimators.rank_correlation(a, torch.ones(60))) and math.isnan(
        estimators.rank_correlation(a[:0], b[:0])
    )


def test_a_long_average_agrees_with_the_exact_diagonal_within_its_error(model, truths, monkeypatch):
    monkeypatch.setattr(estimators, "EXACT_WORK", {"cpu": 0})
    layers = Layers(model)
    for exact in truths:
        average = estimators.find_truth(exact.name, model, batch(), 120, 5)
        assert "average of 120" in average.kind
        off = average.diagonal - exact.diagonal
        assert (off.abs() <= 6 * average.variance.sqrt() + 1e-12).all()
        assert (layers.sums(off).abs() < 4 * average.sums_error).all()
        assert average.noise == pytest.approx((off.norm() / exact.diagonal.norm()).item(), rel=1.0)
        assert 0.01 < average.noise < 1


def test_the_noise_of_a_truth_is_in_the_error_of_the_bias_and_not_in_the_variance(model, truths):
    exact = truths[0]
    noise = 0.3 * exact.diagonal.norm() / len(exact.diagonal) ** 0.5
    noisy = exact.diagonal + noise * torch.randn(
        len(exact.diagonal), generator=torch.Generator().manual_seed(1)
    )
    error = torch.full((5,), 0.5) * exact.diagonal.sum()
    truth = Truth("it", "noisy", noisy, torch.full_like(noisy, noise.item() ** 2), error)
    plain, ours = (scores(model, GNB(), each, 20)["overall"] for each in (exact, truth))
    assert ours.variance == pytest.approx(plain.variance, rel=0.05)
    assert ours.bias_error > 0.4 * (1 + ours.bias)


# ---- the script


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosed") / "run"
    ended = tiny(folder, "max_steps=2", "save_interval=2", "schedule.warmup_steps=1")
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No truth of the script is exact but where a test asks for it: that would take seconds."""
    monkeypatch.setattr(estimators, "EXACT_WORK", {"cpu": 1e8})


def test_it_measures_a_run_from_end_to_end(run, script, tmp_path, capsys):
    out, numbers = tmp_path / "h.png", tmp_path / "h.json"
    sizes = ["--sequences", "8", "--refreshes", "3", "--device", "cpu"]
    assert script([str(run), *sizes, "--out", str(out), "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= max(80, len(f"{out}: {run}"))
    assert all(len(line) <= 80 for line in printed.splitlines()[:-1])
    height, width, _ = matplotlib.image.imread(out).shape
    assert width > height > 500

    found = json.loads(numbers.read_text())
    assert (found["run"], found["step"], found["sequences"], found["refreshes"]) == (str(run), 2, 8, 3)
    assert found["device"] == "cpu" and found["torch"] == torch.__version__ and found["bf16"] is False
    pairs = [(each["estimator"], each["truth"]["name"]) for each in found["comparisons"]]
    assert pairs == [
        ("gnb", "Gauss-Newton"),
        ("gnb:groups=8", "Gauss-Newton"),
        ("hutchinson", "Gauss-Newton"),
        ("hutchinson", "Hessian"),
        ("empirical_fisher", "Gauss-Newton"),
        ("gradient_magnitude", "Gauss-Newton"),
    ]
    for each in found["comparisons"]:
        assert list(each["layers"]) == LAYERS and each["truth"]["kind"].startswith("average of 12 ")
        assert each["seconds"] > 0 and each["truth"]["noise"] > 0
        assert each["layers"]["overall"]["bias"] is not None
        assert printed.count(each["estimator"]) >= 2
    assert "Gauss-Newton: average of 12 estimates by GNB" in printed and "h.0" in printed


def test_the_same_call_gives_the_same_numbers_and_an_exact_truth_is_named(
    run, script, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(estimators, "EXACT_WORK", {"cpu": 1e9})
    sizes = [
        "--sequences",
        "2",
        "--refreshes",
        "2",
        "--device",
        "cpu",
        "--estimators",
        "gnb:groups=2,interval=3",
    ]
    found = []
    for name in ("a", "b"):
        files = ["--out", str(tmp_path / f"{name}.svg"), "--json", str(tmp_path / f"{name}.json")]
        assert script([str(run / "checkpoints" / "step_00000002"), *sizes, *files]) == 0
        assert "Gauss-Newton: exact, 2 sequences, fp32" in capsys.readouterr().out
        found.append(json.loads((tmp_path / f"{name}.json").read_text())["comparisons"][0])
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert found[0]["layers"] == found[1]["layers"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{run}/nowhere"], 66, "nowhere"),
        (["{tmp}"], 66, "neither a checkpoint nor a run"),
        (["{run}", "--estimators", "gnbb"], 64, "did you mean gnb?"),
        (["{run}", "--estimators", "gnb:group=4"], 64, "groups"),
        (["{run}", "--estimators", "gnb:groups=x"], 64, "an integer"),
        (["{run}", "--estimators", "gnb:groups=0"], 64, "at least 1"),
        (["{run}", "--sequences", "8", "--estimators", "gnb:groups=16"], 64, "more than the 8 sequences"),
        (["{run}", "--estimators", "hutchinson:probe=uniform"], 64, "rademacher"),
        (["{run}", "--refreshes", "1"], 64, "at least 2"),
        (["{run}", "--sequences", "0"], 64, "at least 1"),
        (["{run}", "--sequences", "8", "--truth-sequences", "4"], 64, "at least"),
        (["{run}", "--sequences", "99999", "--estimators", "gnb"], 64, "249"),
        (["{run}", "--out", "{tmp}/nowhere/h.png"], 73, "nowhere"),
        (["{run}", "--json", "{tmp}/nowhere/h.json"], 73, "nowhere"),
        (["{run}", "--out", "{tmp}/h.txt"], 64, ".png"),
        (["{run}", "--device", "tpu"], 64, "tpu"),
    ],
)
def test_mistakes_end_in_one_line(arguments, code, message, run, tmp_path, script, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script([argument.format(run=run, tmp=tmp_path) for argument in arguments]) == code
    assert_one_line(capsys, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_ends_in_one_line(run, script, capsys):
    assert script([str(run), "--device", "cuda"]) == 69
    assert_one_line(capsys, "--device cpu")


def test_what_is_damaged_or_gone_ends_in_one_line(tiny, token_files, script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(token_files, tmp_path / "data")
    run = tmp_path / "run"
    assert (
        tiny(run, f"data.path={data}", "max_steps=2", "save_interval=2", "schedule.warmup_steps=1").code == 0
    )
    tokens = (data / "train.bin").read_bytes()
    (data / "train.bin").write_bytes(tokens[2:] + tokens[:2])
    assert script([str(run)]) == 65
    assert_one_line(capsys, "not those of")
    shutil.rmtree(data)
    assert script([str(run)]) == 66
    assert_one_line(capsys, "does not exist")
    weights = run / "checkpoints" / "step_00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert script([str(run)]) == 65
    assert_one_line(capsys, "step_00000002")
    assert not (tmp_path / "hessian.png").exists()


def assert_one_line(capsys, message):
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
