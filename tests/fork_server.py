"""Fork a process of taskd or taskctl for each order on stdin, and print its process id.

To start Python and import everything takes 0.5 s of a processor; to fork a process that has done so
takes some milliseconds. processes.ForkServer starts this file and sends the orders, JSON lines:
{"ended": pid} asks for a child's exit status (null while it runs); all others start a child.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from types import ModuleType
from typing import Any

WRITE = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY
STREAMS = {"stdin": os.O_RDONLY | os.O_NOCTTY, "stdout": WRITE, "stderr": WRITE}


def serve(program: ModuleType, directory: str) -> None:
    """Carry out the orders until stdin ends, and then kill the children that still run."""
    running: set[int] = set()
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if "ended" in order:
            child, status = os.waitpid(order["ended"], os.WNOHANG)
            running.discard(child)
            print(json.dumps(os.waitstatus_to_exitcode(status) if child else None), flush=True)
            continue
        # They are open before the answer: the tests may then close their end of a pipe.
        streams = [order[name] and os.open(order[name], flags) for name, flags in STREAMS.items()]
        if child := os.fork():
            running.add(child)
            print(child, flush=True)
            for stream in filter(None, streams):
                os.close(stream)
            continue
        become(order, streams)
        sys.argv = [f"{directory}/{program.__name__}.py", *order["arguments"]]
        exec(order["before"], vars(program) | {program.__name__: program})
        run(program)
    for child in running:  # the tests were interrupted
        os.kill(child, signal.SIGKILL)


def run(program: ModuleType) -> None:
    """Run the program, and end as Python does, but for taking down each object in memory.

    That takes 20 ms, because a child then gets copies of the pages that it shares with its parent.
    """
    try:
        program.main()
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        threading._shutdown()  # type: ignore[attr-defined]  # wait for the threads
        atexit._run_exitfuncs()
        os._exit(ended.code or 0)


def become(order: dict[str, Any], streams: list[int | None]) -> None:
    """Set the working directory, environment and standard streams of an order."""
    os.chdir(order["directory"])
    os.environ.clear()
    os.environ.update(order["environment"])
    time.tzset()
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    for number, (name, stream) in enumerate(zip(STREAMS, streams, strict=True)):
        opened = None
        if stream is None:
            os.close(number)
        else:
            os.dup2(stream, number)
            os.close(stream)
            mode = "r" if name == "stdin" else "a"
            errors, buffering = ("backslashreplace", 1) if name == "stderr" else ("strict", -1)
            opened = os.fdopen(number, mode, buffering, encoding, errors, closefd=False)
        for known_as in (name, f"__{name}__"):
            setattr(sys, known_as, opened)


if __name__ == "__main__":
    directory, name, prepare = sys.argv[1:]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # with nohup it is ignored
    sys.path[0] = directory
    program = importlib.import_module(name)
    exec(prepare)
    gc.freeze()  # so that a collection in a child does not copy every page
    serve(program, directory)
