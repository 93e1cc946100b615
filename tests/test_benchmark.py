"""The benchmark: that it compares equal work, and says what it measured."""

import json
import os
import re
import runpy
import statistics
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from sophia_train.benchmarks import data, hessian, loader, memory, optimizer, scaling, tokenizer_alone, train
from sophia_train.errors import RunError

NAMES = ["sophia_train, AdamW", "transformers, AdamW", "sophia_train, Sophia-G"]
PEAK = r"\d+\.\d\d" if torch.cuda.is_available() else "-"  # GB, in a table
FLAGS = ["train", "--batch-size", "2", "--micro-batch-size", "1", "--repeats", "2"]


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)  # and back to what it was
        yield runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "benchmark.py"))["main"]


@pytest.fixture(scope="module")
def measured(benchmark, tmp_path_factory):
    """The exit code of a small benchmark and the JSON that it wrote."""
    file = tmp_path_factory.mktemp("benchmark") / "train.json"
    return benchmark([*FLAGS, "--json", str(file)]), json.loads(file.read_text())


def test_both_do_the_same_work(measured):
    code, report = measured
    assert code == 0
    losses = {row["name"]: row["losses"] for row in report["results"]}
    assert list(losses) == NAMES
    ours, theirs, sophia = losses.values()
    assert len(ours) == len(theirs) == len(sophia) == 22  # 2 to warm up, 2 repeats of 10
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert report["largest_loss_difference"] == max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert sophia[0] == pytest.approx(ours[0], abs=1e-6)  # the same weights and words
    assert sophia[-1] != pytest.approx(ours[-1], abs=1e-4)  # another optimizer


def test_figures_follow_from_the_times(measured):
    _, report = measured
    tokens, steps = report["settings"]["tokens_per_step"], report["settings"]["steps"]
    assert tokens == 2 * 256
    theirs = report["results"][1]["seconds"]
    for row in report["results"]:
        assert len(row["seconds"]) == report["settings"]["repeats"] == 2
        assert all(second > 0 for second in row["seconds"])
        assert row["step_ms"] == pytest.approx(1000 * statistics.median(row["seconds"]) / steps)
        assert row["tokens_per_second"] == pytest.approx(1000 * tokens / row["step_ms"])
        ratios = [other / own for own, other in zip(row["seconds"], theirs, strict=True)]
        assert row["ratio"] == pytest.approx(statistics.median(ratios))
    assert report["results"][1]["ratio"] == 1


def test_it_says_what_it_ran_on(measured):
    environment = measured[1]["environment"]
    assert environment["threads"] >= 1
    assert {"python", "torch", "transformers", "device", "cpus", "platform"} <= environment.keys()


