"""Where the time to the first token (TTFT) of a streamed answer went, in parts that sum to it.

It begins when the request's last bytes were in this machine's kernel: a proxy without CPU reads them later. Nothing is
guessed and no clocks of two machines are compared. The proxy knows when the request came, when it asked each
server and when each answered. The servers tell in ``x-kv-timing`` how long each thing took there; what is left of the
time that the proxy waited for them was spent between them.
"""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import time

from disagg_prefill_lmcache_v1.proxy.request import RequestContext

PARTS = {
    "proxy_queue": "until the first server is asked: CPU for the proxy, the body, checks, a place in the queue",
    "prefill_queue": "in the prefill server, until its engine has scheduled the request",
    "prefill": "the prefill server computes (all of its time, if it does not tell more)",
    "kv_visible": "the prefill server holds its answer until the KV cache is visible in the store",
    "hand_over": "in the proxy, between the prefill server's answer and asking the decode server",
    "decode_queue": "in the decode server, until its engine has scheduled the request",
    "load": "the decode server loads the KV cache",
    "first_step": "the decode server computes what was not loaded, and the first token",
    "decode": "all of the decode server's time, if it does not tell more",
    "network": "between the proxy and servers that tell their times: HTTP on both sides",
}
HEADER = b"x-kv-timing"
_LAST_DATA = slice(52, 56)  # tcpi_last_data_recv in the kernel's struct tcp_info: milliseconds since data came
_TICK_S = time.clock_getres(6) if sys.platform == "linux" else 0.0  # that number's step; 6 is CLOCK_MONOTONIC_COARSE
_SLACK_S = 0.0005  # servers round what they tell

_MS = rb"(\d{1,9}\.\d\d)"
told_by_prefill = re.compile(rb"queue=%b,prefill=%b,hold=%b" % (_MS, _MS, _MS)).fullmatch
told_by_decode = re.compile(rb"queue=%b,first-step=%b,load=%b" % (_MS, _MS, _MS)).fullmatch


def told_times(found: re.Match[bytes] | None) -> tuple[float, ...]:
    """The seconds that a server tells, empty if it does not; ``found`` by one of the two above."""
    if found is None:
        return ()
    first, second, third = found.groups()
    return float(first) / 1000, float(second) / 1000, float(third) / 1000


def arrived(transport: asyncio.BaseTransport, read_at: float) -> float:
    """When a client's last bytes came, on ``time.perf_counter``: at the latest then, and before ``read_at``."""
    try:
        told = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA.stop)
    except (OSError, AttributeError):  # it has hung up; another system
        return read_at
    since = int.from_bytes(told[_LAST_DATA], sys.byteorder) / 1000
    return min(read_at, time.perf_counter() - since + _TICK_S)


def ttft_parts(request: RequestContext, ttft_s: float) -> dict[str, float]:
    """Seconds of each part, which sum to ``ttft_s``."""
    start, asked, sent = request.start, request.prefill_sent, request.decode_sent
    parts = {"proxy_queue": (asked or sent) - start}
    network = -1.0
    if asked and request.prefill_answered:
        whole, told = request.prefill_s, request.prefill_told
        rest = whole - sum(told)
        if told and rest > -_SLACK_S:
            parts["prefill_queue"], parts["prefill"], parts["kv_visible"] = told
            network = max(rest, 0.0)
        else:
            parts["prefill"] = whole
        parts["hand_over"] = sent - asked - whole  # a server that did not take it was asked before, maybe
    elif asked:
        parts["prefill"] = sent - asked
    whole, told = start + ttft_s - sent, request.decode_told
    rest = whole - sum(told)
    if told and rest > -_SLACK_S:
        parts["decode_queue"], parts["load"], parts["first_step"] = told[0], told[2], told[1]
        network = max(rest, 0.0) + max(network, 0.0)
    else:
        parts["decode"] = whole
    if network >= 0:
        parts["network"] = network
    return parts


def server_timing(parts: dict[str, float]) -> bytes:
    """Header line that tells the parts to the client, milliseconds."""
    names = tuple(parts)
    pattern = _lines.get(names) or _lines.setdefault(names, _pattern(names, "%s;dur=%%.2f", ", "))
    return f"server-timing: {pattern % tuple([seconds * 1000 for seconds in parts.values()])}\r\n".encode()


def as_json(parts: dict[str, float]) -> str:
    """The same for the access log."""
    names = tuple(parts)
    pattern = _objects.get(names) or _objects.setdefault(names, "{" + _pattern(names, '"%s":%%.2f', ",") + "}")
    return pattern % tuple([seconds * 1000 for seconds in parts.values()])


# Few combinations of parts come, again and again: the text around the numbers is made once.
_lines: dict[tuple[str, ...], str] = {}
_objects: dict[tuple[str, ...], str] = {}


def _pattern(names: tuple[str, ...], each: str, between: str) -> str:
    return between.join([each % name for name in names])
