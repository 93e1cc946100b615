"""What processes do together: the failure of one is that of all, and a long wait is not one."""

import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from sophia_train.collectives import gather, together
from sophia_train.errors import DataError


def in_two_processes(work):
    """Do `work(rank)` in two processes whose collectives wait for a second."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_join, (store.port, work), nprocs=2)


def _join(rank, port, work):
    store = TCPStore("127.0.0.1", port)
    options = {"store": store, "rank": rank, "world_size": 2, "timeout": timedelta(seconds=1)}
    torch.distributed.init_process_group("gloo", **options)
    work(rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def prepare(rank):
    if rank == 0:
        time.sleep(2)  # longer than a collective waits
    return rank


def wait_for_long(rank):
    assert together(lambda: prepare(rank), timedelta(minutes=2)) == [0, 1]
    assert gather(rank) == [0, 1]


def wait_as_always(rank):
    together(lambda: prepare(rank))


def fail_on_one(rank):
    def work():
        if rank == 1:
            raise DataError("of the second")

    with pytest.raises(DataError, match="of the second"):
        together(work)


def test_the_others_wait_for_long_work():
    in_two_processes(wait_for_long)


def test_without_a_timeout_of_its_own_the_group_has_its_say():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="Timed out|Connection|timeout"):
        in_two_processes(wait_as_always)


def test_what_fails_on_one_fails_on_all():
    in_two_processes(fail_on_one)


def test_alone_it_is_just_done():
    assert together(lambda: 3) == [3] and gather("a") == ["a"]
