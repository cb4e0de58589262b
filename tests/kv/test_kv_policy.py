"""kv_policy: which way is chosen for which sizes, and what is kept of a request from the lookup to the measurement."""

from __future__ import annotations

import pytest

from disagg_prefill_lmcache_v1.kv import load_scheduler
from disagg_prefill_lmcache_v1.kv import policy as kv_policy
from disagg_prefill_lmcache_v1.kv.load_scheduler import LoadScheduler
from disagg_prefill_lmcache_v1.kv.policy import LoadPolicy, size_class
from disagg_prefill_lmcache_v1.kv.settings import from_environment


class World:
    """Requests one after the other, each measured: seconds a token of both ways are settings."""

    def __init__(self, load: float, compute: float, policy: LoadPolicy | None = None) -> None:
        self.load, self.compute = load, compute
        self.policy = policy or LoadPolicy("auto")
        self.seconds = 0.0

    def request(self, tokens: int = 300) -> bool:
        loads = self.policy.decide(tokens)
        took = tokens * (self.load if loads else self.compute)
        (self.policy.record_load if loads else self.policy.record_compute)(tokens, took)
        self.seconds += took
        return loads

    def requests(self, count: int, tokens: int = 300) -> int:
        """How many of them were loaded."""
        return sum(self.request(tokens) for _ in range(count))


def test_always_and_never_do_as_they_say():
    for mode, chosen in (("always", 50), ("never", 0)):
        world = World(1.0, 0.001, LoadPolicy(mode))
        assert world.requests(50) == chosen
    with pytest.raises(ValueError, match=r"sometimes.*auto, always, never"):
        LoadPolicy("sometimes")


def test_the_mode_comes_from_the_environment_and_is_auto_by_default(monkeypatch):
    monkeypatch.delenv("DISAGG_KV_LOAD", raising=False)
    assert from_environment().load == "auto"
    monkeypatch.setenv("DISAGG_KV_LOAD", "never")
    assert from_environment().load == "never"
    monkeypatch.setenv("DISAGG_KV_LOAD", "maybe")
    with pytest.raises(ValueError, match="DISAGG_KV_LOAD 'maybe': allowed: auto, always, never"):
        from_environment()


@pytest.mark.parametrize(("beside", "load_s", "loads"), [(False, 1.1, False), (True, 2.9, True), (True, 3.1, False)])
def test_a_load_beside_the_steps_may_take_longer_than_computing(beside, load_s, loads):
    policy = LoadPolicy("auto", beside)
    policy.record_compute(300, 1.0)
    for _ in range(kv_policy.LOADS_TRUSTED):
        policy.record_load(300, load_s)
    assert policy.decide(300) is loads


def test_what_is_not_known_is_loaded():
    policy = LoadPolicy("auto")
    assert policy.decide(300)
    policy.record_compute(300, 0.001)
    assert policy.decide(300)
    policy.record_load(300, 10.0)
    policy.record_load(300, 10.0)
    assert policy.decide(300), "the first loads pay for connections"
    policy.record_load(300, 10.0)
    assert not policy.decide(300)
    assert policy.decide(600), "loads of another size are not known"


@pytest.mark.parametrize("ratio", [1.5, 4, 30])
@pytest.mark.parametrize("better", ["load", "compute"])
def test_the_faster_way_is_found_and_the_other_costs_a_few_percent(better, ratio):
    fast, slow = 0.001, 0.001 * ratio
    world = World(fast, slow) if better == "load" else World(slow, fast)
    world.policy.record_compute(256, 256 * world.compute)  # as the launcher's calibration
    world.requests(kv_policy.LOADS_TRUSTED)
    world.seconds = 0.0
    loaded = world.requests(2000)
    chosen = loaded if better == "load" else 2000 - loaded
    assert chosen >= 1960
    assert world.seconds <= 2000 * 300 * fast * (1 + 1.5 * kv_policy.EXPLORE_SHARE)


