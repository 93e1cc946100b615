"""The figures of a run, out of its records."""

import dataclasses
import math

from sophia_train.trackers.summary import summarize


def test_figures(record):
    records = [
        record(0, **{"val/loss": 4.0}),
        record(5, **{"train/loss": 3.0, "perf/tokens_per_second": 100.0, "perf/hessian_share": 0.0}),
        record(10, **{"val/loss": 2.0, "perf/tokens_per_second": 200.0, "perf/hessian_share": 0.5}),
        record(20, **{"val/loss": 2.5, "optim/skipped_steps": 3, "perf/peak_memory_gb": 7.0}),
    ]
    found = summarize(records)
    assert {axis: getattr(found, axis) for axis in records[-1].keys() & vars(found)} == record(20)
    assert (found.final_val_loss, found.best_val_loss, found.best_step) == (2.5, 2.0, 10)
    assert (found.tokens_per_second, found.hessian_share) == (150.0, 0.25)
    assert (found.skipped_steps, found.peak_memory_gb) == (3, 7.0)
    assert found.mfu is None and found.win_rate is None


def test_a_loss_that_is_not_finite_is_final_but_never_the_best(record):
    found = summarize([record(1, **{"val/loss": 3.0}), record(2, **{"val/loss": math.nan})])
    assert math.isnan(found.final_val_loss) and found.best_val_loss == 3.0
    assert summarize([record(1, **{"val/loss": math.inf})]).best_val_loss is None


def test_nothing_is_made_up():
    assert set(dataclasses.asdict(summarize([])).values()) == {None}
    foreign = {"step": 1, "tokens": "many", "val/loss": True, "perf/mfu": None}
    assert {k: v for k, v in vars(summarize([foreign])).items() if v is not None} == {"step": 1}
