"""Durable actions on a folder; run as a program, one of them, killed before its n-th operation."""

import itertools
import os
import signal
import sys
from pathlib import Path

from sophia_train import durable

OLD, NEW = b"old" * 1000, b"new content" * 3000


def write_file(folder: Path) -> None:
    durable.write_bytes(folder / "file", NEW)


def write_file_in_a_new_folder(folder: Path) -> None:
    durable.write_bytes(folder / "new" / "file", NEW)


def commit(folder: Path) -> None:
    with durable.commit_folder(folder / "committed") as temporary:
        (temporary / "a").write_bytes(NEW)
        durable.write_json(temporary / "b.json", {"of": "the folder"})
        (temporary / "below").mkdir()
        (temporary / "below" / "c").write_bytes(NEW)


def remove(folder: Path) -> None:
    durable.remove_folder(folder / "there")


ACTIONS = [write_file, write_file_in_a_new_folder, commit, remove]

if __name__ == "__main__":
    name, folder, victim = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    count = itertools.count()

    def before(operation: str, path: Path) -> None:
        if next(count) == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    durable.before = before
    globals()[name](folder)
