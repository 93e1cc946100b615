"""Checkpoints come back bitwise or not at all, and loading one runs no code."""

import ast
import functools
import json
import shutil

import pytest
import torch
from support import ROOT, contents
from test_collectives import in_two_processes
from torch import nn

from sophia_train import checkpoint, durable
from sophia_train.collectives import gather
from sophia_train.errors import ConfigError, DataError, MissingInputError, RunError
from sophia_train.optim import Sophia


class Nested(torch.optim.Optimizer):
    """An optimizer whose state is as nested as those of libraries may be."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "name": None, "flag": True})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["factors"] = [torch.eye(2), {"left": p.grad.mean(), "right": None}]
                state["ids"] = {"rows": torch.arange(3), "half": torch.ones(2, dtype=torch.bfloat16)}
                p.data.add_(p.grad, alpha=-group["lr"])


def make(kind=Sophia, seed=0, width=4, steps=2, **settings):
    """A small model and an optimizer, after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2, bias=False))
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias, model[1].weight], "lr": 0.5}]
    optimizer = kind(groups, **settings)
    for _ in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def flat(tree):
    """A tree with tensors as what can be compared: their type, shape and bytes."""
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), list(tree.shape), bytes(tree.contiguous().flatten().view(torch.uint8))
    if isinstance(tree, dict):
        return {key: flat(value) for key, value in tree.items()}
    return [flat(value) for value in tree] if isinstance(tree, list | tuple) else tree


def verify_a_share(path, rank):
    """Load weights on one of two processes, of which each verifies a file."""
    verified, original = [], checkpoint.fingerprint
    checkpoint.fingerprint = lambda file: verified.append(file.name) or original(file)
    weights, manifest = checkpoint.load_weights(path)
    assert len(weights) == 3
    assert sorted(gather(verified)) == [[name] for name in sorted(manifest["files"])]


def refuse(path, rank):
    """Fail to load weights on one of two processes, of which one sees the damage."""
    with pytest.raises(DataError, match="optimizer.safetensors"):
        checkpoint.load_weights(path)


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path / "checkpoints", 5, *make(), {"state": {"step": 5}, "config": {"a": 1}})


class TestRoundTrip:
    @pytest.mark.parametrize(
        "kind", [Sophia, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, Nested]
    )
    @pytest.mark.parametrize("steps", [0, 2])
    def test_is_bitwise(self, kind, steps, tmp_path):
        model, optimizer = make(kind, steps=steps)
        path = checkpoint.save(tmp_path, 2, model, optimizer, {"config": {"a": [1, None]}})
        other, into = make(kind, seed=1, steps=1)
        if steps == 0:
            into.state.clear()
        assert checkpoint.restore(path, other, into)["config"] == {"a": [1, None]}
        assert flat(dict(other.state_dict())) == flat(dict(model.state_dict()))
        assert flat(into.state_dict()) == flat(optimizer.state_dict())

    def test_goes_on_bitwise(self, tmp_path):
        model, optimizer = make(torch.optim.AdamW)
        path = checkpoint.save(tmp_path, 2, model, optimizer, {})
        other, into = make(torch.optim.AdamW, seed=1)
        checkpoint.restore(path, other, into)
        for one, its in ((model, optimizer), (other, into)):
            one(torch.ones(1, 3)).sum().backward()
            its.step()
        assert flat(dict(other.state_dict())) == flat(dict(model.state_dict()))

    def test_not_finite_values_survive(self, tmp_path):
        model, optimizer = make()
        with torch.no_grad():
            model[0].weight[0] = torch.tensor([float("inf"), float("nan"), -0.0])
        path = checkpoint.save(tmp_path, 2, model, optimizer, {})
        weights, _ = checkpoint.load_weights(path)
        assert flat(weights) == flat(dict(model.state_dict()))

    def test_what_a_checkpoint_cannot_hold_is_an_error(self, tmp_path):
        model, optimizer = make()
        optimizer.state[model[0].weight]["odd"] = {1, 2}
        with pytest.raises(TypeError, match=r"0\.weight/odd is a set"):
            checkpoint.save(tmp_path, 2, model, optimizer, {})
        assert list(tmp_path.iterdir()) == []


