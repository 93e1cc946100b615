"""Preparing text, next to nanoGPT's recipe and to the tokenizer alone on the same text and cores."""

import argparse
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from sophia_train.benchmarks import tokenizer_alone
from sophia_train.benchmarks.turns import provenance, times_faster
from sophia_train.data.manifest import Manifest
from sophia_train.data.sources import Text
from sophia_train.data.tokenizers import load_tokenizer
from sophia_train.errors import UnavailableError

OURS, BARE, RECIPE = "prepare_data.py", "tiktoken alone", "nanoGPT's recipe"


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare `options.path` by each with as many processes, in turns; return tokens a second.

    nanoGPT's recipe is that of its `data/openwebtext/prepare.py`: `datasets.map` over a dataset that is
    loaded already, then batches of it into a memory map. Ours reads the text files, and its time has all of
    it: start of the workers, digests, `fsync`.

    The tokenizer alone is what a perfect preparation would reach: as many processes at once, each with a part
    of the documents of its own, of nearly equal length, whose tokens it forgets. Its time, too, has the start
    of the processes and the reading of text.

    Raises:
        UnavailableError: the package `datasets` or the tokenizer's vocabulary is not there.
        MissingInputError: there is no text.
    """
    datasets = _datasets()
    load_tokenizer("gpt2").encode("")
    texts = [
        "".join(str(piece) for piece in document.pieces)
        for unit in Text(path=options.path, tokenizer="gpt2").units()
        for document in unit.documents()
    ]
    seconds: dict[str, list[float]] = {OURS: [], BARE: [], RECIPE: []}
    tokens: dict[str, int] = {}
    started: list[float] = []  # seconds of the tokenizer alone, without start and reading
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        dataset = datasets.Dataset.from_dict({"text": texts})
        shares = [Path(scratch) / f"share_{index}" for index in range(options.workers)]
        for path, share in zip(shares, _equal_shares(texts, options.workers), strict=True):
            tokenizer_alone.write(share, path)

        def bare() -> int:
            count, encoding = tokenizer_alone.run(shares)
            started.append(encoding)
            return count

        for repeat in range(options.repeats):
            folder = Path(scratch) / f"repeat_{repeat}"
            contestants: dict[str, Callable[[], int]] = {
                OURS: functools.partial(_ours, options, folder / "ours"),
                BARE: bare,
                RECIPE: functools.partial(_recipe, dataset, options.workers, folder / "recipe"),
            }
            for name, contestant in contestants.items():
                began = time.perf_counter()
                tokens[name] = contestant()
                seconds[name].append(time.perf_counter() - began)
            shutil.rmtree(folder)
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
                "tokens_per_second": tokens[name] / statistics.median(times),
                "tokens_per_second_per_core": tokens[name] / statistics.median(times) / options.workers,
                "over_recipe": times_faster(times, seconds[RECIPE]),
                "of_bare": times_faster(times, seconds[BARE]),
                "of_bare_without_its_start": times_faster(times, started),
                "seconds": times,
            }
            for name, times in seconds.items()
        ],
    }


def table(report: dict[str, Any]) -> Table:
    """Lay out the figures in at most 80 columns."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("")
    for heading in ("tokens/s", "a core", "over nanoGPT's", "of tiktoken's"):
        made.add_column(heading, justify="right")
    for row in report["results"]:
        made.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second_per_core']:,.0f}",
            f"{row['over_recipe']:.2f}",
            f"{row['of_bare']:.0%}",
        )
    return made


def notes(report: dict[str, Any]) -> str:
    """Say under what conditions the figures were measured."""
    settings, env = report["settings"], report["environment"]
    ours = report["results"][0]
    return "\n".join(
        [
            f"tokens/s: gpt2 tokens, median of {settings['repeats']} repeats in turns; ratios: of neighbours",
            f"each: {settings['workers']} processes, the time of their start included",
            f"without tiktoken's start, ours reaches {ours['of_bare_without_its_start']:.0%} of its rate",
            f"text: {settings['documents']:,} documents, {settings['text_bytes']:,} bytes",
            f"device: {env['device']}, {os.cpu_count()} cores",
            f"versions: Python {env['python']}, tiktoken {env['tiktoken']}, datasets {env['datasets']}",
        ]
    )


def _equal_shares(texts: Sequence[str], count: int) -> list[list[str]]:
    """Share texts out so that each share is about as long: the longest first, each to the shortest share."""
    shares: list[list[str]] = [[] for _ in range(count)]
    lengths = [0] * count
    for text in sorted(texts, key=len, reverse=True):
        shortest = lengths.index(min(lengths))
        shares[shortest].append(text)
        lengths[shortest] += len(text)
    return shares


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
