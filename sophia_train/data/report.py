"""What token files hold, written for a person: counts, lengths, frequent tokens and samples."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.cells import cell_len, set_cell_size

from sophia_train.data.base import SPLITS
from sophia_train.data.inspection import Contents, count, document_at
from sophia_train.data.manifest import Manifest
from sophia_train.data.token_files import Tokens
from sophia_train.data.tokenizers import Tokenizer, load_tokenizer
from sophia_train.errors import DataError, RunError

WIDTH = 79


def report(
    path: Path,
    record: Manifest | None,
    splits: Mapping[str, Tokens],
    tokenizer: Tokenizer | None,
    end_of_text: int,
) -> Iterator[str]:
    """Write what token files hold, line by line, without end of line.

    Args:
        path: where they are.
        record: their manifest, if there is one.
        splits: the tokens of each split, or of a file under its name.
        tokenizer: to decode with; without one, ids are shown.
        end_of_text: its id.
    """
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
            f"{record.text_bytes:,} bytes of text: {total / record.text_bytes:.3f} tokens per byte, "
            f"{record.text_bytes / total:.2f} bytes per token"
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


def tokenizer_for(
    path: Path, record: Manifest | None, name: str | None
) -> tuple[Tokenizer | None, str | None]:
    """Find the tokenizer to decode with, or None and why there is none.

    Args:
        path: of the token files, for messages.
        record: their manifest, if there is one.
        name: as `data.tokenizer`; by default what the manifest says, or gpt2.

    Raises:
        DataError: they were prepared with another one than `name`.
        ConfigError, MissingInputError: as `load_tokenizer`, where `name` is given.
    """
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
