"""The paper's two-dimensional example: what the methods do, and the picture of it."""

import math
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from torch.autograd.functional import hessian, jacobian

SCRIPT = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "paper_2d.py")))
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def paths():
    """The trajectories of the methods as the script starts them."""
    return {
        name: SCRIPT.trajectory(name, method.lr, SCRIPT.START, 50) for name, method in SCRIPT.METHODS.items()
    }


def points(*pairs):
    return torch.tensor(pairs, dtype=torch.float64)


def near(points):
    return points[SCRIPT.loss(points) < SCRIPT.NEAR]


@pytest.mark.parametrize("x", [-1.5, -0.65, 0.0, 0.22, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("y", [-2.0, 4.0, 5.5])
def test_the_derivatives_are_those_of_the_formula(x, y):
    point = torch.tensor([x, y], dtype=torch.float64)
    sharp = 8 * (x - 1) ** 2 * (1.3 * x**2 + 2 * x + 1)
    assert SCRIPT.loss(point).item() == pytest.approx(sharp + (y - 4) ** 2 / 2)
    slope = points([8 * x * (x - 1) * (5.2 * x + 3.4), y - 4])[0]
    curvature = points([8 * (15.6 * x**2 - 3.6 * x - 3.4), 1])[0]
    torch.testing.assert_close(SCRIPT.gradient(point), slope)
    torch.testing.assert_close(SCRIPT.curvature(point), curvature)
    torch.testing.assert_close(jacobian(SCRIPT.loss, point), slope)
    torch.testing.assert_close(hessian(SCRIPT.loss, point), torch.diag(curvature))


def test_every_trajectory_begins_at_the_start_and_has_a_point_a_step(paths):
    for path in paths.values():
        assert path.shape == (51, 2)
        assert path[0].tolist() == list(SCRIPT.START)


def test_sophia_ends_in_the_minimum_and_is_there_first(paths):
    assert (paths["Sophia"][-1] - torch.tensor(SCRIPT.MINIMUM)).abs().max() < 1e-2
    arrivals = {name: (SCRIPT.loss(path) < SCRIPT.NEAR).tolist() for name, path in paths.items()}
    first = {name: hits.index(True) for name, hits in arrivals.items() if True in hits}
    assert min(first, key=first.get) == "Sophia"


@pytest.mark.parametrize("lr", [0.1, 0.3, 1.0])
def test_no_coordinate_of_sophia_moves_more_than_lr_in_a_step(lr):
    moves = SCRIPT.trajectory("Sophia", lr, SCRIPT.START, 50).diff(dim=0).abs()
    assert moves.max() <= lr * (1 + 1e-12)
    assert moves.max() == pytest.approx(lr)  # and the bound is met: the clip does something


def test_newton_ends_where_the_loss_is_flat_but_not_smallest(paths):
    end = paths["Newton"][-1]
    assert SCRIPT.gradient(end).abs().max() < 1e-9
    assert SCRIPT.curvature(end)[0] <= 0 < SCRIPT.curvature(end)[1]
    torch.testing.assert_close(end, points(SCRIPT.SADDLE)[0], atol=1e-9, rtol=0)


def test_gd_is_slow_along_the_flat_axis_and_not_along_the_sharp_one(paths):
    distance = (paths["GD"][-1] - torch.tensor(SCRIPT.MINIMUM)).abs()
    assert distance[0] < 1e-3 and distance[1] > 0.5
    limit = 2 / SCRIPT.curvature(points(SCRIPT.MINIMUM)[0])[0].item()
    assert limit == pytest.approx(2 / 68.8)
    assert 0.8 * limit < SCRIPT.METHODS["GD"].lr < limit


def test_sign_gd_moves_lr_along_each_axis_and_ends_bouncing(paths):
    moves = paths["SignGD"].diff(dim=0)
    torch.testing.assert_close(moves.abs(), torch.full_like(moves, SCRIPT.METHODS["SignGD"].lr))
    assert (moves[-10:, 0].sign() == -moves[-11:-1, 0].sign()).all()


@pytest.mark.parametrize(("name", "lr", "steps"), [("Adam", 0.15, 30), ("Sophia", 0.1, 46)])
def test_what_the_help_says_of_other_rates_is_so(name, lr, steps):
    path = SCRIPT.trajectory(name, lr, SCRIPT.START, steps)
    assert torch.equal(near(path), path[-1:])


@pytest.mark.parametrize("name", ["GD", "Newton"])
def test_a_trajectory_ends_before_the_loss_overflows(name):
    path = SCRIPT.trajectory(name, 1e3, (2.0, 0.0), 200)
    assert 1 < len(path) < 201 and SCRIPT.loss(path).isfinite().all()


def test_it_draws_and_says_where_each_method_ended(paths, tmp_path, capsys):
    out = tmp_path / "figure.png"
    assert SCRIPT.main(["--out", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    assert out.read_bytes().startswith(PNG)
    assert matplotlib.image.imread(out)[..., :3].std() > 0.05  # not one colour
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1]) and str(out) in lines[-1]
    for line, (name, path) in zip(lines[1:], paths.items(), strict=False):
        assert line.split()[:2] == [name, f"{SCRIPT.METHODS[name].lr:g}"]
        x, y = map(float, re.search(r"\((.+), (.+)\)", line).groups())
        assert [x, y] == pytest.approx(path[-1].tolist(), abs=1e-3)
        steps = line.split()[-1]
        assert steps == "-" if not len(near(path)) else torch.equal(path[int(steps)], near(path)[0])


@pytest.mark.parametrize(("suffix", "begin"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", PNG)])
def test_the_suffix_chooses_the_format(suffix, begin, tmp_path):
    assert SCRIPT.main(["--out", str(tmp_path / f"figure{suffix}"), "--steps", "1"]) == 0
    assert (tmp_path / f"figure{suffix}").read_bytes().startswith(begin)


def test_start_steps_and_rates_can_be_chosen(tmp_path, capsys):
    chosen = ["--start", "-10", "9.5", "--steps", "9", "--lr", "gd=0.5", "--lr", "Adam=0.7"]
    assert SCRIPT.main(["--out", str(tmp_path / "figure.png"), *chosen]) == 0
    captured = capsys.readouterr()
    assert "GD diverged" in captured.out and "Adam diverged" not in captured.out
    assert re.search(r"^Adam +0.7 ", captured.out, re.M)
    assert captured.out.endswith("9 steps from (-10, 9.5)\n") and captured.err == ""


def test_the_start_is_in_the_picture():
    for start in (SCRIPT.START, (-10.0, 10.0), (10.0, -10.0)):
        (axes,) = SCRIPT.draw({"GD": points(start)}).axes
        for place in (start, SCRIPT.MINIMUM, SCRIPT.SADDLE):
            for value, (low, high) in zip(place, (axes.get_xlim(), axes.get_ylim()), strict=True):
                assert low < value < high and math.isfinite(high - low)


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        (["--steps", "-3"], 64, ["--steps", "'-3'", "at least 1"]),
        (["--steps", "1e3"], 64, ["--steps", "'1e3'"]),
        (["--start", "nan", "0"], 64, ["--start", "nan", "-10 to 10"]),
        (["--start", "0", "inf"], 64, ["--start", "inf", "-10 to 10"]),
        (["--start", "0", "-1e300"], 64, ["--start"]),
        (["--start", "11", "0"], 64, ["--start", "11", "-10 to 10"]),
        (["--start", "a", "0"], 64, ["--start", "'a'"]),
        (["--start", "1"], 64, ["--start", "2 arguments"]),
        (["--lr", "adam"], 64, ["--lr", "adam"]),
        (["--lr", "adam=fast"], 64, ["--lr", "adam=fast"]),
        (["--lr", "adam=0"], 64, ["--lr", "adam=0", "Adam=0.1"]),
        (["--lr", "gd=inf"], 64, ["--lr", "gd=inf", "GD=0.1"]),
        (["--lr", "lion=1"], 64, ["--lr", "lion=1", "Newton"]),
        (["--out", "{folder}/a.jpg"], 64, ["--out", "a.jpg", "a.png"]),
        (["--out", "{folder}/nowhere/a.png"], 73, ["--out", "nowhere"]),
        (["--out", "{folder}/taken.png"], 73, ["--out", "taken.png"]),
        (["--out", "{folder}/" + "a" * 300 + ".png"], 74, ["aaa"]),
    ],
)
def test_mistakes_end_in_one_line(arguments, code, fragments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.png").mkdir()
    assert SCRIPT.main([argument.format(folder=tmp_path) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]
