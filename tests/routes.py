"""The routes of an application, as Falcon describes them."""

from __future__ import annotations

from unittest import mock

import falcon.inspect

import taskd


def routes(app: taskd.App) -> list[falcon.inspect.RouteInfo]:
    """Return the routes without the lines of their sources, which take a second to find."""
    with mock.patch("inspect.findsource", side_effect=OSError):
        return falcon.inspect.inspect_routes(app)
