"""What a report says: the tables, notes and figures of a comparison, in their order."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from sophia_train.compare.cells import (
    NOTHING,
    ends_text,
    lengths_cells,
    loss_cells,
    number_text,
    size_cells,
    speed_cells,
    speed_text,
    variation_cells,
)
from sophia_train.compare.document import Block, Bullets, Heading, Notice, Paragraph, Picture, Table
from sophia_train.compare.fairness import Finding
from sophia_train.compare.reference import kinds
from sophia_train.compare.report import Comparison, Report, Row, best_by_length, best_by_optimizer
from sophia_train.compare.runs import Run
from sophia_train.compare.statistics import LEVEL

THE_OTHERS = 4
"""Number of groups from which on those with the most frequent value are not named one by one."""


def contents(report: Report, pictures: Mapping[str, Sequence[Picture]] | None = None) -> list[Block]:
    """Write a report.

    Args:
        report: its numbers.
        pictures: figures by the place where they belong: `differences SIZE`, `loss SIZE`, `hessian SIZE`,
            `sizes`, `tuning`.
    """
    pictures = pictures or {}
    number = len(report.runs)
    blocks: list[Block] = [Heading(1, f"{number} run{'s' * (number > 1)} compared{report.where}")]
    if report.at_step is not None:
        blocks.append(
            Notice(
                f"Mid-schedule: everything here is at step {report.at_step:,}, before the learning rate has "
                "decayed. The order of optimizers often changes until the end."
            )
        )
    several = len(report.comparisons) > 1
    for comparison in report.comparisons:
        if several:
            blocks.append(Heading(2, f"{comparison.size} parameters"))
        blocks += _comparison(comparison, report, 3 if several else 2, pictures)
    if several:
        blocks += _sizes(report, pictures.get("sizes", ()))
    blocks += _tuning(report, pictures.get("tuning", ()))
    blocks += _reference(report)
    return blocks


def _comparison(
    comparison: Comparison, report: Report, level: int, pictures: Mapping[str, Sequence[Picture]]
) -> Iterator[Block]:
    where = report.where
    at = f"at step {report.at_step:,}, mid-schedule" if report.at_step else "at the end of the schedule"
    baseline = comparison.baseline
    if verdicts := list(_verdicts(comparison)):
        yield Heading(level, f"In short{where}")
        yield Bullets(verdicts)
        yield from pictures.get(f"differences {comparison.size}", ())
    yield Heading(level, f"Validation loss{where}" if where else "Final validation loss")
    baseline_words = f"; the baseline is {baseline}" if baseline else ""
    yield Paragraph(f"Nats a token {at}; {100 * LEVEL:g} % intervals over seeds{baseline_words}.")
    yield Table(
        ["", "less baseline", "interval", "loss", "interval", "seeds", "detectable", "win rate"]
        + ["Hessian time"],
        [loss_cells(row, baseline) for row in comparison.rows],
    )
    yield Paragraph(
        "Differences are paired by seed: Student's t below 10 seeds, bootstrap from there. Detectable is the "
        "true difference that would show at 5 % in 80 % of such comparisons. Of 20 differences that are "
        "nothing, one will look like something."
    )
    yield from pictures.get(f"loss {comparison.size}", ())
    if varied := [row for row in comparison.rows if row.variation]:
        yield Heading(level, f"Settings of one optimizer{where}")
        yield Paragraph(
            "Each less the first of its optimizer and length in the table above, paired by seed as there."
        )
        yield Table(
            ["", "less the first", "interval", "detectable"], [variation_cells(row) for row in varied]
        )
    if comparison.lengths:
        yield Heading(level, f"Length of the schedule{where}")
        yield Paragraph(
            "The best settings of each optimizer and length. The speed-up compares ends of schedules: the "
            "baseline's tokens over those of the schedule that ends at its loss, on the line between two "
            "lengths, by seed; a bound (<, >) where no two lengths lie around it."
        )
        yield Table(
            ["", "speed-up in tokens", "loss by steps"],
            [lengths_cells(each) for each in comparison.lengths],
        )
    if baseline:
        target = comparison.target
        loss = (
            f"the {'' if where else 'final '}loss of {baseline}"
            if target is None
            else f"a loss of {target:.4f}"
        )
        yield Heading(level, f"Speed-up on the way to {loss}{where}")
        yield Paragraph(
            f"What {baseline} spends until it is there, over what a run with the same seed does: a geometric "
            "mean with its interval over seeds. Above 1, the run is in the middle of its schedule there: "
            "no comparison of ends. A bound (<, >) where a run never reaches the loss."
        )
        yield Table(
            ["", "reach it", "steps", "tokens", "FLOPs", "seconds"],
            [speed_cells(row, baseline) for row in comparison.rows],
        )
    else:
        yield Paragraph("No run of this size has the baseline's optimizer: there is nothing to compare with.")
    yield from pictures.get(f"hessian {comparison.size}", ())
    left_out = [(row, run) for row in comparison.rows for run in row.group.runs if not run.is_comparable]
    if left_out:
        yield Heading(level, f"Not in the losses{where}" if where else "Not in the final losses")
        yield Bullets([("", f"{run.path} ({row.group.label}): {_why(run)}") for row, run in left_out])
    yield Heading(level, "Unequal beyond the optimizer and its rates")
    if not report.studies:
        yield Paragraph("With how many trials the settings were found is not known; --tuning would tell.")
    found = [(finding.what, _values(finding)) for finding in comparison.findings]
    yield Bullets(found) if found else Paragraph("Nothing.")


def _sizes(report: Report, pictures: Sequence[Picture]) -> Iterator[Block]:
    yield Heading(2, f"Against model size{report.where}")
    yield Paragraph(
        "The group of the lowest loss of each optimizer at each size; speed-ups, in tokens, are to the final "
        "loss of that size's baseline, on the way of a longer schedule."
    )
    best = [best_by_optimizer(comparison.rows) for comparison in report.comparisons]
    optimizers = list(dict.fromkeys(name for each in best for name in each))
    head = [f"{comparison.size}{what}" for comparison in report.comparisons for what in ("", ", speed-up")]
    yield Table(
        ["", *head],
        [
            [name]
            + [
                cell
                for comparison, rows in zip(report.comparisons, best, strict=True)
                for cell in size_cells(rows.get(name), comparison.baseline)
            ]
            for name in optimizers
        ],
    )
    yield from pictures


def _tuning(report: Report, pictures: Sequence[Picture]) -> Iterator[Block]:
    if not report.studies:
        return
    yield Heading(2, "Tuning")
    yield Table(
        ["", "optimizer", "trials", "FLOPs", "best loss", "best settings"],
        [
            [
                study.path.name,
                study.optimizer,
                str(study.trials),
                f"{study.flops:.3g}",
                number_text(study.best_losses[-1], ".4f"),
                " ".join(f"{key}={value}" for key, value in study.best.items()) or NOTHING,
            ]
            for study in report.studies
        ],
        words=True,
    )
    yield from pictures


def _reference(report: Report) -> Iterator[Block]:
    reference = report.reference
    yield Heading(2, "Published results")
    yield Paragraph(reference.reason)
    if reference.curves:
        meanings = kinds()
        used = dict.fromkeys(
            [curve.kind for curve in reference.curves] + [claim.kind for claim in reference.claims]
        )
        yield Bullets([(kind, meanings[kind]) for kind in used])
        yield Table(
            ["", "publication", "kind", "loss", "tokens", "points", "source", "note"],
            [
                [f"{curve.optimizer} {curve.size}", curve.name, curve.kind, f"{curve.losses[-1]:.3f}"]
                + [f"{curve.tokens[-1] / 1e9:.1f}B", str(len(curve.losses)), curve.source, curve.note]
                for curve in reference.curves
            ]
            + [
                [f"{claim.optimizer} {claim.size}", claim.name, claim.kind, *[NOTHING] * 3, claim.source]
                + [f"speed-up {claim.speed_up:g}: {claim.note}"]
                for claim in reference.claims
            ],
            words=True,
        )


def _verdicts(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Say of the best of each other optimizer and length, in words, what the intervals say."""
    baseline = comparison.baseline_row
    if baseline is None:
        return
    others = [row for row in comparison.rows if row.group.optimizer != baseline.group.optimizer]
    for row in best_by_length(others) or others:
        yield row.group.label, _verdict(row, baseline)
    for each in comparison.lengths:
        if each.speed_up is not None and each.speed_up.relation != "?":
            words = f"speed-up in tokens, by the ends of its schedules: {speed_text(each.speed_up)}."
            yield each.optimizer, words


