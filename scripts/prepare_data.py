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
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.status import Status
from rich.table import Column

from sophia_train.data.base import SPLITS, Data
from sophia_train.data.inspection import Contents, count, document_at, find_tokens, missing_units
from sophia_train.data.manifest import DTYPES, Manifest
from sophia_train.data.parts import dtype_of
from sophia_train.data.sources import TextData
from sophia_train.data.text_files import Files
from sophia_train.data.token_files import Tokens, TokenShard, check_shard
from sophia_train.data.tokenizers import Tokenizer, load_tokenizer
from sophia_train.data.units import Unit
from sophia_train.errors import ConfigError, DataError, Interrupted, MissingInputError, RunError
from sophia_train.trackers import console as words  # how figures are written

# Nothing heavier at the top: every worker process imports this file.

WIDTH = 79
OWN = ("workers", "shard", "merge", "verify", "inspect")
PACKING = {".gz": 3, ".xz": 4, ".zst": 3, ".parquet": 2}  # bytes of text in a packed byte, for estimates
SAMPLE_BYTES = 1 << 16  # of text that is tokenised for an estimate, from each of `SAMPLE_UNITS`
SAMPLE_UNITS = 4
PLAIN_SECONDS = 10.0  # between lines where there is no terminal
PROSE = """\
This is tokenised where the text itself is far away, since it is about as long in tokens as most other prose
is: how much of the disk the whole is going to take is not known any better before it has been read.
"""

out = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        out.print((__doc__ or "").strip(), markup=False)
        return 0
    try:
        own, rest = split_words(arguments)
        if "verify" in own:
            verify(Path(own["verify"]))
        elif "inspect" in own:
            inspect(Path(own["inspect"]).expanduser(), rest[0].partition("=")[2] if rest else None)
        else:
            _prepare(own, rest)
    except RunError as error:
        return _fail(str(error), error.code)
    except KeyboardInterrupt:
        return _fail(
            "interrupted; units that are done are kept, and the same command goes on", Interrupted.code
        )
    return 0


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


def _prepare(own: Mapping[str, str], overrides: Sequence[str]) -> None:
    read_workers(own.get("workers"), 1)  # what is wrong here is said before anything takes time
    share = read_shard(own.get("shard"))
    from sophia_train.config import build, compose

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
            left = [index for index in missing if index % share[1] == share[0]]
            workers = read_workers(own.get("workers"), len(left))
            text_bytes = estimate(data, mine, [units[index] for index in left], workers)
            with Display(text_bytes) as display:
                data.prepare(display.show, workers, share)
        if share != (0, 1):
            remaining(units, missing_units(data.prepared_folder, units), len(mine), share)
            return
    with _status("comparing the files with their digests"):
        for split in SPLITS:
            data.open(split)
    out.print(data.describe(), markup=False)


def remaining(units: Sequence[Unit], missing: Sequence[int], mine: int, share: tuple[int, int]) -> None:
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