class TestFitting:
    """What does not fit is refused by name, and refused whole: the model is as it was."""

    @pytest.mark.parametrize(
        ("other", "fragment"),
        [
            ({"width": 5}, r"0\.weight is \[4, 3\] there and \[5, 3\] here"),
            ({"kind": torch.optim.AdamW}, "does not fit AdamW"),
        ],
        ids=["shape", "optimizer"],
    )
    def test_another_model_or_optimizer(self, other, fragment, saved):
        model, optimizer = make(seed=1, **other)
        before = flat(dict(model.state_dict()))
        with pytest.raises(ConfigError, match=fragment):
            checkpoint.restore(saved, model, optimizer)
        if "width" in other:
            assert flat(dict(model.state_dict())) == before

    def test_other_names(self, saved):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        with pytest.raises(ConfigError, match=r"1\.bias is not in"):
            checkpoint.restore(saved, model, Sophia(model.parameters()))
        smaller = nn.Sequential(nn.Linear(3, 4))
        with pytest.raises(ConfigError, match=r"1\.weight is not in the model"):
            checkpoint.restore(saved, smaller, Sophia(smaller.parameters()))

    def test_other_groups(self, saved):
        model, _ = make()
        with pytest.raises(ConfigError, match="groups differ"):
            checkpoint.restore(saved, model, Sophia(model.parameters()))

    def test_another_format(self, saved):
        rewrite(saved, lambda manifest: manifest.update(format_version=2))
        with pytest.raises(DataError, match="format_version=2"):
            checkpoint.verify(saved)


