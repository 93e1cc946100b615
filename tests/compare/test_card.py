"""The card of a run says what its folder says, and no more."""

import json
import shlex
import shutil

import pytest
from safetensors.torch import load_file
from support import load_script, records

from sophia_train.compare.card import card, write_card
from sophia_train.compare.runs import leaves
from sophia_train.config import compose, run_config, to_json
from sophia_train.errors import DataError, MissingInputError
from sophia_train.trackers.jsonl import read_metrics


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A real run that reached its end."""
    folder = tmp_path_factory.mktemp("cards") / "finished"
    assert tiny(folder).code == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture(scope="module")
def defaults():
    return to_json(run_config(compose()))


def tables(text):
    """Rows of the tables of a card, by their first cell without its quotes; the others without theirs."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip("`"): [cell.strip("`") for cell in row[1:]] for row in rows}


def test_the_figures_are_those_of_the_metrics(finished):
    metrics = read_metrics(finished / "metrics.jsonl")
    last, rows = metrics[-1], tables(card(finished))
    losses = {one["step"]: one["val/loss"] for one in metrics if "val/loss" in one}
    best = min(losses, key=losses.__getitem__)
    assert rows["validation loss"] == [f"{last['val/loss']:.4f} nats a token"]
    assert rows["lowest"] == [f"{losses[best]:.4f} at step {best}"]
    assert rows["steps"] == ["6"] and rows["tokens"] == [f"{last['tokens']:,}"]
    assert rows["FLOPs"][0].startswith(f"{last['flops']:.4g},")
    assert rows["time"] == [f"{last['seconds']:.1f} s"]
    for row, key, form in (
        ("tokens a second", "perf/tokens_per_second", ",.0f"),
        ("Hessian's share of the time", "perf/hessian_share", ".1%"),
        ("win rate", "optim/unclipped_fraction", ".3f"),
    ):
        values = [one[key] for one in metrics if key in one]
        assert rows[row][0].split()[0] == f"{sum(values) / len(values):{form}}"
    assert rows["skipped steps"] == ["0"]


def test_what_was_not_measured_is_not_there(copied):
    (copied / "status.json").unlink()
    rows = tables(card(copied))
    assert not {"GPU hours", "model FLOPs utilisation", "peak memory of a GPU", "cuda"} & rows.keys()
    assert not {"unigram model", "bigram model"} & rows.keys()


def test_hours_count_every_gpu(copied):
    path = copied / "metrics.jsonl"
    with path.open("a") as file:
        last = {**read_metrics(path)[-1], "step": 7, "seconds": 5400.0}
        file.write(json.dumps({**last, "perf/peak_memory_gb": 70.0, "perf/mfu": 0.45}) + "\n")
    environment = json.loads((copied / "environment.json").read_text())
    changed = {**environment, "processes": 8, "device": "NVIDIA H200"}
    (copied / "environment.json").write_text(json.dumps(changed))
    rows = tables(card(copied))
    assert rows["GPU hours"] == ["12"] and rows["device"] == ["8 x NVIDIA H200"]
    assert rows["model FLOPs utilisation"] == ["45.0%"] and rows["peak memory of a GPU"] == ["70.00 GB"]


