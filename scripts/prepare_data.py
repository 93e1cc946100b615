"""Prepare the data of a run, or verify what was prepared.

    python scripts/prepare_data.py data=text data.path=FILES [data.folder=FOLDER] [data.tokenizer=gpt2]
    python scripts/prepare_data.py verify=FOLDER

Takes the settings of `python -m sophia_train`; only those of `data` matter. Exits with 0, or as a run would:
64 bad setting, 65 bad data, 66 missing, 69 no vocabulary, 73 not writable, 74 disk full, 75 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from sophia_train.config import build, compose
from sophia_train.data.base import SPLITS, Data
from sophia_train.data.manifest import DTYPES, Manifest
from sophia_train.data.sources import TextData
from sophia_train.data.token_files import TokenShard, check_shard
from sophia_train.errors import ConfigError, DataError, Interrupted, RunError

out = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        out.print((__doc__ or "").strip(), markup=False)
        return 0
    folders = [word.removeprefix("verify=") for word in arguments if word.startswith("verify=")]
    try:
        if folders and len(arguments) > 1:
            raise ConfigError(f"verify={folders[0]} stands alone; leave the other arguments out")
        if folders:
            verify(Path(folders[0]))
        else:
            prepare(build(compose(arguments).data))
    except RunError as error:
        return _fail(str(error), error.code)
    except KeyboardInterrupt:
        return _fail("interrupted, and nothing was kept; start again", Interrupted.code)
    return 0


def prepare(data: Data) -> None:
    """Prepare data under a progress bar, and open it, which verifies it."""
    columns = (
        BarColumn(),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    if isinstance(data, TextData) and not data.is_prepared:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=data.text_bytes(), documents=0, tokens=0)

            def show(documents: int, tokens: int, text_bytes: int) -> None:
                bar.update(task, completed=text_bytes, documents=documents, tokens=tokens)

            data.prepare(show)
    else:
        data.prepare()
    for split in SPLITS:
        data.open(split)
    out.print(data.describe(), markup=False)


def verify(folder: Path) -> None:
    """Compare every shard of a prepared folder with its manifest; raises `DataError` when one differs."""
    record = Manifest.read(folder)
    failed = 0
    for split in SPLITS:
        for shard in record.shards[split]:
            try:
                check_shard(
                    TokenShard(folder / shard.file, DTYPES[record.dtype], 0, shard.tokens), shard.sha256
                )
                outcome = "ok"
            except RunError as error:
                outcome = f"failed: {error}"
                failed += 1
            out.print(f"{shard.file}  {shard.tokens:,} tokens  {outcome}", markup=False)
    if failed:
        raise DataError(f"{folder}: {failed} shards are damaged; copy them again, or prepare the data anew")


def _fail(message: str, code: int) -> int:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
