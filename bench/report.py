"""The results as a JSON file, as Markdown tables and as a chart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from peers import OPERATIONS

INTRODUCTION = """# Results

Made by `make bench`, which also writes `results.json`; what is measured, and how, is in the
programs beside this file. All numbers are medians over the rounds. Read them as proportions: the
load generator ran on the same machine.
"""
Section = dict[str, Any]


def publish(name: str, section: Section, output: Path | None) -> None:
    """Print one part's results; with a directory, save them there and draw the chart anew."""
    print(SECTIONS[name](section))
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    results = {**(json.loads(path.read_text()) if path.exists() else {}), name: section}
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    parts = [render(results[part]) for part, render in SECTIONS.items() if part in results]
    (output / "RESULTS.md").write_text("\n".join([INTRODUCTION, *parts]))
    if "speed" in results:
        (output / "results.svg").write_text(chart(results["speed"]))


# --- Markdown -------------------------------------------------------------------------------------


def table(head: list[str], rows: Iterable[Iterable[object]], numbers_from: int = 1) -> str:
    """Return a Markdown table; the columns from `numbers_from` on are aligned right."""
    rules = ["---" if column < numbers_from else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, rules, *rows]) + "\n"


def circumstances(section: Section) -> str:
    machine, versions = section["machine"], section["versions"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{section['date']}; "
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['system']}; 4 KiB reach the disk in {machine['fsync_us']} µs; "
        f"{section['rounds']} rounds of {section['seconds']} s.\n{listed}.\n"
    )


def targets(section: Section) -> str:
    rows = [
        (each["measure"], each["target"], each["reached"], "yes" if each["met"] else "**no**")
        for each in section["targets"]
    ]
    return table(["measure", "target", "reached", "met"], rows)


def speed(section: Section) -> str:
    peers = section["peers"]
    about = [
        (
            peer["title"],
            peer["runs_as"],
            peer["durability"],
            f"{peer['rss_idle_mb']:.0f}",
            f"{peer['rss_loaded_mb']:.0f}",
        )
        for peer in peers.values()
    ]
    return "\n".join([
        "## Side by side\n",
        circumstances(section),
        table(["peer", "runs as", "what survives a power cut", "MB idle", "MB loaded"], about, 3),
        "Requests a second (p50 / p99 in milliseconds), by connections:\n",
        table(
            ["operation", "conn.", *(peer["title"] for peer in peers.values())],
            speeds(section),
            1,
        ),
        unexpected(section),
        targets(section),
    ])  # fmt: skip


def speeds(section: Section) -> list[list[str]]:
    cells = {
        (each["operation"], each["connections"], each["peer"]): each for each in section["measures"]
    }
    lines = dict.fromkeys((operation, count) for operation, count, _ in cells)
    ordered = sorted(lines, key=lambda line: (OPERATIONS.index(line[0]), line[1]))
    return [
        [
            operation,
            str(count),
            *(speed_cell(cells[operation, count, peer]) for peer in section["peers"]),
        ]
        for operation, count in ordered
    ]


def speed_cell(each: Section) -> str:
    return f"{each['requests_per_second']:,.0f} ({each['p50_ms']:.2f} / {each['p99_ms']:.2f})"


def unexpected(section: Section) -> str:
    wrong = [each for each in section["measures"] if each["unexpected"]]
    listed = [
        f"{each['peer']} {each['operation']} at {each['connections']}: {each['unexpected']}"
        for each in wrong
    ]
    return f"Answers with an unexpected status, or none: {'; '.join(listed) or 'none'}.\n"


def growth(section: Section) -> str:
    cases = section["cases"]
    lines = {
        "tasks": "tasks",
        "users": "users",
        "file_mb": "file, MB",
        "start_s": "start to first answer, s",
    }
    lines |= {"rss_idle_mb": "memory idle, MB", "rss_loaded_mb": "memory after a long load, MB"}
    rows = [[label, *(f"{case[key]:,}" for case in cases)] for key, label in lines.items()]
    rows += [
        [
            f"{name}, p50 ms (against the first)",
            *(f"{case['p50_ms'][name]:.3f} ({case['ratio'][name]:.2f})" for case in cases),
        ]
        for name in cases[0]["p50_ms"]
    ]
    heading = ["", *(case["title"] for case in cases)]
    paged = table(
        ["a page of that list", "p50 ms"],
        [(name, f"{p50:.2f}") for name, p50 in section["pages"].items()],
    )
    parts = [
        "## Growth\n",
        circumstances(section),
        table(heading, rows),
        section["giant"],
        paged,
        targets(section),
    ]
    return "\n".join(parts)