def test_the_table_fits_a_narrow_terminal(benchmark, measured, capsys):
    Console(width=80).print(train.table(measured[1]))
    print(train.notes(measured[1]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in NAMES:
        assert (
            sum(
                bool(re.match(rf"{name} +[\d,]+ +[\d.,]+ +\d+\.\d\d +5\.\d+ +{PEAK} *$", line))
                for line in lines
            )
            == 1
        )


# What the benchmark uses of nanoGPT's model.py, on layers of ours, so that losses have to be the same.
NANOGPT = """
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sophia_train.models.gpt2 import GPT2Config, Transformer


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = Transformer(GPT2Config(**vars(config)))
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        print("number of parameters")

    def forward(self, idx, targets):
        logits = self.lm_head(self.transformer(idx))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using fused AdamW")
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
"""


def test_nanogpt_takes_the_place_of_transformers(benchmark, tmp_path, capsys):
    (tmp_path / "model.py").write_text(NANOGPT)
    file = tmp_path / "train.json"
    flags = ["--nanogpt", str(tmp_path), "--batch-size", "1", "--repeats", "1", "--json", str(file)]
    assert benchmark(["train", *flags]) == 0
    report, lines = json.loads(file.read_text()), capsys.readouterr().out.splitlines()
    rows = {row["name"]: row for row in report["results"]}
    assert list(rows) == ["sophia_train, AdamW", "nanoGPT, AdamW", "sophia_train, Sophia-G"]
    ours, theirs, sophia = (row["losses"] for row in rows.values())
    products = 1e-3 if torch.cuda.is_available() else 1e-5  # TF32 as nanoGPT has it, or float32
    assert ours == pytest.approx(theirs, abs=products) and len(set(theirs)) == 12
    assert sophia[0] == pytest.approx(ours[0], abs=1e-6) and sophia[-1] != pytest.approx(ours[-1], abs=1e-6)
    for row in rows.values():
        assert row["ratio"] == pytest.approx(rows["nanoGPT, AdamW"]["seconds"][0] / row["seconds"][0])
        assert (row["peak_gb"] is not None) == torch.cuda.is_available()
    assert "without biases" in report["settings"]["size"] and "50,304 words" in report["settings"]["size"]
    assert max(map(len, lines)) <= 80
    assert not any("parameters" in line or "fused" in line for line in lines)  # the other's own words
    assert any(
        re.match(rf"nanoGPT, AdamW +[\d,]+ +[\d.,]+ +1\.00 +1\d\.\d+ +{PEAK} *$", line) for line in lines
    )
    assert any(re.search(r"nanoGPT model\.py [\da-f]{12}$", line) for line in lines)


@pytest.mark.parametrize("command", [["train", "--nanogpt"], ["optimizer", "--official"]])
@pytest.mark.parametrize(
    ("content", "code", "message"), [(None, 66, "has no"), ("GPTConfig = 1\n", 64, "give a checkout of")]
)
def test_a_folder_that_is_no_checkout_is_refused(
    command, content, code, message, benchmark, tmp_path, capsys
):
    for name in ("model.py", "sophia.py"):
        if content is not None:
            (tmp_path / name).write_text(content)
    assert benchmark([*command, str(tmp_path)]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err and f"{command[1]} {tmp_path}" in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "command"),
        (["fly"], "fly"),
        (["train", "--model", "gpt2_micro"], "gpt2_micro"),
        (["train", "--batch-size", "3", "--micro-batch-size", "2"], "micro_batch_size = 2"),
        (["train", "--steps", "5"], "multiple of 10"),
        (["train", "--repeats", "0"], "--repeats"),
        (["train", "--precision", "fp16"], "--precision"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, benchmark, capsys):
    assert benchmark(flags) == 64
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


@pytest.fixture(scope="module")
def cost(benchmark, tmp_path_factory):
    """The JSON of a small `hessian` benchmark."""
    file = tmp_path_factory.mktemp("benchmark") / "hessian.json"
    runs = ["optimizer=sophia_g hessian.batch_size=1", "optimizer=sophia_empirical_fisher"]
    flags = ["hessian", "--batch-size", "2", "--repeats", "2", "--runs", *runs, "--json", str(file)]
    assert benchmark(flags) == 0
    return json.loads(file.read_text())


def test_the_cost_of_a_hessian_is_that_of_its_passes(cost):
    rows = {row["name"]: row for row in cost["results"]}
    assert list(rows)[0] == "optimizer=adamw" and rows["optimizer=adamw"]["overhead"] == 0
    flops = [row["hessian_flops_share"] for row in rows.values()]
    assert flops == pytest.approx([0, 1 / 21, 0])  # one of 2 sequences, every tenth step
    adamw = rows["optimizer=adamw"]["seconds"]
    for row in rows.values():
        assert len(row["seconds"]) == 2
        ratios = [own / theirs for own, theirs in zip(row["seconds"], adamw, strict=True)]
        assert 1 / (1 + row["overhead"]) == pytest.approx(statistics.median(1 / ratio for ratio in ratios))


def test_the_table_of_costs_fits_a_narrow_terminal(cost, capsys):
    Console(width=80).print(hessian.table(cost))
    print(hessian.notes(cost))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.match(rf"sophia_g batch_size=1 .* 4\.8% +{PEAK} *$", line) for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "15"], "multiple of 10"),
        (["--runs", "optimizer=sofia_g"], "sophia_g?"),
        (["--runs", "optimizer=sophia_lite", "--steps", "10"], "multiple of 20"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(flags, message, benchmark, capsys):
    assert benchmark(["hessian", *flags]) == 64
    assert message in capsys.readouterr().err


# What the benchmark uses of the official sophia.py: another way to write the same update.
OFFICIAL = """
import torch


class SophiaG(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, rho, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay})

    @torch.no_grad()
    def update_hessian(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), hessian=torch.zeros_like(p))
                state["hessian"].mul_(group["betas"][1]).add_(p.grad**2 * (1 - group["betas"][1]))

    @torch.no_grad()
    def step(self, closure=None, bs=5120):
        for group in self.param_groups:
            for p in group["params"]:
                m, h = self.state[p]["exp_avg"], self.state[p]["hessian"]
                m.mul_(group["betas"][0]).add_(p.grad * (1 - group["betas"][0]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                ratio = (m.abs() / (group["rho"] * bs * h + 1e-15)).clamp(max=1)
                p.sub_(group["lr"] * m.sign() * ratio)
"""
STEP_FLOOR, UPDATE_FLOOR = "step, floor: 24 bytes each", "update_hessian, floor: 16 bytes each"
STEPS = [
    "AdamW, fused",
    "AdamW, foreach",
    "Sophia",
    "Sophia, foreach",
    "Sophia's rule, torch.compile",
    "official SophiaG.step",
]
UPDATES = ["Sophia.update_hessian", "official SophiaG.update_hessian"]


@pytest.fixture(scope="module")
def alone(benchmark, tmp_path_factory):
    """The JSON of a small `optimizer` benchmark with all contestants."""
    folder = tmp_path_factory.mktemp("optimizer")
    (folder / "sophia.py").write_text(OFFICIAL)
    flags = ["--models", "gpt2_nano", "--official", str(folder), "--compile", "--repeats", "3"]
    assert benchmark(["optimizer", *flags, "--json", str(folder / "json")]) == 0
    return json.loads((folder / "json").read_text())


def rows_of(report):
    return {row["name"]: row for row in report["results"][0]["rows"]}


def test_optimizers_that_are_compared_do_the_same_work(alone):
    rows = rows_of(alone)
    assert list(rows) == [STEP_FLOOR, *STEPS, UPDATE_FLOOR, *UPDATES]
    adamw, _, *sophias = (rows[name]["change"] for name in STEPS)
    most = 6e-4 * alone["results"][0]["parameters"] ** 0.5  # lr in each coordinate
    assert 0.9 * most < adamw < 1.01 * most
    assert rows["AdamW, foreach"]["change"] == pytest.approx(adamw, rel=1e-4)
    assert 0.5 * most < sophias[0] < 0.95 * most  # some coordinates are clipped, others are not
    assert sophias == pytest.approx([sophias[0]] * 4, rel=1e-4)
    ours, official = (rows[name]["change"] for name in UPDATES)
    assert ours == pytest.approx(official, rel=1e-4) and ours > 0


def test_floors_and_ratios_follow_from_the_times(alone):
    rows, model = rows_of(alone), alone["results"][0]
    floor, other = rows[STEP_FLOOR]["seconds"], rows[UPDATE_FLOOR]["seconds"]
    assert [a / b for a, b in zip(floor, other, strict=True)] == pytest.approx([24 / 16] * 3)
    copied = model["copy_bytes_per_second"] * statistics.median(floor)
    assert copied == pytest.approx(24 * model["parameters"])
    adamw = rows["AdamW, fused"]["seconds"]
    for row in rows.values():
        assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
        assert row["ms"] == pytest.approx(1000 * statistics.median(row["seconds"]))
        least = floor if row["work"] == "step" else other
        ratios = [own / lowest for own, lowest in zip(row["seconds"], least, strict=True)]
        assert row["over_floor"] == pytest.approx(statistics.median(ratios))
        if row["work"] == "step":
            ratios = [own / theirs for own, theirs in zip(row["seconds"], adamw, strict=True)]
            assert row["over_adamw"] == pytest.approx(statistics.median(ratios))
        else:
            assert row["over_adamw"] is None  # a refresh is not a step


def test_the_table_of_optimizers_fits_a_narrow_terminal(alone, capsys):
    Console(width=80).print(optimizer.table(alone))
    print(optimizer.notes(alone))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].strip() == "gpt2_nano, 861,312 parameters"
    for name in [STEP_FLOOR, *STEPS]:
        figures = rf"  {re.escape(name)} +[\d,]+\.\d{{3}} +\d+\.\d\d +\d+\.\d\d +[\d,]+\.\d{{3}} *$"
        assert sum(bool(re.match(figures, line)) for line in lines) == 1
    assert any(re.search(r"^official: sophia\.py [\da-f]{12}$", line) for line in lines)