def _verdict(row: Row, baseline: Row) -> str:
    """Say what the intervals say, and no more."""
    name = baseline.group.label
    if row.final is None:
        return "no run got to where losses are compared."
    if row.difference is None:
        return f"shares no seed with {name}, so that nothing is paired."
    interval = row.difference.interval
    words = f"{abs(interval.mean):.4f} {'below' if interval.mean < 0 else 'above'} {name}"
    if interval.n == 1:
        return f"{words} with one seed, which shows nothing."
    shown = interval.low > 0 or interval.high < 0
    words += f" ({ends_text(interval, '+.4f')}): {'a' if shown else 'no'} difference shown"
    share = row.group.compared_step / baseline.group.compared_step
    if share == 1:
        return f"{words}."
    if shown:
        return (
            f"{words}, with {share:.2f} of the steps: it {'does not match' if interval.mean > 0 else 'wins'}."
        )
    detectable = number_text(row.difference.detectable, ".4f")
    return f"{words} with {share:.2f} of the steps; one of {detectable} would have been."


def _why(run: Run) -> str:
    if run.is_complete and run.compared_step == run.total_steps:
        return "its final loss is not finite"
    if run.is_complete:
        return f"its loss at step {run.compared_step:,} is not finite"
    if run.compared_step < run.total_steps:
        return f"not evaluated at step {run.compared_step:,}; the last time before was step {run.last_step:,}"
    at = f"cut at step {run.last_step:,} of {run.total_steps:,}, loss {run.final_loss:.4f} mid-schedule"
    return f"{at} ({run.reason})"


def _values(finding: Finding) -> str:
    """List values with the groups that have them; many that agree are the others."""
    labels: dict[str, list[str]] = {}
    for label, values in finding.values.items():
        labels.setdefault(", ".join(values) or "none", []).append(label)
    most, count = Counter({value: len(each) for value, each in labels.items()}).most_common(1)[0]
    texts = [f"{value} ({', '.join(each)})" for value, each in labels.items() if value != most]
    owners = f"the other {count}" if texts and count >= THE_OTHERS else ", ".join(labels[most])
    return "; ".join([f"{most} ({owners})", *texts])
