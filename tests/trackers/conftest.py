import pytest

from sophia_train.config import compose, run_config, to_json
from sophia_train.trackers.base import RunInfo


@pytest.fixture
def run_info(tmp_path):
    """Describe a run in a temporary folder, new or resumed."""

    def describe(resumed_from_step=None, total_steps=100, name="trial", config=None, data=None):
        return RunInfo(
            run_dir=tmp_path,
            name=name,
            config=config or {"model": {"n_layer": 2}, "seed": 1},
            resumed_from_step=resumed_from_step,
            total_steps=total_steps,
            data=data or {},
        )

    return describe


@pytest.fixture
def run_of(run_info):
    """Describe a run of real settings, by overrides."""

    def describe(*overrides, **options):
        config = run_config(compose(overrides))
        steps = config.total_steps(config.model.block_size)
        return run_info(name=config.name, config=to_json(config), total_steps=steps, **options)

    return describe


@pytest.fixture
def record():
    """Make the metrics of one step."""

    def make(step, **metrics):
        return {"step": step, "tokens": 64 * step, "seconds": 0.5 * step, "flops": 1e6 * step, **metrics}

    return make
