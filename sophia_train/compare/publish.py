"""The files of a comparison: Markdown, one page, and each figure as PNG and SVG."""

from pathlib import Path

from sophia_train import durable
from sophia_train.compare.contents import contents
from sophia_train.compare.document import Picture, markdown
from sophia_train.compare.figures import draw
from sophia_train.compare.page import html
from sophia_train.compare.report import Report
from sophia_train.errors import OutputError


def publish(report: Report, folder: Path) -> None:
    """Write `report.md`, `report.html` and the figures; files of these names are replaced, each at once.

    The figures come first: a report that is there has all that it refers to.

    Raises:
        OutputError: the folder is a file.
        OSError: writing failed.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--out {folder} is not a folder; choose another one")
    drawings = draw(report)
    pictures: dict[str, list[Picture]] = {}
    for drawing in drawings:
        pictures.setdefault(drawing.place, []).append(Picture(drawing.name, drawing.caption))
        durable.write_bytes(folder / f"{drawing.name}.png", drawing.png)
        durable.write_text(folder / f"{drawing.name}.svg", drawing.svg)
    blocks = contents(report, pictures)
    durable.write_text(folder / "report.md", markdown(blocks))
    durable.write_text(folder / "report.html", html(blocks, {each.name: each.svg for each in drawings}))