def estimate(data: TextData, mine: Sequence[Unit], left: Sequence[Unit], workers: int) -> float:
    """Say how much disk the tokens are going to take, and warn if there is less.

    Returns:
        About how many bytes of text are in the units of this call, those that are done included.
    """
    text = [sum(_text_bytes(unit) for unit in units) for units in (mine, left)]
    if not left:
        return text[0]
    tokenizer = data.load_tokenizer()
    step = max(1, len(left) // SAMPLE_UNITS)
    samples = [_sample(unit, tokenizer) for unit in left[::step][:SAMPLE_UNITS]]
    sampled = sum(size for size, _ in samples)
    ratio = sum(tokens for _, tokens in samples) / sampled if sampled else 0.0
    needed = text[1] * ratio * np.dtype(DTYPES[dtype_of(tokenizer)]).itemsize
    place = data.prepared_folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    stored = sum(unit.stored_bytes for unit in left)
    _note(
        f"about {size(needed)} of tokens from {size(stored)} in {several(len(left), 'unit')}, "
        f"{several(workers, 'worker')}; {size(free)} free"
    )
    if needed > free:
        _note(
            f"warning: {place} has {size(free)} free, and about {size(needed)} are needed; "
            "make room, or choose another data.folder"
        )
    return text[0]


def _text_bytes(unit: Unit) -> float:
    file = re.sub(r"@\d+$", "", unit.name)  # of which the unit is a part, or the first
    return unit.stored_bytes * PACKING.get(Path(file).suffix.lower(), 1)


def _sample(unit: Unit, tokenizer: Tokenizer) -> tuple[int, int]:
    """Tokenise the beginning of a unit; returns bytes of text, and tokens."""
    if not isinstance(unit, Files):
        return len(PROSE), len(tokenizer.encode_array(PROSE))
    text_bytes = tokens = 0
    for document in unit.documents():
        tokens += 1
        for piece in document.pieces:
            piece = piece[:SAMPLE_BYTES]
            tokens += len(tokenizer.encode_array(piece))
            text_bytes += len(piece if isinstance(piece, bytes) else piece.encode(errors="replace"))
            if text_bytes >= SAMPLE_BYTES:
                return text_bytes, tokens
    return text_bytes, tokens


class Display:
    """Shows how far a preparation is: a live line on a terminal, elsewhere a line now and then.

    Args:
        total: bytes of text, about.
    """

    def __init__(self, total: float) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._total = total
        self._points: deque[tuple[float, int]] = deque(maxlen=300)  # a minute of times and bytes
        self._printed = time.monotonic()
        self._bar = Progress(
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
            console=self._console,
            expand=True,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._task = self._bar.add_task("", total=max(1.0, self._total), figures="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._bar.update(self._task, completed=max(1.0, self._total))
        self._bar.stop()

    def show(self, documents: int, tokens: int, text_bytes: int) -> None:
        """Take in documents, tokens and bytes of text so far."""
        now = time.monotonic()
        self._points.append((now, text_bytes))
        figures = f"{words.count(documents)} documents  {words.count(tokens)} tokens"
        seconds, done = now - self._points[0][0], text_bytes - self._points[0][1]
        if seconds > 0 and done > 0:
            figures += f"  {done / seconds / 1e6:.1f} MB/s"
            if text_bytes < self._total:
                figures += f"  eta {words.duration((self._total - text_bytes) * seconds / done)}"
        self._bar.update(self._task, completed=min(text_bytes, self._total), figures=figures)
        if not self._console.is_terminal and now > self._printed + PLAIN_SECONDS:
            self._printed = now
            self._console.print(figures, soft_wrap=True)


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


def inspect(path: Path, tokenizer_name: str | None) -> None:
    """Print what token files hold.

    Args:
        path: a prepared folder, a folder of nanoGPT's or llm.c's files, or a `.bin` file.
        tokenizer_name: as `data.tokenizer`; by default what the manifest says, or gpt2.
    """
    record, splits = find_tokens(path)
    tokenizer, why_not = _tokenizer_of(path, record, tokenizer_name)
    end_of_text = record.end_of_text if record else tokenizer.end_of_text if tokenizer else 0
    with _status("counting"):
        lines = list(inspection(path, record, splits, tokenizer, end_of_text))
    for line in lines:
        out.print(line, markup=False)
    if why_not:
        _note(f"tokens are shown by their ids: {why_not}")


def _tokenizer_of(
    path: Path, record: Manifest | None, name: str | None
) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer to decode with, or None and why there is none."""
    recorded = record.tokenizer if record else None
    try:
        tokenizer = load_tokenizer(name or recorded or "gpt2")
    except RunError:
        if name:
            raise
        return None, f"{path} was made with {recorded}; give it by data.tokenizer=FILE"
    if recorded and tokenizer.name != recorded:
        raise DataError(
            f"{path} was prepared with tokenizer={recorded}, but data.tokenizer={name} is {tokenizer.name}; "
            "give the one that it was prepared with"
        )
    try:
        tokenizer.decode_bytes([0])
    except RunError as error:
        return None, str(error)
    return tokenizer, None


def inspection(
    path: Path,
    record: Manifest | None,
    splits: Mapping[str, Tokens],
    tokenizer: Tokenizer | None,
    end_of_text: int,
) -> Iterator[str]:
    """Write what token files hold, line by line."""
    contents = {split: count(tokens, end_of_text) for split, tokens in splits.items()}
    name = record.tokenizer if record else f"{tokenizer.name}, as is supposed" if tokenizer else "?"
    yield str(path)
    if record:
        yield f"{record.source}, revision {record.revision}, split rule: {record.split_rule}"
    yield f"tokenizer {name}, end of text {end_of_text}"
    yield ""
    yield f"{'':<12}{'documents':>16}{'tokens':>20}{'shards':>8}{'bytes':>20}"
    for split, tokens in splits.items():
        documents = f"{_documents(split, record, contents[split]):,}"
        if not record and contents[split].read < len(tokens):
            documents = f"about {documents}"
        stored = sum(shard.path.stat().st_size for shard in tokens.shards)
        label = split if split in SPLITS else "file"
        yield f"{label:<12}{documents:>16}{len(tokens):>20,}{tokens.n_shards:>8,}{stored:>20,}"
    total = sum(map(len, splits.values()))
    if record and record.text_bytes:
        yield ""
        yield (
            f"{total / record.text_bytes:.3f} tokens per byte of text, {record.text_bytes / total:.2f} bytes "
            f"per token, {size(record.text_bytes)} of text"
        )
    for split, found in contents.items():
        if found.read < found.tokens:
            yield ""
            yield f"{split}: {found.read:,} of its tokens are read here, in stretches at even"
            yield "distances; documents that do not lie in one as a whole are left out"
    yield from _lengths(list(contents.values()))
    yield from _frequent(list(contents.values()), tokenizer)
    for number, (split, tokens) in enumerate(splits.items()):
        positions = [0] + ([len(tokens) // 3, 2 * len(tokens) // 3] if number == 0 else [])
        yield from _samples(split, tokens, tokenizer, end_of_text, positions)


def _documents(split: str, record: Manifest | None, found: Contents) -> int:
    if record:
        return next(record.documents[known] for known in SPLITS if known == split)
    return round(found.documents * found.tokens / found.read) if found.read else 0


def _lengths(contents: Sequence[Contents]) -> Iterator[str]:
    lengths = np.sum([each.lengths for each in contents], axis=0)
    documents = int(lengths.sum())
    if not documents:
        return
    mean = sum(each.length_sum for each in contents) / documents
    longest = max(each.longest for each in contents)
    yield ""
    yield f"tokens of a document: {mean:,.0f} in the mean, {longest:,} at most"
    used = np.flatnonzero(lengths)
    for k in range(used[0], used[-1] + 1):
        low, high = (0, 0) if k == 0 else (2 ** (k - 1), 2**k - 1)
        label = f"{low:,}" if low == high else f"{low:,} - {high:,}"
        bar = "#" * int(np.ceil(36 * lengths[k] / lengths.max()))
        yield f"{label:>27} {lengths[k]:>13,} {bar}".rstrip()


def _frequent(contents: Sequence[Contents], tokenizer: Tokenizer | None, most: int = 20) -> Iterator[str]:
    frequencies = np.zeros(max(len(each.frequencies) for each in contents), dtype=np.int64)
    for each in contents:
        frequencies[: len(each.frequencies)] += each.frequencies
    order = np.argsort(-frequencies, kind="stable")[:most]
    order = order[frequencies[order] > 0]
    if not len(order):
        return
    yield ""
    yield "most frequent tokens"
    cells = [
        f"{_fit(_spelled(tokenizer, int(i)), 18)} {i:>8} {frequencies[i] / frequencies.sum():>7.2%}"
        for i in order
    ]
    half = -(-len(cells) // 2)
    for left, right in itertools.zip_longest(cells[:half], cells[half:], fillvalue=""):
        yield f"  {left}    {right}".rstrip()


def _spelled(tokenizer: Tokenizer | None, i: int) -> str:
    """A token as Python writes it; as bytes where it is part of a character."""
    if tokenizer is None or i >= tokenizer.vocab_size:
        return "?"
    content = tokenizer.decode_bytes([i])
    try:
        return repr(content.decode())
    except UnicodeDecodeError:
        return repr(content)


def _samples(
    split: str, tokens: Tokens, tokenizer: Tokenizer | None, end_of_text: int, positions: Sequence[int]
) -> Iterator[str]:
    shown = set()
    for position in positions:
        found = document_at(tokens, end_of_text, position, 200) if len(tokens) else None
        if found is None or found[0] in shown:
            continue
        begin, ids = found
        shown.add(begin)
        yield ""
        yield f"{split}, from token {begin:,}"
        if tokenizer is None or any(i >= tokenizer.vocab_size for i in ids):
            lines = [" ".join(map(str, ids))]
        else:
            lines = tokenizer.decode(ids).split("\n")
        for line in lines[:4]:
            printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
            yield f"  | {_fit(printable, WIDTH - 4)}".rstrip()


def _fit(text: str, cells: int) -> str:
    """Cut or fill text to a width."""
    return set_cell_size(text, cells - 3) + "..." if cell_len(text) > cells else set_cell_size(text, cells)


def several(n: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def size(n: float) -> str:
    """Write a number of bytes with its unit."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            return f"{n / factor:.{1 if n < 100 * factor else 0}f} {unit}"
    return f"{n:.0f} bytes"


def _cores() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _status(what: str) -> Status:
    """Show on a terminal what is being done."""
    return Console(stderr=True).status(what)


def _note(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def _fail(message: str, code: int) -> int:
    _note(f"error: {' '.join(message.split())}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
