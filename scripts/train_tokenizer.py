r"""Learn a tokenizer from your own text: byte-level BPE, words as in GPT-2's.

  python scripts/train_tokenizer.py data=text data.path=FILES \
      --vocab-size N --out FILE

Takes the settings of `python -m sophia_train`, of which those of `data` matter,
and reads the documents of the training split only. FILE is a tokenizer.json of
Hugging Face's, the same for the same text; train with data.tokenizer=FILE
model.vocab_size=N.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from sophia_train import durable
from sophia_train.command_line import Parser, whole_number
from sophia_train.config import build, compose
from sophia_train.data.base import Split
from sophia_train.data.sources import TextData
from sophia_train.data.tokenizers import load_tokenizer, train_bpe
from sophia_train.data.units import Document
from sophia_train.errors import ConfigError, DataError, OutputError, exit_code_of

SMALLEST = 257  # the bytes and end of text
SHOWN_BYTES = 1 << 20  # between two updates of the status line


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="data=text data.path=FILES")
    add("--vocab-size", type=whole_number, required=True, metavar="N", help=f"tokens, at least {SMALLEST}")
    add("--out", type=Path, required=True, metavar="FILE", help="must not exist; FILE.json")
    options = parser.parse_intermixed_args(arguments)
    out = options.out.expanduser()
    if options.vocab_size < SMALLEST:
        raise ConfigError(
            f"--vocab-size {options.vocab_size} is less than the 256 bytes and end of text; "
            f"use --vocab-size {SMALLEST} or more"
        )
    if out.suffix != ".json":
        raise ConfigError(f"--out {out} does not end in .json; use --out {out.name or 'tokenizer'}.json")
    if out.exists():
        raise OutputError(f"--out {out} exists already; choose another name, or remove it")
    if not out.parent.is_dir():
        raise OutputError(f"--out {out}: there is no folder {out.parent}; make it")
    data = build(compose(options.overrides).data)
    if not isinstance(data, TextData):
        raise ConfigError("a tokenizer is learned from text, and these are tokens; use data=text")
    with Console(stderr=True).status("reading") as status:
        texts = Texts(data, status.update)
        content = train_bpe(texts, options.vocab_size)
    durable.write_text(out, content)
    made = load_tokenizer(str(out))
    print = Console(highlight=False, soft_wrap=True).print
    print(f"{out}: {made.vocab_size:,} tokens, of {texts.text_bytes:,} bytes of text", markup=False)
    if made.vocab_size < options.vocab_size:
        print(f"no more than that are in the text, of the {options.vocab_size:,} asked for", markup=False)
    print(f"data.tokenizer={out} model.vocab_size={made.vocab_size}", markup=False)


class Texts:
    """The text of the training split, piece by piece.

    Where the documents are all of one split, the preparation holds out the last tokens; so is the end of the
    text here, by its bytes.

    Args:
        data: where from.
        show: called with a line for a person now and then.

    Raises:
        DataError: there is no text.
    """

    def __init__(self, data: TextData, show: Callable[[str], None]) -> None:
        self.text_bytes = 0
        self._data, self._show = data, show
        self._rule = data.split_rule()

    def __iter__(self) -> Iterator[str]:
        most = self._limit()
        shown = 0
        for document, split in self._documents():
            if most is None and split != "train":
                continue
            for piece in document.pieces:
                text = piece if isinstance(piece, str) else piece.decode("utf-8", errors="replace")
                length = len(text.encode(errors="replace"))
                if most is not None and self.text_bytes + length > most:
                    text = text.encode(errors="replace")[: most - self.text_bytes].decode(errors="ignore")
                    length = most - self.text_bytes
                self.text_bytes += length
                yield text
                if self.text_bytes == most:
                    return
                if self.text_bytes >= shown + SHOWN_BYTES:
                    shown = self.text_bytes
                    self._show(f"reading: {shown / 1e6:,.0f} MB")
        self._show("merging")

    def _documents(self) -> Iterator[tuple[Document, Split]]:
        for unit in self._data.units():
            for document in unit.documents():
                yield document, self._rule.split_of(document)

    def _limit(self) -> int | None:
        """How many bytes to take where all documents are of one split; None where both have some."""
        seen: set[Split] = set()
        total = 0
        for document, split in self._documents():
            seen.add(split)
            if len(seen) == 2:
                return None
            for piece in document.pieces:
                total += len(piece if isinstance(piece, bytes) else piece.encode(errors="replace"))
        if not total:
            raise DataError(f"{self._data.source} has no text to learn from; give another data.path")
        return total - max(1, round(total * self._data.validation_fraction))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
