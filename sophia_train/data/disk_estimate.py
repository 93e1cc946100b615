"""How much of the disk a preparation is going to take, said before it begins."""

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sophia_train.data.manifest import DTYPES
from sophia_train.data.parts import dtype_of
from sophia_train.data.text_files import Files
from sophia_train.data.tokenizers import Tokenizer
from sophia_train.data.units import Unit

PACKING = {".gz": 3, ".xz": 4, ".zst": 3, ".parquet": 2}  # bytes of text in a packed byte, about
SAMPLE_BYTES = 1 << 16  # of text that is tokenised, from each of `SAMPLE_UNITS`
SAMPLE_UNITS = 4
PROSE = """\
This is tokenised where the text itself is far away, since it is about as long in tokens as most other prose
is: how much of the disk the whole is going to take is not known any better before it has been read.
"""


@dataclass(frozen=True)
class DiskEstimate:
    """What there is to read and to write, in bytes.

    Args:
        stored: of what is read, packed where it is packed.
        needed: of its tokens, about.
        free: on the disk.
        place: the folder that is asked about, or the next one above it that is there.
    """

    stored: int
    needed: float
    free: int
    place: Path

    def describe(self) -> str:
        """Say it in a line."""
        return f"about {_size(self.needed)} of tokens from {_size(self.stored)}; {_size(self.free)} free"

    def shortage(self) -> str:
        """Say what to do where `needed` is more than `free`."""
        return (
            f"{self.place} has {_size(self.free)} free, and about {_size(self.needed)} are needed; "
            "make room, or choose another data.folder"
        )


def estimate(folder: Path, units: Sequence[Unit], tokenizer: Tokenizer) -> DiskEstimate:
    """Estimate what the tokens of units take in a folder; raises as `Unit.documents` and `encode`."""
    step = max(1, len(units) // SAMPLE_UNITS)
    samples = [_sample(unit, tokenizer) for unit in units[::step][:SAMPLE_UNITS]]
    sampled = sum(size for size, _ in samples)
    ratio = sum(tokens for _, tokens in samples) / sampled if sampled else 0.0
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return DiskEstimate(
        stored=sum(unit.stored_bytes for unit in units),
        needed=text_bytes(units) * ratio * np.dtype(DTYPES[dtype_of(tokenizer)]).itemsize,
        free=shutil.disk_usage(place).free,
        place=place,
    )


def text_bytes(units: Iterable[Unit]) -> float:
    """Say about how many bytes of text are in units, unpacked."""
    return sum(unit.stored_bytes * PACKING.get(_suffix(unit), 1) for unit in units)


def _size(n: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            return f"{n / factor:.{1 if n < 100 * factor else 0}f} {unit}"
    return f"{n:.0f} bytes"


def _suffix(unit: Unit) -> str:
    file = re.sub(r"@\d+$", "", unit.name)  # of which the unit is a part, or the first
    return Path(file).suffix.lower()


def _sample(unit: Unit, tokenizer: Tokenizer) -> tuple[int, int]:
    """Tokenise the beginning of a unit; returns bytes of text, and tokens."""
    if not isinstance(unit, Files):
        return len(PROSE), len(tokenizer.encode_array(PROSE))
    size = tokens = 0
    for document in unit.documents():
        tokens += 1
        for piece in document.pieces:
            piece = piece[:SAMPLE_BYTES]
            tokens += len(tokenizer.encode_array(piece))
            size += len(piece if isinstance(piece, bytes) else piece.encode(errors="replace"))
            if size >= SAMPLE_BYTES:
                return size, tokens
    return size, tokens
