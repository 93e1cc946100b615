"""The loader: the batches of the steps, whatever the order in which they are asked for."""

import resource
import threading

import numpy as np
import pytest
import torch

from sophia_train.data import token_files
from sophia_train.data.batches import Batches
from sophia_train.data.loader import Loader
from sophia_train.data.token_files import Tokens, TokenShard


@pytest.fixture
def batches(make_tokens):
    return Batches(make_tokens(np.arange(200), (50, 120)), block_size=4, batch_size=6, seed=3)


def test_gives_each_step_its_batch_in_any_order(batches):
    loader = Loader(batches, torch.device("cpu"))
    for step in [0, 1, 2, 3, 7, 8, 2, 2, 100]:
        found, expected = loader.batch(step), batches.batch(step)
        assert torch.equal(found.inputs, expected.inputs) and torch.equal(found.targets, expected.targets)
        assert found.sequences == expected.sequences


def test_reads_the_next_step_while_this_one_is_worked_on(batches):
    read, done = [], threading.Event()

    class Watched:
        def batch(self, step):
            read.append(step)
            if step == 1:
                done.set()
            return batches.batch(step)

    Loader(Watched(), torch.device("cpu")).batch(0)
    assert done.wait(30) and read == [0, 1]


def test_an_error_of_the_thread_is_raised_where_the_batch_is_asked_for(batches):
    class Broken:
        def batch(self, step):
            if step == 1:
                raise OSError("the disk is gone")
            return batches.batch(step)

    loader = Loader(Broken(), torch.device("cpu"))
    loader.batch(0)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.batch(1)


def test_more_files_than_a_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "OPEN_FILES", 16)
    ids = np.arange(2000)
    shards = []
    for number, part in enumerate(np.split(ids, 400)):
        path = tmp_path / f"{number}.bin"
        part.astype("<u2").tofile(path)
        shards.append(TokenShard(path, "<u2", 0, len(part)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        tokens = Tokens(shards)
        assert np.array_equal(tokens.read(0, 2000), ids)
        for start in np.random.default_rng(0).integers(0, 1990, 2000):
            assert np.array_equal(tokens.read(int(start), 10), ids[start : start + 10])
        assert len(tokens._maps) == 16
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
