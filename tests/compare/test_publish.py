"""The files of a comparison: Markdown, a page that needs nothing else, and the figures."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from synthetic_runs import LOSSES, SOPHIA, write_study

from sophia_train import durable
from sophia_train.compare.groups import group_runs
from sophia_train.compare.loss_figures import _look
from sophia_train.compare.report import compare_groups
from sophia_train.compare.runs import read_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
FLAGS += [
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--enable-logging=stderr",
    "--v=0",
]


class Page(HTMLParser):
    """Tables, texts by element, and all attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.attributes, self.texts, self.stack = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *each) for each in attributes]
        if tag not in ("meta", "link"):
            self.stack.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.stack[-1] if self.stack else "", data))
        if self.stack and self.stack[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def texts_of(self, tag):
        return [text for where, text in self.texts if where == tag]


def tables_of(markdown):
    """The tables of a Markdown text, rules left out."""
    found, before = [], False
    for line in markdown.splitlines():
        is_row = line.startswith("| ")
        if is_row and not before:
            found.append([])
        if is_row and not line.startswith("| ---"):
            row = re.split(r"(?<!\\)\|", line)[1:-1]
            found[-1].append([cell.strip().replace("\\|", "|") for cell in row])
        before = is_row
    return found


@pytest.fixture
def published(compare, two_groups, tmp_path):
    """The folder of a comparison of two groups, tuning included, and what was printed."""
    adamw, sophia = two_groups
    for folder in sophia:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        extra = {"perf/hessian_share": 0.05, "optim/unclipped_fraction": 0.3}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line | extra) + "\n" for line in lines))
    write_study(tmp_path / "tuning" / "adamw")
    write_study(tmp_path / "tuning" / "sophia_g", **SOPHIA)
    code, out, err = compare(*adamw, *sophia, "--tuning", tmp_path / "tuning", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    return tmp_path / "out", out


FIGURES = {f"loss_{axis}" for axis in ("step", "tokens", "seconds", "flops")} | {
    "win_rate",
    "overhead",
    "tuning",
    "differences",
}


def test_every_figure_is_there_as_png_and_svg_and_in_both_reports(published):
    folder, _ = published
    files = {path.name for path in folder.iterdir()}
    pictures = {f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg")}
    assert files == pictures | {"report.md", "report.html"}
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        root = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
    assert set(re.findall(r"\]\((\w+)\.svg\)", (folder / "report.md").read_text())) == FIGURES
    page = (folder / "report.html").read_text()
    assert page.count("<figure>") == page.count('role="img"') == len(FIGURES)


def test_the_page_has_the_tables_and_headings_of_the_markdown(published):
    folder, out = published
    written, page = (folder / "report.md").read_text(), Page((folder / "report.html").read_text())
    assert page.tables == tables_of(written) == tables_of(out)
    assert len(page.tables) == 3
    headings = re.findall(r"^#+ (.*)", written, re.MULTILINE)
    assert [text for tag, text in page.texts if tag in ("h1", "h2", "h3")] == headings
    assert page.texts_of("title") == headings[:1]
    assert "![" not in out  # on a terminal there is nothing that a link to a figure could lead to


def test_the_page_needs_nothing_else(published):
    folder, _ = published
    text = (folder / "report.html").read_text()
    page = Page(text)
    for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
        used = {value for _, key, value in page.attributes if key == name}
        assert all(value == "data:," or value.startswith("#") for value in used), name
    assert "http" not in text and "@import" not in text and "<script" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    identifiers = [value for _, key, value in page.attributes if key == "id"]
    assert len(identifiers) == len(set(identifiers))
    targets = {t[1:] for t in re.findall(r"url\((#[^)]*)\)", text)}
    targets |= {value[1:] for _, key, value in page.attributes if key == "href" and value.startswith("#")}
    assert targets <= set(identifiers)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' not in page.texts_of("title")


def test_figures_on_the_page_have_its_colours(published):
    folder, _ = published
    page = (folder / "report.html").read_text()
    body = page[page.index("<body>") :]
    assert set(re.findall(r"(?:fill|stroke): ?(#\w+)", body)) == set()
    defined = set(re.findall(r"(--[\w-]+):", page))
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= defined
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    assert set(re.findall(r"(--[\w-]+):", light)) == set(re.findall(r"(--[\w-]+):", dark))


def test_the_same_runs_give_the_same_bytes(compare, two_groups, tmp_path):
    adamw, sophia = two_groups
    for name in ("one", "two"):
        assert compare(*adamw, *sophia, "--out", tmp_path / name)[0] == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_names_with_markup_stay_text(compare, make_run, tmp_path):
    folders = [make_run("a1"), make_run("b1", **{"optimizer.note": "<b>|&amp;</b>"})]
    assert compare(*folders, "--out", tmp_path / "out")[0] == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "AdamW note=<b>|&amp;</b>" in [row[0] for row in page.tables[0]]
    assert page.tables == tables_of((tmp_path / "out" / "report.md").read_text())


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "rename"])
def test_a_failed_write_leaves_the_report_that_was_there(compare, make_run, tmp_path, monkeypatch, operation):
    folder, run = tmp_path / "out", make_run("a1")
    assert compare(run, "--out", folder)[0] == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = make_run("s1", losses=(5.0, 4.0, 3.0, 2.0, 1.0))

    def fail(name, path):
        if name == operation and "report.html" in path.name:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(durable, "before", fail)
    code, out, err = compare(other, "--out", folder)
    assert (code, out) == (74, "") and "report.html" in err
    assert (folder / "report.html").read_bytes() == before["report.html"]
    assert {path.name for path in folder.iterdir()} == set(before)


