"""What a run's folder says of the program that made it."""

import subprocess

import pytest

from sophia_train import run_folder


@pytest.fixture
def git(tmp_path):
    """Runs git in a new repository around a copy of the program."""

    def run(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    run("init")
    return run


def test_the_commit_is_that_of_the_program_and_not_of_a_repository_around_it(git, tmp_path, monkeypatch):
    program = tmp_path / "venv" / "run_folder.py"
    monkeypatch.setattr(run_folder, "__file__", str(program))
    program.parent.mkdir()
    program.write_text("")
    (tmp_path / "other.py").write_text("")
    git("add", "other.py")
    git("commit", "-m", "another's")
    assert run_folder._git_commit() is None
    git("add", "venv")
    git("commit", "-m", "ours")
    assert run_folder._git_commit() == git("rev-parse", "HEAD")
    program.write_text("changed")
    assert run_folder._git_commit() == git("rev-parse", "HEAD") + "-dirty"
    program.rename(tmp_path / "elsewhere.py")
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "elsewhere.py"))
    assert run_folder._git_commit() is None