def latency(section: Section) -> str:
    measures = [
        (
            each["operation"],
            each["connections"],
            *(f"{each[name]:.2f}" for name in ("p50_ms", "p99_ms", "max_ms")),
        )
        for each in section["measures"]
    ]
    return "\n".join([
        "## The time to a refusal, and that of verification\n",
        circumstances(section),
        table(["request", "connections", "p50 ms", "p99 ms", "max ms"], measures),
        unexpected({"measures": [{"peer": "taskd", **each} for each in section["measures"]]}),
        targets(section),
    ])  # fmt: skip


SECTIONS = {"speed": speed, "growth": growth, "latency": latency}

# --- The chart ------------------------------------------------------------------------------------

INK = "#7d8590"  # readable on white and on black
COLORS = {
    "bare": "#8b949e",
    "taskd": "#2f81f7",
    "granian": "#3fb0c9",
    "gunicorn": "#1f9e89",
    "fastapi": "#c98a1b",
    "pocketbase": "#a371f7",
    "postgresql": "#3f9142",
    "postgresql-2": "#6cc070",
    "postgresql-granian": "#a5d6a7",
}
NOTES = [
    "requests a second, more is better",
    "bare waitress has 4 threads, as by default, which take turns to run Python; taskd runs "
    "requests in the event loop,",
    "one after another, and so can be faster than the server that it is built on",
]
NOT_CHARTED = ("slow-disk", "postgresql-pinned")  # they are taskd again
CHARTED = ["list", "get", "create", "toggle", "401"]
# Widths: of the names, of the bars, of the numbers after them, of the gap.
LABELS, PANEL, NUMBERS, GAP = 150, 270, 60, 30
BAR, HEADING, TOP = 17, 30, 34  # heights: of a bar with its gap, above a group of bars, above all


Rates = dict[tuple[int, str, str], float]  # by number of connections, operation, peer


def chart(section: Section) -> str:
    """Return an SVG, for light and dark pages, of requests a second at 1 and 16 connections."""
    rates: Rates = {
        (each["connections"], each["operation"], each["peer"]): each["requests_per_second"]
        for each in section["measures"]
        if each["connections"] in (1, 16) and each["operation"] in CHARTED
    }
    peers = {
        name: peer["title"] for name, peer in section["peers"].items() if name not in NOT_CHARTED
    }
    names = [name for name in CHARTED if any(operation == name for _, operation, _ in rates)]
    counts = sorted({count for count, _, _ in rates})
    group = HEADING + BAR * len(peers)
    parts = [
        labels(TOP + row * group, name, list(peers.values())) for row, name in enumerate(names)
    ]
    for column, count in enumerate(counts):
        left = LABELS + column * (PANEL + NUMBERS + GAP)
        parts.append(text(left, 16, f"{count} connection{'s' * (count > 1)}", "bold"))
        parts += [
            bars(left, TOP + row * group, rates, count, name, list(peers))
            for row, name in enumerate(names)
        ]
    height = TOP + len(names) * group + 14 + 16 * len(NOTES)
    for line, note in enumerate(reversed(NOTES)):
        parts.append(text(0, height - 8 - 16 * line, note))
    return frame(LABELS + len(counts) * (PANEL + NUMBERS + GAP) - GAP, height, parts)


def labels(top: float, operation: str, titles: list[str]) -> str:
    lines = [
        text(LABELS - 8, top + HEADING + place * BAR + 10, title, "end")
        for place, title in enumerate(titles)
    ]
    return text(0, top + 18, operation, "bold") + "".join(lines)


def bars(
    left: float, top: float, rates: Rates, connections: int, operation: str, peers: list[str]
) -> str:
    longest = max(rates.values())
    return "".join(
        bar(left, top + HEADING + place * BAR, rates[connections, operation, peer], longest, peer)
        for place, peer in enumerate(peers)
    )


def bar(left: float, top: float, rate: float, longest: float, peer: str) -> str:
    width = PANEL * rate / longest
    fill = f'rx="2" fill="{COLORS[peer]}"'
    rect = f'<rect x="{left}" y="{top}" width="{width:.1f}" height="{BAR - 4}" {fill}/>\n'
    return rect + text(left + width + 6, top + 10, f"{rate:,.0f}")


def text(left: float, baseline: float, words: str, style: str = "") -> str:
    return f'<text class="{style}" x="{left:.1f}" y="{baseline:.1f}">{escape(words)}</text>\n'


STYLE = f"""<style>
text {{ font: 12px system-ui, sans-serif; fill: {INK} }}
.bold {{ font-weight: 600 }}
.end {{ text-anchor: end }}
</style>"""


def frame(width: float, height: float, parts: list[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n'
        "<title>taskd and its peers</title>\n"
    )
    return head + STYLE + "\n" + "".join(parts) + "</svg>\n"
