"""The Hydra tree and its checks: all of it composes, and nothing wrong with it reaches a run."""

import copy
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from sophia_train import launch, schema_check
from sophia_train.config import CONFIGS, build, compose, expand, from_json, run_config, to_json
from sophia_train.errors import ConfigError, RunError
from sophia_train.models.gpt2 import GPT2
from sophia_train.run_config import RunConfig, build_optimizer, with_processes

ROOT = Path(__file__).resolve().parent.parent
CHOICES = sorted((path.parent.name, path.stem) for path in CONFIGS.glob("*/*.yaml"))
NEEDED = {
    "text": ["data.path=x"],
    "token_files": ["data.path=x"],
    "finetune": ["data.path=x"],
    "hf": ["data.repo=owner/name"],
}  # settings without a default
WRONG = {"no": "such"}  # a value that no key takes


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, in which nothing may appear."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield folder
    assert not any(folder.iterdir())


@functools.cache
def configured(*overrides: str) -> RunConfig:
    return run_config(compose(overrides))


def plain(*overrides: str) -> dict:
    return to_json(configured(*overrides))


def refusal(settings: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        from_json(settings)
    return str(caught.value)


def section_of(settings: dict, key: str) -> tuple[dict, str]:
    *sections, name = key.split(".")
    for section in sections:
        settings = settings[section]
    return settings, name


def keys_of(settings: dict, prefix: str = "") -> list[str]:
    keys = []
    for name, value in settings.items():
        if isinstance(value, dict):
            keys += keys_of(value, f"{prefix}{name}.")
        elif name != "_target_":
            keys.append(prefix + name)
    return keys


FULL = ("optimizer=sophia_g", "data=text", "data.path=x", "tracker=[wandb,tensorboard]")


class TestEveryFile:
    @pytest.mark.parametrize(("group", "choice"), CHOICES)
    def test_composes_and_its_nodes_build(self, group, choice):
        needed = NEEDED.get(choice, ["data.path=x"] * choice.startswith("paper_")).copy()
        if group == "hessian":
            needed.append("optimizer=sophia_g")
        config = configured(f"{group}={choice}", *needed)
        for node in (config.data, config.schedule, config.hessian):
            assert type(build(node)).__module__.startswith("sophia_train.")
        with torch.device("meta"):
            optimizer = build_optimizer(config.optimizer, GPT2(config.model))
        assert optimizer.param_groups[0]["lr"] == config.optimizer["lr"]

    @pytest.mark.parametrize(
        ("choice", "millions"),
        [
            ("gpt2_nano", 0.85),
            ("gpt2_30m", 30),
            ("gpt2_125m", 124),
            ("gpt2_355m", 354),
            ("gpt2_540m", 537),
            ("gpt2_770m", 773),
            ("gpt2_1_5b", 1557),
        ],
    )
    def test_model_has_the_size_that_its_name_says(self, choice, millions):
        with torch.device("meta"):
            model = GPT2(configured(f"model={choice}").model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert parameters / 1e6 == pytest.approx(millions, rel=0.02)

    def test_paper_presets_have_the_paper_s_settings(self):
        sophia = plain("experiment=paper/gpt2_125m_sophia_g")
        adamw = plain("experiment=paper/gpt2_125m_adamw")
        for settings in (sophia, adamw):
            assert (settings["batch_size"], settings["model"]["block_size"]) == (480, 1024)
            assert (settings["max_steps"], settings["gradient_clip"]) == (100_000, 1.0)
            assert settings["schedule"]["warmup_steps"] == 2000
            assert settings["schedule"]["final_lr_fraction"] == 0.05
            assert settings["optimizer"]["lr"] == 6e-4
        assert sophia["optimizer"]["betas"] == [0.96, 0.99]
        assert sophia["optimizer"]["gamma"] == 0.05
        assert sophia["optimizer"]["eps"] == 1e-12
        assert (sophia["hessian"]["interval"], sophia["hessian"]["batch_size"]) == (10, 240)
        assert (adamw["optimizer"]["betas"], adamw["optimizer"]["weight_decay"]) == ([0.9, 0.95], 0.1)
        differing = {key for key in sophia if sophia[key] != adamw[key]}
        assert differing == {"name", "run_dir", "model", "hessian", "optimizer"}

    def test_wheels_ship_the_tree(self):
        setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
        folders = {path.parent for path in (ROOT / "sophia_train").rglob("__init__.py")}
        packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
        assert set(setuptools["packages"]) == packages | {"sophia_train.configs"}
        assert setuptools["package-dir"] == {"sophia_train.configs": "configs"}
        patterns = setuptools["package-data"]["sophia_train.configs"]
        shipped = {path for pattern in patterns for path in CONFIGS.glob(pattern)}
        assert shipped == set(CONFIGS.rglob("*.yaml"))


class TestChoosing:
    @pytest.mark.parametrize(
        ("overrides", "estimator"),
        [
            (["optimizer=sophia_g"], "GNB"),
            (["optimizer=sophia_g_short"], "GNB"),
            (["optimizer=adamw"], "NoHessian"),
            (["experiment=demo"], "GNB"),
            (["experiment=demo", "optimizer=adamw"], "NoHessian"),
            (["experiment=paper/gpt2_125m_adamw", "optimizer=sophia_g"], "GNB"),
            (["optimizer=sophia_g", "hessian=none"], "NoHessian"),
            (["hessian=none", "optimizer=sophia_g"], "NoHessian"),
        ],
    )
    def test_an_optimizer_chooses_its_estimator(self, overrides, estimator):
        assert configured(*overrides).hessian["_target_"].endswith(f".{estimator}")

    @pytest.mark.parametrize(
        ("choice", "names"),
        [
            ("console", {"console"}),
            ("jsonl", set()),
            ("wandb", {"console", "wandb"}),
            ("[wandb,tensorboard]", {"console", "wandb", "tensorboard"}),
        ],
    )
    def test_trackers_work_together(self, choice, names):
        assert set(configured(f"tracker={choice}").tracker) == names

    @pytest.mark.parametrize(("batch_size", "part"), [(480, 32), (32, 32), (7, 7), (1, 1)])
    def test_the_hessian_takes_at_most_32_sequences(self, batch_size, part):
        assert configured(f"batch_size={batch_size}").hessian["batch_size"] == part

    def test_an_optimizer_can_choose_its_schedule_under_an_experiment(self):
        config = configured("experiment=demo", "optimizer=schedule_free")
        assert config.schedule["_target_"].endswith(".Constant") and config.schedule["warmup_steps"] == 60

    def test_a_plus_that_is_not_needed_does_no_harm(self):
        assert configured("+seed=3", "++max_steps=9999") == configured("seed=3", "max_steps=9999")

    def test_a_folder_of_one_s_own_is_searched(self, tmp_path):
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 5\n")
        assert compose(["experiment=mine"], tmp_path).seed == 5

    def test_settings_survive_json(self):
        config = configured(*FULL)
        assert from_json(json.loads(json.dumps(to_json(config)))) == config

    def test_processes_are_settled(self):
        assert with_processes(configured(), 4).processes == 4
        with pytest.raises(ConfigError, match="batch_size=480 .* processes = 7; use 476 or 483"):
            with_processes(configured(), 7)
        with pytest.raises(ConfigError, match="hessian.batch_size=3 .*use hessian.batch_size=2"):
            with_processes(configured("batch_size=6", "hessian.batch_size=3"), 2)


# What is typed, and what the one line must say: the key with its value, and the fix.
LINES = {
    "+max_stepz=5": ["max_stepz=5", "max_steps?"],
    "++max_stepz=5": ["max_stepz=5", "max_steps?"],
    "+foo=1": ["foo=1", "--help"],
    "lr=1e-3": ["lr=0.001", "optimizer.lr?"],
    "+optimizer.gama=0.1": ["optimizer.gama=0.1", "optimizer.gamma?"],
    "++optimizer.gama=0.1": ["optimizer.gama=0.1", "optimizer.gamma?"],
    "optimizer=adamw +optimizer.gamma=0.1": ["optimizer.gamma=0.1", "AdamW"],
    "modle=gpt2_nano": ["modle=gpt2_nano", "model?"],
    "model=gpt2_nanno": ["model=gpt2_nanno", "gpt2_nano?"],
    "optimizer=zzz": ["optimizer=zzz", "sophia_g, sophia_g_"],
    "optimizer=null": ["optimizer=null", "sophia_g, sophia_g_"],
    "model=5": ["model=5", "gpt2_125m"],
    "model=[gpt2_nano,gpt2_30m]": ["model=", "gpt2_nano?"],
    "tracker=[wandb,tensorbord]": ["tracker=tensorbord", "tensorboard?"],
    "optimizer.lr=6e-4x": ["optimizer.lr=6e-4x", "a number"],
    "optimizer.lr=nan": ["optimizer.lr=NaN", "a number"],
    "optimizer.lr=": ['optimizer.lr=""', "a number"],
    "model.n_layer.foo=3": ["model.n_layer=", "an integer"],
    "max_steps=1e5": ["max_steps=100000.0", "max_steps=100000"],
    "max_tokens=1e6": ["max_tokens=1000000.0", "max_tokens=1000000"],
    "~optimizer": ["optimizer", "not set"],
    "optimizer=adamw hessian=gnb": ["hessian._target_=", "GNB", "AdamW", "use hessian=none"],
    "optimizer=adamw gamma=auto": ["gamma._target_=", "AutoGamma", "AdamW", "use gamma=fixed"],
    "optimizer=adamw hessian=hutchinson": ["hessian._target_=", "Hutchinson", "AdamW", "use hessian=none"],
    "hessian=empirical_fisher hessian.batch_size=3": ["hessian.batch_size=3", "EmpiricalFisher"],
    "optimizer=sophia_robust optimizer.others.adamw.parameters=[embedings]": [
        'optimizer.others.adamw.parameters=["embedings"]',
        "kinds are embeddings, head",
    ],
    "optimizer=sophia_robust optimizer.others.adamw.parameters=embeddings": [
        "optimizer.others.adamw.parameters=embeddings",
        "such as [embeddings]",
    ],
    "optimizer=sophia_robust optimizer.others.adamw.parameters=['*']": [
        "optimizer has no parameters",
        '["*"]',
    ],
    "optimizer=sophia_robust optimizer.others.adamw.lrr=1": ["others.adamw.lrr=1", "others.adamw.lr?"],
    "optimizer=sophia_robust optimizer.others.adamw._target_=torch.optim.Adamm": [
        "torch.optim.Adamm",
        "Adam?",
    ],
    "optimizer.others.x.parameters=[embeddings]": ["optimizer.others.x=", "add optimizer.others.x._target_="],
    "optimizer.others=3": ["optimizer.others=3", "a mapping"],
    "data=text": ["data.path", "add data.path=<text>"],
    "tracker.wandb.project=x": ["tracker.wandb=", "tracker=<name>"],
    "name=${nme}": ["name=${nme}", "nme", "not found"],
    "hydra.run.dir=x": ["hydra.run.dir=x", "use run_dir"],
    "optimizer.lr=1e-3,2e-3": ["optimizer.lr=1e-3,2e-3", "several values need -m"],
    "optimizer.lr": ["optimizer.lr", "key=value"],
    "=3": ["=3", "key=value"],
    "-m seed=1,x": ["seed=x", "an integer"],
    "-m optimizer=adamw,sofia_g": ["optimizer=sofia_g", "sophia_g?"],
    "-m seed=interval(1,2)": ["seed=interval(1,2)", "commas"],
    "--nonsense": ["--nonsense", "--help"],
    "--cfg nonsense": ["nonsense", "job"],
}

# The same for settings that are set without Hydra, which is quicker.
VALUES = {
    "max_stepz=5": ["max_stepz=5", "max_steps?"],
    "n_layer=3": ["n_layer=3", "model.n_layer?"],
    "optimizer.gama=0.1": ["optimizer.gama=0.1", "optimizer.gamma?"],
    "optimizer=adamw optimizer.rho=0.1": ["optimizer.rho=0.1", "its keys are lr, betas"],
    "tracker=wandb tracker.wandb.projct=x": ["tracker.wandb.projct=x", "tracker.wandb.project?"],
    "optimizer.lr=true": ["optimizer.lr=true", "a number"],
    "optimizer.betas=[0.9]": ["optimizer.betas=[0.9]", "a list of 2"],
    "optimizer.betas=0.9": ["optimizer.betas=0.9", "a list of 2"],
    "optimizer=adamw optimizer.fused=5": ["optimizer.fused=5", "true or false or null"],
    "seed=true": ["seed=true", "an integer"],
    "name=125": ["name=125", """name="'125'\""""],
    "name=": ['name=""', "name=<"],
    "compile=maybe": ["compile=maybe", "auto, blocks, true, false"],
    "compile_cache=": ['compile_cache=""', "compile_cache=<"],
    "activation_checkpointing=all": ["activation_checkpointing=all", "none, blocks"],
    "profile=10": ["profile=10", "true or false"],
    "precision=fp64": ["precision=fp64", "auto, bf16, fp32"],
    "precision=fp16": ["precision=fp16", "loss scaler gives NaN", "use bf16"],
    "tracker=wandb tracker.wandb.mode=onlin": ["tracker.wandb.mode=onlin", "online, offline"],
    "dry_run=1": ["dry_run=1", "true or false"],
    "seed=-1": ["seed=-1", "at least 0"],
    "batch_size=0": ["batch_size=0", "at least 1"],
    "max_steps=0": ["max_steps=0", "at least 1"],
    "gradient_clip=-1": ["gradient_clip=-1", "0"],
    "sample_tokens=0": ["sample_tokens=0", "at least 1"],
    "optimizer.lr=-1": ["optimizer.lr=-1", "at least 0"],
    "optimizer.betas=[0.9,1.0]": ["optimizer.betas[1]=1.0", "below 1"],
    "optimizer=adamw optimizer.lr=-1": ["optimizer.lr=-1", "Invalid learning rate"],
    "optimizer=mars optimizer.lr=0": ["optimizer.lr=0 is not possible", "zero"],
    "optimizer=adamw optimizer.betas=[0.9,1.5]": ["optimizer.betas=[0.9, 1.5]", "at index 1"],
    "model.n_layer=0": ["model.n_layer=0", "at least 1"],
    "model.dropout=1.5": ["model.dropout=1.5", "below 1"],
    "model.n_head=5": ["model.n_head=5", "n_embd=768", "use n_embd=770"],
    "schedule.warmup_steps=-1": ["schedule.warmup_steps=-1", "at least 0"],
    "schedule.final_lr_fraction=2": ["schedule.final_lr_fraction=2", "between 0 and 1"],
    "hessian.interval=0": ["hessian.interval=0", "at least 1"],
    "hessian.gradient_clip=0": ["hessian.gradient_clip=0", "null for no clip"],
    "hessian.groups=40": ["hessian.groups=40", "32 sequences", "use hessian.groups=1"],
    "hessian=hutchinson hessian.probe=x": ["hessian.probe=x", "one of gaussian, rademacher"],
    "hessian=hutchinson hessian.micro_batch_size=0": ["hessian.micro_batch_size=0", "at least 1"],
    "gamma=auto gamma.low=0.9": ["gamma.low=0.9", "below high=0.5"],
    "gamma=auto gamma.factor=10": ["gamma.factor=10", "high / low = 5"],
    "gamma=decay gamma.start_fraction=1": ["gamma.start_fraction=1", "below 1"],
    "optimizer.bias_correction=some": ["optimizer.bias_correction=some", "none, momentum or both"],
    "batch_size=10 processes=2 micro_batch_size=4": ["batch_size=10", "2 x 4", "use 8 or 16"],
    "batch_size=3 micro_batch_size=4": ["batch_size=3", "use 4"],
    "hessian.batch_size=1000": ["hessian.batch_size=1000", "batch_size=480", "use hessian.batch_size=480"],
    "hessian.groups=3 processes=2": ["hessian.groups=3", "2 processes", "use hessian.groups=2"],
    "max_steps=2000": ["schedule.warmup_steps=2000", "max_steps=2000", "use schedule.warmup_steps=200"],
    "max_steps=100": ["schedule.warmup_steps=2000", "max_steps=100", "use schedule.warmup_steps=10"],
    "max_tokens=9830400": ["schedule.warmup_steps=2000", "max_tokens=9830400", "use schedule.warmup_steps=2"],
    "max_steps=null": ["max_steps=null", "max_tokens=null", "set one"],
    "stop_at_step=100001": ["stop_at_step=100001", "max_steps=100000", "use 100000"],
    "resume=atuo": ["resume=atuo", "auto?"],
    "resume=must init_from=x": ["init_from=x", "resume=must"],
    "optimizer._target_=os.system": ["optimizer._target_=os.system", "torch.optim"],
    "optimizer._target_=torch.optim.AdmW": ["optimizer._target_=torch.optim.AdmW", "AdamW?"],
    "optimizer._target_=torch.optim.Optimizer": ["optimizer._target_=torch.optim.Optimizer", "AdamW"],
    "optimizer._target_=torch.optim.nothing.AdamW": ["torch.optim.nothing", "no module"],
    "optimizer._target_=torch.optim.lr_scheduler.StepLR": ["_target_=torch.optim.lr_scheduler", "no such"],
    "hessian._target_=sophia_train.durable.remove_folder": ["hessian._target_=", "sophia_train.hessian"],
    "data._target_=sophia_train.data.base.Data": ["data._target_=", "no such data"],
    "data._target_=sophia_train.data.sources.TextData": ["no such data", "did you mean Text?"],
}


class TestRefusals:
    @pytest.mark.parametrize("line", LINES)
    def test_a_command_line_gets_one_line_with_key_and_fix(self, line, capfd):
        assert launch.run(line.split(), never) == 64
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        for fragment in LINES[line]:
            assert fragment in err

    @pytest.mark.parametrize("line", VALUES)
    def test_a_setting_gets_one_line_with_key_and_fix(self, line):
        assignments = [part.split("=") for part in line.split()]
        groups = {path.name for path in CONFIGS.iterdir()}
        settings = copy.deepcopy(plain(*("=".join(each) for each in assignments if each[0] in groups)))
        for key, value in assignments:
            if key not in groups:
                section, name = section_of(settings, key)
                section[name] = yaml.safe_load(value) if value else ""
        message = refusal(settings)
        assert "\n" not in message
        for fragment in VALUES[line]:
            assert fragment in message

    @pytest.mark.parametrize("line", ["++optimizer.gama=0.1", "-m optimizer=adamw optimizer.lr=1e-3,6e-4x"])
    def test_the_program_prints_that_line_and_exits_with_64(self, line):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
        command = [sys.executable, "-m", "sophia_train", *line.split()]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 64
        assert done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("content", "fragments"),
        [
            ("optimizer:\n  gama: 0.1\n", ["optimizer.gama=0.1", "optimizer.gamma?"]),
            ("max_stepz: 5\n", ["max_stepz=5", "max_steps?"]),
            ("optimizer:\n  lr: 6e-4x\n", ["optimizer.lr=6e-4x", "a number"]),
            ("defaults:\n  - override /optimizer: sofia_g\n", ["optimizer=sofia_g", "sophia_g?"]),
            ("seed: [1\n", ["mine.yaml"]),
            ("seed: ${sed}\n", ["seed=${sed}", "not found"]),
        ],
    )
    def test_mistakes_inside_a_yaml_file(self, content, fragments, tmp_path, capfd):
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}")
        assert launch.run(["experiment=mine", "--config-dir", str(tmp_path)], never) == 64
        err = capfd.readouterr().err
        assert err.count("\n") == 1
        for fragment in fragments:
            assert fragment in err

    def test_what_is_not_there_has_codes_of_its_own(self, capfd):
        assert launch.run(["resume=/no/such/folder"], never) == 66
        assert launch.run(["--config-dir", "/no/such/folder"], never) == 66
        assert capfd.readouterr().err.count("error: ") == 2

    def test_every_key_with_a_letter_missing_leads_back_to_it(self):
        settings = plain(*FULL)
        for key in keys_of(settings):
            broken = copy.deepcopy(settings)
            section, name = section_of(broken, key)
            if len(name) > 3:  # of shorter names too little is left to tell
                section[name[:-2] + name[-1]] = section.pop(name)
                assert f"did you mean {key}?" in refusal(broken)

    def test_every_key_refuses_a_value_of_another_type(self):
        settings = plain(*FULL)
        for key in keys_of(settings):
            broken = copy.deepcopy(settings)
            section, name = section_of(broken, key)
            section[name] = WRONG
            assert refusal(broken).startswith(f"{key}=")

    def test_every_bool_is_told_from_a_number(self):
        settings = plain(*FULL)
        for key in keys_of(settings):
            section, name = section_of(settings, key)
            if isinstance(section[name], int | float) and key != "compile":
                broken = copy.deepcopy(settings)
                section, name = section_of(broken, key)
                section[name] = 1 if isinstance(section[name], bool) else True
                assert refusal(broken).startswith(f"{key}=")

    def test_only_the_first_process_speaks(self, monkeypatch, capfd):
        monkeypatch.setenv("RANK", "1")
        assert launch.run(["max_stepz=5"], never) == 64
        assert capfd.readouterr() == ("", "")

    def test_nothing_foreign_is_built(self):
        for target in ("subprocess.Popen", "sophia_train.durable.remove_folder", "torch.load", "Popen"):
            with pytest.raises(ConfigError, match=target):
                build({"_target_": target})


