"""Whatever is wrong is said in one line before training, with a sysexits code, and nothing is written."""

import os
import random
import shutil
import time

import pytest
from support import TINY, InMemory, contents

from sophia_train.data.prepare import prepare
from sophia_train.data.tokenizers import Bytes
from sophia_train.data.units import ByKey, Document

CONFIG, DATA, MISSING, UNAVAILABLE, OUTPUT = 64, 65, 66, 69, 73


@pytest.fixture
def refused(tiny, tmp_path):
    """Asserts how a run is refused: its code, one line with all the fragments, and not a trace of it."""

    def check(code, *fragments, overrides=(), folder=tmp_path / "new" / "run", **options):
        before = contents(tmp_path), sorted(tmp_path.rglob("*"))
        ended = tiny(folder, *overrides, **options)
        assert ended.code == code, ended
        assert len(ended.errors) == 1 and "Traceback" not in ended.err and ended.out == "", ended
        for fragment in fragments:
            assert str(fragment) in ended.errors[0], ended.errors[0]
        assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before

    return check


@pytest.fixture
def run(tiny, tmp_path):
    """A run that was stopped at step 3 of 6."""
    folder = tmp_path / "old"
    assert tiny(folder, "stop_at_step=3").code == 75
    return folder


class TestSettings:
    @pytest.mark.parametrize(
        ("overrides", "fragments"),
        [
            (["batchsize=8"], ["batchsize", "batch_size"]),
            (["+batchsize=8"], ["batchsize", "batch_size"]),
            (["++optimizer.gama=1"], ["optimizer.gama", "gamma"]),
            (["optimizer.lr=6e-4x"], ["optimizer.lr=6e-4x", "number"]),
            (["batch_size=4.5"], ["batch_size=4.5", "integer"]),
            (["batch_size=0"], ["batch_size=0", "1"]),
            (["optimizer.betas=[0.9,1.1]"], ["optimizer.", "betas", "1.1"]),
            (["optimizer=sofia_g"], ["optimizer=sofia_g", "sophia_g"]),
            (["batch_size=10", "micro_batch_size=4"], ["batch_size=10", "micro_batch_size", "8 or 12"]),
            (["processes=2"], ["processes=2", "torchrun"]),
            (["model.n_embd=17"], ["n_embd=17", "n_head=2"]),
            (["model.vocab_size=256"], ["model.vocab_size=256", "data.tokenizer=bytes", "257"]),
            (["precision=fp16"], ["precision=fp16", "bf16"]),
            (["hessian.batch_size=5"], ["hessian.batch_size=5", "4"]),
            (["max_seconds=0"], ["max_seconds=0"]),
            (["optimizer=adamw", "hessian=gnb"], ["GNB", "AdamW", "hessian=none"]),
            (["eval_tokens=7"], ["7", "block_size=8"]),
            (["run_dir="], ["run_dir"]),
            (["parallel=fsdp"], ["parallel=fsdp", "1 process", "torchrun", "parallel=ddp"]),
            (["parallel=zero"], ["parallel=zero", "fsdp"]),
            (
                ["parallel=hsdp", "processes=4", "batch_size=8", "shard_processes=4"],
                ["shard_processes=4 of 4", "fsdp"],
            ),
            (
                ["parallel=hsdp", "processes=4", "batch_size=8", "shard_processes=3"],
                ["shard_processes=3 of 4"],
            ),
            (["shard_processes=2"], ["shard_processes=2", "parallel=hsdp"]),
            (["parallel=fsdp", "hessian.groups=2"], ["parallel=fsdp", "groups=2", "hessian.groups=1"]),
            (["parallel=fsdp", "optimizer=sophia_h"], ["parallel=fsdp", "Hutchinson", "hessian=gnb"]),
            (["strict=true"], ["strict=true", "micro_batch_size=1"]),
            (["strict=true", "micro_batch_size=1", "model.dropout=0.1"], ["strict=true", "model.dropout=0"]),
            (["strict=true", "micro_batch_size=1", "precision=bf16"], ["strict=true", "precision=fp32"]),
            (["strict=true", "micro_batch_size=1", "hessian.groups=2"], ["strict=true", "hessian.groups=1"]),
            (["strict=true", "micro_batch_size=1", "processes=3", "batch_size=12"], ["strict", "power of 2"]),
            (["parallel=fsdp", "optimizer=adafactor", "~hessian.interval"], ["Adafactor", "parallel=ddp"]),
            (["gradient_type=fp16"], ["gradient_type=fp16", "bf16"]),
        ],
        ids=lambda value: " ".join(value) if "=" in value[0] else "",
    )
    def test_are_refused(self, overrides, fragments, refused):
        refused(CONFIG, *fragments, overrides=overrides)

    def test_inside_a_file_are_refused(self, refused, tmp_path):
        file = tmp_path / "experiment" / "mine.yaml"
        file.parent.mkdir()
        file.write_text("# @package _global_\nmodel:\n  n_layers: 3\n")
        overrides = ["--config-dir", tmp_path, "experiment=mine"]
        refused(CONFIG, "model.n_layers=3", "n_layer", overrides=overrides)


