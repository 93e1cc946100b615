"""Build the dashboard of a Weights & Biases project: a workspace, and a report.

    python scripts/dashboard.py [--project NAME] [--entity NAME] [--spec FILE]

Loss against steps, tokens, seconds and FLOPs, what the Hessian does and costs, the update and the speed; runs
that differ in the seed alone as their mean, and the mean of each optimizer for each model and length. Trials
of a search, which have the tag purpose:tuning, are left out. Nothing in it refers to a run: it shows what is
in the project now and what comes later, offline runs that `wandb sync` sends included.

Each call makes a new workspace and a new report, and prints where they are. With --spec nothing is sent, and
no account is needed: what would be sent is written to FILE, as JSON.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from sophia_train import durable
from sophia_train.command_line import Parser
from sophia_train.errors import OutputError, UnavailableError, exit_code_of
from sophia_train.trackers.labels import TRIALS
from sophia_train.trackers.panels import AXIS_WORDS, SECTIONS, VALIDATION_LOSS, Panel
from sophia_train.trackers.wandb import default_entity

NAME = "Optimizers compared"
MOST_LINES = 100
COLUMNS = ("final_val_loss", "best_val_loss", "tokens", "flops", "seconds", "tokens_per_second")
"""Of the table of runs, all from their summaries."""

SETUP, SEEDS = "labels.setup", "group"
"""What runs are averaged over: a setting that the tracker adds, and W&B's own group."""

NO_TRIALS = f"Tags not in ['{TRIALS}']"
"""Which runs are shown, as wandb-workspaces has it."""


class Library(NamedTuple):
    """The two halves of wandb-workspaces."""

    workspaces: ModuleType
    reports: ModuleType


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--project", default="sophia_train", help="as tracker.wandb.project (sophia_train)")
    parser.add_argument("--entity", help="user or team (the default of the login)")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="write what would be sent; send nothing")
    options = parser.parse_args(arguments)
    library = import_library()
    if options.spec is not None:
        _write(options.spec, specification(library, options.entity or "", options.project))
        sys.stdout.write(f"{options.spec}\n")
        return
    try:
        own_entity = default_entity()
    except UnavailableError as error:
        raise UnavailableError(f"{error}, or use --spec FILE to write what would be sent") from error
    entity = options.entity or own_entity
    # The report comes first: saving it makes the project, if there is none.
    for made in (report(library, entity, options.project), workspace(library, entity, options.project)):
        _save(made)


def import_library() -> Library:
    """Import wandb-workspaces.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2
    except ImportError as error:
        raise UnavailableError(
            "the wandb-workspaces package is not installed; run `pip install 'sophia_train[dashboard]'`"
        ) from error
    return Library(workspaces, v2)


def _write(path: Path, content: dict[str, Any]) -> None:
    if path.is_dir():
        raise OutputError(f"--spec {path} is a folder; choose a file")
    try:
        durable.write_json(path, content)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"--spec {path}: {error.strerror}; choose another file") from None


def _save(made: Any) -> None:
    try:
        made.save()
    except Exception as error:  # the library raises it bare, and KeyError for an answer that it does not know
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UnavailableError(
            f"--project {made.project}, --entity {made.entity}: Weights & Biases did not take the dashboard "
            f"({reason}); check both names and the net, or use --spec FILE to write what would be sent"
        ) from error
    sys.stdout.write(f"{made.url}\n")


def workspace(library: Library, entity: str, project: str) -> Any:
    """Build the workspace: all sections, runs averaged over seeds, and the mean of each optimizer."""
    ws = library.workspaces
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            ws.Section(
                name=title, panels=panels, is_open=True, layout_settings=ws.SectionLayoutSettings(columns=4)
            )
            for title, panels in _sections(library)
        ],
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=MOST_LINES),
        runset_settings=ws.RunsetSettings(
            filters=NO_TRIALS,
            groupby=[ws.Metric(SEEDS)],
            pinned_columns=[f"summary:{name}" for name in COLUMNS],
        ),
    )


def report(library: Library, entity: str, project: str) -> Any:
    """Build the report: the same, as a page to read from above to below."""
    wr = library.reports
    blocks: list[Any] = [wr.P(INTRODUCTION), wr.TableOfContents()]
    for title, panels in _sections(library):
        for index, panel in enumerate(panels):
            panel.layout = wr.Layout(x=12 * (index % 2), y=8 * (index // 2), w=12, h=8)
        runs = wr.Runset(name="Runs", filters=NO_TRIALS, groupby=[SEEDS])  # of the report's own project
        blocks += [wr.H1(title), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(
        entity=entity, project=project, title=NAME, description=DESCRIPTION, blocks=blocks, width="fluid"
    )


def specification(library: Library, entity: str, project: str) -> dict[str, Any]:
    """Return the workspace and the report as they would be sent, by the library's own models."""
    made = {"workspace": workspace(library, entity, project), "report": report(library, entity, project)}
    return {
        kind: each._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        for kind, each in made.items()
    }


DESCRIPTION = "Loss by steps, tokens, seconds and FLOPs; what the Hessian does and costs."
INTRODUCTION = (
    "A line is the mean of runs that differ in the seed alone, between the lowest and the highest; in the "
    "first section it is the mean of an optimizer over all of its runs with that model and number of steps. "
    "Trials of a search are left out. FLOPs and seconds include the Hessian's passes. Intervals, speed-ups, "
    "and what is unequal between the runs: scripts/compare.py."
)


def _sections(library: Library) -> Iterator[tuple[str, list[Any]]]:
    """The sections by title, each with fresh panels."""
    by_setup = library.reports.Config(SETUP)
    means = [_line_plot(library, panel, by_setup) for panel in VALIDATION_LOSS.panels]
    yield "Mean of each optimizer", means
    for section in SECTIONS:
        yield section.name, [_line_plot(library, panel) for panel in section.panels]


def _line_plot(library: Library, panel: Panel, group: Any = None) -> Any:
    return library.reports.LinePlot(
        title=panel.title if group is None else f"{panel.title}, by optimizer",
        x=panel.axis,
        y=[panel.metric],
        title_x=AXIS_WORDS[panel.axis],
        groupby=group,
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_runs_to_show=MOST_LINES,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