def test_the_official_sophia_and_compilation_are_asked_for(benchmark, tmp_path):
    flags = ["--models", "gpt2_nano", "--repeats", "1", "--json", str(tmp_path / "json")]
    assert benchmark(["optimizer", *flags]) == 0
    rows = rows_of(json.loads((tmp_path / "json").read_text()))
    compiled = STEPS[4:5] if torch.cuda.is_available() else []
    assert list(rows) == [STEP_FLOOR, *STEPS[:4], *compiled, UPDATE_FLOOR, UPDATES[0]]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--models", "gpt2_micro"], 64, "gpt2_micro"),
        (["--models", "gpt2_nano", "--runs", "optimizer=sofia_g"], 64, "sophia_g?"),
        (["--models", "gpt2_nano", "--runs", "optimizer.lr=-1"], 64, "optimizer.lr=-1"),
        (["--micro-batch-size", "0"], 64, "--micro-batch-size"),
        (["--models", "gpt2_nano", "--micro-batch-size", "2", "--runs", "batch_size=3"], 64, "batch_size=3"),
        pytest.param(
            ["--models", "gpt2_nano"],
            69,
            "GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_memory_that_cannot_be_measured_is_refused_in_one_line(flags, code, message, benchmark, capfd):
    assert benchmark(["memory", *flags]) == code
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_memory_is_that_of_two_steps_with_a_refresh_in_each():
    overrides = ["optimizer=sophia_g", "micro_batch_size=1", "batch_size=2"]
    config = memory.config_of("gpt2_nano", overrides)
    assert config.max_steps == 2 and config.hessian["interval"] == 1
    assert "interval" not in memory.config_of("gpt2_nano", ["optimizer=adamw"]).hessian
    measured = memory.in_process_of_its_own("gpt2_nano", overrides)
    assert measured["micro_batch_size"] == 1 and not measured["out_of_memory"]
    first, second = measured["losses"]
    assert first == pytest.approx(second, abs=0.2) and first != second  # near the log of 257 words
    if torch.cuda.is_available():
        assert 0 < measured["peak_gb"] <= measured["reserved_gb"]
    else:
        assert measured["peak_gb"] is None and measured["reserved_gb"] is None


def test_a_process_that_fails_says_why(capfd):
    with pytest.raises(RunError, match="gpt2_nano optimizer=nadam.* code 64"):
        memory.in_process_of_its_own("gpt2_nano", ["optimizer=nadam"])
    assert "error: optimizer=nadam" in capfd.readouterr().err


def test_running_out_of_memory_is_told_from_other_errors():
    def within_another() -> None:
        try:
            raise torch.OutOfMemoryError("tried to allocate")
        except torch.OutOfMemoryError:
            raise RuntimeError("in a compiled function") from None

    def other() -> None:
        raise RuntimeError("in a kernel")

    assert memory.runs_out_of_memory(within_another)
    assert not memory.runs_out_of_memory(lambda: None)
    with pytest.raises(RuntimeError, match="in a kernel"):
        memory.runs_out_of_memory(other)


def test_the_table_of_memory_has_a_row_for_what_does_not_fit(capsys):
    fits = {"out_of_memory": False, "micro_batch_size": 32, "peak_gb": 24.216, "reserved_gb": 31.0}
    too_large = {"out_of_memory": True, "micro_batch_size": None, "peak_gb": 139.0, "reserved_gb": 140.0}
    names = {"run": "optimizer=sophia_g hessian=gnb_paper"}
    results = [{"model": "gpt2_125m", **names, **fits}, {"model": "gpt2_1_5b", **names, **too_large}]
    Console(width=80).print(memory.table({"results": results}))
    _, first, second = capsys.readouterr().out.splitlines()
    assert re.match(r"gpt2_125m +sophia_g gnb_paper +32 +24\.22 +31\.00 *$", first)
    assert re.match(r"gpt2_1_5b +sophia_g gnb_paper +- +out of memory *$", second)


def test_a_start_is_measured_to_the_first_step_and_ended(benchmark, tmp_path, capsys):
    file = tmp_path / "json"
    flags = ["--batch-size", "2", "--runs", "compile=false optimizer=adamw", "--repeats", "2"]
    before = psutil.Process().children()
    assert benchmark(["startup", *flags, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["results"]
    assert row["cold_seconds"] > 0 and len(row["warm_seconds"]) == 2
    assert psutil.Process().children() == before
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"compile=false optimizer=adamw +\d+\.\d +\d+\.\d +\d+\.\d \d+\.\d$", lines[1])


@pytest.mark.parametrize(
    ("run", "message"),
    [("optimizer=nadam", "error: optimizer=nadam"), ("data.path=/nowhere", "first step: error: data.path=")],
)
def test_a_start_that_fails_says_why_in_one_line(run, message, benchmark, capsys):
    assert benchmark(["startup", "--batch-size", "2", "--runs", run]) != 0
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_does_not_fit_into_the_gpu_is_a_row(benchmark, tmp_path, capsys):
    file, run = tmp_path / "json", "optimizer=adamw compile=false"
    flags = ["--models", "gpt2_nano", "gpt2_770m", "--micro-batch-size", "256", "--runs", run]
    assert benchmark(["memory", *flags, "--json", str(file)]) == 0
    fits, too_large = json.loads(file.read_text())["results"]
    assert not fits["out_of_memory"] and 0 < fits["peak_gb"] <= fits["reserved_gb"]
    assert too_large["out_of_memory"]
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.match(r"gpt2_770m +adamw compile=false +256 +out of memory *$", line) for line in lines)


@pytest.fixture(scope="module")
def fed(benchmark, tmp_path_factory):
    """The JSON of a small `loader` benchmark, on random words and on token files."""
    folder = tmp_path_factory.mktemp("loader")
    words = np.random.default_rng(0).integers(0, 256, 20_000, dtype="<u2")
    for split in ("train", "val"):
        words.tofile(folder / f"{split}.bin")
    flags = ["loader", "--batch-size", "2", "--micro-batch-size", "1", "--steps", "3", "--repeats", "2"]
    reports = []
    for name, more in (
        ("random", []),
        ("files", ["--data", f"data=token_files data.path={folder} data.tokenizer=bytes"]),
    ):
        assert benchmark([*flags, *more, "--json", str(folder / name)]) == 0
        reports.append(json.loads((folder / name).read_text()))
    return reports


def test_only_what_is_fed_differs(fed):
    for report in fed:
        batches, constant = (row["losses"] for row in report["results"])
        assert len(batches) == len(constant) == 8  # 2 to warm up, 2 repeats of 3
        assert set(constant) == {batches[0]}  # the first batch again and again, and a model that stays
        assert len(set(batches)) == 8  # no batch twice
    random_words, files = (report["results"][0]["losses"] for report in fed)
    assert not set(random_words) & set(files)
    assert fed[0]["settings"]["data"] == "random words" and "data.path=" in fed[1]["settings"]["data"]


def test_the_loaders_share_follows_from_the_times(fed):
    for report in fed:
        batches, constant = (row["seconds"] for row in report["results"])
        assert len(batches) == len(constant) == 2 and min(*batches, *constant) > 0
        ratio = statistics.median(a / b for a, b in zip(batches, constant, strict=True))
        assert report["loader_share"] == pytest.approx(1 - 1 / ratio)
        for row in report["results"]:
            assert row["step_ms"] == pytest.approx(1000 * statistics.median(row["seconds"]) / 3)


def test_the_table_of_the_loader_fits_a_narrow_terminal(fed, capsys):
    Console(width=80).print(loader.table(fed[0]))
    print(loader.notes(fed[0]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("loader's share ") and line.rstrip().endswith("%") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        ("data=token_files data.path=nowhere", 64, "model.vocab_size=257"),
        ("data=token_files data.path=nowhere data.tokenizer=bytes", 66, "data.path=nowhere"),
        ("data=tokenfiles", 64, "token_files?"),
    ],
)
def test_data_that_cannot_be_read_is_refused(overrides, code, message, benchmark, capsys):
    assert benchmark(["loader", "--data", overrides]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


TEXTS = [
    "The quick brown fox jumps.\n" * 40,
    "",
    "éß 世界 \U0001f600\n\n  indented\n" * 9,
    "x" * 500,
    "a b c",
]


@pytest.fixture(scope="module")
def prepared(benchmark, tmp_path_factory):
    """The JSON of a small `data` benchmark with two processes."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not cache or not any(Path(cache).glob("*")):
        pytest.skip("GPT-2's vocabulary is not cached (TIKTOKEN_CACHE_DIR)")
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "file.txt").write_text(TEXTS[0] + TEXTS[2])
    scratch, file = folder / "scratch", folder / "data.json"
    scratch.mkdir()
    flags = ["--workers", "2", "--repeats", "2", "--scratch", str(scratch), "--json", str(file)]
    assert benchmark(["data", str(folder / "[fr]*.[tj]*"), *flags]) == 0
    assert not any(scratch.iterdir())
    return json.loads(file.read_text())


forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of datasets, from Python 3.12 on


@forks
def test_all_make_the_same_tokens(prepared):
    import tiktoken

    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    tokens = sum(len(encode(text)) + 1 for text in [*TEXTS, TEXTS[0] + TEXTS[2]])
    assert {row["name"]: row["tokens"] for row in prepared["results"]} == {
        "prepare_data.py": tokens,
        "tiktoken alone": tokens,
        "nanoGPT's recipe": tokens,
    }
    assert prepared["settings"]["documents"] == 6
    assert prepared["settings"]["text_bytes"] == sum(len(text.encode()) for text in TEXTS) + len(
        (TEXTS[0] + TEXTS[2]).encode()
    )


@forks
def test_rates_and_ratios_follow_from_the_seconds(prepared):
    times = {row["name"]: row["seconds"] for row in prepared["results"]}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times.values())
    for row in prepared["results"]:
        rate = row["tokens"] / statistics.median(row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(rate)
        assert row["tokens_per_second_per_core"] == pytest.approx(rate / 2)
        for key, other in (("over_recipe", "nanoGPT's recipe"), ("of_bare", "tiktoken alone")):
            ratios = [theirs / own for own, theirs in zip(row["seconds"], times[other], strict=True)]
            assert row[key] == pytest.approx(statistics.median(ratios))
        # less than with the time of its start: what ours is measured by is the faster then
        assert 0 < row["of_bare_without_its_start"] < row["of_bare"]


@forks
def test_the_table_of_preparation_fits_a_narrow_terminal(prepared, capsys):
    Console(width=80).print(data.table(prepared))
    print(data.notes(prepared))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for row in prepared["results"]:
        figures = rf"{row['name']} +[\d,]+ +[\d,]+ +\d+\.\d\d +\d+% *$"
        assert sum(bool(re.match(figures, line)) for line in lines) == 1


def test_the_tokenizer_alone_gets_the_documents_as_they_are(tmp_path, capsys, monkeypatch):
    encoded = []

    class Words:
        def encode(self, text):
            return []

        def encode_array(self, text):
            encoded.append(text)
            return text.split()

    monkeypatch.setattr(tokenizer_alone, "load_tokenizer", lambda name: Words())
    texts = [*TEXTS, "half of a pair \ud83d"]
    tokenizer_alone.write(texts, tmp_path / "share")
    tokenizer_alone.main(tmp_path / "share")
    assert encoded == texts
    assert int(capsys.readouterr().out.split()[0]) == sum(len(text.split()) + 1 for text in texts)


@pytest.fixture(scope="module")
def scaled(benchmark, tmp_path_factory):
    """The JSON of two optimizers on one process and on two that share a model, and what was printed."""
    folder = tmp_path_factory.mktemp("scaling")
    flags = ["--processes", "1", "2", "--parallel", "fsdp", "--steps", "2", "--repeats", "2"]
    flags += ["--runs", "optimizer=adamw", "optimizer=sgd", "optimizer=adamw micro_batch_size=2"]
    flags += ["--batch-size", "4", "--micro-batch-size", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(folder)  # the data are prepared there
        assert benchmark(["scaling", *flags, "--json", str(folder / "json")]) == 0
    return json.loads((folder / "json").read_text())


@pytest.mark.slow
def test_several_processes_do_the_work_of_one(scaled):
    rows = {(row["run"], row["processes"]): row for row in scaled["results"]}
    assert len(rows) == 6
    for (run, processes), row in rows.items():
        alone, first = rows[run, 1], rows["optimizer=adamw", processes]
        assert row["parallel"] == (None if processes == 1 else "fsdp")
        assert row["losses"] == pytest.approx(alone["losses"], abs=1e-5) and len(row["losses"]) == 6
        of_the_optimizer = rows[run.partition(" ")[0], 1]["losses"]
        apart = [abs(a - b) for a, b in zip(row["losses"], of_the_optimizer, strict=True)]
        assert row["loss_difference"] == max(apart)
        assert row["tokens_per_second"] == pytest.approx(2 * 4 * 256 / statistics.median(row["seconds"]))
        assert row["speed_up"] == pytest.approx(row["tokens_per_second"] / alone["tokens_per_second"])
        assert row["overhead"] == pytest.approx(first["tokens_per_second"] / row["tokens_per_second"] - 1)
    assert rows["optimizer=adamw", 1]["losses"] != rows["optimizer=sgd", 1]["losses"]


@pytest.mark.slow
def test_the_table_of_processes_fits_a_narrow_terminal(scaled, capsys):
    Console(width=80).print(scaling.table(scaled))
    print(scaling.notes(scaled))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(bool(re.match(r"(adamw|sgd) +(1|2 fsdp) +[\d,]+ +\d\.\d\d ", line)) for line in lines) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "3", "--batch-size", "4"], "batch_size=4"),
        (["--parallel", "fsdp", "--runs", "optimizer=sophia_h"], "parallel=fsdp"),
        (["--processes", "0"], "--processes"),
    ],
)
def test_processes_that_cannot_share_the_work_are_refused(flags, message, benchmark, capsys):
    assert benchmark(["scaling", *flags]) == 64
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