@pytest.mark.parametrize("better", ["load", "compute"])
def test_a_change_is_noticed_in_either_direction(better):
    world = World(0.001, 0.004) if better == "load" else World(0.004, 0.001)
    world.policy.record_compute(300, 300 * world.compute)
    world.requests(500)
    before = world.requests(100)
    assert before >= 98 if better == "load" else before <= 2
    world.load, world.compute = world.compute, world.load  # both change: the chosen way is measured all the time
    world.requests(500)
    after = world.requests(100)
    assert after <= 2 if better == "load" else after >= 98


def test_the_way_not_taken_is_tried_when_it_has_become_faster():
    world = World(0.004, 0.001)
    world.policy.record_compute(300, 0.3)
    world.requests(200)
    world.load = 0.0001  # nothing but a try can show it
    world.requests(2000)
    assert world.requests(100) >= 98


def test_computing_that_was_never_measured_is_tried():
    world = World(0.004, 0.001)
    assert world.requests(kv_policy.EXPLORE_AFTER + kv_policy.LOADS_TRUSTED) == 67
    assert world.requests(100) <= 2


def test_sizes_are_decided_each_by_itself():
    policy = LoadPolicy("auto")
    for _ in range(5):
        for tokens, load_s, compute_s in ((100, 0.05, 0.01), (8000, 0.2, 0.8)):
            policy.record_load(tokens, load_s)
            policy.record_compute(tokens, compute_s)
    assert not policy.decide(100)
    assert not policy.decide(127)
    assert policy.decide(8000)
    assert policy.decide(4100)
    assert size_class(256) == size_class(511) != size_class(512)
    assert size_class(1) != size_class(2)


def test_computing_of_another_size_is_judged_by_the_nearest_one():
    policy = LoadPolicy("auto")
    policy.record_compute(256, 0.256)
    policy.record_compute(8000, 16.0)
    assert policy.compute_seconds(100) == pytest.approx(0.1)
    assert policy.compute_seconds(600) == pytest.approx(0.6)
    assert policy.compute_seconds(4000) == pytest.approx(8.0)
    assert policy.load_seconds(256) is None


def test_a_hiccup_does_not_decide():
    world = World(0.001, 0.002)
    world.policy.record_compute(300, 0.6)
    world.requests(10)
    world.policy.record_load(300, 60.0)
    assert world.requests(50) == 50


def test_steps_of_a_prompt_count_as_one_measurement():
    whole, steps = LoadPolicy("auto"), LoadPolicy("auto")
    for policy in (whole, steps):
        policy.record_compute(4096, 4.0)
    whole.record_compute(4096, 8.0)
    for _ in range(4):
        steps.record_compute(1024, 2.0, of=4096)
    assert steps.compute_seconds(4096) == pytest.approx(whole.compute_seconds(4096))
    assert 4.0 < whole.compute_seconds(4096) < 8.0


def test_nothing_is_learned_from_nothing():
    policy = LoadPolicy("auto")
    for _ in range(5):
        policy.record_load(0, 5.0)
        policy.record_load(300, 0.0)
        policy.record_compute(0, 5.0)
    assert policy.load_seconds(300) is policy.compute_seconds(300) is None


# the scheduler's account


class Choosing(LoadPolicy):
    """Answers what it is told to, and keeps what it was asked and told."""

    def __init__(self, *answers: bool) -> None:
        super().__init__("auto")
        self.answers, self.asked, self.computed, self.loaded = list(answers), [], [], []

    def decide(self, tokens: int) -> bool:
        self.asked.append(tokens)
        return self.answers.pop(0)

    def record_compute(self, tokens: int, seconds: float, of: int = 0) -> None:
        self.computed.append((tokens, round(seconds, 6), of))

    def record_load(self, tokens: int, seconds: float) -> None:
        self.loaded.append((tokens, seconds))


def test_a_request_is_decided_once_and_counted_when_it_is_scheduled():
    book = LoadScheduler(Choosing(False, True))
    assert [book.choose("a", 299), book.choose("a", 299)] == [False, False]
    assert book.choose("b", 50)
    assert book.take() == {}
    for _ in range(2):  # the second time after a preemption
        book.scheduled("a", 0)
        book.scheduled("b", 50)
    book.scheduled("unknown to the store", 0)
    assert book.take() == {"recomputes": 1, "recomputed_tokens": 299, "loads": 1}
    assert book.take() == {}
    assert book.policy.asked == [299, 50]
    book.finished("a")
    book.policy.answers = [True]
    assert book.choose("a", 299), "another request may have the id later"


