"""report.html: what a run or a comparison has shown, as one file that needs no network.

    python -m disagg_prefill_lmcache_v1.measure.report RUN_DIR

It reads compare.json of RUN_DIR, or else summary.json, and writes report.html beside it. Exit status 1, with one line,
where there is neither, or no Plotly.
"""

from __future__ import annotations

import html
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from disagg_prefill_lmcache_v1.measure import report_charts
from disagg_prefill_lmcache_v1.measure.parts import all_points, describe_parts, percentile, rate_name, short

NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_LATENCIES = (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL"), ("e2el_ms", "E2E"))


class ReportError(Exception):
    """The report cannot be made; the message is one line."""


def write_report(run_dir: Path) -> Path:
    """Write the report of a run directory.

    Raises:
        ReportError: there is nothing to report, it cannot be read, or Plotly is not installed.
    """
    for name, read in (("compare.json", dict), ("summary.json", comparison_of_one)):
        path = run_dir / name
        if path.is_file():
            try:
                result = read(json.loads(path.read_text(encoding="utf-8")))
                text = make_report(result)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ReportError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
            break
    else:
        raise ReportError(f"{run_dir} has neither compare.json nor summary.json")
    target = run_dir / NAME
    temporary = run_dir / f".report-{os.getpid()}.html"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    return target


def comparison_of_one(summary: dict[str, Any]) -> dict[str, Any]:
    """summary.json in the form of compare.json: one arm, one point."""
    requests = summary["each_request"]
    complete = [r for r in requests if not r["error"] and r["ttft_ms"]]
    seconds = summary["duration_s"] or 1.0
    tpot = [(r["e2el_ms"] - r["ttft_ms"]) / (r["output_tokens"] - 1) for r in complete if r["output_tokens"] > 1]
    point = {
        "request_rate": summary["request_rate"],
        "duration_s": summary["duration_s"],
        "completed": len(complete),
        "failed": len(requests) - len(complete),
        "request_throughput": len(complete) / seconds,
        "output_throughput": summary["output_tokens"] / seconds,
        "total_token_throughput": (summary["output_tokens"] + summary["prompt_tokens"]) / seconds,
        "ttft_ms": _quantiles([r["ttft_ms"] for r in complete]),
        "tpot_ms": _quantiles(tpot),
        "itl_ms": _quantiles([gap for r in complete for gap in r["itls_ms"]]),
        "e2el_ms": _quantiles([r["e2el_ms"] for r in complete]),
        "requests": requests,
    }
    probe = "not compared"
    if summary["probe_prompts"]:
        probe = f"{'equal' if summary['outputs_match'] else 'NOT EQUAL'} ({summary['probe_compared']} prompts compared)"
    names = ("backend", "kv_load", "tensor_parallel_size", "input_len", "output_len", "request_rate", "seed")
    return {
        "arms": {"pair": {"points": [point]}},
        "sentence": f"TTFT goes to {describe_parts(summary)}." if summary["ttft_parts_ms"] else "",
        "versions": summary["versions"],
        "flags": {"model": summary["model"], "answers": probe, **{name: summary[name] for name in names}},
        "machine": {"device": summary["device"], **summary["machine"]},
        "cards": 2 * summary["tensor_parallel_size"],
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    figures = {f"p{percent}": percentile(values, percent) or 0.0 for percent in (50, 90, 99)}
    return {**figures, "mean": sum(values) / len(values)}


def make_report(result: dict[str, Any]) -> str:
    """The page. ``result`` is compare.json's content."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ReportError(f"{NAME} needs Plotly: pip install plotly") from None
    arms: dict[str, list[dict[str, Any]]] = {name: all_points(arm) for name, arm in result["arms"].items()}
    title = " against ".join(("plain servers" if name == "plain" else "the pair") for name in arms) or "nothing"
    charts = {
        "all": {"pareto": report_charts.pareto(arms, max(int(result.get("cards") or 1), 1))},
        "points": [[rate, _point_charts(points)] for rate, points in _by_rate(arms).items()],
    }
    parts = {
        "title": html.escape(f"Disaggregated prefill: {title}"),
        "head": f'<p class="verdict">{html.escape(result["sentence"])}</p>' if result.get("sentence") else "",
        "sections": "\n".join(_sections(result, arms)),
        "charts": json.dumps(charts, separators=(",", ":")).replace("<", "\\u003c"),
        "plotly": get_plotlyjs(),
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub(f"@({'|'.join(parts)})@", lambda found: parts[found[1]], template)


def _by_rate(arms: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rate, as text, to the point of each arm; the highest first, which shows most."""
    rates: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, points in arms.items():
        for point in sorted(points, key=lambda each: -each["request_rate"]):
            rates.setdefault(rate_name(point), {})[arm] = point
    return rates


def _point_charts(points: dict[str, dict[str, Any]]) -> dict[str, Any]:
    complete = {
        arm: sorted((r for r in point["requests"] if not r.get("error")), key=lambda r: r["start_s"])
        for arm, point in points.items()
    }
    last = list(complete)[-1]  # the pair
    pair = complete.get("pair", complete[last])
    ttft = {arm: [r["ttft_ms"] for r in requests if r["ttft_ms"]] for arm, requests in complete.items()}
    gaps = {arm: [gap for r in requests for gap in r["itls_ms"]] for arm, requests in complete.items()}
    charts = {
        "ttft": report_charts.distribution(ttft, "TTFT, ms"),
        "itl": report_charts.distribution(gaps, "ITL, ms", log=True),
        "parts": report_charts.where_ttft_goes(complete),
        "reuse": report_charts.reuse(pair),
    }
    for arm in points:
        charts[f"timeline-{arm}"] = report_charts.timeline(complete[arm])
    return charts


def _sections(result: dict[str, Any], arms: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    yield _section("In figures", f'<div class="table">{_table(arms)}</div>', wide=True)
    below = "Cumulative: half of all at 50 %, the slowest at the top."
    yield _section("Time to first token", _chart("ttft"), below)
    yield _section("Inter-token latency", _chart("itl"), below)
    means = "The means, and the very requests at the median, the 90th and the 99th percentile of TTFT."
    yield _section("Where TTFT goes", _chart("parts"), means, wide=True)
    yield _section("Tokens/s for a user, tokens/s from a card", _chart("pareto"), "Up and to the right is better.")
    yield _section("Reuse", _chart("reuse"), "Prompt tokens of each request of the pair, in order of their start.")
    text = f"Each request, the first {report_charts.MOST_ROWS}: the parts of its TTFT, then its decoding."
    for arm in reversed(arms):
        yield _section(f"Timeline, {arm}", _chart(f"timeline-{arm}"), text, wide=True)
    facts = (
        ("Versions", "versions"),
        ("Machine", "machine"),
        ("Flags", "flags"),
        ("Load", "workload"),
        ("Targets", "targets"),
    )
    told = [f"<div><h3>{title}</h3>{_facts(result[key])}</div>" for title, key in facts if result.get(key)]
    yield _section("What ran", f'<div class="facts">{"".join(told)}</div>', wide=True)


def _section(title: str, content: str, text: str = "", *, wide: bool = False) -> str:
    words = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section{' class=wide' if wide else ''}><h2>{html.escape(title)}</h2>{words}{content}</section>"


def _chart(name: str) -> str:
    return f'<div id="{name}" class="chart"></div>'


def _table(arms: dict[str, list[dict[str, Any]]]) -> str:
    head = ["", "requests/s", "done", "failed", *(f"{name}, ms<br>p50 / p90 / p99" for _, name in _LATENCIES)]
    rows = []
    for arm, points in arms.items():
        for point in points:
            cells = [arm, rate_name(point), f"{point['completed']}", f"{point['failed']}"]
            for key, _ in _LATENCIES:
                of = point.get(key) or {}
                cells.append(" / ".join(short(of[p]) if p in of else "-" for p in ("p50", "p90", "p99")))
            cells.append(f"{point['output_throughput']:,.1f}")
            cells.append("-" if point.get("goodput") is None else f"{point['goodput']:,.2f}")
            rows.append(cells)
    head += ["tokens/s", "goodput,<br>requests/s"]
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>" for cells in rows)
    return f"<table><thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead><tbody>{body}</tbody></table>"


def _facts(facts: Any) -> str:
    items = facts.items() if isinstance(facts, dict) else [("", facts)]
    rows = []
    for name, value in items:
        text = value if isinstance(value, str) else json.dumps(value)
        rows.append(f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(text)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        asked = list(arguments) in (["-h"], ["--help"])
        print("usage: python -m disagg_prefill_lmcache_v1.measure.report RUN_DIR",
              file=sys.stdout if asked else sys.stderr)  # fmt: skip
        return 0 if asked else 2
    try:
        print(f"report: {write_report(Path(arguments[0]))}")
    except (ReportError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
