"""The charts of report.html, as Plotly takes them: traces and layout; colours of text and grid come with the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from disagg_prefill_lmcache_v1.measure.parts import percentile, rate_name

Figure = dict[str, Any]
Arms = dict[str, list[dict[str, Any]]]
"""Name of an arm to its requests, or to its points."""

_ARM_COLOURS = ("#2f7ed8", "#e08214", "#3a9d5d", "#9467bd")
# Told apart also by those who see colours differently, on white and on black.
_PART_COLOURS = {
    "proxy_queue": "#8c8c8c",
    "prefill_queue": "#e6a117",
    "prefill": "#d1591d",
    "kv_visible": "#c678a8",
    "hand_over": "#9a8f2d",
    "decode_queue": "#5ab4e6",
    "load": "#2f74c0",
    "first_step": "#1f9d78",
    "decode": "#3f8f4f",
    "network": "#b3b3b3",
    "client": "#6b7686",
}
_OTHER = "#7a6fd0"  # a part of another name
_DECODING = "rgba(128, 128, 128, 0.28)"
MOST_ROWS = 120  # requests in a chart with a row for each


def colour_of(arm: int) -> str:
    return _ARM_COLOURS[arm % len(_ARM_COLOURS)]


def distribution(values: dict[str, list[float]], unit: str, *, log: bool = False) -> Figure:
    """Cumulative share of the values of each arm: read p50 at 0.5, the tail at the top."""
    traces = []
    for number, (arm, given) in enumerate(values.items()):
        ordered = sorted(value for value in given if value > 0 or not log)
        if len(ordered) > 2000:  # so many are drawn
            ordered = [percentile(ordered, 100 * n / 1999) or 0.0 for n in range(2000)]
        share = [(n + 1) / len(ordered) for n in range(len(ordered))]
        line = {"shape": "hv", "width": 2, "color": colour_of(number)}
        hover = f"%{{y:.1%}} at most %{{x:,.2f}} ms<extra>{arm}</extra>"
        traces.append({"type": "scatter", "mode": "lines", "name": arm, "x": [round(v, 3) for v in ordered],
                       "y": share, "line": line, "hovertemplate": hover})  # fmt: skip
    axis: dict[str, Any] = {"title": {"text": unit}, "type": "log" if log else "linear"}
    if not log:
        axis["rangemode"] = "tozero"
    share_axis = _axis("share of gaps" if log else "share of requests", range=[0, 1.02], tickformat=".0%")
    return {"data": traces, "layout": {"xaxis": axis, "yaxis": share_axis, "height": 360}}


def pareto(points: Arms, cards: int) -> Figure:
    """Tokens per second for a user against tokens per second from a card: up and to the right is better."""
    traces = []
    for number, (arm, given) in enumerate(points.items()):
        shown = [point for point in given if (point["tpot_ms"] or {}).get("p50")]
        text = [rate_name(point) + ("/s" if point["request_rate"] else "") for point in shown]
        traces.append({
            "type": "scatter", "mode": "lines+markers+text", "name": arm, "text": text, "textposition": "top center",
            "x": [round(1000 / point["tpot_ms"]["p50"], 2) for point in shown],
            "y": [round(point["output_throughput"] / cards, 2) for point in shown],
            "line": {"color": colour_of(number)}, "marker": {"size": 10}, "cliponaxis": False,
            "hovertemplate": f"%{{x:,.1f}} tokens/s a user, %{{y:,.1f}} a card<extra>{arm}, %{{text}}</extra>",
        })  # fmt: skip
    layout = {"xaxis": _axis("tokens/s for a user (1 / median TPOT)", rangemode="tozero"), "height": 360,
              "yaxis": _axis("tokens/s from a card", rangemode="tozero")}  # fmt: skip
    return {"data": traces, "layout": layout}


def where_ttft_goes(requests: Arms) -> Figure:
    """Stacked parts: their mean, and the very requests whose TTFT is the median, the 90th and the 99th percentile."""
    rows: list[tuple[str, dict[str, float]]] = []
    for arm, given in requests.items():
        told = sorted((r for r in given if r.get("parts") and r["ttft_ms"]), key=lambda r: r["ttft_ms"])
        if not told:
            continue
        names = _names([told])
        rows.append((f"{arm}, mean", {n: sum(r["parts"].get(n, 0.0) for r in told) / len(told) for n in names}))
        for percent in (50, 90, 99):
            rows.append((f"{arm}, p{percent}", told[round((len(told) - 1) * percent / 100)]["parts"]))
    rows.reverse()  # Plotly begins below
    traces = [
        {
            "type": "bar", "orientation": "h", "name": name, "y": [row for row, _ in rows],
            "x": [round(parts.get(name, 0.0), 2) for _, parts in rows],
            "marker": {"color": _PART_COLOURS.get(name, _OTHER)},
            "hovertemplate": f"{name} %{{x:,.1f}} ms<extra></extra>",
        }
        for name in dict.fromkeys(name for _, parts in reversed(rows) for name in parts)
    ]  # fmt: skip
    layout = {"barmode": "stack", "xaxis": _axis("ms"), "yaxis": {"automargin": True}, "height": 130 + 34 * len(rows)}
    return {"data": traces, "layout": {**layout, "legend": {"traceorder": "normal"}}}


def timeline(requests: Sequence[dict[str, Any]]) -> Figure:
    """Each request as a row: the parts of its TTFT one after the other, then its decoding."""
    shown = [r for r in requests if r["ttft_ms"]][:MOST_ROWS]
    rows = list(range(1, len(shown) + 1))
    begins = [r["start_s"] for r in shown]
    traces = []
    # Time between the proxy and the others comes last, wherever it was spent.
    for name in _names([shown]):
        lasts = [_part(r, name) / 1000 for r in shown]
        if any(lasts):
            colour = _PART_COLOURS.get(name, _OTHER)
            traces.append(_bars(name, rows, begins, lasts, colour))
            begins = [begin + last for begin, last in zip(begins, lasts, strict=True)]
    if not shown:
        return {"data": [], "layout": {}}
    decoding = [max(r["start_s"] + r["e2el_ms"] / 1000 - begin, 0.0) for r, begin in zip(shown, begins, strict=True)]
    traces.append(_bars("decoding", rows, begins, decoding, _DECODING))
    layout = {
        "barmode": "overlay", "bargap": 0.25, "xaxis": _axis("s since the load began", rangemode="tozero"),
        "yaxis": _axis("request", autorange="reversed", dtick=1 + len(rows) // 20),
        "height": 150 + 14 * max(len(rows), 8), "legend": {"traceorder": "normal"},
    }  # fmt: skip
    return {"data": traces, "layout": layout}


def reuse(requests: Sequence[dict[str, Any]]) -> Figure:
    """Prompt tokens of each request: reused, and computed by the decode server."""
    shown = [r for r in requests if r.get("reused_tokens") is not None and r["input_tokens"]][:MOST_ROWS]
    rows = list(range(1, len(shown) + 1))
    reused = [min(r["reused_tokens"], r["input_tokens"]) for r in shown]
    computed = [r["input_tokens"] - got for r, got in zip(shown, reused, strict=True)]
    traces = [
        {"type": "bar", "name": name, "x": rows, "y": values, "marker": {"color": colour},
         "hovertemplate": f"request %{{x}}: %{{y:,}} tokens {name}<extra></extra>"}
        for name, values, colour in (("reused", reused, "#1f9d78"), ("computed again", computed, "#d1591d"))
    ]  # fmt: skip
    layout = {"barmode": "stack", "xaxis": _axis("request"), "yaxis": _axis("prompt tokens"), "height": 360}
    return {"data": traces if shown else [], "layout": {**layout, "legend": {"traceorder": "normal"}}}


def _bars(name: str, rows: list[int], begins: list[float], lasts: list[float], colour: str) -> dict[str, Any]:
    return {
        "type": "bar", "orientation": "h", "name": name, "y": rows, "base": [round(b, 5) for b in begins],
        "x": [round(last, 5) for last in lasts], "marker": {"color": colour},
        "customdata": [round(last * 1000, 2) for last in lasts],
        "hovertemplate": f"request %{{y}}: {name} %{{customdata:,.1f}} ms<extra></extra>",
    }  # fmt: skip


def _part(request: dict[str, Any], name: str) -> float:
    """Milliseconds; all of a TTFT whose parts nobody tells is "decode"."""
    parts = request.get("parts") or {"decode": request["ttft_ms"]}
    return float(parts.get(name, 0.0))


def _names(groups: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    found = dict.fromkeys(name for group in groups for r in group for name in (r.get("parts") or ("decode",)))
    order = list(_PART_COLOURS)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}
