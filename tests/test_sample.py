"""Continuing a text with a run's model on the command line."""

import dataclasses
import os
import runpy
from pathlib import Path

import pytest
import torch

from sophia_train import checkpoint
from sophia_train.data.tokenizers import load_tokenizer, train_bpe
from sophia_train.models import convert
from sophia_train.models.gpt2 import GPT2, GPT2Config

BYTES = load_tokenizer("bytes")
# more words than the tokenizer has, so that the model knows some that have no text
CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=8, block_size=16, vocab_size=300)


@pytest.fixture
def sample():
    return runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "sample.py"))["main"]


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints at steps 3 and 7, and the newest model."""
    model = GPT2(CONFIG)
    folder = tmp_path / "run"
    for step in (3, 7):
        randomize(model, step)
        extra = {"config": {"model": dataclasses.asdict(CONFIG), "data": {"tokenizer": "bytes"}}}
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint.save(folder / "checkpoints", step, model, optimizer, extra)
    (folder / "config.json").write_text("{}")  # as runs have one, of another kind than Hugging Face's
    (folder / "metrics.jsonl").touch()
    return folder, model


def randomize(model, seed):
    """Weights so large that they, and not the draw alone, make the text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.7, generator=generator)


def continuation(model, prompt, tokens, **options):
    ids = model.generate(torch.tensor([BYTES.encode(prompt)]), tokens, words=BYTES.vocab_size, **options)
    return BYTES.decode(ids[0].tolist())


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {"seed": 1337}),
        (["--seed", "3"], {"seed": 3}),
        (
            ["--seed", "3", "--temperature", "0.5", "--top-k", "4"],
            {"seed": 3, "temperature": 0.5, "top_k": 4},
        ),
        (["--temperature", "0"], {"temperature": 0}),
    ],
)
def test_it_prints_what_the_newest_model_generates(flags, options, run, sample, capsys):
    folder, model = run
    expected = continuation(model, "def é", 30, **options) + "\n"
    for _ in range(2):
        assert sample([str(folder), "--prompt", "def é", "--tokens", "30", *flags]) == 0
        assert capsys.readouterr().out == expected


def test_several_samples_are_those_of_the_following_seeds(run, sample, capsys):
    folder, model = run
    assert sample([str(folder), "--prompt", "a", "--tokens", "9", "--seed", "5", "--samples", "3"]) == 0
    texts = [continuation(model, "a", 9, seed=seed) for seed in (5, 6, 7)]
    assert len(set(texts)) == 3
    assert capsys.readouterr().out == "\n\n---\n".join(texts) + "\n"


def test_words_that_the_tokenizer_has_not_are_never_drawn(run, sample, capsys):
    folder, model = run
    unbounded = model.generate(torch.tensor([[97]]), 300, seed=1)
    assert (unbounded >= BYTES.vocab_size).any()
    assert sample([str(folder), "--prompt", "a", "--tokens", "300", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("a")


def test_an_empty_prompt_starts_a_new_text(run, sample, capsys):
    folder, model = run
    assert sample([str(folder), "--prompt", "", "--tokens", "8", "--seed", "1"]) == 0
    ids = model.generate(torch.tensor([[BYTES.end_of_text]]), 8, seed=1, words=BYTES.vocab_size)
    assert capsys.readouterr().out == BYTES.decode(ids[0].tolist()) + "\n"


def test_a_single_checkpoint_can_be_sampled(run, sample, capsys):
    folder, model = run
    older = folder / "checkpoints" / "step_00000003"
    assert sample([str(older), "--prompt", "a", "--tokens", "20", "--seed", "1"]) == 0
    text = capsys.readouterr().out
    assert text != continuation(model, "a", 20, seed=1) + "\n"
    randomize(model, 3)
    assert text == continuation(model, "a", 20, seed=1) + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{run}"], 64, "--prompt"),
        (["{run}", "--prompt", "a", "--tokens", "0"], 64, "'0' is not a whole number of at least 1"),
        (["{run}", "--prompt", "a", "--temperature", "-1"], 64, "-1 is not a number of at least 0"),
        (["{run}", "--prompt", "a", "--temperature", "hot"], 64, "--temperature"),
        (["{run}", "--prompt", "a", "--device", "tpu"], 64, "tpu"),
        (["{run}/nowhere", "--prompt", "a"], 66, "nowhere"),
        (["{empty}", "--prompt", "a"], 66, "empty"),
    ],
)
def test_mistakes_end_in_one_line(arguments, code, message, run, tmp_path, sample, capsys):
    (tmp_path / "empty").mkdir()
    places = {"run": run[0], "empty": tmp_path / "empty"}
    assert sample([argument.format(**places) for argument in arguments]) == code
    assert_one_line(capsys, message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_ends_in_one_line(run, sample, capsys):
    assert sample([str(run[0]), "--prompt", "a", "--device", "cuda"]) == 69
    assert_one_line(capsys, "--device cpu")


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_not_sampled(file, run, sample, capsys):
    folder, _ = run
    path = folder / "checkpoints" / "step_00000007" / file
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert sample([str(folder), "--prompt", "a"]) == 65
    assert_one_line(capsys, "step_00000007")


@pytest.fixture
def exported(tmp_path):
    """A Hugging Face folder of a model over GPT-2's vocabulary."""
    model = GPT2(dataclasses.replace(CONFIG, vocab_size=50257))
    randomize(model, 1)
    convert.export_folder(model, tmp_path / "exported")
    return tmp_path / "exported", model


@pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="GPT-2's vocabulary is not cached")
def test_a_hugging_face_folder_is_sampled_with_the_tokenizer_of_gpt2(exported, sample, capsys):
    folder, model = exported
    tokenizer = load_tokenizer("gpt2")
    assert sample([str(folder), "--prompt", "Hello", "--tokens", "5", "--seed", "2"]) == 0
    ids = model.generate(torch.tensor([tokenizer.encode("Hello")]), 5, seed=2)
    assert capsys.readouterr().out == tokenizer.decode(ids[0].tolist()) + "\n"