class TestData:
    @pytest.fixture
    def prepared(self, tmp_path):
        """A prepared folder: three training shards and one of validation, each of some hundred tokens."""
        folder = tmp_path / "prepared"
        words = random.Random(0).choices(["sun", "moon", "stars", "and"], k=3000)
        texts = [Document(str(n), [" ".join(words[n::20])]) for n in range(20)]
        options = {"source": "words", "revision": "1", "rule": ByKey(0.2)}
        prepare(folder, [InMemory("first", texts[:10]), InMemory("second", texts[10:])], Bytes(), **options)
        return folder

    def test_of_less_than_a_batch(self, refused):
        refused(DATA, "2,000", "batch_size=1000", overrides=["batch_size=1000"])

    def test_of_less_than_a_validation_block(self, refused):
        refused(
            DATA,
            "1,000",
            "block_size=1024",
            overrides=["model.block_size=1024", "batch_size=1", "micro_batch_size=1"],
        )

    def test_that_is_not_there(self, refused, tmp_path):
        refused(MISSING, f"data.path={tmp_path}/no", overrides=[f"data.path={tmp_path}/no"])

    def test_without_a_validation_file(self, refused, token_files, tmp_path):
        shutil.copy(token_files / "train.bin", tmp_path)
        refused(MISSING, f"data.path={tmp_path}", "*val*.bin", overrides=[f"data.path={tmp_path}"])

    def test_with_half_a_token(self, refused, token_files, tmp_path):
        shutil.copytree(token_files, tmp_path / "cut")
        os.truncate(tmp_path / "cut" / "val.bin", 1001)
        refused(DATA, "val.bin", "1,001 bytes", overrides=[f"data.path={tmp_path}/cut"])

    def test_with_a_word_that_the_tokenizer_has_not(self, refused, token_files, tmp_path):
        shutil.copytree(token_files, tmp_path / "altered")
        with (tmp_path / "altered" / "train.bin").open("r+b") as file:
            file.seek(1000)
            file.write(b"\x39\x30")
        refused(DATA, "train.bin", "12345", overrides=[f"data.path={tmp_path}/altered"])

    @pytest.mark.parametrize("shard", ["train_00001.bin", "validation_00000.bin"])
    @pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
    def test_with_a_bad_shard(self, damage, shard, refused, prepared):
        path = prepared / shard
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            os.truncate(path, path.stat().st_size - 2)
        else:
            flip(path, path.stat().st_size // 2)
        how = {"missing": "missing", "truncated": "bytes, not", "altered": "SHA-256"}[damage]
        refused(MISSING if damage == "missing" else DATA, path, how, overrides=[f"data.path={prepared}"])

    def test_with_a_bad_manifest(self, refused, prepared):
        os.truncate(prepared / "manifest.json", 100)
        refused(DATA, prepared / "manifest.json", overrides=[f"data.path={prepared}"])

    def test_of_another_tokenizer(self, refused, prepared):
        overrides = [f"data.path={prepared}", "data.tokenizer=gpt2", "model.vocab_size=50257"]
        refused(DATA, "data.tokenizer=gpt2", "tokenizer=bytes", overrides=overrides)

    def test_that_is_good_trains(self, tiny, prepared, tmp_path):
        assert tiny(tmp_path / "run", f"data.path={prepared}").code == 0

    @pytest.mark.parametrize("needed_for", ["samples", "preparation"])
    def test_gpt2_vocabulary_offline(self, needed_for, refused, tmp_path):
        (tmp_path / "cache").mkdir()
        (tmp_path / "text.txt").write_text("words " * 1000)
        dead_end = "http://127.0.0.1:9"
        environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "HTTPS_PROXY": dead_end}
        environment |= {"https_proxy": dead_end, "NO_PROXY": "", "no_proxy": ""}
        overrides = ["data.tokenizer=gpt2", "model.vocab_size=50257"]
        if needed_for == "samples":
            overrides += ["sample_interval=2"]
        else:
            overrides += ["data=text", f"data.path={tmp_path}/text.txt", f"data.folder={tmp_path}/tokens"]
        refused(UNAVAILABLE, "data.tokenizer=gpt2", "TIKTOKEN", overrides=overrides, environment=environment)


