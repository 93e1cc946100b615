"""Whatever happens at any operation of a durable write: old content or new, never a mixture, nothing left."""

import errno
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT, contents
from worker_durable import ACTIONS, NEW, OLD, commit, write_file

from sophia_train import durable

WORKER = Path(__file__).parent / "worker_durable.py"


class Disturbed(Exception):
    """What a test raises inside a durable operation."""


@pytest.fixture
def folder(tmp_path):
    """A folder with a file and a folder that were committed before."""
    path = tmp_path / "folder"
    (path / "there").mkdir(parents=True)
    (path / "file").write_bytes(OLD)
    (path / "there" / "one").write_bytes(OLD)
    (path / "there" / "two").write_bytes(OLD)
    return path


@pytest.fixture
def operations(tmp_path, monkeypatch):
    """Names the operations of an action, by doing it in a folder of its own."""

    def of(action, folder):
        seen = []
        monkeypatch.setattr(durable, "before", lambda operation, path: seen.append(operation))
        action(folder)
        monkeypatch.undo()
        return seen

    return of


def visible(folder):
    """What a reader takes for content, that is, everything but temporary names."""
    return {p: c for p, c in contents(folder).items() if not any(s.endswith(".tmp") for s in p.split("/"))}


def copies(folder, action, operations):
    """One equal folder for each operation of the action, beside the states before and after it."""
    before, parts = visible(folder), []
    reference = shutil.copytree(folder, folder.with_name("reference"))
    for number, _ in enumerate(operations(action, reference)):
        parts.append(shutil.copytree(folder, folder.with_name(f"copy_{number}")))

    def relative(root, files):
        return {path.removeprefix(str(root)): content for path, content in files.items()}

    states = relative(folder, before), relative(reference, visible(reference))
    return parts, states, lambda root: relative(root, visible(root))


@pytest.mark.parametrize("action", ACTIONS)
class TestDisturbances:
    @pytest.mark.parametrize("error", [Disturbed(), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
    def test_an_exception(self, error, action, folder, operations, monkeypatch):
        parts, states, seen = copies(folder, action, operations)
        assert len(parts) >= 2
        for victim, part in enumerate(parts):
            count = iter(range(1000))

            def before(operation, path, victim=victim, count=count):
                if next(count) == victim:
                    raise error

            with monkeypatch.context() as patched:
                patched.setattr(durable, "before", before)
                with pytest.raises(type(error)):
                    action(part)
            assert seen(part) in states, victim
            left = [path for path in part.rglob("*.tmp") if not path.name.startswith(".there")]
            assert left == [], victim  # what is left of a removal is one whole folder under another name

    def test_a_kill(self, action, folder, operations):
        parts, states, seen = copies(folder, action, operations)
        for victim, part in enumerate(parts):
            command = [sys.executable, str(WORKER), action.__name__, str(part), str(victim)]
            assert subprocess.run(command, env=ENVIRONMENT).returncode == -signal.SIGKILL
            assert seen(part) in states, victim
            for each in (part, part / "new"):
                durable.remove_leftovers(each)
            assert list(part.rglob(".*")) == [], victim
            assert seen(part) in states, victim
            if seen(part) == states[0]:
                action(part)
            assert seen(part) == states[1], victim


class TestCommit:
    def test_a_body_that_fails_leaves_nothing(self, folder):
        before = contents(folder)
        with pytest.raises(Disturbed), durable.commit_folder(folder / "new") as temporary:
            (temporary / "half").write_bytes(NEW)
            raise Disturbed
        assert contents(folder) == before and list(folder.rglob("*.tmp")) == []

    def test_is_not_there_before_it_is_whole(self, folder):
        with durable.commit_folder(folder / "new") as temporary:
            (temporary / "half").write_bytes(NEW)
            assert not (folder / "new").exists()
        assert (folder / "new" / "half").read_bytes() == NEW

    def test_does_not_replace_what_is_there(self, folder):
        before = contents(folder)
        with pytest.raises(FileExistsError), durable.commit_folder(folder / "there"):
            pass
        assert contents(folder) == before

    def test_what_a_killed_one_left_is_not_mixed_in(self, folder):
        (folder / ".new.tmp").mkdir()
        (folder / ".new.tmp" / "stale").write_bytes(OLD)
        with durable.commit_folder(folder / "new") as temporary:
            (temporary / "fresh").write_bytes(NEW)
        assert [path.name for path in (folder / "new").iterdir()] == ["fresh"]

    def test_more_than_fits_is_refused_before_it_is_written(self, folder):
        before = contents(folder)
        with pytest.raises(OSError, match="needed.*free") as caught:
            with durable.commit_folder(folder / "new", reserve=1 << 62):
                raise AssertionError("never reached")
        assert caught.value.errno == errno.ENOSPC
        assert contents(folder) == before and list(folder.rglob("*.tmp")) == []


class TestReserve:
    def test_gives_the_file_its_size(self, tmp_path):
        with (tmp_path / "file").open("wb") as file:
            durable.reserve(file, 100_000)
        assert (tmp_path / "file").stat().st_blocks * 512 >= 100_000

    def test_more_than_fits_is_refused(self, tmp_path):
        with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="needed.*free") as caught:
            durable.reserve(file, 1 << 62)
        assert caught.value.errno == errno.ENOSPC


class TestOrder:
    """What a power cut could otherwise undo: content is on the disk before its name is, and the name then."""

    def test_of_a_file(self, folder, operations):
        steps = ["open", "reserve", "write", "fsync", "rename", "fsync_folder"]
        assert operations(write_file, folder) == steps

    def test_of_a_folder(self, folder, operations):
        seen = operations(commit, folder)
        assert seen[-3:] == ["fsync_folder", "rename", "fsync_folder"]
        assert seen.count("fsync") == 4  # b.json by itself, and then each of three files


def test_json_refuses_what_no_reader_takes(folder):
    before = contents(folder)
    with pytest.raises(ValueError, match="JSON compliant"):
        durable.write_json(folder / "file", {"loss": float("nan")})
    assert contents(folder) == before