def test_it_says_what_the_run_was(finished):
    rows, environment = tables(card(finished)), json.loads((finished / "environment.json").read_text())
    newest = max((finished / "checkpoints").glob("step_*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    assert rows["digest of the train tokens"] == [manifest["data"]["train"]]
    assert rows["digest of the validation tokens"] == [manifest["data"]["validation"]]
    assert rows["optimizer"] == ["Sophia GNB"]
    parameters = sum(tensor.numel() for tensor in load_file(newest / "model.safetensors").values())
    assert rows["model"] == [f"GPT-2, {parameters / 1000:.3g}k parameters"]
    for key in ("commit", "torch", "python", "platform"):
        assert rows[key] == [str(environment[key])]


def test_settings_are_listed_where_they_differ_from_the_defaults(finished, defaults):
    mine = leaves(json.loads((finished / "config.json").read_text()))
    usual = leaves(json.loads(json.dumps(defaults)))
    rows = tables(card(finished, defaults=defaults))
    listed = {key: cells for key, cells in rows.items() if key in mine}
    left_out = {"name", "run_dir", "seed", "processes"}
    expected = {
        key: [json.dumps(value), json.dumps(usual[key]) if key in usual else ""]
        for key, value in mine.items()
        if not (key in usual and usual[key] == value) and key not in left_out
    }
    assert {key: [*cells, ""][:2] for key, cells in listed.items() if key != "seed"} == expected
    assert {"batch_size", "data.path", "model.n_layer"} <= listed.keys()
    assert "optimizer.lr" in tables(card(finished)), "without the defaults, all are listed"


def test_its_command_makes_the_same_run_again(finished, runs, tmp_path):
    text = card(finished)
    command = shlex.split(text.partition("```sh\n")[2].partition("\n```")[0])
    assert command[:3] == ["python", "-m", "sophia_train"]
    again = finished.with_name("finished-again")
    ended = runs(*command[3:], cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert records(again) == records(finished)


def test_a_folder_with_signs_that_hydra_reads_is_quoted_for_it(copied):
    config = json.loads((copied / "config.json").read_text())
    folder = "runs/it's-lr=1e-3 x"
    (copied / "config.json").write_text(json.dumps({**config, "run_dir": folder}))
    command = shlex.split(card(copied).partition("```sh\n")[2].partition("\n```")[0])
    assert compose([command[-1]]).run_dir == f"{folder}-again"


def test_of_several_names_the_command_has_the_one_that_held(copied):
    environment = json.loads((copied / "environment.json").read_text())
    words = ["python", "-m", "sophia_train", "name=a", "seed=1", "name='a-seed=1'"]
    (copied / "environment.json").write_text(json.dumps({**environment, "command": words}))
    command = shlex.split(card(copied).partition("```sh\n")[2].partition("\n```")[0])
    assert [word for word in command if word.startswith("name=")] == ["name='a-seed=1'"]
    assert compose(command[3:]).name == compose(words[3:]).name == "a-seed=1"


def test_the_curve_is_linked_where_it_is(copied):
    assert "![Loss against steps](loss.png)" in card(copied)
    (copied / "loss.png").unlink()
    assert "loss.png" not in card(copied)


def test_an_interrupted_run_is_told_up_to_its_newest_checkpoint(tiny, tmp_path):
    folder = tmp_path / "cut"
    assert tiny(folder, "stop_at_step=5", "log_interval=3").code == 75
    text, newest = card(folder), json.loads(next(folder.rglob("step_00000005/manifest.json")).read_text())
    rows = tables(text)
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 3
    assert rows["steps"] == ["5"] and rows["tokens"] == [f"{newest['state']['tokens']:,}"]
    assert "Not finished: stopped at step 5 of 6" in text and "exit code 75" in text


def test_a_folder_of_settings_alone_has_a_card(copied, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(copied / "config.json", bare)
    text = card(bare)
    assert "No invocation has ended" in text and "Sophia GNB" in text
    for word in ("Result", "Cost", "Where", "digest", "run it again"):
        assert word not in text


def test_it_is_one_page(finished, defaults):
    assert len(card(finished, defaults).splitlines()) < 90


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{", "config.json, line 1"),
        ("config.json", '{"model": {"n_layers": 1}}', "config.json is not of a run"),
        ("config.json", '{"model": 5}', "config.json is not of a run"),
        ("environment.json", "[]", "environment.json, line 1"),
        ("status.json", "\xff", "status.json, line 1"),
        ("status.json", '{"baselines": [1]}', "status.json: baselines"),
        ("status.json", '{"baselines": {"bigram": "low"}}', "status.json: baselines"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl, line 1"),
    ],
)
def test_a_damaged_file_is_named(name, content, reason, copied):
    (copied / name).write_text(content, encoding="latin-1")
    (copied / "card.md").unlink()
    with pytest.raises(DataError, match=reason):
        write_card(copied)
    assert not (copied / "card.md").exists()


def test_settings_are_needed(tmp_path):
    with pytest.raises(MissingInputError, match=r"config\.json is not there; give the folder that has it"):
        card(tmp_path)


def test_the_script_writes_what_the_run_wrote(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / finished.name)
    for name in ("card.md", "loss.png"):
        (folder / name).unlink()
    assert load_script("card").main([str(folder)]) == 0
    assert {"unigram model", "bigram model"} <= tables((folder / "card.md").read_text()).keys()
    for name in ("card.md", "loss.png"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_the_script_writes_cards_and_draws_curves_that_are_missing(copied, capsys):
    script = load_script("card")
    (copied / "loss.png").unlink()
    assert script.main([str(copied)]) == 0
    path = copied / "card.md"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text() == card(copied, defaults=to_json(run_config(compose())))
    assert "loss.png" in path.read_text() and (copied / "loss.png").stat().st_size > 1000
    drawn = (copied / "loss.png").stat().st_mtime_ns
    assert script.main([str(copied)]) == 0 and (copied / "loss.png").stat().st_mtime_ns == drawn


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ([], 64, "RUN"),
        (["--all", "x"], 64, "--all"),
        (["nowhere"], 66, "config.json is not there"),
        (["file"], 66, "file is not a folder"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, code, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert load_script("card").main(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and reason in err