class TestPlace:
    def test_that_cannot_be_written(self, refused, tmp_path):
        (tmp_path / "file").write_text("")
        refused(OUTPUT, f"run_dir={tmp_path}/file/run", folder=tmp_path / "file" / "run")

    def test_that_is_a_file(self, refused, tmp_path):
        (tmp_path / "file").write_text("")
        refused(OUTPUT, f"run_dir={tmp_path}/file", folder=tmp_path / "file")

    def test_that_was_empty_stays(self, refused, tmp_path):
        (tmp_path / "empty").mkdir()
        refused(DATA, "batch_size=1000", overrides=["batch_size=1000"], folder=tmp_path / "empty")

    def test_that_holds_something_else_gets_nothing(self, refused, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").write_text("mine")
        refused(DATA, "batch_size=1000", overrides=["batch_size=1000"], folder=tmp_path / "other")

    def test_that_another_process_uses(self, runs, tiny, token_files, tmp_path):
        folder, ready, go = tmp_path / "run", tmp_path / "ready", tmp_path / "go"
        arguments = [*TINY, f"data.path={token_files}", f"run_dir={folder}"]
        owner = runs.start(*arguments, hooks=[["pause", 3, str(ready), str(go)]])
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline
        try:
            before = contents(folder)
            second = tiny(folder)
            after = contents(folder)
        finally:
            go.touch()
        assert second.code == OUTPUT and f"run_dir={folder}" in second.errors[0]
        assert len(second.err.splitlines()) == 1
        assert after == before
        assert runs.wait(owner).code == 0
        assert tiny(folder).code == 0


class TestRunThatIsThere:
    @pytest.mark.parametrize(
        ("overrides", "fragments"),
        [
            (["model.n_embd=32"], ["model.n_embd=32", "model.n_embd=16"]),
            (["model.bias=true"], ["model.bias=True", "model.bias=False"]),
            (["optimizer.lr=1e-5"], ["optimizer.lr=1e-05", "optimizer.lr=0.0006"]),
            (["optimizer=adamw", "~hessian.interval"], ["hessian._target_=", "GNB", "NoHessian"]),
            (["seed=2"], ["seed=2", "seed=1337"]),
            (["max_steps=7"], ["max_steps=7", "max_steps=6"]),
            (["resume=never"], ["resume=never"]),
        ],
        ids=lambda value: value[0],
    )
    def test_is_not_continued_with_other_settings(self, overrides, fragments, refused, run):
        refused(CONFIG, *fragments, run, overrides=overrides, folder=run)

    def test_that_was_killed_before_it_saved_is_not_either(self, refused, run):
        shutil.rmtree(run / "checkpoints")
        refused(CONFIG, "seed=2", "seed=1337", run, overrides=["seed=2"], folder=run)

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
    def test_with_a_missing_file(self, name, refused, run):
        (run / "checkpoints" / "step_00000003" / name).unlink()
        refused(MISSING, "step_00000003", name, folder=run)

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
    @pytest.mark.parametrize("where", [0.0, 0.5, 0.9])
    def test_with_a_flipped_bit(self, name, where, refused, run):
        path = run / "checkpoints" / "step_00000003" / name
        flip(path, int(path.stat().st_size * where))
        refused(DATA, path, folder=run)
        refused(DATA, path, overrides=[f"resume={run}"])
        refused(DATA, path, overrides=[f"init_from={run}"])

    def test_with_an_empty_checkpoint(self, refused, run):
        (run / "checkpoints" / "step_00000005").mkdir()
        refused(MISSING, "step_00000005", folder=run)

    def test_with_altered_metrics(self, refused, run):
        path = run / "metrics.jsonl"
        path.write_text(path.read_text().replace('{"step": 2', '{"step": two', 1))
        refused(DATA, path, "line 3", folder=run)

    def test_with_damaged_settings_and_no_checkpoint(self, refused, run):
        shutil.rmtree(run / "checkpoints")
        os.truncate(run / "config.json", 50)
        refused(DATA, run / "config.json", folder=run)


class TestAnotherRun:
    def test_that_must_be_there(self, refused):
        refused(MISSING, "resume=must", overrides=["resume=must"])

    def test_that_is_not_there(self, refused, tmp_path):
        refused(MISSING, f"resume={tmp_path}/no", overrides=[f"resume={tmp_path}/no"])
        refused(MISSING, f"{tmp_path}", overrides=[f"resume={tmp_path}"])

    def test_with_weights_of_another_shape(self, refused, run):
        overrides = [f"init_from={run}", "model.n_embd=32"]
        refused(CONFIG, "model.n_embd=32", f"init_from={run}", "16", overrides=overrides)

    def test_without_weights(self, refused, tmp_path):
        refused(MISSING, tmp_path, overrides=[f"init_from={tmp_path}/no"])

    def test_of_other_settings(self, refused, run):
        overrides = [f"resume={run}", "model.n_layer=2"]
        refused(CONFIG, "model.n_layer=2", "model.n_layer=1", overrides=overrides)


class TestPackages:
    @pytest.mark.parametrize("package", ["wandb", "tensorboard"])
    def test_that_are_not_installed(self, package, refused):
        overrides = [f"tracker={package}"] + ["tracker.wandb.mode=offline"] * (package == "wandb")
        hooks = [["hide_package", package]]
        refused(UNAVAILABLE, f"tracker={package}", "pip install", overrides=overrides, hooks=hooks)


def flip(path, position):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
