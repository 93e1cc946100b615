"""Preparing text, next to nanoGPT's recipe and to the bare tokenizer on the same text and cores."""

import argparse
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from sophia_train.benchmarks.turns import provenance
from sophia_train.data.manifest import Manifest
from sophia_train.data.sources import Text
from sophia_train.data.tokenizers import load_tokenizer
from sophia_train.errors import UnavailableError

OURS, RECIPE, BARE = "prepare_data.py", "nanoGPT's recipe", "tiktoken alone, one core"


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare `options.path` by each, in turns; return tokens a second.

    nanoGPT's recipe is that of its `data/openwebtext/prepare.py`: `datasets.map` over a dataset that is
    loaded already, then batches of it into a memory map. Ours reads the text files, and its time has all of
    it: start of the workers, digests, `fsync`. The bare tokenizer is one core's, on documents in memory;
    cores times it is what a perfect preparation would reach.

    Raises:
        UnavailableError: the package `datasets` or the tokenizer's vocabulary is not there.
        MissingInputError: there is no text.
    """
    datasets = _datasets()
    tokenizer = load_tokenizer("gpt2")
    tokenizer.encode("")
    texts = [
        "".join(str(piece) for piece in document.pieces)
        for unit in Text(path=options.path, tokenizer="gpt2").units()
        for document in unit.documents()
    ]
    seconds: dict[str, list[float]] = {OURS: [], RECIPE: [], BARE: []}
    tokens: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        dataset = datasets.Dataset.from_dict({"text": texts})
        for repeat in range(options.repeats):
            folder = Path(scratch) / f"repeat_{repeat}"
            contestants: dict[str, Callable[[], int]] = {
                OURS: functools.partial(_ours, options, folder / "ours"),
                RECIPE: functools.partial(_recipe, dataset, options.workers, folder / "recipe"),
                BARE: lambda: sum(len(tokenizer.encode(text)) for text in texts) + len(texts),
            }
            for name, contestant in contestants.items():
                began = time.perf_counter()
                tokens[name] = contestant()
                seconds[name].append(time.perf_counter() - began)
            shutil.rmtree(folder)
    medians = {name: tokens[name] / statistics.median(times) for name, times in seconds.items()}
    return {
        "benchmark": "data",
        "settings": {
            "path": str(options.path),
            "documents": len(texts),
            "text_bytes": sum(len(text.encode(errors="replace")) for text in texts),
            "workers": options.workers,
            "repeats": options.repeats,
        },
        "environment": provenance(
            torch.device("cpu"), datasets=datasets.__version__, tiktoken=version("tiktoken")
        ),
        "results": [
            {
                "name": name,
                "tokens": tokens[name],
                "tokens_per_second": medians[name],
                "over_recipe": medians[name] / medians[RECIPE],
                "of_bare": medians[name] / (medians[BARE] * (options.workers if name != BARE else 1)),
                "seconds": seconds[name],
            }
            for name in seconds
        ],
    }


def table(report: dict[str, Any]) -> Table:
    """Lay out the figures in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    for heading in ("tokens/s", "over nanoGPT's", "of bare x cores"):
        made.add_column(heading, justify="right")
    for row in report["results"]:
        made.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['over_recipe']:.2f}",
            f"{row['of_bare']:.0%}",
        )
    return made


def notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures were measured."""
    settings, env = report["settings"], report["environment"]
    return "\n".join(
        [
            f"tokens/s: median of {settings['repeats']} repeats in turns, gpt2 tokens, "
            f"{settings['workers']} workers",
            f"text: {settings['documents']:,} documents, {settings['text_bytes']:,} bytes",
            f"device: {env['device']}, {os.cpu_count()} cores",
            f"versions: Python {env['python']}, tiktoken {env['tiktoken']}, datasets {env['datasets']}",
        ]
    )


def _ours(options: argparse.Namespace, folder: Path) -> int:
    data = Text(path=options.path, tokenizer="gpt2", folder=str(folder), validation_fraction=0.0005)
    data.prepare(workers=options.workers)
    record = Manifest.read(folder)
    return record.tokens("train") + record.tokens("validation")


def _recipe(dataset: Any, workers: int, folder: Path) -> int:
    """Tokenise as nanoGPT does: ids of every document into a new dataset, and that into one file."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")

    def process(example: dict[str, str]) -> dict[str, Any]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    folder.mkdir(parents=True)
    tokenized = dataset.map(
        process,
        remove_columns=["text"],
        num_proc=workers,
        load_from_cache_file=False,
        cache_file_name=str(folder / "cache.arrow"),
    )
    total = int(np.sum(tokenized["len"], dtype=np.uint64))
    written = np.memmap(folder / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
    batches, at = min(1024, len(tokenized)), 0
    for index in range(batches):
        batch = tokenized.shard(num_shards=batches, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        written[at : at + len(ids)] = ids
        at += len(ids)
    written.flush()
    return total


def _datasets() -> Any:
    try:
        version("datasets")
    except PackageNotFoundError:
        raise UnavailableError("datasets is not installed; pip install datasets") from None
    import datasets

    datasets.disable_progress_bars()
    return datasets
