"""A document as a sequence of blocks, and as Markdown; `page.py` writes the same blocks as HTML."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the document's."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Notice:
    """What nobody may overlook."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells of plain text; the first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False  # in the other columns, where otherwise numbers are


@dataclass(frozen=True)
class Bullets:
    """A list of items, each a name, which may be empty, and a text."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """A figure in a file of its own beside the document."""

    name: str  # of the file, without its ending
    caption: str


Block = Heading | Paragraph | Notice | Table | Bullets | Picture


def markdown(blocks: Iterable[Block]) -> str:
    """Write blocks as Markdown; pictures are links to SVG files in the same folder."""
    return "\n".join("\n".join([*_lines(block), ""]) for block in blocks)


def _lines(block: Block) -> Iterator[str]:
    match block:
        case Heading(level, text):
            yield f"{'#' * level} {text}"
        case Paragraph(text):
            yield text
        case Notice(text):
            yield f"> **{text}**"
        case Table(head, rows, words):
            rule = ["---", *["---" if words else "---:"] * (len(head) - 1)]
            for line in (head, rule, *rows):
                yield "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
        case Bullets(items):
            for name, text in items:
                yield f"- **{name}**: {text}" if name else f"- {text}"
        case Picture(name, caption):
            yield f"![{caption}]({name}.svg)"
