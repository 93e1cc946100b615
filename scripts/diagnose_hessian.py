"""Measure estimators of the Hessian's diagonal on a run's model: bias, variance, rank correlation, time.

    python scripts/diagnose_hessian.py RUN [--estimators gnb gnb:groups=8 ...] [--sequences N] [--out FILE]

RUN is a run folder (its newest checkpoint is taken) or a checkpoint. Estimates, on sequences of the run's
training data, are compared with the truth about these: the Gauss-Newton diagonal, and for Hutchinson also the
Hessian's. It is exact for a small model, else an average of many estimates, whose noise is printed.

  bias      sum(mean of the estimates - truth) / sum(truth), +- its standard error
  variance  sum(variance of one estimate) / sum(truth^2)
  rank 1    Spearman's correlation of one estimate with the truth, the median over estimates
  rank      that of the estimates' mean
  s         seconds of one estimate, the median; without a training gradient that it only reads
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from sophia_train import checkpoint, durable, schema_check
from sophia_train.command_line import Parser, whole_number
from sophia_train.compare.estimators import Comparison, Score, compare, estimates, find_truth
from sophia_train.data.batches import Batch, Batches
from sophia_train.errors import ConfigError, DataError, OutputError, UnavailableError, exit_code_of
from sophia_train.hessian import GNB, EmpiricalFisher, Estimator, GradientMagnitude, Hutchinson
from sophia_train.models.gpt2 import GPT2, GPT2Config
from sophia_train.run_config import build
from sophia_train.seeds import derive

ESTIMATORS: dict[str, type[Estimator]] = {
    "gnb": GNB,
    "hutchinson": Hutchinson,
    "empirical_fisher": EmpiricalFisher,
    "gradient_magnitude": GradientMagnitude,
}
DEFAULT = ["gnb", "gnb:groups=8", *list(ESTIMATORS)[1:]]
SUFFIXES = (".png", ".svg", ".pdf")
SHOWN = 3000  # coordinates in a panel


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    options = _options(arguments)
    estimators = {text: estimator(text, options.sequences) for text in options.estimators}
    weights, manifest = checkpoint.load_weights(options.run)
    config = manifest["config"]
    model = GPT2(GPT2Config(**config["model"])).to(options.device)
    checkpoint.load_parameters(model, weights, str(options.run))
    options.bf16 = options.device == "cuda" and config["precision"] != "fp32"
    seed = derive(config["seed"], "diagnosis")
    pool = _pool(options, manifest, seed)
    with Console(stderr=True).status("estimating; fewer --sequences or --refreshes are quicker"):
        comparisons = _compare(options, estimators, model, pool, seed)
    about = {key: getattr(options, key) for key in ("sequences", "refreshes", "truth_sequences", "bf16")}
    about |= {"run": str(options.run), "step": manifest["step"], "torch": torch.__version__}
    about["device"] = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    picture = io.BytesIO()
    draw(comparisons).savefig(picture, format=options.out.suffix[1:].lower())
    durable.write_bytes(options.out, picture.getvalue())
    if options.json is not None:
        durable.write_json(options.json, {**about, "comparisons": [_plain(each) for each in comparisons]})
    console = Console(highlight=False, width=80)
    console.print(table(comparisons, by_layer=True), "", table(comparisons), "")
    for truth in {each.truth.name: each.truth for each in comparisons}.values():
        noise = f" (noise {truth.noise:.0%})" if truth.noise else ""
        console.print(f"{truth.name}: {truth.kind}{noise}, {options.truth_sequences} sequences, fp32")
    words = "estimates: {refreshes} of {sequences} sequences, {0}, {device}; step {step}"
    console.print(words.format("bf16" if options.bf16 else "fp32", **about))
    Console(highlight=False, soft_wrap=True).print(f"{options.out}: {options.run}", markup=False)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add, number = parser.add_argument, functools.partial(parser.add_argument, type=whole_number, metavar="N")
    names = f"{', '.join(ESTIMATORS)}; with settings as in gnb:groups=8"
    add("run", type=Path, metavar="RUN", help="a run folder or a checkpoint")
    add("--estimators", nargs="+", default=DEFAULT, metavar="NAME", help=names)
    number("--sequences", default=32, help="of one estimate (%(default)s)")
    number("--refreshes", default=50, help="how many estimates (%(default)s)")
    number("--truth-sequences", help="each estimate draws its own from these (as many as --sequences)")
    number("--truth-refreshes", help="estimates in the average that a truth is (4 x --refreshes)")
    add("--out", type=Path, default="hessian.png", metavar="FILE", help="png, svg or pdf (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="all numbers")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(%(default)s)")
    options = parser.parse_args(arguments)
    if min(options.refreshes, options.truth_refreshes or 2) < 2:
        raise ConfigError("one of --refreshes or --truth-refreshes shows no variance; use at least 2")
    options.truth_refreshes = options.truth_refreshes or 4 * options.refreshes
    options.truth_sequences = options.truth_sequences or options.sequences
    if options.truth_sequences < options.sequences:
        raise ConfigError(f"--truth-sequences must be at least --sequences {options.sequences}")
    if options.out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--out {options.out} is none of {', '.join(SUFFIXES)}; use --out hessian.png")
    for path in filter(None, (options.out, options.json)):
        if path.is_dir() or not path.parent.is_dir():
            raise OutputError(f"{path} is a folder, or in none that is there; name a file, make its folder")
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise UnavailableError("--device cuda, but torch sees no GPU; use --device cpu")
    options.device = "cuda" if available and options.device != "cpu" else "cpu"
    return options


def estimator(text: str, sequences: int) -> Estimator:
    """Build what NAME or NAME:KEY=VALUE,KEY=VALUE names, for sub-batches of `sequences`."""
    name, _, rest = text.partition(":")
    if name not in ESTIMATORS:
        raise ConfigError(f"--estimators {text}: {schema_check.choices(name, list(ESTIMATORS))}")
    owner = ESTIMATORS[name]
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        settings[key] = value
        with contextlib.suppress(ValueError):  # a word
            settings[key] = json.loads(value)
    schema_check.check_keys({name: owner}, {name: settings})
    schema_check.check_values(name, owner, settings)
    schema_check.check_constructor(name, settings, lambda values: owner(**values))
    made = owner(**settings)
    try:
        made.check(sequences, 1)
    except ValueError as error:
        raise ConfigError(f"--estimators {text}: {error}; choose others, or other --sequences") from error
    return made


def _pool(options: argparse.Namespace, manifest: dict[str, Any], seed: int) -> Batch:
    """Sequences of the run's training data, chosen at random, the same at each call."""
    config, block_size = manifest["config"], manifest["config"]["model"]["block_size"]
    tokens = build(config["data"]).open("train")
    if tokens.fingerprint() != manifest["data"]["train"]:
        raise DataError(f"the training tokens are not those of {options.run}; bring them back")
    size, most = options.truth_sequences, (len(tokens) - 1) // block_size
    if size > most:
        raise ConfigError(f"{size} sequences are more than the {most} of the run's training data; use fewer")
    batch = Batches(tokens, block_size=block_size, batch_size=size, seed=seed).batch(0)
    return Batch(batch.inputs.to(options.device), batch.targets.to(options.device), batch.sequences)


