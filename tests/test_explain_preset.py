"""What the script says of two presets: all that differs, each value with its source."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from sophia_train.config import compose

SCRIPT = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "explain_preset.py")))
ADAMW, RELEASED = "gpt2_125m_adamw", "gpt2_125m_adamw_as_released"


def test_exactly_what_differs_is_there():
    found = SCRIPT.differences(ADAMW, RELEASED)
    assert set(found) == {"gradient_clip", "optimizer.eps"}
    one, two = found["gradient_clip"]
    assert (one.value, two.value) == ("1", "0.166667")
    assert one.source == "paper" and two.source.startswith("1 / 6: official code")


def test_a_preset_does_not_differ_from_itself(capsys):
    assert SCRIPT.differences(ADAMW, ADAMW) == {}
    assert SCRIPT.main([ADAMW, ADAMW]) == 0
    assert capsys.readouterr().out == f"{ADAMW} and {ADAMW} do not differ\n"


def test_the_other_way_round_is_the_same_swapped():
    there = SCRIPT.differences("gpt2_355m_lion", "gpt2_355m_sophia_h")
    back = SCRIPT.differences("gpt2_355m_sophia_h", "gpt2_355m_lion")
    assert there == {key: (two, one) for key, (one, two) in back.items()}


def test_what_one_of_them_lacks_is_shown_as_absent():
    found = SCRIPT.differences(ADAMW, "gpt2_125m_sophia_g")
    assert found["optimizer.gamma"][0] == SCRIPT.ABSENT
    assert found["optimizer.fused"][1] == SCRIPT.ABSENT


@pytest.mark.parametrize("name", SCRIPT.presets())
def test_every_setting_of_every_optimizer_model_and_hessian_has_a_source(name):
    found = SCRIPT.settings(name)
    config = compose([f"experiment=paper/{name}"])
    assert {f"optimizer.{key}" for key in config.optimizer if key != "others"} <= set(found)
    for key, setting in found.items():
        if key.partition(".")[0] in ("optimizer", "model", "hessian", "batch_size", "gradient_clip"):
            assert setting.source, key


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1 # one\n", {"a": "one"}),
        ("# Head of it. And more.\na: 1\n", {"a": "Head of it"}),
        ("# @package _global_\n# Head.\na:\n  b: [1, 2] # two\n  c: x\n", {"a.b": "two", "a.c": "Head"}),
        ('a: "x # y" # z\n', {"a": "z"}),
        ("a: null\n", {"a": ""}),
    ],
)
def test_a_source_is_the_comment_behind_or_the_head(text, expected):
    assert SCRIPT._comments(text) == expected


def test_the_table_fits_80_columns_and_has_values_and_sources(capsys):
    assert SCRIPT.main(["paper/gpt2_355m_sophia_g", "experiment=paper/gpt2_355m_sophia_g_as_released"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for fragment in ("optimizer.lr 0.0004 0.0007", "config/train_gpt2_medium_sophiag.py", "not verified"):
        assert fragment in words


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("gpt2_125m_sofia_g", ["no such preset", "did you mean gpt2_125m_sophia_g?"]),
        ("paper/gpt2_125m_adam", ["no such preset", "did you mean gpt2_125m_adamw?"]),
        ("gpt2_540m_adamw_as_released", ["released only", "gpt2_770m_adamw", "use gpt2_540m_adamw or"]),
        ("_adamw", ["no such preset"]),
        ("../demo", ["no such preset"]),
    ],
)
def test_an_unknown_preset_is_one_line_with_the_nearest(name, fragments, capsys):
    for arguments in ([name, ADAMW], [ADAMW, name]):
        assert SCRIPT.main(arguments) == 64
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"error: {name}: ") and err.count("\n") == 1
        for fragment in fragments:
            assert fragment in err


@pytest.mark.parametrize("arguments", [[], [ADAMW], [ADAMW, ADAMW, ADAMW], ["--nonsense"]])
def test_wrong_arguments_are_one_line(arguments, capsys):
    assert SCRIPT.main(arguments) == 64
    assert capsys.readouterr().err.count("\n") == 1