class TestLaunch:
    def test_one_run_gets_its_settings_and_its_code_is_passed_on(self):
        seen = []
        assert launch.run(["experiment=demo", "seed=7"], lambda config: seen.append(config)) == 0
        assert seen == [configured("experiment=demo", "seed=7")]
        assert launch.run(["experiment=demo"], lambda config: 75) == 75

    def test_an_error_of_the_run_is_one_line_and_its_code(self, capfd):
        def fail(config):
            raise RunError("one\nline")

        assert launch.run(["experiment=demo"], fail) == 70
        assert capfd.readouterr().err == "error: one line\n"

    def test_help_fits_the_terminal_and_names_everything(self, capfd):
        assert launch.run(["--help"], never) == 0
        text = capfd.readouterr().out
        assert max(len(line) for line in text.splitlines()) <= 80
        words = set(text.replace(":", " ").split())
        assert {field.name for field in dataclasses.fields(RunConfig)} <= words
        assert {choice for _, choice in CHOICES} <= words

    def test_cfg_shows_what_would_run(self, capfd):
        arguments = ["experiment=demo", "--cfg", "job", "seed=7"]
        assert launch.run(arguments, never) == 0
        assert "run_dir: runs/${name}" in capfd.readouterr().out
        assert launch.run([*arguments, "--resolve"], never) == 0
        assert yaml.safe_load(capfd.readouterr().out)["run_dir"] == "runs/demo"

    def test_cfg_refuses_what_a_run_would(self, capfd):
        assert launch.run(["--cfg", "job", "max_stepz=5"], never) == 64


