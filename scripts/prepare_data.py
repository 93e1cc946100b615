"""Prepare the data of a run, in parallel, or look into what was prepared.

  python scripts/prepare_data.py data=text data.path=FILES [data.folder=FOLDER]
  python scripts/prepare_data.py data=... shard=0/8    on each machine its own
  python scripts/prepare_data.py data=... merge=true   when all shards are done
  python scripts/prepare_data.py verify=FOLDER         check its digests
  python scripts/prepare_data.py inspect=FOLDER [data.tokenizer=NAME]

Takes the settings of `python -m sophia_train`, of which those of `data` matter,
and words of its own:

  workers=N    processes; by default as many as cores, if there is work for them
  shard=I/N    units I, I + N, I + 2N, ... only, with 0 <= I < N; machines share
               the folder that data.folder is in
  merge=true   put the units together, and prepare none
  verify=...   a prepared folder
  inspect=...  counts, lengths, frequent tokens and samples; of a prepared
               folder, a folder of nanoGPT's or llm.c's, or a .bin file

Neither workers nor shards change a byte of the result. Units that are done when
a preparation is interrupted are kept, and the same command goes on from there.
Exits with 0, or as a run would: 64 bad setting, 65 bad data, 66 missing, 69 no
vocabulary, 73 not writable, 74 disk full, 75 interrupted.
"""

import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.status import Status

from sophia_train.data.base import SPLITS, Data
from sophia_train.data.disk_estimate import estimate, text_bytes
from sophia_train.data.inspection import damage, find_tokens, missing_units
from sophia_train.data.progress import ProgressDisplay
from sophia_train.data.report import report, tokenizer_for
from sophia_train.data.sources import TextData
from sophia_train.data.units import Unit
from sophia_train.errors import ConfigError, DataError, Interrupted, MissingInputError, exit_code_of

OWN = ("workers", "shard", "merge", "verify", "inspect")

out = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        out.print((__doc__ or "").strip(), markup=False)
        return
    own, rest = split_words(arguments)
    if "verify" in own:
        verify(Path(own["verify"]).expanduser())
    elif "inspect" in own:
        inspect(Path(own["inspect"]).expanduser(), rest[0].partition("=")[2] if rest else None)
    else:
        try:
            prepare(own, rest)
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted; units that are done are kept, and the same command goes on"
            ) from None


