"""How long a 401 takes (SC-002), and how long the verification of a token takes (SC-005)."""

from __future__ import annotations

import statistics
from typing import Any

import report
from common import (
    Load,
    Request,
    Run,
    medians,
    options,
    parse,
    run_interleaved,
    setup,
    target,
    workplace,
    write_script,
)
from peers import READERS, REFUSALS, Taskd, operations, sign, start

CONNECTIONS = [1, 16, 64, 256]
REFUSED, VERIFIED = 100, 50  # milliseconds: SC-002 and SC-005
NOTHING, VERIFYING = "/healthz, no token", "an empty list, with a token"
# Users without tasks, whose list costs next to nothing.
IDLERS = [f"idler-{number}" for number in range(len(READERS))]
Runs = dict[tuple[str, int], list[Run]]


def requests(peer: Taskd) -> dict[str, list[Request]]:
    """Return the timed requests; the list minus `/healthz` is verification and one small query."""
    peer.tokens |= {user: sign(user) for user in IDLERS}
    asked = operations(peer, READERS, IDLERS)
    return {
        **{name: asked[name] for name in REFUSALS},
        NOTHING: [Request("GET", "/healthz")],
        VERIFYING: [peer.list(user) for user in IDLERS],
    }


def verification(runs: Runs, connections: int, measure: str) -> float:
    """Return the median over the rounds of what verification adds to a request, in milliseconds."""
    pairs = zip(runs[VERIFYING, connections], runs[NOTHING, connections], strict=True)
    return statistics.median(
        getattr(one, measure) - getattr(other, measure) for one, other in pairs
    )


def reach(runs: Runs, counts: list[int]) -> list[dict[str, Any]]:
    """Return the targets of this part, and the results."""
    slowest = {
        (name, count): max(run.max_ms for run in runs[name, count])
        for name in REFUSALS
        for count in counts
    }
    targets = [
        target(
            f"SC-002: {name}, slowest of all, {count} at once",
            milliseconds,
            under=REFUSED,
            unit=" ms",
        )
        for (name, count), milliseconds in slowest.items()
    ]
    return targets + [
        target(
            f"SC-005: verification, {measure[:3]}, {count} at once",
            verification(runs, count, measure),
            under=VERIFIED,
            unit=" ms",
        )
        for measure in ("p50_ms", "p99_ms")
        for count in counts
    ]


def main() -> None:
    parser = options(str(__doc__))
    parser.add_argument(
        "--connections", nargs="+", type=int, default=CONNECTIONS, help="how many at once"
    )
    arguments = parse(parser)
    with workplace() as (directory, running):
        circumstances = setup(arguments, directory)
        peer = Taskd(directory)
        start(peer, running)
        scripts = {
            name: write_script(directory / f"{number}.lua", peer.port, asked)
            for number, (name, asked) in enumerate(requests(peer).items())
        }
        loads = {
            (name, count): Load(peer.ports, script, count, refused=name in REFUSALS)
            for count in arguments.connections
            for name, script in scripts.items()
        }
        runs = run_interleaved(loads, arguments.rounds, arguments.seconds)
    measures = [
        {"operation": name, "connections": count, **medians(of)}
        for (name, count), of in runs.items()
    ]
    section = {**circumstances, "measures": measures, "targets": reach(runs, arguments.connections)}
    report.publish("latency", section, arguments.output)


if __name__ == "__main__":
    main()
