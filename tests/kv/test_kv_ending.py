"""An error of the connector at start ends the process, whatever threads there are."""

from __future__ import annotations

import multiprocessing

import ending_process
import pytest

from disagg_prefill_lmcache_v1.kv import ending


def start(guarded):
    child = multiprocessing.get_context("fork").Process(target=ending_process.fail_at_start, args=(guarded,))
    child.start()
    return child


def test_the_process_ends_though_a_thread_goes_on():
    child, unguarded = start(True), start(False)
    try:
        child.join(60)
        assert child.exitcode == 1
        unguarded.join(1)
        assert unguarded.exitcode is None, "it would end by itself: nothing of ours is needed"
    finally:
        for process in (child, unguarded):
            process.kill()
            process.join()


def test_the_error_goes_on_and_a_process_that_nobody_started_lives():
    assert multiprocessing.parent_process() is None
    with pytest.raises(ValueError, match="told"), ending.process_ends_on_error():
        raise ValueError("told")
