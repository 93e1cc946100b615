"""Every durable write: temporary name, write, fsync, rename, fsync of the folder.

A reader sees the old content or the new, never a mixture, whenever the process is killed or the disk fills
up. All functions raise `OSError`, and then leave what was committed before as it was.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def before(operation: str, path: Path) -> None:
    """Mark the moment before `operation` touches `path`; tests replace this to kill or to fail there."""


def write_bytes(path: Path, content: bytes, *, temporary: Path | None = None) -> None:
    """Replace the file at `path` by `content`, all or nothing.

    Args:
        path: of the file.
        content: of the file.
        temporary: its name until it is whole; `one_of_many(path)` where others may write it at the same time.
    """
    temporary = temporary or _temporary(path)
    try:
        with _open(temporary, "wb") as file:
            if content:
                reserve(file, len(content))
            before("write", temporary)
            file.write(content)
            sync_file(file)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Replace the file at `path` by `content` in UTF-8, all or nothing."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any, *, temporary: Path | None = None) -> None:
    """Replace the file at `path` by `content` as indented JSON (NaN refused), as `write_bytes`."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode(), temporary=temporary)


def one_of_many(path: Path) -> Path:
    """Name a file as no other process does, on whatever machine, and as `remove_leftovers` knows it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def commit_folder(path: Path, reserve: int = 0) -> Iterator[Path]:
    """Yield a temporary folder; when the body ends, its files are synced and it becomes `path`.

    Args and errors are those of `begin_folder`; nothing is left of the temporary folder after an error.
    """
    temporary = begin_folder(path, reserve)
    try:
        yield temporary
        finish_folder(temporary, path)
    except BaseException:
        abandon_folder(temporary)
        raise


def begin_folder(path: Path, reserve: int = 0) -> Path:
    """Make a temporary folder that is to become `path`.

    Args:
        path: a folder that does not exist yet, on a file system that renames atomically.
        reserve: bytes that are going to be written: checked against the free space first.

    Raises:
        FileExistsError: `path` exists.
        OSError: the temporary folder could not be made; nothing is left of it.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = _temporary(path)
    abandon_folder(temporary)
    before("mkdir", temporary)
    temporary.mkdir(parents=True)
    try:
        _check_space(temporary, reserve)
    except BaseException:
        abandon_folder(temporary)
        raise
    return temporary


def finish_folder(temporary: Path, path: Path) -> None:
    """Sync all files of a temporary folder, and let it become `path`."""
    for file_path in sorted(temporary.rglob("*")):
        if file_path.is_file():
            with file_path.open("rb") as file:
                sync_file(file)
    _sync_folder(temporary)
    rename(temporary, path)


def abandon_folder(temporary: Path) -> None:
    """Remove a temporary folder."""
    shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a committed folder; a kill on the way leaves a temporary name, never half a folder."""
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    rename(path, temporary)
    before("rmtree", temporary)
    shutil.rmtree(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in `folder` under temporary names."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def reserve(file: BinaryIO, size: int) -> None:
    """Reserve `size` bytes for an open file, all told, so that writing them cannot meet a full disk.

    Raises:
        OSError: `ENOSPC`, naming the needed and the free bytes.
    """
    path = Path(file.name)
    before("reserve", path)
    _check_space(path.parent, size - os.fstat(file.fileno()).st_blocks * 512)  # less what it has already
    if hasattr(os, "posix_fallocate"):  # macOS has none: there the check above must do
        os.posix_fallocate(file.fileno(), 0, size)


def sync_file(file: BinaryIO) -> None:
    """Flush an open file down to the disk."""
    before("fsync", Path(file.name))
    file.flush()
    os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder that is on the disk already, and bring the new name there, too."""
    before("rename", target)
    os.replace(source, target)
    _sync_folder(target.parent)


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"disk full: {size:,} bytes needed, {free:,} free", str(folder))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _open(path: Path, mode: str) -> Any:
    before("open", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open(mode)


def _sync_folder(path: Path) -> None:
    before("fsync_folder", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
