"""The folder of what was compiled: it is filled, used again, and refused where nothing can be written."""

import pytest
from support import records

COMPILED = "compile=true optimizer=adamw ~hessian.interval max_steps=2 schedule.warmup_steps=1".split()


def libraries(folder):
    """What inductor made for this machine, and when."""
    return {path: path.stat().st_mtime_ns for path in (folder / "inductor").rglob("*.so")}


@pytest.mark.slow
def test_is_filled_by_one_run_and_used_by_the_next(tiny, tmp_path):
    """A relative path is relative to the working directory."""
    cache = tmp_path / "cache"
    assert tiny(tmp_path / "first", *COMPILED, "compile_cache=cache", cwd=tmp_path).code == 0
    made = libraries(cache)
    assert made
    assert tiny(tmp_path / "second", *COMPILED, f"compile_cache={cache}").code == 0
    assert libraries(cache) == made
    assert records(tmp_path / "first") == records(tmp_path / "second")


def test_may_be_another_one_later(tiny, tmp_path):
    assert tiny(tmp_path / "run", "stop_at_step=2").code == 75
    assert tiny(tmp_path / "run", f"compile_cache={tmp_path / 'cache'}").code == 0
    assert (tmp_path / "cache").is_dir()


def test_that_cannot_be_written_is_refused_before_anything_is_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "cache"):
        ended = tiny(tmp_path / "run", f"compile_cache={place}")
        assert ended.code == 73 and len(ended.err.splitlines()) == 1
        assert f"compile_cache={place} cannot be written" in ended.errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