def _compare(
    options: argparse.Namespace, estimators: dict[str, Estimator], model: GPT2, pool: Batch, seed: int
) -> list[Comparison]:
    both = any(isinstance(each, Hutchinson) for each in estimators.values())
    truths = []
    for name in ["Gauss-Newton", "Hessian"][: 1 + both]:
        truths.append(find_truth(name, model, pool, options.truth_refreshes, seed))
        if not truths[-1].diagonal.isfinite().all():
            raise DataError(f"the {name} diagonal of {options.run} is not finite; take an older checkpoint")
    comparisons = []
    for text, each in estimators.items():
        size, key = each.size(options.sequences), derive(seed, text)
        stream = estimates(each, model, pool, size, options.refreshes, key, options.bf16)
        comparisons += compare(text, model, stream, truths if isinstance(each, Hutchinson) else truths[:1])
    return comparisons


def _plain(each: Comparison) -> dict[str, Any]:
    """All numbers of a comparison as JSON; what has no meaning is null."""
    truth = {key: getattr(each.truth, key) for key in ("name", "kind", "noise")}
    layers = {name: dataclasses.asdict(score) for name, score in each.scores.items()}
    made = {"estimator": each.label, "truth": truth, "seconds": each.seconds, "layers": layers}
    return json.loads(json.dumps(made), parse_constant=lambda _: None)


def table(comparisons: Sequence[Comparison], by_layer: bool = False) -> Table:
    """Lay out the scores in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("layer" if by_layer else "estimator", overflow="fold")
    for heading in ("truth", "bias", "+-", "variance", "rank 1", "rank", "s"):
        made.add_column(heading, justify="left" if heading == "truth" else "right", no_wrap=True)
    for each in comparisons:
        if by_layer:
            made.add_row(each.label, style="bold")
        for name, score in each.scores.items():
            if (name == "overall") != by_layer:
                first, last = (f"  {name}", "") if by_layer else (each.label, f"{each.seconds:.2g}")
                made.add_row(first, each.truth.name, *_numbers(score), last)
    return made


def _numbers(score: Score) -> list[str]:
    values = zip(dataclasses.astuple(score), ("+.3g", ".2g", ".3g", ".2f", ".2f"), strict=True)
    return [f"{value:{form}}" if math.isfinite(value) else "-" for value, form in values]


def draw(comparisons: Sequence[Comparison]) -> Figure:
    """Draw estimates against the truth, a panel a comparison."""
    columns = min(3, len(comparisons))
    rows = math.ceil(len(comparisons) / columns)
    figure = Figure(figsize=(3.9 * columns + 0.6, 3.9 * rows + 0.4), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, each in zip(panels, comparisons, strict=False):
        used = each.shown[0].nonzero()[:, 0]
        used = used[:: max(1, len(used) // SHOWN)]
        true, mean, one = (values[used].double() for values in each.shown)
        for values, color, label in (
            (one, "#8fb8de", "one estimate"),
            (mean, "#c8452f", "mean of estimates"),
        ):
            same = values * true > 0
            axes.loglog(true[same].abs(), values[same].abs(), ".", color=color, markersize=2, label=label)
        low, high = true.abs().quantile(true.new_tensor([0.005, 1.0])).tolist()
        axes.plot([low, high], [low, high], color="#333333", linewidth=1, label="estimate = truth")
        axes.set(xlim=(low, 2 * high), xlabel=f"{each.truth.name} diagonal", ylabel="estimate")
        axes.set_ylim(bottom=min(low, mean.abs().quantile(0.005).item() or low))
        bias, error, variance, rank_one, rank_mean = _numbers(each.scores["overall"])
        ranks = f"rank correlation {rank_one}, of the mean {rank_mean}"
        axes.set_title(f"{each.label}\nbias {bias} ± {error}, variance {variance}\n{ranks}", fontsize=9)
        other = (mean * true < 0).double().mean().item()
        if other:
            axes.text(0.97, 0.03, f"{other:.0%} differ in sign", ha="right", transform=axes.transAxes)
    for axes in panels[len(comparisons) :]:
        axes.set_axis_off()
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, frameon=False, markerscale=5)
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
