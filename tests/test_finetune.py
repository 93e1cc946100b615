"""Going on from a Hugging Face folder with Sophia: `experiment=finetune`."""

import numpy as np
import pytest
from support import TINY, records

from sophia_train import checkpoint
from sophia_train.config import compose, run_config
from sophia_train.models import convert
from sophia_train.models.gpt2 import GPT2Config


def test_learns_a_new_text_from_where_the_model_was(runs, tiny, tmp_path):
    assert tiny(tmp_path / "base", "model.bias=true", "max_steps=60", "eval_interval=60").code == 0
    weights, manifest = checkpoint.load_weights(tmp_path / "base")
    convert.export_folder(weights, tmp_path / "hf", GPT2Config(**manifest["config"]["model"]))
    text = (np.cumsum(np.full(4000, 5)) % 200).astype("<u2")  # another pattern than the base's
    (tmp_path / "new").mkdir()
    text[:3000].tofile(tmp_path / "new" / "train.bin")
    text[3000:].tofile(tmp_path / "new" / "val.bin")
    shape = [
        each for each in TINY if each.startswith(("data", "model.", "micro_batch", "tracker", "eval_tokens"))
    ]
    shape += ["model.vocab_size=257"]
    shape += [
        "batch_size=8",
        "max_steps=80",
        "schedule.warmup_steps=8",
        "eval_interval=80",
        "log_interval=10",
    ]
    arguments = [*shape, f"data.path={tmp_path / 'new'}", f"init_from={tmp_path / 'hf'}", "optimizer.lr=3e-3"]
    ended = runs("experiment=finetune", *arguments, f"run_dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    losses = [record["val/loss"] for record in records(tmp_path / "run") if "val/loss" in record]
    untrained = runs(
        "experiment=finetune", *arguments, "optimizer.lr=0", "max_steps=9", f"run_dir={tmp_path / 'still'}"
    )
    assert untrained.code == 0
    still = [record["val/loss"] for record in records(tmp_path / "still") if "val/loss" in record]
    assert losses[0] == still[0] == still[-1]  # where the model was
    assert losses[-1] < losses[0] - 1.0


def test_goes_on_from_a_folder_at_a_tenth_of_the_rate():
    config = run_config(compose(["experiment=finetune", "data.path=x"]))
    assert config.init_from == "gpt2"
    scratch = run_config(compose(["optimizer=sophia_g"]))
    assert config.optimizer["lr"] == pytest.approx(scratch.optimizer["lr"] / 10)
    assert config.model.bias
