"""Reading what Weights & Biases keeps of an offline run."""

import json
import struct
from pathlib import Path


def offline_folders(run_dir: Path) -> list[Path]:
    """The folder of each invocation of a run."""
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def read(folder: Path) -> list:
    """Every record in the transaction log of an offline run: a 7-byte header, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    content, records, parts, at = path.read_bytes(), [], [], 7
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # no header fits into the rest of the block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
            parts = []
    return records


def of_kind(records: list, kind: str) -> list:
    """The contents of the records of one type, such as `exit`."""
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def history(records: list) -> list[dict]:
    """The logged values, as wandb would show them."""
    return [
        {item.nested_key[0]: json.loads(item.value_json) for item in each.item if len(item.nested_key) == 1}
        for each in of_kind(records, "history")
    ]


def config(records: list) -> dict:
    """The settings that were sent."""
    return {item.key: json.loads(item.value_json) for item in of_kind(records, "run")[0].config.update}


def summary(records: list) -> dict:
    """The figures that a run ends with, as wandb would show them."""
    items = [item for each in of_kind(records, "summary") for item in each.update]
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