def split_words(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Part this script's own words, by key, from the settings of a run.

    Raises:
        ConfigError: words are there twice, or do not go together.
    """
    own: dict[str, str] = {}
    rest = []
    for word in arguments:
        key, equals, value = word.partition("=")
        if key not in OWN or not equals:
            if meant := difflib.get_close_matches(key, OWN, 1, 0.8):
                raise ConfigError(f"{word}: there is no such key; use {meant[0]}=")
            rest.append(word)
        elif key in own:
            raise ConfigError(f"{word}, but {key}={own[key]} is there, too; leave one of them out")
        else:
            own[key] = value
    for key in ("verify", "inspect"):
        others = [word for word in rest if key == "verify" or not word.startswith("data.tokenizer=")]
        others += [f"{other}={value}" for other, value in own.items() if other != key]
        if key in own and others:
            raise ConfigError(f"{key}={own[key]} stands alone; leave {others[0]} out")
    if own.get("merge") not in (None, "true", "false"):
        raise ConfigError(f"merge={own['merge']} is neither true nor false; use merge=true")
    if own.get("merge") == "true" and "shard" in own:
        raise ConfigError(
            f"merge=true and shard={own['shard']} do not go together; "
            "prepare all shards first, then use merge=true alone"
        )
    return own, rest


def read_workers(text: str | None, units: int) -> int:
    """Read `workers=`; by default there are as many as cores, and no more than units."""
    if text is None:
        return max(1, min(_cores(), units))
    if not (text.isdecimal() and int(text) > 0):
        raise ConfigError(f"workers={text} is not a whole number of at least 1; use workers={_cores()}")
    return int(text)


def read_shard(text: str | None) -> tuple[int, int]:
    """Read `shard=`; by default this is the only one."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise ConfigError(f"shard={text} is not of the form i/n; use shard=0/4 for the first of four")
    i, n = int(match[1]), int(match[2])
    if i >= n:
        last = f"shard=0/{n} to shard={n - 1}/{n}" if n else "shard=0/1"
        raise ConfigError(f"shard={text} is out of range, as shards are counted from 0; use {last}")
    return i, n


def prepare(own: Mapping[str, str], overrides: Sequence[str]) -> None:
    """Prepare the data that the overrides say, or that share of it that this script's own words say."""
    read_workers(own.get("workers"), 1)  # what is wrong here is said before anything takes time
    share = read_shard(own.get("shard"))
    from sophia_train.config import build, compose  # and with it torch

    data: Data = build(compose(overrides).data)
    merge = own.get("merge") == "true"
    if not isinstance(data, TextData):
        if merge or "shard" in own:
            word = "merge=true" if merge else f"shard={own['shard']}"
            raise ConfigError(f"{word}: token files need no preparation; leave {word} out")
        data.prepare()
    elif data.is_prepared:
        data.prepare()
    else:
        units = data.units()
        missing = missing_units(data.prepared_folder, units)
        if merge and missing:
            raise MissingInputError(
                f"{data.prepared_folder} lacks units {numbers(missing)} of the {len(units)} from 0 on; run "
                "their shards (unit k is in shard k mod n of n), or leave merge=true out to prepare them here"
            )
        if merge:
            with _status("putting the units together"):
                data.prepare()
        else:
            mine = [unit for index, unit in enumerate(units) if index % share[1] == share[0]]
            left = [units[index] for index in missing if index % share[1] == share[0]]
            workers = read_workers(own.get("workers"), len(left))
            if left:
                found = estimate(data.prepared_folder, left, data.load_tokenizer())
                _note(f"{several(len(left), 'unit')}, {several(workers, 'worker')}: {found.describe()}")
                if found.needed > found.free:
                    _note(f"warning: {found.shortage()}")
            with ProgressDisplay(text_bytes(mine)) as display:
                data.prepare(display.show, workers, share)
        if share != (0, 1):
            say_remaining(units, missing_units(data.prepared_folder, units), len(mine), share)
            return
    with _status("comparing the files with their digests"):
        for split in SPLITS:
            data.open(split)
    out.print(data.describe(), markup=False)


def say_remaining(units: Sequence[Unit], missing: Sequence[int], mine: int, share: tuple[int, int]) -> None:
    """Say what is left to do when a shard is done."""
    i, n = share
    out.print(f"shard {i}/{n} is done: {mine} of {several(len(units), 'unit')}", markup=False)
    if missing:
        shards = sorted({index % n for index in missing})
        out.print(f"{several(len(missing), 'unit')} to go, of shard {numbers(shards)} of {n}", markup=False)
    else:
        out.print("all units are done; the same command with merge=true puts them together", markup=False)


def numbers(values: Sequence[int], most: int = 10) -> str:
    """Write ascending whole numbers as ranges: 0, 2-5, 9."""
    ranges = []
    for _, group in itertools.groupby(enumerate(values), lambda pair: pair[1] - pair[0]):
        run = [value for _, value in group]
        ranges.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(ranges[:most]) + (", ..." if len(ranges) > most else "")


def verify(folder: Path) -> None:
    """Compare every shard of a prepared folder with its manifest; raises `DataError` when one differs."""
    failed = 0
    for shard, problem in damage(folder):
        failed += problem is not None
        outcome = f"failed: {problem}" if problem else "ok"
        out.print(f"{shard.file}  {shard.tokens:,} tokens  {outcome}", markup=False)
    if failed:
        raise DataError(f"{folder}: {failed} shards are damaged; copy them again, or prepare the data anew")


def inspect(path: Path, tokenizer_name: str | None) -> None:
    """Print what token files hold.

    Args:
        path: a prepared folder, a folder of nanoGPT's or llm.c's files, or a `.bin` file.
        tokenizer_name: as `data.tokenizer`; by default what the manifest says, or gpt2.
    """
    record, splits = find_tokens(path)
    tokenizer, why_not = tokenizer_for(path, record, tokenizer_name)
    end_of_text = record.end_of_text if record else tokenizer.end_of_text if tokenizer else 0
    with _status("counting"):
        lines = list(report(path, record, splits, tokenizer, end_of_text))
    for line in lines:
        out.print(line, markup=False)
    if why_not:
        _note(f"tokens are shown by their ids: {why_not}")


def several(n: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _cores() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _status(what: str) -> Status:
    """Show on a terminal what is being done."""
    return Console(stderr=True).status(what)


def _note(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
