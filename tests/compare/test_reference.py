"""Published results: the values of the paper, their provenance, and when they are drawn."""

import pytest
from synthetic_runs import SOPHIA

from sophia_train.compare.reference import claims, curves, kinds

GPT2_125M = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}
OPENWEBTEXT = {"data.path": "data/openwebtext-gpt2", "model": GPT2_125M, "batch_size": 480}


def ends(name, kind):
    """Loss at the end by optimizer, size and tokens in billions."""
    mine = [curve for curve in curves() if (curve.name, curve.kind) == (name, kind)]
    return {(c.optimizer, c.size, round(c.tokens[-1] / 1e9, 1)): c.losses[-1] for c in mine}


def test_the_table_of_the_paper():
    """arXiv 2305.14342 v1, caption of Figure 4: 100,000 steps of 480 x 1024 tokens."""
    assert ends("paper", "published") == {
        ("AdamW", "125M", 49.2): 2.921,
        ("Lion", "125M", 49.2): 2.924,
        ("Sophia-H", "125M", 49.2): 2.901,
        ("Sophia-G", "125M", 49.2): 2.895,
        ("AdamW", "355M", 49.2): 2.691,
        ("Lion", "355M", 49.2): 2.678,
        ("Sophia-H", "355M", 49.2): 2.645,
        ("AdamW", "770M", 49.2): 2.613,
        ("Sophia-H", "770M", 49.2): 2.559,
    }


def test_what_was_read_off_figures_says_so():
    assert ends("paper", "digitised") == {
        ("AdamW", "125M", 98.3): 2.907,
        ("AdamW", "355M", 98.3): 2.66,
        ("AdamW", "770M", 98.3): 2.567,
        ("AdamW", "540M", 49.2): 2.64,
        ("Sophia-H", "540M", 49.2): 2.6,
    }
    released = {(c.optimizer, c.size): c for c in curves() if c.name == "released"}
    assert {curve.kind for curve in released.values()} == {"digitised"}
    at = {
        key: dict(zip((round(t / 491_520_000) for t in c.tokens), c.losses, strict=True))
        for key, c in released.items()
    }  # thousands of steps
    assert [at["AdamW", "125M"][k] for k in (10, 50, 100)] == [3.227, 3.031, 2.932]
    assert [at["Sophia-G", "125M"][k] for k in (10, 50)] == [3.187, 2.977]
    assert [at["AdamW", "355M"][k] for k in (20, 75)] == [2.946, 2.742]
    assert [at["Sophia-G", "355M"][k] for k in (10, 100)] == [2.997, 2.658]


def test_reports_of_others():
    """Issues 31 and 46 of the official repository; the tables of MARS and SASSHA; nanoGPT."""
    assert ends("issue_31", "community") == {
        ("Sophia-G", "125M", 49.2): 2.876,
        ("AdamW", "125M", 49.2): 2.869,
    }
    assert ends("issue_46", "community")["AdamW", "125M", 98.3] == 2.863
    assert ends("mars", "published")["AdamW", "125M", 49.2] == 2.885
    assert ends("sassha", "published")["Sophia-G", "125M", 24.6] == 2.9307
    assert ends("nanogpt", "community")["AdamW", "125M", 294.9] == 2.85


def test_the_claim_is_marked_as_unverified():
    assert {(c.size, c.speed_up, c.kind) for c in claims()} == {
        ("125M", 1.6, "unverified"),
        ("770M", 2.0, "unverified"),
    }


def test_every_point_has_a_source_and_a_kind_and_costs_that_increase():
    for curve in curves():
        assert curve.source and curve.kind in kinds()
        assert len(curve.tokens) == len(curve.losses) > 0
        assert list(curve.tokens) == sorted(set(curve.tokens))
        assert all(2.4 < loss < 3.4 for loss in curve.losses)
    assert {curve.size for curve in curves()} == {"125M", "355M", "540M", "770M"}


def drawn(folder):
    return (folder / "loss_tokens.svg").read_text()


def test_runs_on_openwebtext_have_them_on_the_token_axis_and_only_their_size(compare, make_run, tmp_path):
    code, out, _ = compare(make_run("a1", **OPENWEBTEXT), "--out", tmp_path / "out")
    assert code == 0
    for label in ("AdamW 125M, paper (published)", "Sophia-G 125M, released (digitised)"):
        assert label in drawn(tmp_path / "out")
    assert "on OpenWebText, validation of theirs" in drawn(tmp_path / "out")
    assert "355M" not in drawn(tmp_path / "out") and "355M" not in out
    assert "paper" not in (tmp_path / "out" / "loss_step.svg").read_text()
    assert "| Sophia-G 125M | paper | published | 2.895 |" in out


@pytest.mark.parametrize(
    "other",
    [{"data.path": "data/books"}, {"model": {**GPT2_125M, "vocab_size": 257}}],
    ids=["other text", "other words"],
)
def test_other_runs_have_none_and_are_told_why(compare, make_run, tmp_path, other):
    _, out, _ = compare(make_run("a1", **{**OPENWEBTEXT, **other}), "--out", tmp_path / "out")
    assert "losses on other text do not compare" in out
    assert "paper" not in drawn(tmp_path / "out")


def test_one_run_on_other_text_among_them_is_enough(compare, make_run):
    folders = [make_run("a1", **OPENWEBTEXT), make_run("s1", **{**OPENWEBTEXT, "data.path": "x"}, **SOPHIA)]
    assert "losses on other text do not compare" in compare(*folders)[1]


def test_they_can_be_asked_for_and_refused(compare, make_run, tmp_path):
    run, books = make_run("a1", **OPENWEBTEXT), make_run("b1", **{**OPENWEBTEXT, "data.path": "books"})
    assert compare(run, "--reference", "mars", "issue_31", "--out", tmp_path / "out")[0] == 0
    assert "AdamW 125M, mars" in drawn(tmp_path / "out") and "paper" not in drawn(tmp_path / "out")
    assert "No published results were asked for" in compare(run, "--reference", "none")[1]
    out = compare(books, "--reference", "paper")[1]
    assert "the losses do not compare" in out and "| Sophia-G 125M | paper |" in out
    assert (
        "None of paper is of a model of 30"
        in compare(
            make_run("c1", **{**OPENWEBTEXT, "model": {**GPT2_125M, "n_layer": 6, "n_embd": 384}}),
            *("--reference", "paper"),
        )[1]
    )
    code, _, err = compare(run, "--reference", "papers")
    assert code == 64 and "papers" in err and "released" in err
