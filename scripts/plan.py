"""Say what a run would take of GPUs that are not here: memory, tokens/s, where a step's time goes, days.

    python scripts/plan.py gpus=64 gpu=A100 network=200 model=gpt2_1_5b parallel=fsdp batch_size=512
        hessian.batch_size=64

Four words are of the GPUs, and the others those of `python -m sophia_train`:

    gpus=N             all of them
    gpu=NAME           A100, A100-40GB, H100 or H200
    gpus_per_node=N    8 unless given
    network=GBIT       Gbit/s between nodes, each way, for each GPU; unless given what NVIDIA's own
                       nodes have: 200 for an A100, 400 for an H100 or H200

The speed of training steps is measured, on the GPUs and for the models that the table names; the plan says
where it goes beyond them. The rest is bytes over rates: sophia_train/planning.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from sophia_train.command_line import Parser, positive_number, whole_number
from sophia_train.config import compose, run_config
from sophia_train.durable import write_json
from sophia_train.errors import ConfigError, exit_code_of
from sophia_train.planning import Cluster, make_plan
from sophia_train.planning.cluster import CARDS
from sophia_train.planning.measured import short

CLUSTER: dict[str, Callable[[str], Any]] = {
    "gpu": str,
    "gpus": whole_number,
    "gpus_per_node": whole_number,
    "network": positive_number,
}


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; returns the exit code."""
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there, too")
    options = parser.parse_intermixed_args(arguments)
    own = [word for word in options.words if word.partition("=")[0] in CLUSTER]
    overrides = [word for word in options.words if word not in own]
    plan = make_plan(run_config(compose(overrides)), cluster_of(own))
    console = Console(highlight=False)
    console.width = min(80, console.width)
    notes = Table.grid(Column(), Column(overflow="fold"), padding=(0, 1))
    for note in plan["notes"]:
        notes.add_row("-", note)
    for part in (table(plan), "", points_table(plan["points"]), "", notes):
        console.print(part)
    if options.json is not None:
        write_json(options.json, plan)


def cluster_of(words: Sequence[str]) -> Cluster:
    """Build the cluster of which the words are.

    Raises:
        ConfigError: a word is missing or wrong, or the GPUs do not fill their nodes.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            values[key] = CLUSTER[key](text)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"{key}={text}: {error}") from error
    for key, example in {"gpus": "gpus=8", "gpu": f"one of gpu={', '.join(CARDS)}"}.items():
        if key not in values:
            raise ConfigError(f"{key} is not given; add {example}")
    return Cluster.of(**values)


def table(plan: Mapping[str, Any]) -> Table:
    """Lay out the figures of a plan."""
    cluster, run, memory, seconds = (plan[key] for key in ("cluster", "run", "memory_bytes", "step_seconds"))
    nodes = "one node"
    if cluster["network_gbit"] is not None:
        nodes = f"{cluster['gpus'] // cluster['gpus_per_node']} nodes of {cluster['gpus_per_node']}, "
        nodes += f"{cluster['network_gbit']:g} Gbit/s a GPU between them"
    hidden = plan["communication_seconds"] - seconds["communication"]
    gigabytes = {key: f"{value / 1e9:.1f}" for key, value in memory.items()}
    rows = {
        "GPUs": f"{cluster['gpus']} {cluster['gpu']}: {nodes}",
        "model": f"{run['parameters']:,} parameters, {run['parallel']}"
        + (f" in {run['shards']} shards" if run["shards"] > 1 else ""),
        "batch": f"{run['batch_size']} x {run['block_size']} tokens: {cluster['gpus']} x "
        f"{run['micro_batches']} micro-batches of {run['micro_batch_size']}",
        "memory of a GPU": f"about {gigabytes['total']} of {gigabytes['card']} GB: states "
        f"{gigabytes['states']}, activations {gigabytes['activations']}, logits {gigabytes['logits']}",
        "": plan["fits"],
        "tokens/s": f"{plan['tokens_per_second']:,.0f}, all GPUs",
        "MFU": f"{plan['mfu']:.1%}",
        "a step": f"{1000 * seconds['total']:,.1f} ms",
        **{
            f"  {part}": f"{1000 * seconds[part]:,.1f} ms, {seconds[part] / seconds['total']:.1%}"
            for part in ("compute", "communication", "optimizer", "hessian")
        },
        "duration": f"{plan['days']:,.2f} days, {plan['gpu_hours']:,.0f} GPU hours: "
        f"{run['steps']:,} steps, {short(run['tokens'])} tokens",
    }
    if cluster["gpus"] > 1:
        rows["  communication"] += f" not hidden by passes; {1000 * hidden:,.1f} ms are"
    layout = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in rows.items():
        layout.add_row(name, value)
    return layout


def points_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out measured points, and how far the model is from them."""
    layout = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    layout.add_column("measured (* used here)", overflow="fold")
    for heading in ("tokens/s", "error", "left out"):
        layout.add_column(heading, justify="right")
    for point in points:
        left_out = point["left_out_error"]
        layout.add_row(
            f"{'*' if point['used'] else ' '} {point['name']}",
            f"{point['measured']:,.0f}",
            f"{point['error']:+z.1%}",
            "-" if left_out is None else f"{left_out:+z.1%}",
        )
    return layout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