class TestSweep:
    def test_is_the_product_of_its_values(self):
        jobs = expand(["experiment=demo", "optimizer=adamw,sophia_g", "seed=1,2"])
        found = [(config.optimizer["_target_"].rpartition(".")[2], config.seed) for config in map(of, jobs)]
        assert found == [(name, seed) for name in ("AdamW", "Sophia") for seed in (1, 2)]

    @pytest.mark.parametrize(
        "sweep",
        [
            "optimizer=adamw,sophia_g",
            "seed=1,2 optimizer.lr=1e-3,2e-3",
            "run_dir=x,y/z",
            'run_dir="it\'s" seed=1,2',
            "seed=range(0,2)",
            "sample_prompt='a b','a-b','../c'",
            "sample_prompt=" + ",".join(letter * 300 for letter in "ab"),
        ],
    )
    def test_every_run_has_a_folder_of_its_own(self, sweep):
        overrides = [sweep] if sweep.startswith("sample_prompt") else sweep.split()
        jobs = expand(overrides)
        folders = {of(job).run_dir for job in jobs}
        assert len(folders) == len(jobs) > 1
        assert all(len(Path(folder).name) < 200 and ".." not in Path(folder).parts for folder in folders)

    def test_a_single_run_keeps_its_name(self):
        assert [of(job).run_dir for job in expand(["experiment=demo"])] == ["runs/demo"]

    def test_several_processes_are_refused(self, monkeypatch, capfd):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert launch.run(["-m", "seed=1,2"], never) == 64
        assert "-m with WORLD_SIZE=2" in capfd.readouterr().err

    def test_every_job_runs_and_the_first_failure_is_the_code(self, tmp_path):
        (tmp_path / "sophia_train").mkdir()
        lines = "import sys; open(sys.argv[1], 'w'); sys.exit(int(sys.argv[2]))"
        (tmp_path / "sophia_train" / "__main__.py").write_text(lines)
        jobs = [("a", "0"), ("b", "65"), ("c", "74"), ("d", "75"), ("e", "0")]
        program = (
            "import os, sys; from sophia_train.sweep import run_in_turn; os.chdir(sys.argv[1]);"
            "os.environ['PYTHONPATH'] = sys.argv[1]; python = [sys.executable, '-m', 'sophia_train'];"
            f"sys.exit(run_in_turn([[*python, *job] for job in {jobs}]))"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment)
        assert done.returncode == 65
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"a", "b", "c", "d"}

    def test_a_signal_reaches_the_job(self):
        job = (
            "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
            "print('ready', flush=True); signal.pause()"
        )
        program = (
            "import sys; from sophia_train.sweep import run_in_turn;"
            f"sys.exit(run_in_turn([[sys.executable, '-c', {job!r}]]))"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 75


def of(job: list[str]) -> RunConfig:
    return configured(*job)


def never(config: RunConfig) -> int:
    raise AssertionError("a run was started")


class TestTypes:
    @pytest.mark.parametrize(
        ("value", "kind", "fits"),
        [
            (1, int, True),
            (True, int, False),
            (1.0, int, False),
            (1, float, True),
            (float("inf"), float, False),
            ("1", float, False),
            (None, int | None, True),
            (0.5, float | torch.Tensor, True),
            ("x", float | torch.Tensor, False),
            ([0.9, 0.95], tuple[float | torch.Tensor, float | torch.Tensor], True),
            ([0.9, True], tuple[float, float], False),
            ([0.9], tuple[float, float], False),
            ([1, 2, 3], tuple[int, ...], True),
            (["a", 1], list[str], False),
            ("ab", list[str], False),
            ({"a": 1}, dict[str, int], True),
            ([], dict[str, int], False),
            ("x", Path, True),
            (1, str, False),
        ],
    )
    def test_yaml_values_against_annotations(self, value, kind, fits):
        assert schema_check.matches(value, kind) is fits
