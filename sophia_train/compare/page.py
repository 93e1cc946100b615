"""A document as one HTML page that needs nothing else: no network, no script, no other file."""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from sophia_train.compare.document import Block, Bullets, Heading, Notice, Paragraph, Picture, Table
from sophia_train.compare.drawing import GRID, INK, PAPER, SERIES, SOFT

VARIABLES = {color: f"--series-{number}" for number, color in enumerate(SERIES)} | {
    INK: "--ink",
    SOFT: "--soft",
    GRID: "--grid",
    PAPER: "--paper",
}
"""The variables of `page.css` for the colours of figures, which so follow the screen."""


def html(blocks: Sequence[Block], figures: Mapping[str, str]) -> str:
    """Write blocks as a page, light or dark as the reader's screen is.

    Args:
        blocks: the first is the title.
        figures: SVG of each picture, by its name.
    """
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(
        "\n".join(_figures(each, figures) if are_pictures else map(_element, each))
        for are_pictures, each in groupby(blocks, lambda block: isinstance(block, Picture))
    )
    style = (files(__package__) / "page.css").read_text()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _element(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Notice(text):
            return f'<p class="notice" role="note">{escape(text)}</p>'
        case Bullets(items):
            lines = (
                f"<strong>{escape(name)}</strong>: {escape(text)}" if name else escape(text)
                for name, text in items
            )
            return "<ul>\n" + "\n".join(f"<li>{line}</li>" for line in lines) + "\n</ul>"
        case Table():
            return _table(block)
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Picture(name, _):
            raise ValueError(f"{name} is a picture, which `_figures` writes")


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in table.rows
    )
    kind = "table words" if table.words else "table"
    return (
        f'<div class="{kind}" role="region" tabindex="0" aria-label="table">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _figures(pictures: Iterator[Block], figures: Mapping[str, str]) -> Iterator[str]:
    yield '<div class="figures">'
    for picture in pictures:
        assert isinstance(picture, Picture)
        caption = escape(picture.caption)
        svg = _inline(figures[picture.name], caption)
        yield f"<figure>\n{svg}\n<figcaption>{caption}</figcaption>\n</figure>"
    yield "</div>"


def _inline(svg: str, caption: str) -> str:
    """Make a drawing part of the page: without a prologue, of the page's colours, named for who listens."""
    svg = svg[svg.index("<svg") :].strip()
    opening, _, rest = svg.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box
    for color, variable in VARIABLES.items():
        rest = rest.replace(color, f"var({variable})")
    rest = rest.replace("xlink:href", "href")
    return f'<svg {view_box[0]} role="img" aria-label="{caption}">{rest}'