def test_a_load_that_vllm_does_not_want_is_not_counted():
    book = LoadScheduler(Choosing(True))
    book.choose("a", 299)
    book.scheduled("a", 0)
    assert book.take() == {}
    assert book.step([], {}).released == ["a"]


def test_lookups_of_requests_that_compute_are_released_once():
    book = LoadScheduler(Choosing(False, True))
    book.choose("a", 299)
    book.choose("b", 299)
    assert book.step([], {}).released == []
    book.scheduled("a", 0)
    book.scheduled("b", 299)
    assert book.step([], {}).released == ["a"]
    assert book.step([], {}).released == []


def test_a_step_is_shared_by_the_prompts_that_it_computes():
    book = LoadScheduler(Choosing())
    note = book.step([("a", 300, 0), ("b", 100, 0), ("loaded", 300, 299)], {"a": 300, "b": 100, "loaded": 1, "old": 1})
    assert note.compute_tokens == 401
    book.observe({"step_times": {note.number: [0.401, 1]}})
    assert book.policy.computed == [(300, 0.3, 300), (100, 0.1, 100), (1, 0.001, 1)]
    assert book.take() == {"compute_tokens": 401, "compute_seconds": 0.401}
    assert book.step([], {"a": 1, "b": 1}).compute_tokens == 0, "decoding is not computing a prompt"


def test_a_prompt_in_several_steps_is_of_its_whole_size():
    book = LoadScheduler(Choosing())
    notes = [book.step([("a", 3000, 256)], {"a": 2048}), book.step([], {"a": 696}), book.step([], {"a": 1})]
    assert [note.compute_tokens for note in notes] == [2048, 696, 0]
    assert len({note.number for note in notes}) == 3
    for note in notes[:2]:
        book.observe({"step_times": {note.number: [1.0, 1]}})
    assert book.policy.computed == [(2048, 1.0, 2744), (696, 1.0, 2744)]


def test_a_preempted_prompt_begins_again():
    book = LoadScheduler(Choosing())
    book.step([("a", 3000, 0)], {"a": 2048})
    note = book.step([("a", 3000, 0)], {"a": 2048})
    book.observe({"step_times": {note.number: [1.0, 1]}})
    assert book.policy.computed == [(2048, 1.0, 3000)]
    book.finished("a")
    assert book.step([], {"a": 952}).compute_tokens == 0


def test_small_steps_are_not_measured():
    book = LoadScheduler(Choosing())
    assert book.step([("a", 63, 0)], {"a": 63}).compute_tokens == 0
    assert book.step([("b", 64, 0)], {"b": 64}).compute_tokens == 64


def test_the_slowest_rank_counts_when_all_have_spoken():
    book = LoadScheduler(Choosing(), ranks=2)
    note = book.step([("a", 300, 0)], {"a": 300})
    book.observe({"step_times": {note.number: [0.3, 1]}, "load_times": {"1:b": [0.2, 1, 300], "1:c": [0.5, 2, 100]}})
    assert (book.policy.computed, book.policy.loaded) == ([], [(100, 0.5)])
    book.observe({"step_times": {note.number: [0.2, 1]}, "load_times": {"1:b": [0.4, 1, 0]}})
    assert book.policy.computed == [(300, 0.3, 300)]
    assert book.policy.loaded[1] == (0, 0.4), "a rank has not loaded it"


def test_measurements_that_never_come_fill_no_memory():
    book = LoadScheduler(Choosing(), ranks=2)
    for number in range(3 * load_scheduler.MOST_PENDING):
        note = book.step([(f"r{number}", 300, 0)], {f"r{number}": 300})
        book.observe({"step_times": {note.number: [0.3, 1]}})
    assert max(len(book._steps), len(book._pending)) <= load_scheduler.MOST_PENDING
    assert book._prompts == {}
