"""Run by torchrun: a run of eight steps, taken up and broken off as it is told; what it saw, into a file."""

import json
import sys
from pathlib import Path

import torch
from support import build, start_trackers

from sophia_train import checkpoint
from sophia_train.checkpoint_files import SavedTensors
from sophia_train.collectives import gather, rank
from sophia_train.distributed import end_process
from sophia_train.errors import Interrupted

STEPS = 8
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def go_on(folder: Path, stop_at_step: int | None, *, mode: str, resaves: bool = False, **settings) -> None:
    """Go on from the newest checkpoint of the run in `folder`, if there is one.

    Args:
        folder: of the run.
        stop_at_step: where to break off; None ends it.
        mode: as `parallel=`.
        resaves: save what was restored, at once and elsewhere.
        settings: of `support.build`.
    """
    settings = {"micro_batch_size": 2, "max_steps": STEPS, "save_interval": 3, **settings}
    trainer, _ = build(folder, mode=mode, stop_at_step=stop_at_step, **settings)
    newest = checkpoint.latest(folder / "checkpoints")
    if newest is not None:
        trainer.restore(newest)
        if resaves:
            again = folder.parent / f"again_{trainer.state.step}"
            checkpoint.save(again, trainer.state.step, trainer.unwrapped, trainer.optimizer, {})
    seen, next_batch = [], trainer._next_batch

    def noted():
        batch = next_batch()
        rows = zip(batch.sequences, batch.inputs.tolist(), strict=True)
        merged = {number: row for part in gather(dict(rows)) for number, row in part.items()}
        seen.append([trainer.state.step, [merged[number] for number in sorted(merged)]])
        return batch

    trainer._next_batch = noted
    if rank() == 0:
        start_trackers(trainer, folder)
    try:
        trainer.fit()
    except Interrupted:
        assert trainer.state.step == stop_at_step
    else:
        assert stop_at_step is None
    if rank() == 0:
        with (folder / "batches.jsonl").open("a") as file:
            file.writelines(json.dumps(each) + "\n" for each in seen)


def differences(one: Path, other: Path) -> list[str]:
    """Names of the tensors of which two checkpoints do not hold the same bits."""
    differing = []
    manifests = [checkpoint.read_manifest(path) for path in (one, other)]
    for kind in ("model", "optimizer"):
        ours, theirs = (
            checkpoint.tensors_of(path, manifest, kind)
            for path, manifest in zip((one, other), manifests, strict=True)
        )
        differing += [name for name in ours.keys() | theirs.keys() if not same(ours, theirs, name)]
    return differing


def same(ours: SavedTensors, theirs: SavedTensors, name: str) -> bool:
    return name in ours and name in theirs and torch.equal(ours[name][:], theirs[name][:])


def breaks(folder: Path, modes: list[str], stride: int) -> None:
    """Break the run off after every `stride`-th step, in each mode; all must end as the undisturbed one."""
    wrong = []
    for mode in modes:
        go_on(folder / mode / "undisturbed", None, mode=mode)
        expected = checkpoint.latest(folder / mode / "undisturbed" / "checkpoints")
        for step in range(1, STEPS, stride):
            for in_background in (False, True) if step == 4 else (False,):
                run = folder / mode / f"broken_{step}_{in_background}"
                go_on(run, step, mode=mode, save_in_background=in_background)
                go_on(run, None, mode=mode, save_in_background=in_background)
                found = checkpoint.latest(run / "checkpoints")
                left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
                if found.name != expected.name or differences(found, expected) or left:
                    wrong.append([mode, step, in_background, differences(found, expected), left])
    if rank() == 0:
        (folder / "wrong.json").write_text(json.dumps(wrong))


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "breaks":
        breaks(folder, sys.argv[4:], int(sys.argv[3]))
    else:
        mode, stop, dtype = sys.argv[3:]
        stop_at_step = None if stop == "end" else int(stop)
        go_on(folder / "run", stop_at_step, mode=mode, resaves=True, dtype=DTYPES[dtype])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    end_process(0)
