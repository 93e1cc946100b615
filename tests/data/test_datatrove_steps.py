"""datatrove's executors prepare the same bytes as one process does, and nothing twice."""

import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from worker_datatrove import SmallUnits

from sophia_train.data.inspection import missing_units
from sophia_train.data.parts import PartsFolder
from sophia_train.errors import ConfigError, DataError, MissingInputError

pytest.importorskip("datatrove", reason="datatrove is not installed")

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

from sophia_train.data.datatrove_steps import PrepareShare, PutTogether

# datatrove forks, which Python 3.12 and later warn of
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

N_UNITS = 7


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    generator = random.Random(0)
    for n in range(35):
        words = generator.choices(["the ", "quick ", "brown\n", "é", "  "], k=70)
        (folder / f"{n:02}.txt").write_text("".join(words)[:190].ljust(200, "."))
    return folder


def data_of(corpus: Path, folder: str) -> SmallUnits:
    return SmallUnits(path=str(corpus), folder=str(corpus.parent / folder), validation_fraction=0.3)


@pytest.fixture
def expected(corpus: Path) -> dict[str, bytes]:
    """The files of a plain preparation."""
    data = data_of(corpus, "plain")
    assert len(data.units()) == N_UNITS
    data.prepare()
    return content_of(data.prepared_folder)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def parts_of(data: SmallUnits) -> Path:
    return PartsFolder(data.prepared_folder, [], {}).path


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def local(step: Any, logs: Path, tasks: int = 1, workers: int = 1, **options: Any) -> Any:
    return LocalPipelineExecutor([step], tasks=tasks, workers=workers, logging_dir=str(logs), **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bytes_are_those_of_a_plain_preparation(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    data = data_of(corpus, "prepared")
    shares = local(PrepareShare(data), tmp_path / "logs_shares", tasks=3, workers=workers)
    local(PutTogether(data), tmp_path / "logs", depends=shares).run()
    assert content_of(data.prepared_folder) == expected
    assert not parts_of(data).exists()


def test_nothing_is_done_twice(corpus: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    data = data_of(corpus, "prepared")
    # no task is complete to a log of its own, so each is run: what is done is found in the folder
    local(PrepareShare(data), tmp_path / "first", tasks=3).run()
    done = state_of(parts_of(data))
    stats = local(PrepareShare(data), tmp_path / "second", tasks=3).run()
    assert state_of(parts_of(data)) == done and not data.is_prepared
    found = {label: stat.total for label, stat in stats.stats[0].stats.items()}
    text_bytes = sum(path.stat().st_size for path in corpus.iterdir())
    assert found == {"documents": 35, "text_bytes": text_bytes, "tokens": text_bytes + 35}
    local(PutTogether(data), tmp_path / "third").run()
    assert content_of(data.prepared_folder) == expected
    done = state_of(data.prepared_folder)
    local(PutTogether(data), tmp_path / "fourth").run()
    local(PrepareShare(data), tmp_path / "fifth", tasks=3).run()
    assert state_of(data.prepared_folder) == done and not parts_of(data).exists()


def test_tasks_share_the_units_out(corpus: Path, tmp_path: Path) -> None:
    data = data_of(corpus, "prepared")
    shares = local(PrepareShare(data), tmp_path / "logs", tasks=3, local_tasks=1, local_rank_offset=1)
    shares.run()
    assert missing_units(data.prepared_folder, data.units()) == [0, 2, 3, 5, 6]
    with pytest.raises(MissingInputError, match=r"lacks 5 units, first of all 0; .*depends="):
        local(PutTogether(data), tmp_path / "other_logs").run()
    assert not data.is_prepared and missing_units(data.prepared_folder, data.units()) == [0, 2, 3, 5, 6]


def test_one_task_is_a_whole_preparation(corpus: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    data = data_of(corpus, "prepared")
    shares = local(PrepareShare(data, workers=2), tmp_path / "shares")
    local(PutTogether(data), tmp_path / "logs", depends=shares).run()
    assert content_of(data.prepared_folder) == expected


def test_several_tasks_cannot_put_together(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tasks=2, .* use tasks=1"):
        local(PutTogether(data_of(corpus, "prepared")), tmp_path / "logs", tasks=2).run()


def test_documents_of_other_steps_pass(corpus: Path) -> None:
    data = data_of(corpus, "prepared")
    for step in (PrepareShare(data), PutTogether(data)):
        assert list(step(iter(["a", "b"]), 0, 1)) == ["a", "b"]
    assert data.is_prepared


def test_an_error_ends_the_task(corpus: Path, tmp_path: Path) -> None:
    data = data_of(corpus, "prepared")
    (corpus / "10.txt").write_bytes(b"\xff" * 200)
    shares = local(PrepareShare(data), tmp_path / "shares", tasks=3)
    with pytest.raises(DataError, match=r"10.txt: byte 0 is not UTF-8"):
        local(PutTogether(data), tmp_path / "logs", depends=shares).run()
    assert not data.is_prepared


SLURM = {
    "sbatch": """\
import os, re, subprocess, sys
*options, script = sys.argv[1:]
last = int(re.search(r"--array=0-(\\d+)", open(script).read())[1])
with open(os.environ["JOBS"], "a+") as jobs:
    jobs.seek(0)
    number = len(jobs.readlines()) + 1
    print(*(option for option in options if "dependency" in option), file=jobs)
for task in range(last + 1):
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here"}
    subprocess.run(["bash", script], check=True, stdout=sys.stderr, env=environment)
print("Submitted batch job", number)
""",
    "srun": "import os, sys\nos.execvp(sys.argv[4], sys.argv[4:])\n",  # srun -l -n 1 COMMAND
    "scontrol": "print('here')\n",
}


def test_slurm_jobs(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor's own scripts and pickles, run at once by commands in the place of Slurm's."""
    commands, jobs = tmp_path / "bin", tmp_path / "jobs"
    commands.mkdir()
    for name, content in SLURM.items():
        (commands / name).write_text(f"#!{sys.executable}\n{content}")
        (commands / name).chmod(0o755)
    monkeypatch.setenv(
        "PATH", os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("JOBS", str(jobs))
    data = data_of(corpus, "prepared")
    where = {"time": "1:00:00", "partition": "cpu"}
    shares = SlurmPipelineExecutor(
        [PrepareShare(data)], tasks=2, logging_dir=str(tmp_path / "shares"), **where
    )
    SlurmPipelineExecutor(
        [PutTogether(data)], tasks=1, logging_dir=str(tmp_path / "logs"), depends=shares, **where
    ).run()
    assert content_of(data.prepared_folder) == expected
    assert jobs.read_text().splitlines()[2] == "--dependency=afterok:1"  # after statistics of the first job
