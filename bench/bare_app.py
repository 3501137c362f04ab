"""The least that waitress can do: two bytes for every request. An app on it cannot be faster."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from waitress import serve


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]


if __name__ == "__main__":
    # A warning for every queued request would slow it down.
    logging.getLogger("waitress.queue").setLevel("ERROR")
    serve(app, listen=f"127.0.0.1:{sys.argv[1]}")