def test_a_vocabulary_that_is_not_to_be_had_ends_in_one_line(exported, sample, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # what this process has loaded already
    monkeypatch.setattr("requests.get", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "nothing"))
    assert sample([str(exported[0]), "--prompt", "a"]) == 69
    assert_one_line(capsys, "TIKTOKEN_CACHE_DIR")


def test_a_hugging_face_folder_of_another_vocabulary_is_refused(run, sample, tmp_path, capsys):
    convert.export_folder(run[1], tmp_path / "exported")
    assert sample([str(tmp_path / "exported"), "--prompt", "a"]) == 64
    assert_one_line(capsys, "300 words")


@pytest.fixture
def run_with_file(tmp_path):
    """A run over a tokenizer.json that has moved, its new place, and another tokenizer's."""
    folder, moved, other = tmp_path / "by_file", tmp_path / "moved.json", tmp_path / "other.json"
    moved.write_text(train_bpe(["the quick brown fox " * 9], 270))
    other.write_text(train_bpe(["lazy dogs jump " * 9], 270))
    model = GPT2(CONFIG)
    randomize(model, 1)
    was = str(tmp_path / "gone" / "tokenizer.json")
    extra = {
        "config": {"model": dataclasses.asdict(CONFIG), "data": {"tokenizer": was}},
        "tokenizer": load_tokenizer(str(moved)).name,
    }
    checkpoint.save(folder / "checkpoints", 3, model, torch.optim.AdamW(model.parameters()), extra)
    return folder, model, was, moved, other


def test_a_tokenizer_that_has_moved_is_asked_for_and_taken(run_with_file, sample, capsys):
    folder, model, was, moved, _ = run_with_file
    asked = [str(folder), "--prompt", "the fox", "--tokens", "9", "--seed", "1"]
    assert sample(asked) == 66
    assert_one_line(capsys, f"trained with data.tokenizer={was}, which is not there any more; say where")
    assert sample([*asked, "--tokenizer", str(moved)]) == 0
    tokenizer = load_tokenizer(str(moved))
    ids = torch.tensor([tokenizer.encode("the fox")])
    expected = model.generate(ids, 9, seed=1, words=tokenizer.vocab_size)
    assert capsys.readouterr().out == tokenizer.decode(expected[0].tolist()) + "\n"


def test_another_tokenizer_than_the_run_s_is_refused(run_with_file, sample, capsys):
    folder, _, was, moved, other = run_with_file
    name = load_tokenizer(str(moved)).name
    for file in (other, "bytes"):
        assert sample([str(folder), "--prompt", "a", "--tokenizer", str(file)]) == 65
        assert_one_line(capsys, f"was trained with the tokenizer {name}, and {file} is ")
    Path(was).parent.mkdir()
    Path(was).write_bytes(other.read_bytes())  # at the old place, too
    assert sample([str(folder), "--prompt", "a"]) == 65
    assert_one_line(capsys, f"and {was} is tokenizer.json-sha256-")
    for file in (folder / "config.json", other.with_name("nowhere.json"), "nowhere"):
        assert sample([str(folder), "--prompt", "a", "--tokenizer", str(file)]) == 66
        assert_one_line(capsys, f"--tokenizer {file} is no tokenizer.json; give the run's own")


def test_runs_record_their_tokenizer_by_its_content(tiny, tmp_path, sample, capsys):
    file = tmp_path / "mine.json"
    file.write_text(train_bpe(["the quick brown fox " * 9], 257))
    assert (
        tiny(tmp_path / "run", "max_steps=1", "schedule.warmup_steps=0", f"data.tokenizer={file}").code == 0
    )
    file.rename(tmp_path / "moved.json")
    asked = [str(tmp_path / "run"), "--prompt", "a", "--tokens", "2"]
    assert sample(asked) == 66
    assert_one_line(capsys, "--tokenizer FILE")
    assert sample([*asked, "--tokenizer", "bytes"]) == 65
    assert_one_line(capsys, "tokenizer.json-sha256-")
    assert sample([*asked, "--tokenizer", str(tmp_path / "moved.json")]) == 0


def test_a_hugging_face_folder_takes_a_tokenizer_that_fits(run, run_with_file, sample, tmp_path, capsys):
    convert.export_folder(run[1], tmp_path / "exported")
    asked = [str(tmp_path / "exported"), "--prompt", "the", "--tokens", "4", "--seed", "1"]
    assert sample([*asked, "--tokenizer", str(run_with_file[3])]) == 0
    assert capsys.readouterr().out.startswith("the")


def assert_one_line(capsys, message):
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def offline(*arguments, **options):
    raise ConnectionError("no network")
