"""What a run would take of GPUs that are not here: memory, time, and how well that is known."""

from sophia_train.planning.cluster import Cluster
from sophia_train.planning.plan import make_plan
from sophia_train.planning.work import Work, work_of

__all__ = ["Cluster", "Work", "make_plan", "work_of"]