def test_a_file_in_the_place_of_the_folder_is_refused(compare, make_run, tmp_path):
    (tmp_path / "out").write_text("")
    code, _, err = compare(make_run("a1"), "--out", tmp_path / "out")
    assert code == 73 and "--out" in err


def test_a_hundred_runs(compare, make_run, tmp_path):
    """34 groups of 3 seeds: every run counts, every group has its row, figures name the best of each kind."""
    folders = []
    for number in range(17):
        lr = {"optimizer.lr": 1e-4 * 1.2**number}
        sophia = {**SOPHIA, "optimizer": {**SOPHIA["optimizer"], "lr": lr["optimizer.lr"]}}
        for seed in (1, 2, 3):
            losses = tuple(loss + 0.01 * abs(number - 8) + 0.001 * seed for loss in LOSSES)
            folders.append(make_run(f"a{number}_{seed}", seed=seed, losses=losses, data=None, **lr))
            folders.append(make_run(f"s{number}_{seed}", seed=seed, losses=losses, data=None, **sophia))
    code, out, _ = compare(*folders[:100], "--out", tmp_path / "out")
    assert code == 0 and out.startswith("# 100 runs compared\n")
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.tables == tables_of(out)
    assert len(page.tables[0]) == 35
    named = [text for text in page.texts_of("text") if text.startswith(("AdamW ", "Sophia "))]
    best = ["AdamW lr=0.00043", "Sophia GNB lr=0.00043"]
    assert set(named) == {f"{label} (3 seeds)" for label in best} | {f"{label}: -0.0800" for label in best}


def test_no_two_groups_have_the_same_line(make_run):
    settings = [{**SOPHIA, "optimizer": {**SOPHIA["optimizer"], "lr": lr}} for lr in (1e-3, 2e-3, 3e-3)]
    folders = [make_run(f"s{n}", **each) for n, each in enumerate(settings)]
    folders += [make_run(f"h{n}", max_steps=50, losses=LOSSES[:3], **each) for n, each in enumerate(settings)]
    folders += [make_run("a_half", max_steps=50, losses=LOSSES[:3]), make_run("a")]
    groups = group_runs(map(read_run, folders))
    rows = compare_groups(groups, groups[-1]).rows
    looks = {row.group.label: (row.group.optimizer, *_look(row, rows).values()) for row in rows}
    assert len(set(looks.values())) == len(rows) == 8
    whole = [_look(row, rows)["linestyle"] for row in rows if row.group.label.endswith(" 100 steps")]
    assert whole == ["-"]  # AdamW's; Sophia's are named for their rates, too
    half = [_look(row, rows)["linestyle"] for row in rows if " 50 steps" in row.group.label]
    assert "-" not in half


def test_mid_schedule_is_said_everywhere(compare, two_groups, tmp_path):
    adamw, sophia = two_groups
    code, out, _ = compare(*adamw, *sophia, "--at-step", "50", "--out", tmp_path / "out")
    assert code == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    words = "mid-schedule"
    headings = [text for tag, text in page.texts if tag in ("h1", "h2")]
    about_losses = [text for text in headings if not text.startswith(("Unequal", "Published"))]
    assert len(about_losses) >= 4 and all(words in text for text in about_losses)
    assert page.texts_of("figcaption") and all(words in text for text in page.texts_of("figcaption"))
    assert "**mid-schedule**: step 50 of 100 (AdamW, Sophia GNB)" in out
    for path in (tmp_path / "out").glob("*.svg"):
        assert words in path.read_text(), path
    assert compare(*adamw)[1].count(words) == 0


@pytest.fixture
def chromium(tmp_path):
    """Opens a page without a window: returns its document after loading, and its console."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")

    def browse(path, width=1280):
        arguments = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
        done = subprocess.run(
            [CHROMIUM, *FLAGS, *arguments, path.as_uri()], capture_output=True, text=True, timeout=120
        )
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return browse


def test_the_page_renders_without_a_word_on_the_console(published, chromium):
    folder, _ = published
    document, console = chromium(folder / "report.html")
    assert console == []
    assert document.count("<figure>") == len(FIGURES)
    text = (folder / "report.html").read_text().replace("</body>", "<script>nothing()</script></body>")
    (folder / "broken.html").write_text(text)
    assert "nothing is not defined" in chromium(folder / "broken.html")[1][0]  # so it would have been heard


@pytest.mark.parametrize("width", [390, 1280])
def test_only_tables_scroll_sideways(published, chromium, width):
    folder, _ = published
    script = "const d = document.documentElement; d.dataset.over = d.scrollWidth - d.clientWidth;"
    text = (folder / "report.html").read_text().replace("</body>", f"<script>{script}</script></body>")
    (folder / "measured.html").write_text(text)
    document, _ = chromium(folder / "measured.html", width)
    assert re.search(r'data-over="(-?\d+)"', document)[1] == "0"
