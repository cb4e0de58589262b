"""Parts of TTFT: they sum to it whatever servers tell, and reach the client, the access log and /metrics."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import pytest
from proxy_harness import DEADLINE_S, REPOSITORY, Stack, stack, wait_until

from disagg_prefill_lmcache_v1.proxy import timing
from disagg_prefill_lmcache_v1.proxy.request import RequestContext

PREFILL = "queue=10.00,prefill=20.00,hold=5.00"
DECODE = "queue=3.00,first-step=7.00,load=15.00"
ALL = [part for part in timing.PARTS if part != "decode"]


def request(**values) -> RequestContext:
    """Asked at 1 s, prefill answered at 1.1, decode asked at 1.25."""
    made = RequestContext("POST", "/v1/completions", b"/v1/completions", "/v1/completions", "id", b"")
    given = {"start": 0.9, "prefill_sent": 1.0, "prefill_answered": 1.1, "prefill_s": 0.1, "decode_sent": 1.25}
    for name, value in {**given, **values}.items():
        setattr(made, name, value)
    return made


def times(text: str, read) -> tuple[float, ...]:
    return timing.told_times(read(text.encode()))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"proxy_queue": 100, "prefill": 100, "hand_over": 150, "decode": 50}),
        (
            {"prefill_told": (0.01, 0.02, 0.05), "decode_told": (0.01, 0.02, 0.01)},
            {
                "proxy_queue": 100, "prefill_queue": 10, "prefill": 20, "kv_visible": 50, "hand_over": 150,
                "decode_queue": 10, "load": 10, "first_step": 20, "network": 30,
            },
        ),
        ({"prefill_told": (0.01, 0.02, 0.05)}, {"prefill_queue": 10, "decode": 50, "network": 20}),
        ({"decode_told": (0.01, 0.02, 0.01)}, {"prefill": 100, "first_step": 20, "network": 10}),
        # told more than the proxy has waited: not believed
        ({"prefill_told": (9.0, 0.0, 0.0), "decode_told": (0.0, 9.0, 0.0)}, {"prefill": 100, "decode": 50}),
        # a first prefill server did not take it; the one that was asked last answered in 60 ms
        ({"prefill_s": 0.06}, {"prefill": 60, "hand_over": 190}),
        ({"prefill_answered": 0.0, "prefill_s": -1.0}, {"prefill": 250, "decode": 50}),  # it failed
        ({"prefill_sent": 0.0, "prefill_answered": 0.0}, {"proxy_queue": 350, "decode": 50}),  # the decoder alone
    ],
)  # fmt: skip
def test_parts_sum_to_the_whole(values, expected) -> None:
    parts = timing.ttft_parts(request(**values), 0.4)
    assert sum(parts.values()) == pytest.approx(0.4)
    assert {name: round(parts[name] * 1000) for name in expected} == expected
    assert min(parts.values()) >= 0
    assert set(parts) <= set(timing.PARTS)
    assert [part for part in timing.PARTS if part in parts] == list(parts)


def test_every_part_is_documented() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    assert [part for part in timing.PARTS if f"`{part}`" not in page] == []


def test_what_servers_tell() -> None:
    assert times(PREFILL, timing.told_by_prefill) == (0.01, 0.02, 0.005)
    assert times(DECODE, timing.told_by_decode) == (0.003, 0.007, 0.015)
    for text in ("", "x", PREFILL, DECODE + ",", DECODE.replace("7", "-7"), DECODE.replace("7.00", "nan"), "9" * 9999):
        assert times(text, timing.told_by_decode) == ()


def stream(made: Stack, name: str, mock: str, url: str = "/v1/completions") -> dict[str, float]:
    """The parts that the header of a streamed answer tells, milliseconds."""
    headers = {"x-request-id": name, "x-mock": mock}
    response = httpx.post(made.url + url, json={"prompt": "x", "stream": True}, headers=headers, timeout=DEADLINE_S)
    assert response.status_code == 200
    assert "x-kv-timing" not in response.headers
    pairs = [part.split(";dur=") for part in response.headers["server-timing"].split(", ")]
    return {part: float(ms) for part, ms in pairs}


@pytest.mark.parametrize(
    ("mock", "names"),
    [
        (f"prefill.timing={PREFILL};decode.timing={DECODE}", ALL),
        (f"decode.timing={DECODE}", [part for part in ALL if part not in ("prefill_queue", "kv_visible")]),
        ("prefill.timing=queue=never;decode.timing=", ["proxy_queue", "prefill", "hand_over", "decode"]),
    ],
)
def test_client_log_and_metrics_have_the_parts(mock: str, names: list[str]) -> None:
    with stack(prefill="delay=0.05", decode="delay=0.05") as made:
        told = stream(made, "parts", mock)
        assert list(told) == names
        line = made.proxy.access_line("parts")
        parts, ttft = line["ttft_parts_ms"], line["ttft_ms"]
        assert list(parts) == names
        assert sum(parts.values()) == pytest.approx(ttft, abs=0.01 * len(parts))
        assert 100 < sum(told.values()) <= ttft + 0.01 * len(parts)
        if names == ALL:
            assert (parts["prefill"], parts["kv_visible"], parts["load"], parts["first_step"]) == (20, 5, 15, 7)
            assert 100 - 35 - 25 <= parts["network"] < ttft - 60
        text = httpx.get(f"{made.url}/metrics").text.splitlines()
        sums = [float(each.split()[1]) for each in text if each.startswith("disagg_ttft_part_seconds_sum")]
        assert sum(sums) * 1000 == pytest.approx(ttft, abs=0.1)


def test_a_request_begins_when_it_is_here_and_not_when_the_proxy_has_cpu_for_it() -> None:
    frozen_s = 0.4
    with stack() as made, made.proxy.connect() as client:
        body = b'{"prompt": "x", "stream": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: late\r\ncontent-type: application/json\r\n"
        made.proxy.process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{made.proxy.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the proxy stands still")
        client.sendall(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        time.sleep(frozen_s)  # what is measured
        made.proxy.process.send_signal(signal.SIGCONT)
        line = made.proxy.access_line("late")
        assert line["ttft_parts_ms"]["proxy_queue"] >= (frozen_s - 0.1) * 1000
        assert sum(line["ttft_parts_ms"].values()) == pytest.approx(line["ttft_ms"], abs=0.1)


def test_without_prefill_servers_the_parts_are_two() -> None:
    with stack("--decode-only") as made:
        assert list(stream(made, "plain", "")) == ["proxy_queue", "decode"]


def test_answers_that_are_not_streamed_have_none() -> None:
    with stack() as made:
        response = httpx.post(f"{made.url}/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "whole"})
        assert "server-timing" not in response.headers
        assert "ttft_parts_ms" not in made.proxy.access_line("whole")
