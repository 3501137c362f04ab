"""How fast taskd is: beside a bare waitress, Granian, FastAPI + SQLModel, and PocketBase."""

from __future__ import annotations

import statistics
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import report
from common import (
    Load,
    Run,
    console,
    medians,
    options,
    parse,
    run_interleaved,
    setup,
    target,
    workplace,
    write_script,
)
from peers import (
    OPERATIONS,
    PEERS,
    READERS,
    READS,
    REFUSALS,
    WRITERS,
    WRITES,
    Granian,
    Peer,
    check,
    operations,
    start,
)

CONNECTIONS = [1, 16, 64]
P99_OF_A_WRITE = {"taskd": 50, "slow-disk": 60}  # milliseconds, at 16 connections
Runs = dict[tuple[str, str, int], list[Run]]  # of a peer, an operation, a number of connections

# Ratios: of whom, to whom, for which operations, at how many connections, at least.
RATIOS: list[tuple[str, str, tuple[str, ...], tuple[int, ...], float]] = [
    ("taskd", "bare", ("get",), (1, 16), 0.85),
    ("taskd", "bare", ("list",), (1, 16), 0.65),
    ("taskd", "bare", REFUSALS, (1, 16), 0.90),
    ("taskd", "bare", WRITES, (1, 16), 0.55),
    ("taskd", "fastapi", READS, (16,), 6),
    ("taskd", "fastapi", WRITES, (16,), 5),
    ("taskd", "pocketbase", ("list",), (1, 16), 1),
    ("taskd", "pocketbase", WRITES, (1,), 1),
    ("taskd", "pocketbase", WRITES, (16,), 1.2),
    ("taskd", "pocketbase", ("get",), (1,), 1),
    ("taskd", "pocketbase", ("get",), (16,), 0.8),
    ("granian", "pocketbase", READS, (16,), 2),
    ("postgresql", "postgresql-pinned", READS + WRITES, (16,), 1),
]
SLOW_DISK = 8  # times the writes of one connection, at 16 connections


def make_loads(
    peers: list[Peer], directory: Path, connections: list[int], chosen: list[str]
) -> dict[Any, Load]:
    """Return the loads of one round, in an order that puts those that are compared side by side."""
    scripts = {
        (peer.name, name): write_script(
            directory / f"{peer.name}-{number}.lua", peer.port, requests
        )
        for peer in peers
        for number, (name, requests) in enumerate(operations(peer, READERS, WRITERS).items())
    }
    return {
        (peer.name, name, count): Load(
            peer.ports,
            scripts[peer.name, name],
            count,
            refused=name in REFUSALS and peer.name != "bare",
        )
        for count in connections
        for name in chosen
        for peer in peers
    }


def ratio(runs: Runs, one: str, other: str, operation: str, connections: int) -> float | None:
    """Return the median, over the rounds, of the ratio of two servers' rates in the same round."""
    pairs = zip(
        runs.get((one, operation, connections), []),
        runs.get((other, operation, connections), []),
        strict=False,
    )
    found = [mine.requests_per_second / theirs.requests_per_second for mine, theirs in pairs]
    return statistics.median(found) if found else None


def reach(runs: Runs) -> list[dict[str, Any]]:
    """Return the targets of this part, and the results."""
    targets = [
        target(
            f"{operation}, {one} to {other}, {plural(count)}", reached, least=least, unit=" times"
        )
        for one, other, names, counts, least in RATIOS
        for operation in names
        for count in counts
        if (reached := ratio(runs, one, other, operation, count)) is not None
    ]
    targets += [
        target(
            f"{name}, slow disk, 16 connections to 1",
            statistics.median(
                many.requests_per_second / one.requests_per_second
                for many, one in zip(runs[key], runs["slow-disk", name, 1], strict=True)
            ),
            least=SLOW_DISK,
            unit=" times",
        )
        for name in WRITES
        if (key := ("slow-disk", name, 16)) in runs and ("slow-disk", name, 1) in runs
    ]
    return targets + [
        target(
            f"p99 of {name}, {peer}, 16 connections",
            medians(runs[peer, name, 16])["p99_ms"],
            under=most,
            unit=" ms",
        )
        for peer, most in P99_OF_A_WRITE.items()
        for name in WRITES
        if (peer, name, 16) in runs
    ]


def plural(connections: int) -> str:
    return f"{connections} connection{'s' * (connections > 1)}"


def describe(peer: Peer, idle: float, loaded: float) -> dict[str, Any]:
    words = {"title": peer.title, "runs_as": peer.runs_as, "durability": peer.durability}
    return words | {"rss_idle_mb": idle, "rss_loaded_mb": loaded}


def measure(
    peers: list[Peer], arguments: Namespace, directory: Path, running: ExitStack
) -> dict[str, Any]:
    circumstances = setup(arguments, directory)
    console.print("starting, filling and checking", *arguments.peers)
    servers = [start(peer, running) for peer in peers]
    idle = [server.memory() for server in servers]
    loads = make_loads(peers, directory, arguments.connections, arguments.operations)
    runs = run_interleaved(loads, arguments.rounds, arguments.seconds)
    loaded = [server.memory() for server in servers]
    return {
        **circumstances,
        "peers": {
            peer.name: describe(peer, *memory)
            for peer, *memory in zip(peers, idle, loaded, strict=True)
        },
        "measures": [
            {"peer": peer, "operation": operation, "connections": count, **medians(of)}
            for (peer, operation, count), of in runs.items()
        ],
        "targets": reach(runs),
    }


def main() -> None:
    parser = options(str(__doc__))
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument(
        "--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="only these"
    )
    parser.add_argument(
        "--connections", nargs="+", type=int, default=CONNECTIONS, help="how many at once"
    )
    parser.add_argument(
        "--granian-threads",
        type=int,
        default=Granian.threads,
        help="blocking threads (%(default)s)",
    )
    arguments = parse(parser)
    Granian.threads = arguments.granian_threads
    with workplace() as (directory, running):
        peers = [kind(directory) for kind in PEERS if kind.name in arguments.peers]
        report.publish("speed", measure(peers, arguments, directory, running), arguments.output)
        for peer in peers:
            check(peer)  # again: a fast server must not have lost anything


if __name__ == "__main__":
    main()
