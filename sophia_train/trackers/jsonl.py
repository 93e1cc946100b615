"""`metrics.jsonl`: the source of truth of a run's metrics, one JSON object a line."""

import json
import math
import os
import re
from io import FileIO
from pathlib import Path
from typing import Any

from sophia_train import durable
from sophia_train.errors import DataError
from sophia_train.trackers.base import Record, RunInfo, Tracker

FILE_NAME = "metrics.jsonl"
SAMPLES = "samples"


class JsonlTracker(Tracker):
    """Appends each record to `metrics.jsonl` and writes each text to `samples/NAME-STEP.txt`.

    Strict JSON has no NaN or infinities: they stand there as the strings "NaN", "Infinity" and "-Infinity",
    which `read_metrics` turns back into numbers.

    A resumed run first drops what was logged after its checkpoint, so that every step is there once. This
    needs everything of step s to be logged before `sync`, and `sync` before the checkpoint of step s.
    """

    slow = False

    def __init__(self) -> None:
        self._run_dir = Path()
        self._file: FileIO | None = None

    def start(self, run: RunInfo) -> None:
        """Begin an empty file, or cut the one that is there back to `run.resumed_from_step`.

        Raises:
            DataError: the file of a resumed run was altered.
            OSError: it cannot be written.
        """
        self._run_dir = run.run_dir
        path = run.run_dir / FILE_NAME
        kept = _lines_until(path, run.resumed_from_step)
        if not path.exists() or path.stat().st_size != len(kept):
            durable.write_bytes(path, kept)
        _remove_texts_after(run.run_dir / SAMPLES, run.resumed_from_step)
        self._file = path.open("ab", buffering=0)

    def log(self, record: Record) -> None:
        """Append one line; other processes can read it at once.

        Raises:
            OSError: the line could not be written; no part of it is left.
        """
        file = self._opened()
        line = json.dumps({key: _to_json(value) for key, value in record.items()}, allow_nan=False) + "\n"
        durable.before("append", Path(str(file.name)))
        end = os.fstat(file.fileno()).st_size
        try:
            remaining = memoryview(line.encode())
            while remaining:
                remaining = remaining[file.write(remaining) :]
        except OSError:
            file.truncate(end)
            raise

    def text(self, name: str, text: str, step: int) -> None:
        """Write one text as a file of its own.

        Raises:
            OSError: it cannot be written.
        """
        stem = re.sub(r"[^\w-]+", "-", name)
        durable.write_text(self._run_dir / SAMPLES / f"{stem}-{step:07d}.txt", text.rstrip("\n") + "\n")

    def sync(self) -> None:
        """Put all lines so far on the disk.

        Raises:
            OSError: the disk refused.
        """
        durable.sync_file(self._opened())

    def close(self, code: int) -> None:
        """Put all lines on the disk and close the file."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def _opened(self) -> FileIO:
        if self._file is None:
            raise RuntimeError("JsonlTracker.start was not called, or close was")
        return self._file


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a `metrics.jsonl`, in order; a last line without its end is left out.

    Raises:
        DataError: a line is not a record, naming it.
        OSError: the file cannot be read.
    """
    return [_parse(path, number, line) for number, line in enumerate(_whole_lines(path.read_bytes()), 1)]


def _whole_lines(content: bytes) -> list[bytes]:
    return content.split(b"\n")[:-1]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if type(record["step"]) is not int:
            raise TypeError
        return {key: _from_json(value) for key, value in record.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}, line {number}: not a metrics record: the file was altered; "
            "restore it, or remove that line"
        ) from error


def _lines_until(path: Path, step: int | None) -> bytes:
    """Return the lines up to a completed step; none for a new run."""
    if step is None or not path.exists():
        return b""
    lines = _whole_lines(path.read_bytes())
    kept = (line for number, line in enumerate(lines, 1) if _parse(path, number, line)["step"] <= step)
    return b"".join(line + b"\n" for line in kept)


def _remove_texts_after(folder: Path, step: int | None) -> None:
    for path in folder.glob("*-*.txt"):
        written = path.stem.rpartition("-")[2]
        if written.isdecimal() and (step is None or int(written) > step):
            path.unlink()


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: float | int) -> float | int | str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _from_json(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
