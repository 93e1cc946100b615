"""Preparation as a pipeline of datatrove's: tasks prepare a share each, then one puts them together.

    shares = SlurmPipelineExecutor([PrepareShare(data, workers=8)], tasks=64, cpus_per_task=8, ...)
    SlurmPipelineExecutor([PutTogether(data)], tasks=1, depends=shares, ...).run()

Every task must see the folder that `data.folder` is in. The bytes are those of any other preparation. A task
that is run again goes on from the units that are done, so it may be killed and queued anew.
"""

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from sophia_train.data.inspection import missing_units
from sophia_train.data.sources import TextData
from sophia_train.errors import ConfigError, MissingInputError


class PrepareShare(PipelineStep):
    """Prepares every n-th unit of a corpus in each of n tasks; a single task prepares all that there is.

    Args:
        data: what to prepare.
        workers: processes of a task.
    """

    name = "share"
    type = "sophia_train"

    def __init__(self, data: TextData, workers: int = 1) -> None:
        super().__init__()
        self.data = data
        self.workers = workers

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Prepare the share of task `rank` of `world_size`; documents from steps before pass through unseen.

        Raises:
            RunError: as `TextData.prepare`.
        """
        counts = {"documents": 0, "tokens": 0, "text_bytes": 0}

        def count(*share: int) -> None:
            counts.update(zip(counts, share, strict=True))

        with self.track_time("task"):
            self.data.prepare(count, self.workers, (rank, world_size))
        for label, value in counts.items():
            self.stat_update(label, value=value, unit="task")
        yield from data or ()


class PutTogether(PipelineStep):
    """Makes the folder of the shares, in one task that depends on those that prepare them.

    Args:
        data: as for the shares.
    """

    name = "put together"
    type = "sophia_train"

    def __init__(self, data: TextData) -> None:
        super().__init__()
        self.data = data

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Put the folder together, unless it is there; documents from steps before pass through unseen.

        Raises:
            ConfigError: there are several tasks.
            MissingInputError: a share is not done.
            RunError: as `TextData.prepare`.
        """
        if world_size != 1:
            raise ConfigError(f"tasks={world_size}, but one puts the folder together; use tasks=1")
        with self.track_time("task"):
            folder = self.data.prepared_folder
            missing = [] if self.data.is_prepared else missing_units(folder, self.data.units())
            if missing:
                raise MissingInputError(
                    f"{folder} lacks {len(missing)} units, first of all {missing[0]}; run the tasks with "
                    "PrepareShare to their end, and give them as depends="
                )
            self.data.prepare()
        yield from data or ()
