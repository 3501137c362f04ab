"""The example in examples/better-auth, in a real Chromium: people, their logins, their tasks."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from cluster import free_port
from database import stored
from packages import install
from processes import ROOT, Process, environment
from test_better_auth import MISSING, PASSWORD
from test_docs_page import OF_COLORS, browser, violations  # noqa: F401  browser is a fixture
from tokens import SECRET
from waiting import DEADLINE, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.sqlite("it is about a page"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]

EXAMPLE = ROOT / "examples" / "better-auth"
NEARLY_EXPIRED = "-8s"  # a token of this lifetime is accepted for 2 s: taskd grants 10 s of leeway


def is_open(port: int) -> bool:
    """Return whether an HTTP server answers at this address."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status > 0
    except OSError:
        return False
    finally:
        connection.close()


class Site:
    """The example's page with its logins on one port, and taskd on another."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port, self.taskd_port = directory, free_port(), free_port()
        self.origin = f"http://localhost:{self.port}"
        variables = {
            "BETTER_AUTH_URL": self.origin,
            "BETTER_AUTH_SECRET": SECRET,
            "TASKD_URL": f"http://127.0.0.1:{self.taskd_port}",
            "TOKEN_LIFETIME": NEARLY_EXPIRED,
        }
        self.popen = subprocess.Popen(
            ["node", str(EXAMPLE / "server.mjs")], cwd=directory, env=environment(**variables)
        )
        until(lambda: is_open(self.port) or self.popen.poll() is not None, "the page is served")
        self.start_taskd()

    def start_taskd(self) -> None:
        self.taskd = Process(
            self.directory,
            BETTER_AUTH_SECRET="",
            TASKD_PORT=str(self.taskd_port),
            TASKD_JWKS_URL=f"{self.origin}/api/auth/jwks",
            TASKD_ISSUER=self.origin,
            TASKD_AUDIENCE=self.origin,
            TASKD_CORS_ORIGINS=self.origin,
        )

    def close(self) -> None:
        self.taskd.kill()
        self.popen.kill()
        self.popen.wait(DEADLINE)


class Visitor:
    """A user of the page."""

    def __init__(self, chromium: webdriver.Chrome, site: Site) -> None:
        self.chromium, self.site = chromium, site
        chromium.get(site.origin)

    def find(self, selector: str) -> Any:
        return self.chromium.find_element(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: object) -> Any:
        return self.chromium.execute_script(script, *arguments)

    def sees(self, selector: str, text: str = "") -> None:
        """Wait until an element is shown, with this text in it."""
        script = """const found = document.querySelector(arguments[0]);
        return Boolean(found?.checkVisibility()) && found.innerText.includes(arguments[1])"""
        until(lambda: self.run(script, selector, text), f"{selector} shows {text!r}")

    def fill(self, form: str, **fields: str) -> None:
        for name, text in fields.items():
            field = self.find(f"{form} [name={name}]")
            if field.get_attribute("type") == "date":
                script = "arguments[0].value = arguments[1]"
                self.run(script, field, text)
            elif field.tag_name == "select":
                options = [option.text for option in Select(field).options]
                field.send_keys(Keys.HOME, Keys.ARROW_DOWN * options.index(text))
            else:
                field.clear()
                field.send_keys(text)

    def press(self, selector: str) -> None:
        """Press Enter on a button, as a user without a mouse does."""
        self.find(selector).send_keys(Keys.ENTER)

    def sign_up(self, name: str) -> None:
        self.sees("#sign", "Create your account")
        self.fill("#sign", name=name, email=f"{name}@example.com", password=PASSWORD)
        self.press("#sign button")
        self.sees("#account", name)

    def sign_out(self) -> None:
        self.press("#sign-out")
        self.sees("#sign", "Welcome back")

    def add(self, title: str, **fields: str) -> None:
        self.fill("#add", title=title, **fields)
        self.press("#add button")

    def titles(self) -> list[str]:
        script = (
            "return [...document.querySelectorAll('#tasks .title')].map((one) => one.textContent)"
        )
        return list(self.run(script))

    def lists(self, *titles: str) -> None:
        """Wait until these tasks are listed, in this order."""
        until(lambda: self.titles() == list(titles), f"{titles} are listed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    install(EXAMPLE / "package-lock.json")
    running = Site(tmp_path_factory.mktemp("example"))
    yield running
    running.close()


@pytest.fixture
def visitor(browser: webdriver.Chrome, site: Site) -> Visitor:  # noqa: F811
    browser.delete_all_cookies()
    return Visitor(browser, site)


def test_two_users_keep_their_tasks_and_neither_sees_the_others(
    visitor: Visitor, site: Site
) -> None:
    visitor.sign_up("Alice")
    visitor.sees("#empty", "Nothing to do")
    visitor.add("Buy milk", priority="High", due_date="2026-12-01", tags="home, shopping")
    visitor.lists("Buy milk")
    visitor.add("<b>Call</b> Bob")
    visitor.lists("<b>Call</b> Bob", "Buy milk")
    visitor.sign_out()
    assert visitor.titles() == []
    visitor.press("#other")
    visitor.sign_up("Bob")
    visitor.sees("#empty", "Nothing to do")
    visitor.add("Read a book")
    visitor.lists("Read a book")
    visitor.sign_out()
    visitor.fill("#sign", email="Alice@example.com", password=PASSWORD)
    visitor.press("#sign button")
    visitor.lists("<b>Call</b> Bob", "Buy milk")
    tasks = list(stored(site.directory / "taskd.db").values())
    assert len({task["user_id"] for task in tasks}) == 2
    assert (
        tasks[0] | {"title": "Buy milk", "priority": "high", "due_date": "2026-12-01"} == tasks[0]
    )


def test_a_task_is_edited_found_checked_off_deleted_and_brought_back(visitor: Visitor) -> None:
    visitor.sign_up("Carol")
    visitor.add(" ")
    visitor.sees("#add .error", "title must not be blank")  # in taskd's words
    assert visitor.find("#add [name=title]").get_attribute("aria-invalid") == "true"
    visitor.add("Pay the rent", priority="Low", tags="home")
    visitor.lists("Pay the rent")
    visitor.add("Water the plants", tags="home,garden")
    visitor.lists("Water the plants", "Pay the rent")
    visitor.press("#tasks li:last-child .title")
    visitor.sees("#editor", "Edit task")
    visitor.fill("#edit", title="Pay the bills", description="Three of them", priority="High")
    visitor.press("#edit .row.end button:last-child")
    visitor.lists("Water the plants", "Pay the bills")
    visitor.sees("#tasks li:last-child", "Three of them")
    visitor.find("#tasks li:last-child input").send_keys(Keys.SPACE)
    visitor.sees("#tasks li.done")
    visitor.fill("#filters", q="THREE")
    visitor.lists("Pay the bills")
    visitor.fill("#filters", q="no such task")
    visitor.sees("#empty", "No task fits")
    visitor.find("#filters [name=q]").send_keys(Keys.ESCAPE)
    visitor.lists("Water the plants", "Pay the bills")
    visitor.find("#filters [name=completed][value=false]").send_keys(Keys.SPACE)
    visitor.lists("Water the plants")
    visitor.find("#filters [name=completed][value='']").send_keys(Keys.SPACE)
    visitor.lists("Water the plants", "Pay the bills")
    visitor.fill("#filters", priority="High")
    visitor.lists("Pay the bills")
    visitor.fill("#filters", priority="Any priority")
    visitor.lists("Water the plants", "Pay the bills")
    visitor.press("#tasks .tag:last-child")
    visitor.lists("Water the plants")
    visitor.press("#any-tag")
    visitor.lists("Water the plants", "Pay the bills")
    visitor.press("#tasks li.done .remove")
    visitor.lists("Water the plants")
    visitor.sees("#toast", "Deleted “Pay the bills”.")
    focused = "return document.activeElement.textContent"
    assert visitor.run(focused) == "Water the plants", "what comes next has the focus"
    visitor.press("#undo")
    visitor.lists("Pay the bills", "Water the plants")
    visitor.sees("#tasks li.done", "Three of them")


def test_a_token_expires_and_taskd_restarts_and_the_page_goes_on(
    visitor: Visitor, site: Site
) -> None:
    visitor.sign_up("Dave")
    visitor.add("Before")
    visitor.lists("Before")

    def has_expired() -> bool:
        visitor.press("#add button")  # with an empty title, so that nothing is made
        visitor.sees("#add .error", "title must not be blank")
        return "401" in site.taskd.log

    until(has_expired, "a token has expired")
    site.taskd.kill()
    visitor.add("After")
    visitor.sees("#add .error", "The task server cannot be reached")
    site.start_taskd()
    visitor.press("#add button")
    visitor.lists("After", "Before")
    visitor.chromium.refresh()
    visitor.lists("After", "Before")
    visitor.chromium.delete_all_cookies()

    def is_signed_out() -> bool:
        visitor.run("document.querySelector('#add').requestSubmit()")
        return visitor.find("#sign").is_displayed()

    until(is_signed_out, "the page asks to sign in when the session has ended")
    visitor.sees("#sign h2", "Welcome back")
    visitor.sees("#sign .error", "Your session has ended")
    assert visitor.titles() == []


def test_the_page_fits_a_phone_and_asks_no_other_host(visitor: Visitor) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    visitor.chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        visitor.sign_up("E" * 100)
        visitor.add("W" * 200, tags="t" * 50)
        visitor.lists("W" * 200)
        width = "return document.documentElement.scrollWidth"
        assert visitor.run(width) == 360
        visitor.press(".remove")
        visitor.sees("#undo")
        assert visitor.run("return document.querySelector('#undo').getClientRects()[0].height") < 60
        assert visitor.run(width) == 360
    finally:
        visitor.chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    script = (
        "return performance.getEntriesByType('resource').map((one) => new URL(one.name).origin)"
    )
    origins = set(visitor.run(script))
    assert origins == {visitor.site.origin, f"http://127.0.0.1:{visitor.site.taskd_port}"}


def test_a_list_that_comes_after_signing_out_is_not_shown(visitor: Visitor) -> None:
    visitor.sign_up("late")
    visitor.add("Only for late")
    visitor.lists("Only for late")
    visitor.run(
        """const now = fetch;
        window.fetch = async (url, options) => {
          const answer = await now(url, options);
          if (`${url}`.includes("/tasks?")) {
            window.isAsked = true;
            await new Promise((done) => { window.release = done; });
            setTimeout(() => { window.isDone = true; }, 100);
          }
          return answer;
        };
        document.querySelector("#filters").oninput();"""
    )
    until(lambda: visitor.run("return window.isAsked"), "the list is asked for")
    visitor.sign_out()
    visitor.run("release()")
    until(lambda: visitor.run("return window.isDone"), "the list has come")
    assert visitor.titles() == []


@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_wrong_in_the_example(visitor: Visitor, width: int) -> None:
    for name, value in itertools.product(["welcome", "board", "editor"], ["light", "dark"]):
        if name == "board" and value == "light":
            visitor.sign_up(f"axe{width}")
            visitor.add("Buy milk", priority="High", due_date="2026-01-01", tags="home, shopping")
            visitor.lists("Buy milk")
        elif name == "editor" and value == "light":
            visitor.press("#tasks .title")
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        scheme = {"features": [{"name": "prefers-color-scheme", "value": value}]}
        visitor.chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        visitor.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        visitor.sees(f"#{name}")
        rules = () if value == "light" else OF_COLORS
        assert violations(visitor.chromium, rules) == [], (name, value)
    visitor.chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    visitor.chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_demo_starts_both_and_ends_both(tmp_path: Path) -> None:
    install(EXAMPLE / "package-lock.json")
    port, taskd_port = free_port(), free_port()
    variables = {"PORT": str(port), "TASKD_PORT": str(taskd_port), "PYTHON": sys.executable}
    settings = environment(
        **variables, DEMO_DATA=str(tmp_path / "data"), DATABASE_URL="sqlite:///not-this.db"
    )
    with subprocess.Popen(
        ["node", str(EXAMPLE / "demo.mjs")],
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        try:
            assert demo.stdout
            assert f"Open http://localhost:{port}" in demo.stdout.readline()
            until(lambda: is_open(taskd_port), "taskd answers")
            assert is_open(port)
            second = subprocess.run(
                demo.args, env=settings, capture_output=True, text=True, timeout=DEADLINE
            )
            assert (second.returncode, second.stdout) == (1, "")
            assert re.fullmatch(r"demo: listen EADDRINUSE.*PORT=3001 make demo\n", second.stderr)
            demo.send_signal(signal.SIGTERM)
            _, log = demo.communicate(timeout=DEADLINE)
            assert demo.returncode == 0
            assert f"taskd: listening on http://127.0.0.1:{taskd_port}" in log
            assert "WARNING" not in log
        finally:
            demo.kill()
    assert not is_open(taskd_port)
    made = {path.name for path in (tmp_path / "data").iterdir()}
    assert made == {"auth.db", "secret", "taskd.db"}
    assert (tmp_path / "data" / "secret").stat().st_mode & 0o777 == 0o600


def test_the_lock_files_name_no_address_to_download_from() -> None:
    for directory in (EXAMPLE, ROOT / "tests" / "playwright"):
        lock = json.loads((directory / "package-lock.json").read_text())
        assert not [name for name, package in lock["packages"].items() if "resolved" in package]
        wanted = json.loads((directory / "package.json").read_text())["dependencies"]
        assert lock["packages"][""]["dependencies"] == wanted


def test_the_page_about_better_auth_shows_the_examples_files() -> None:
    page = (ROOT / "docs" / "better-auth.md").read_text()
    shown = re.findall(r"^```javascript\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    files = [path.read_text() for path in EXAMPLE.glob("*.mjs")]
    assert len(shown) == 5
    assert [code for code in shown if not any(code in file for file in files)] == []
    assert shown[0] == (EXAMPLE / "auth.mjs").read_text()
