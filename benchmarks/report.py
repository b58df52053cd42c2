"""Results as one HTML page that needs nothing else: pictures, tables, conditions."""

import re
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from convmixer_fast.benchmarks.plots import PICTURES, THEMES, draw
from convmixer_fast.benchmarks.results import ResultFile, Row, by_case
from convmixer_fast.benchmarks.tables import best, duration, number, speedup
from convmixer_fast.support.files import write_whole

__all__ = ["write_report"]

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --text: #1f2328; --line: #d1d9e0; --ours: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #0d1117; --text: #f0f6fc; --line: #3d444d; --ours: #58a6ff; }
  .light { display: none; }
}
@media (prefers-color-scheme: light) { .dark { display: none; } }
@media (max-width: 700px) { .wide { display: none; } }
@media (min-width: 701px) { .narrow { display: none; } }
body { background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto; }
th, td { text-align: right; padding: 0.2rem 0.7rem 0.2rem 0; vertical-align: top;
  white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8.5rem; }
.fact td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.ours td { color: var(--ours); font-weight: 600; }
.bad td { font-style: italic; }
code { overflow-wrap: anywhere; }
"""


def write_report(results: ResultFile, path: Path, title: str = "convmixer_fast benchmarks") -> None:
    """Write the page.

    Args:
        results: what was measured.
        path: of the HTML file; its folder is made where there is none.
        title: of the page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = results.environment
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(stamp.summary())}<br><code>{escape(stamp.command)}</code></p>",
        "<h2>Ours against the best of the others</h2>",
        _summary(results),
        *_pictures(results),
        "<h2>Every provider</h2>",
        "<p>Medians of interleaved calls; 20 % of them were faster than the first of the two times "
        "behind, 80 % faster than the second. <em>Roofline</em>: the time that this machine's copy "
        "bandwidth and matrix products allow at best, op by op, over the median. <em>Error</em>: "
        "largest difference from float64 over its largest magnitude.</p>",
        *_cases(results),
        "<h2>Conditions</h2>",
        _conditions(results),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )
    write_whole(path, page.encode())


def _pictures(results: ResultFile) -> Iterator[str]:
    for name in PICTURES:
        for theme in THEMES:
            for width in ("wide", "narrow"):
                content = draw(results, name, theme, "svg", narrow=width == "narrow")
                if content is not None:
                    svg = "<svg" + content.decode().partition("<svg")[2]
                    own = _own_ids(svg, theme + width + name)
                    yield f'<div class="{theme} {width}">{own}</div>'


def _own_ids(svg: str, prefix: str) -> str:
    """Make the ids of a picture its own: several stand in one page, and a hidden one hides."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)


def _table(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    def line(tag: str, cells: list[str]) -> str:
        return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)

    body = "".join(f'<tr class="{kind}">{line("td", cells)}</tr>\n' for kind, cells in rows)
    return f"<table><thead><tr>{line('th', head)}</tr></thead><tbody>\n{body}</tbody></table>"


def _summary(results: ResultFile) -> str:
    rows = []
    for first, providers in by_case(results.rows):
        peer, ours = best(providers, ours=False), best(providers, ours=True)
        ratio = speedup(providers)
        if peer and ours and ratio and peer.p50_s and ours.p50_s:
            kind = "" if first.bench == "model" else f"{first.bench}: "
            cells = [
                f"{kind}{first.case}, {first.dtype}",
                f"{ratio:.2f}",
                f"{ours.provider}, {duration(ours.p50_s)}",
                f"{peer.provider}, {duration(peer.p50_s)}",
            ]
            rows.append(("", cells))
    return _table(["case", "times as fast", "ours", "best peer"], rows)


def _cases(results: ResultFile) -> Iterator[str]:
    head = ["provider", "median", "p20", "p80", "img/s", "GB/s", "GFLOP/s", "roofline", "memory"]
    for first, providers in by_case(results.rows):
        yield f"<h3>{escape(f'{first.bench}: {first.case}, {first.dtype}')}</h3>"
        ordered = sorted(providers.values(), key=lambda row: row.p50_s or float("inf"))
        yield _table([*head, "error"], [_line(row) for row in ordered])


def _line(row: Row) -> tuple[str, list[str]]:
    if row.status != "ok" or not (row.p20_s and row.p50_s and row.p80_s):
        return "bad", [row.provider, row.status, *[""] * 7, row.note]
    memory = row.peak_memory_bytes
    return "ours" if row.ours else "", [
        row.provider,
        duration(row.p50_s),
        duration(row.p20_s),
        duration(row.p80_s),
        number(row.images_per_s),
        number((row.bytes_per_s or 0.0) / 1e9),
        number((row.flop_per_s or 0.0) / 1e9),
        f"{row.roofline_share:.0%}" if row.roofline_share else "",
        "" if memory is None else f"{memory / 2**20:,.0f} MiB",
        f"{row.error:.0e}",
    ]


def _conditions(results: ResultFile) -> str:
    ceilings = results.ceilings
    facts = {
        "copy bandwidth": f"{ceilings.bytes_per_s / 1e9:.4g} GB/s",
        **{
            f"matrix product, {dtype}": f"{rate / 1e12:.4g} TFLOP/s"
            for dtype, rate in ceilings.flop_per_s.items()
        },
        **dict(_named(results.environment.to_json())),
        **{f"not here: {name}": why for name, why in results.absent.items()},
    }
    return _table(["", ""], [("fact", [name, value]) for name, value in facts.items()])


def _named(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and values of plain data, those of a dictionary one by one."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _named(value, f"{name}: ")
        elif value != "":
            yield before + name, ("no", "yes")[value] if isinstance(value, bool) else str(value)