class TestDamage:
    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
    def test_a_changed_byte_is_noticed(self, name, saved):
        path, model = saved / name, make(seed=1)
        good = path.read_bytes()
        original = json.loads(good) if name == "manifest.json" else None
        for position in range(0, len(good), max(1, len(good) // 150)):
            for change in (1, 0x20, 0x80):
                content = bytearray(good)
                content[position] ^= change
                path.write_bytes(content)
                if original and same_json(content, original):
                    continue  # as another kind of white space: it still says the same
                with pytest.raises((DataError, MissingInputError), match=name):
                    checkpoint.restore(saved, *model)
                with pytest.raises((DataError, MissingInputError), match=name):
                    checkpoint.load_weights(saved)
        path.write_bytes(good)
        checkpoint.restore(saved, *model)

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
    @pytest.mark.parametrize("length", [0, 1, 0.5, -2])
    def test_another_length_is_noticed(self, name, length, saved):
        path = saved / name
        good = path.read_bytes()
        path.write_bytes(good[: int(len(good) * length) if isinstance(length, float) else length])
        with pytest.raises(DataError, match=name):
            checkpoint.restore(saved, *make())
        path.write_bytes(good + b"\0")
        with pytest.raises(DataError, match=name):
            checkpoint.restore(saved, *make())

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
    def test_a_missing_file_is_noticed(self, name, saved):
        (saved / name).unlink()
        with pytest.raises(MissingInputError, match=name):
            checkpoint.restore(saved, *make())

    def test_two_processes_read_a_file_each_and_both_notice(self, saved):
        in_two_processes(functools.partial(verify_a_share, saved))
        path = saved / "optimizer.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        in_two_processes(functools.partial(refuse, saved))

    def test_files_of_another_checkpoint_are_noticed(self, saved, tmp_path):
        other = checkpoint.save(tmp_path, 6, *make(seed=3), {})
        shutil.copy(other / "model.safetensors", saved)
        with pytest.raises(DataError, match="model.safetensors"):
            checkpoint.verify(saved)

    def test_a_file_that_is_not_of_the_checkpoint_is_left_alone(self, saved, tmp_path):
        model, optimizer = make(seed=1)
        expected = checkpoint.load_weights(saved)[0]
        stray = checkpoint.save(tmp_path, 6, *make(seed=3), {}) / "model.safetensors"
        shutil.copy(stray, saved / "model-00002-of-00002.safetensors")
        checkpoint.restore(saved, model, optimizer)
        assert all(torch.equal(expected[name], found) for name, found in model.named_parameters())

    @pytest.mark.parametrize("content", ["null", "[]", "3", '"text"', "{}", '{"sha256": 1}'])
    def test_json_that_is_no_manifest(self, content, saved):
        (saved / "manifest.json").write_text(content)
        with pytest.raises(DataError, match="manifest.json"):
            checkpoint.verify(saved)

    def test_damage_on_the_way_to_the_disk_is_noticed(self, tmp_path, monkeypatch):
        def before(operation, path):
            if path.name == "model.safetensors" and operation == "fsync":
                content = bytearray(path.read_bytes())
                content[-1] ^= 4
                path.write_bytes(content)

        monkeypatch.setattr(durable, "before", before)
        with pytest.raises(DataError, match="model.safetensors"):
            checkpoint.save(tmp_path, 1, *make(), {})
        assert list(tmp_path.iterdir()) == []


class TestFolder:
    def test_latest_and_prune(self, tmp_path):
        pair = make()
        for step in (3, 20, 100, 99_999_999, 100_000_000):
            checkpoint.save(tmp_path, step, *pair, {})
            checkpoint.prune(tmp_path, 2)
        assert checkpoint.latest(tmp_path).name == "step_100000000"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_100000000", "step_99999999"]

    def test_names_that_are_not_checkpoints_are_left_alone(self, tmp_path):
        pair = make()
        (tmp_path / "step_best").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        for step in (1, 2):
            checkpoint.save(tmp_path, step, *pair, {})
        checkpoint.prune(tmp_path, 1)
        assert {path.name for path in tmp_path.iterdir()} == {"step_best", "notes.txt", "step_00000002"}

    def test_leftovers_of_killed_processes_go(self, saved, tmp_path):
        folder = tmp_path / "checkpoints"
        (folder / ".step_00000004.tmp").mkdir()
        (folder / ".step_00000004.tmp" / "model.safetensors").write_bytes(b"half")
        checkpoint.prune(folder, 2)
        assert [path.name for path in folder.iterdir()] == ["step_00000005"]

    def test_none_is_none(self, tmp_path):
        assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "no") is None
        assert not checkpoint.exists(tmp_path)
        with pytest.raises(MissingInputError, match=str(tmp_path)):
            checkpoint.find(tmp_path)

    def test_is_found_by_its_own_path_and_by_its_run(self, saved, tmp_path):
        assert checkpoint.find(saved) == checkpoint.find(tmp_path) == saved

    def test_a_second_one_of_the_same_step_changes_nothing(self, saved):
        before = contents(saved)
        with pytest.raises(FileExistsError):
            checkpoint.save(saved.parent, 5, *make(seed=2), {})
        assert contents(saved) == before and len(list(saved.parent.iterdir())) == 1

    def test_an_old_one_stays_until_the_new_one_is_verified(self, saved, monkeypatch):
        """At every durable operation of save and prune there is a checkpoint that verifies."""
        folder, seen = saved.parent, []

        def before(operation, path):
            seen.append(operation)
            assert checkpoint.verify(checkpoint.latest(folder))

        monkeypatch.setattr(durable, "before", before)
        checkpoint.save(folder, 6, *make(), {})
        checkpoint.prune(folder, 1)
        assert len(seen) > 10 and [path.name for path in folder.iterdir()] == ["step_00000006"]


FORBIDDEN = {
    ("torch", "load"),
    ("torch", "save"),
    ("pickle",),
    ("dill",),
    ("cloudpickle",),
    ("joblib", "load"),
    ("joblib", "dump"),
    ("shelve",),
    ("marshal",),
}


@pytest.mark.parametrize(
    "path", [*(ROOT / "sophia_train").rglob("*.py"), *(ROOT / "scripts").glob("*.py")], ids=str
)
def test_nothing_unpickles(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {(alias.name.split(".")[0],) for alias in node.names} & FORBIDDEN
        elif isinstance(node, ast.ImportFrom):
            names = {((node.module or "").split(".")[0],)} | {
                (node.module, alias.name) for alias in node.names
            }
            assert not names & FORBIDDEN
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in FORBIDDEN
        elif isinstance(node, ast.keyword):
            assert node.arg not in ("weights_only", "trust_remote_code", "allow_pickle")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec")


def same_json(content, original):
    try:
        return json.loads(content) == original
    except ValueError:
        return False


def rewrite(path, change):
    """Change a manifest as a program of another version might have written it, its digest included."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256")
    change(manifest)
    manifest["sha256"] = checkpoint._manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("in_background", [False, True])
def test_no_error_of_writing_is_lost(in_background, tmp_path, monkeypatch):
    """Else a checkpoint without its optimizer would be committed, and the older ones removed."""

    def before(operation, path):
        if path.name == "optimizer.safetensors":
            raise MemoryError("no memory")

    monkeypatch.setattr(durable, "before", before)
    saving = checkpoint.Save(tmp_path, 5, *make(), {}, in_background=in_background)
    with pytest.raises(RunError, match="MemoryError: no memory"):
        saving.finish()
    assert list(tmp_path.iterdir()) == []
