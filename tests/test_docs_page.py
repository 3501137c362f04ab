"""The page at /docs, in a real Chromium, against a real server."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from packages import install
from support import DEADLINE, ROOT, Process, environment, stored, token, until

pytestmark = pytest.mark.sqlite("it is about a page")

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HOSTILE = (
    "<img src=x onerror=document.title='gone'> </pre><b>\u202e \U0001f4a9 ' \" \\ & ${x} `y` é"
)
ODD_USER = '<i>o\'hara $HOME `id` "é" 100% \\'
FIVE_HOURS = 5 * 60 * 60 + 30 * 60  # seconds, and half an hour
OPERATIONS = 27  # of the document
QUIET = ["background-networking", "component-update", "sync", "gpu", "extensions", "default-apps"]
LIGHT_AND_DARK = pytest.mark.parametrize("scheme", ["light", "dark"])
# The contrast (WCAG 2.2, 1.4.3) of each visible text with its background, the lowest first.
CONTRASTS = """
const channels = (color) => color.match(/[0-9.]+/g).map(Number);
const luminance = (color) => channels(color).slice(0, 3).map((value) => value / 255)
  .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
  .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
const behind = (one) => {
  for (let at = one; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (channels(color)[3] !== 0) return color;
  }
};
return [...document.querySelectorAll("body *")]
  .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
  .filter((one) => one.checkVisibility())
  .filter((one) => !["SCRIPT", "STYLE", "NOSCRIPT"].includes(one.tagName))
  .map((one) => {
    const colors = [getComputedStyle(one).color, behind(one)];
    const [light, dark] = colors.map(luminance).sort((a, b) => b - a);
    return [(light + 0.05) / (dark + 0.05), one.className, one.textContent.slice(0, 40)];
  }).sort((a, b) => a[0] - b[0]);
"""
# Form fields and buttons without a name for screen readers.
NAMELESS = """
const fields = "input, textarea, select, button, summary, a, [role=region], nav, form";
const hasName = (one) =>
  (one.labels && one.labels.length) || one.getAttribute("aria-label") || one.textContent.trim();
return [...document.querySelectorAll(fields)]
  .filter((one) => !hasName(one))
  .map((one) => one.outerHTML);
"""
HOSTS = """
const kinds = ["navigation", "resource"].flatMap((kind) => performance.getEntriesByType(kind));
return [kinds.length, [...new Set(kinds.map((entry) => new URL(entry.name).origin))]];
"""


# Names and values of the headers that are shown, in one call: asking for each text costs a second.
HEADERS = """
const [names, values] = ["dt", "dd"].map((tag) =>
  [...document.querySelectorAll(`${arguments[0]} ${tag}`)]
    .map((one) => one.checkVisibility() ? one.innerText.trim() : ""));
if (names.length !== values.length) throw new Error(`${names.length} names`);
return names.map((name, at) => [name, values[at]]);
"""


OPEN_AROUND = """
for (let one = arguments[0].closest("details"); one; one = one.parentElement.closest("details"))
  one.open = true;
"""


TWO_FRAMES = "return new Promise((end) => requestAnimationFrame(() => requestAnimationFrame(end)))"
COVERED = """
const target = document.getElementById(arguments[0]).getBoundingClientRect();
const card = document.querySelector(".login").getBoundingClientRect();
return !(target.top >= card.bottom && target.top < innerHeight);
"""


class Page:
    """The page, used with a keyboard."""

    def __init__(self, browser: webdriver.Chrome, server: Process, directory: Path) -> None:
        self.browser, self.server, self.database = browser, server, directory / "taskd.db"
        self.origin = f"http://127.0.0.1:{server.port}"

    def open(self, path: str = "/docs") -> Page:
        self.browser.get(self.origin + path)
        self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        until(
            lambda: self.run("return document.documentElement.dataset.ready"),
            "the page shows the document",
        )

    def run(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def emulate(self, command: str, **options: object) -> None:
        self.browser.execute_cdp_cmd(f"Emulation.{command}", options)

    def size(self, width: int, height: int) -> None:
        self.emulate(
            "setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def find(self, selector: str) -> WebElement:
        """Return an element, after opening what hides it, such as the optional parameters."""
        found = self.browser.find_element(By.CSS_SELECTOR, selector)
        self.run(OPEN_AROUND, found)
        return found

    def paste(self, selector: str, text: str) -> None:
        """Put a text in a field at once, as pasting does; typing would lose some characters."""
        self.run("arguments[0].focus(); arguments[0].select()", self.find(selector))
        self.browser.execute_cdp_cmd("Input.insertText", {"text": text})

    def log_in(self, user: str) -> str:
        text = token(user, exp=int(time.time()) + FIVE_HOURS)
        self.paste("#token", text)
        return text

    def send(self, operation: str) -> tuple[str, str]:
        """Press Enter on a call's button, and return the status and the body that are shown."""
        form = f"#try-{operation}"
        self.run("document.querySelector(arguments[0] + ' ~ .result').replaceChildren()", form)
        self.find(f"{form} button[type=submit]").send_keys(Keys.ENTER)
        until(
            lambda: self.run(
                "return document.querySelector(arguments[0] + ' ~ .result .outcome')", form
            ),
            "an answer",
        )
        body = self.browser.find_elements(By.CSS_SELECTOR, f"{form} ~ .result pre")
        text = body[0].get_property("textContent") if body else ""
        return self.find(f"{form} ~ .result .status").text, str(text)

    def open_everything(self) -> None:
        self.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        until(
            lambda: self.run("return document.querySelectorAll('form').length") == OPERATIONS,
            "all calls are open",
        )

    def headers(self, operation: str) -> dict[str, str]:
        return dict(self.run(HEADERS, f"#try-{operation} ~ .result"))

    def curl(self, operation: str) -> str:
        return str(self.find(f"#try-{operation} ~ .part pre").get_property("textContent"))

    def complaints(self) -> list[dict[str, Any]]:
        """Return the new lines of Chromium's console."""
        return list(self.browser.get_log("browser"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if not CHROMIUM or not DRIVER:
        pytest.skip("the page is not tried: Chromium is not installed, or its chromedriver is not")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = tmp_path_factory.mktemp("chromium")
    for argument in [
        "headless=new",
        "hide-scrollbars",
        "no-first-run",
        "no-proxy-server",
        f"user-data-dir={profile}",
    ]:
        options.add_argument(f"--{argument}")
    for feature in QUIET:
        options.add_argument(f"--disable-{feature}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's sandbox does not work for root
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def server(start: Callable[..., Process]) -> Process:
    return start(TASKD_METRICS="1")


@pytest.fixture
def page(browser: webdriver.Chrome, server: Process, tmp_path: Path) -> Page:
    browser.get("about:blank")
    found = Page(browser, server, tmp_path)
    found.complaints()  # those of the previous test
    found.emulate("clearDeviceMetricsOverride")
    found.emulate("setEmulatedMedia", features=[])
    found.open()
    assert found.complaints() == []
    return found


def test_a_person_can_paste_a_token_create_a_task_and_list_it(page):
    page.log_in("alice")
    assert page.find("#token-state").text.startswith("For alice, good for another 5 hours")
    page.paste(
        "#try-createTask-body", json.dumps({"title": "Buy oat milk", "description": "2 litres"})
    )
    status, body = page.send("createTask")
    (task,) = stored(page.database).values()
    assert status == "201 Created"
    assert json.loads(body) == task | {"completed": False}
    assert (task["user_id"], task["title"], task["description"]) == (
        "alice",
        "Buy oat milk",
        "2 litres",
    )
    assert page.headers("createTask")["location"] == f"/api/alice/tasks/{task['id']}"
    assert page.find("#try-createTask ~ .result .time").text.endswith(" ms")
    status, body = page.send("listTasks")
    assert (status, json.loads(body)) == ("200 OK", [task | {"completed": False}])
    assert page.complaints() == []
    assert page.run(HOSTS) == [4, [page.origin]]  # the page, the document and two calls


def test_every_call_of_the_document_can_be_tried(page):
    page.log_in("alice")
    document = json.loads((ROOT / "openapi.json").read_text())
    names = [operation["operationId"] for item in document["paths"].values()
             for method, operation in item.items() if method != "parameters"]  # fmt: skip
    page.open_everything()
    names.sort(key=["createTask", *(set(names) - {"createTask", "deleteTask"}), "deleteTask"].index)
    for name in names:
        status, _ = page.send(name)
        assert status == ("201 Created" if name == "createTask" else "200 OK"), name
        assert "x-request-id" in page.headers(name)
    assert len(names) == OPERATIONS
    assert stored(page.database) == {}
    assert page.complaints() == []


def test_a_person_can_narrow_sort_and_page_a_list(page):
    page.log_in("alice")
    for title in ["Süße Birnen & Äpfel", "süße äpfel", "Buy milk", "SÜSSE ÄPFEL?"]:
        page.paste("#try-createTask-body", json.dumps({"title": title}))
        page.send("createTask")
    for name, value in [("completed", "false"), ("sort", "-id")]:
        page.find(f"#try-listTasks-{name} option[value='{value}']").click()
    page.paste("#try-listTasks-q", "SÜSSE")
    page.paste("#try-listTasks-limit", "2")
    assert "/tasks?completed=false&q=S%C3%9CSSE&sort=-id&limit=2'" in page.curl("listTasks")
    status, body = page.send("listTasks")
    assert (status, [task["title"] for task in json.loads(body)]) == (
        "200 OK",
        ["SÜSSE ÄPFEL?", "süße äpfel"],
    )
    assert page.headers("listTasks")["link"].startswith(
        "</api/alice/tasks?completed=false&q=S%C3%9CSSE&sort=-id&limit=2&after="
    )
    button = page.find("#try-listTasks ~ .result button")
    assert button.text == "Next page"
    button.send_keys(Keys.ENTER)
    until(
        lambda: not page.browser.find_elements(By.CSS_SELECTOR, "#try-listTasks ~ .result button"),
        "the last page",
    )
    shown = page.find("#try-listTasks ~ .result pre").get_property("textContent")
    assert [task["title"] for task in json.loads(shown)] == ["Süße Birnen & Äpfel"]
    assert page.run("return document.activeElement.className") == "result"
    assert page.find("#try-listTasks-after").get_property("value") != ""
    page.find("#try-listTasks-sort option[value='id']").click()
    assert page.find("#try-listTasks-after").get_property("value") == ""
    page.find("#try-listTasks-sort option[value='-id']").click()
    assert "link" not in page.headers("listTasks")
    assert page.complaints() == []


def test_a_person_can_repeat_a_create_and_change_only_what_is_as_it_was(page):
    page.log_in("alice")
    page.paste("#try-createTask-Idempotency-Key", "once")
    first, again = page.send("createTask"), page.send("createTask")
    assert first == again
    assert page.headers("createTask")["idempotency-replayed"] == "true"
    tag = page.headers("createTask")["etag"]
    page.paste("#try-readTask-If-None-Match", tag)
    assert page.send("readTask") == ("304 Not Modified", "")
    assert page.headers("readTask")["etag"] == tag
    page.paste("#try-updateTask-If-Match", tag)
    assert page.send("updateTask")[0] == "200 OK"
    assert page.complaints() == []
    status, body = page.send("updateTask")
    assert (status, json.loads(body)["status"]) == ("412 Precondition Failed", 412)
    assert page.headers("updateTask")["etag"] != tag


def test_what_users_write_is_shown_as_text(page):
    page.log_in(ODD_USER)
    page.paste("#try-createTask-body", json.dumps({"title": HOSTILE}, ensure_ascii=False))
    status, body = page.send("createTask")
    (task,) = stored(page.database).values()
    assert status == "201 Created"
    assert (task["title"], task["user_id"]) == (HOSTILE, ODD_USER)
    assert json.loads(body)["title"] == HOSTILE
    assert json.loads(page.send("listTasks")[1])[0]["user_id"] == ODD_USER
    assert page.find("#token-state").text.startswith(f"For {ODD_USER}, good")
    assert page.run("return document.querySelectorAll('main img, main i, main b').length") == 0
    assert page.browser.title == "taskd: the API"
    assert page.complaints() == []


def test_the_curl_command_makes_the_same_request(page):
    secret = page.log_in(ODD_USER)
    page.paste("#try-createTask-body", json.dumps({"title": HOSTILE}, ensure_ascii=False))
    page.paste("#try-createTask-X-Request-ID", "from-curl")
    command = page.curl("createTask")
    assert secret not in command
    words = ["sh", "-c", command.replace("curl", "curl --silent --include", 1)]
    finished = subprocess.run(
        words, env=environment(TOKEN=secret), capture_output=True, text=True, timeout=DEADLINE
    )
    head, _, body = finished.stdout.replace("\r\n", "\n").partition("\n\n")
    (task,) = stored(page.database).values()
    assert (task["title"], task["user_id"]) == (HOSTILE, ODD_USER)
    assert head.startswith("HTTP/1.1 201 ")
    assert "x-request-id: from-curl" in head.lower()
    assert json.loads(body) == task | {"completed": False}


def test_without_a_token_the_page_shows_the_refusal(page):
    page.paste("#try-listTasks-user_id", "alice")
    status, body = page.send("listTasks")
    assert status == "401 Unauthorized"
    assert json.loads(body)["status"] == 401
    assert page.headers("listTasks")["www-authenticate"] == 'Bearer realm="taskd"'
    assert "Authorization" not in page.curl("listTasks")
    assert [one["message"].rpartition(" - ")[2][:57] for one in page.complaints()] == [
        "Failed to load resource: the server responded with a stat"
    ]


def test_the_page_says_what_it_thinks_of_a_token(page):
    good, later = "good for another 5 hours", int(time.time()) + FIVE_HOURS
    for pasted, said in [
        ("nonsense", "This does not look like a JWT"),
        ("a.b.c", "This does not look like a JWT"),
        (token("alice", sub=None), "This token has no sub"),
        (token("alice", exp=None), "For alice, but it has no expiry"),
        (token("alice", exp=1), "For alice, but it has expired"),
        (f'  "{token("é💩", exp=later)}"\n', f"For é💩, {good}"),
        (f"Authorization: Bearer {token('alice', exp=later)}", f"For alice, {good}"),
    ]:
        page.paste("#token", pasted)
        assert page.find("#token-state").text.startswith(said), pasted
    page.find(".login button").click()
    assert page.find("#token-state").text.startswith("No token")
    assert page.complaints() == []


def test_the_token_is_kept_nowhere(page):
    secret = page.log_in("alice")
    page.send("listTasks")
    assert page.run("return [localStorage.length, sessionStorage.length, document.cookie]") == [
        0,
        0,
        "",
    ]
    assert secret not in page.run("return document.documentElement.outerHTML")
    assert secret not in page.browser.current_url
    page.browser.refresh()
    page.wait_until_ready()
    assert page.find("#token").get_property("value") == ""
    assert page.find("#try-listTasks-user_id").get_property("value") == ""


def test_a_token_that_cannot_be_sent_is_reported(page):
    for user, said in [("", "Fill in user_id."), ("..", "A browser cannot ask for this path")]:
        page.run("document.querySelector('#try-listTasks-user_id').value = ''")
        page.paste("#try-listTasks-user_id", user)
        assert page.send("listTasks")[0] == "Not sent"
        assert said in page.find("#try-listTasks ~ .result").text
    page.paste("#try-readTask-user_id", "alice")
    page.paste("#try-readTask-If-None-Match", '"1-\u2026"')
    assert page.send("readTask")[0] == "Not sent"
    assert (
        "If-None-Match has a character that a header cannot have."
        in page.find("#try-readTask ~ .result").text
    )
    for call, field in [("listTasks", "q"), ("createTask", "body")]:
        page.paste(f"#try-{call}-user_id", "alice")
        page.run("document.querySelector(arguments[0]).value = 'x\\ud800'", f"#try-{call}-{field}")
        assert page.send(call)[0] == "Not sent"
        assert "half of a surrogate pair" in page.find(f"#try-{call} ~ .result").text
    page.run("document.querySelector('#try-listTasks-q').value = ''")
    page.paste("#token", "日本.日本.日本")
    assert page.send("readTask")[0] == "Not sent"
    assert "The token has a character" in page.find("#try-readTask ~ .result").text
    page.paste("#token", "")
    assert page.run(HOSTS)[0] == 2, "nothing was sent"
    page.paste("#try-listTasks-user_id", "alice")
    page.server.kill()
    assert page.send("listTasks")[0] == "No answer", "the page cannot know whether it was sent"
    assert "The server could not be reached." in page.find("#try-listTasks ~ .result").text


def test_numbers_are_shown_as_they_came(page):
    sent = '{"id": 9223372036854775807, "a": [], "b": {"c": [1, -2.50e3, "x\\"y"]}}'
    shown = page.run("return codeBlock(arguments[0], 'x').textContent", sent)
    assert shown == (
        '{\n  "id": 9223372036854775807,\n  "a": [],\n  "b": {\n    "c": [\n'
        '      1,\n      -2.50e3,\n      "x\\"y"\n    ]\n  }\n}'
    )


def test_a_very_long_answer_is_cut_and_says_so(page):
    shown = page.run("return codeBlock(JSON.stringify(Array(100000).fill('é')), 'x').textContent")
    assert len(shown) < 101_000
    assert shown.endswith("… and 300,001 more characters")


def test_the_page_works_with_a_trailing_slash(page):
    page.open("/docs/")
    page.log_in("alice")
    assert page.send("listTasks")[0] == "200 OK"
    assert page.complaints() == []


@pytest.mark.parametrize("name", ["deleteTask", "optionsTask"])
def test_an_address_with_a_name_leads_to_that_call(page, name):
    page.browser.get("about:blank")
    page.open(f"/docs#{name}")
    until(
        lambda: page.run("return document.getElementById(`try-${arguments[0]}`)", name),
        "the call is open",
    )
    covered = page.run("return document.querySelector('.login').getBoundingClientRect().bottom")
    top = "return document.getElementById(arguments[0]).getBoundingClientRect().top"
    until(lambda: covered <= page.run(top, name) < 200, "the call is in view, below the token")
    assert page.find(f"#try-{name} button").is_displayed()


@LIGHT_AND_DARK
def test_every_text_can_be_read(page, scheme):
    page.emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.log_in("alice")
    page.send("createTask")
    page.send("listTasks")
    page.open_everything()
    contrasts = page.run(CONTRASTS)
    dark = page.run("return matchMedia('(prefers-color-scheme: dark)').matches")
    page.emulate("setEmulatedMedia", features=[])
    assert dark == (scheme == "dark")
    assert len(contrasts) > 300
    assert [one for one in contrasts if one[0] < 4.5] == []


def test_a_token_with_line_breaks_is_the_token(page):
    text = token("alice", exp=int(time.time()) + FIVE_HOURS)
    page.paste("#token", f"{text[:60]}\n{text[60:120]} \n{text[120:]}")
    assert page.send("listTasks") == ("200 OK", "[]")


def test_a_blank_header_is_blank_in_the_curl_command_too(page):
    page.log_in("alice")
    page.paste("#try-createTask-Idempotency-Key", "   ")
    assert page.send("createTask")[0] == "400 Bad Request"
    assert "--header 'Idempotency-Key;'" in page.curl("createTask")


def test_a_call_that_is_opened_later_is_about_the_new_task_too(page):
    page.log_in("alice")
    for _ in range(2):
        page.send("createTask")
    page.open_everything()
    ids = page.run(
        "return [...document.querySelectorAll('input[name=task_id]')].map((one) => one.value)"
    )
    assert set(ids) == {"2"}


def test_an_address_that_is_not_percent_encoded_well_is_harmless(page):
    page.open("/docs#%")
    assert page.complaints() == []


@pytest.mark.parametrize("width", [320, 640, 1280])
def test_the_card_of_a_long_user_id_covers_no_heading_that_a_link_leads_to(page, width):
    page.size(width, 640)
    page.log_in("verylongfirstname.lastname@subdomain.of-a-rather-long-example-company.org" * 3)
    page.run(TWO_FRAMES)  # the page measures the card
    for name in ("createTask", "errors", "rules", "schema-Task"):
        page.run("location.hash = arguments[0]", name)
        page.run(TWO_FRAMES)
        assert page.run(COVERED, name) is False, name
    page.emulate("clearDeviceMetricsOverride")


def test_the_card_leaves_room_in_a_short_window(page):
    page.size(320, 256)  # 1280 x 1024 at 400 % (WCAG 2.2, 1.4.10)
    page.open("/docs#createTask")
    page.run(TWO_FRAMES)
    assert page.run("return document.querySelector('.login').getBoundingClientRect().bottom") < 0
    top = page.run("return document.getElementById('createTask').getBoundingClientRect().top")
    assert 0 < top < 128
    page.emulate("clearDeviceMetricsOverride")


def test_printing_closes_nothing(page):
    page.size(1280, 800)
    page.emulate("setEmulatedMedia", media="print")
    page.size(700, 800)
    page.run(TWO_FRAMES)
    closed = "return document.querySelectorAll('#createTask .detail[open]').length"
    assert page.run(closed) == 1, "the pages are counted before a listener could close the body"
    page.emulate("setEmulatedMedia", media="")
    page.emulate("clearDeviceMetricsOverride")


def test_nothing_is_wider_than_the_window(page):
    page.log_in("mWQkGHM2wDBvYwKNq8XOZmCUWAGRTMEo" * 4)
    page.paste("#try-createTask-body", json.dumps({"title": "W" * 200, "description": "W" * 5000}))
    page.send("createTask")
    page.send("listTasks")
    page.open_everything()
    for width in [320, 360, 600, 1000, 1400, 2560]:
        page.emulate(
            "setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False
        )
        page.open_everything()  # the contents open and close with the width
        assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [
            width,
            width,
        ]
    page.emulate("clearDeviceMetricsOverride")


def test_everything_that_can_be_used_has_a_name(page):
    page.open_everything()
    assert page.run(NAMELESS) == []
    ids = page.run("return [...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    levels = page.run(
        "return [...document.querySelectorAll('main :is(h1, h2, h3, h4)')]"
        ".map((one) => +one.tagName[1])"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


PHONE, DESK = (390, 844), (1280, 800)
# The rules of axe that judge colors; the others find the same in a light page and in a dark one.
OF_COLORS = ("color-contrast", "link-in-text-block")
# axe need not load the style sheets again, nor sounds: only rules about those want them.
AXE = """
const [values, done] = arguments;
const only = values.length ? {runOnly: {type: "rule", values}} : {};
axe.run(document, {resultTypes: ["violations"], preload: false, ...only})
  .then((found) => found.violations.map((one) => [one.id, one.nodes.length, one.nodes[0].html]))
  .then(done);
"""


def violations(browser: webdriver.Chrome, rules: Sequence[str] = ()) -> list[Any]:
    """Return what axe finds wrong with the page that is shown, by these rules or by all."""
    source = install(ROOT / "tests" / "axe" / "package-lock.json") / "axe-core" / "axe.min.js"
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": source.read_text()})
    return list(browser.execute_async_script(AXE, rules))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="axe comes by npm")
def test_axe_finds_nothing_wrong(page):
    for (width, height), scheme in ((PHONE, "light"), (DESK, "dark")):
        page.size(width, height)
        page.emulate(
            "setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        page.open()
        assert violations(page.browser) == []
        page.open_everything()
        assert violations(page.browser) == []


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_token_stays_in_sight_and_the_page_says_how_to_get_one(page, size):
    page.size(*size)
    page.open()
    assert "taskctl mint alice" in page.find("#token-note").text
    page.run("scrollTo(0, document.documentElement.scrollHeight / 2)")
    top, bottom = page.run(
        "const box = document.querySelector('.login').getBoundingClientRect();"
        "return [box.top, box.bottom]"
    )
    assert 0 <= top < bottom < size[1] / 4
    if size == PHONE:
        assert top >= page.run(
            "return document.querySelector('.contents').getBoundingClientRect().bottom"
        )
    page.log_in("alice")
    assert page.find("#token-state").is_displayed()


def test_a_phone_shows_send_near_its_title_and_keeps_the_contents(page):
    page.size(*PHONE)
    page.open()
    below = page.run(
        "return [...document.querySelectorAll('article.operation')].map((one) =>"
        " one.querySelector('button[type=submit]').getBoundingClientRect().bottom"
        " - one.querySelector('h3').getBoundingClientRect().top)"
    )
    strip = page.run("return document.querySelector('.login').offsetHeight + 44")
    assert max(below) < PHONE[1] - strip, below  # in sight when the contents have led to the title
    page.run("scrollTo(0, document.documentElement.scrollHeight / 2)")
    page.find(".contents summary").click()
    page.find(".contents a[href='#deleteTask']").click()
    top = "return document.getElementById('deleteTask').getBoundingClientRect().top"
    until(lambda: 0 < page.run(top) < 250, "the call is in view")
    assert not page.run("return document.querySelector('.contents details').open")


@pytest.mark.parametrize(
    ("size", "longest"), [(PHONE, 16_000), (DESK, 12_000)], ids=["phone", "desk"]
)
def test_the_page_is_short_until_something_is_opened(page, size, longest):
    page.size(*size)
    page.open()
    assert page.run("return document.documentElement.scrollHeight") < longest
    badges = page.run(
        "return [...document.querySelectorAll('.method')].filter((one) => one.checkVisibility())"
        ".map((one) => one.getBoundingClientRect().height)"
    )
    assert max(badges) < 1.5 * min(badges)  # each is on one line


def test_a_closed_part_names_what_is_in_it(page):
    page.size(*PHONE)
    page.open()
    titles = [
        " ".join(one.text.split())
        for one in page.browser.find_elements(By.CSS_SELECTOR, "#createTask .detail > summary")
    ]
    assert titles == [
        "Parameters user_id Idempotency-Key X-Request-ID",
        "Body title description completed priority due_date tags id user_id created_at updated_at",
        "Answers 201 400 401 403 413 415 422 431 500 503",
    ]
    empty = page.run(
        "return [...document.querySelectorAll('.contents h2, .group h2')]"
        ".map((one) => [one, one.nextElementSibling ?? one.parentElement.nextElementSibling])"
        ".filter(([, next]) => !next?.textContent)"
        ".map(([one]) => one.textContent)"
    )
    assert empty == []
    missing = page.run(
        "return [...document.querySelectorAll('[aria-labelledby]')]"
        ".flatMap((one) => one.getAttribute('aria-labelledby').split(' '))"
        ".filter((id) => !document.getElementById(id))"
    )
    assert missing == []


def test_a_type_leads_to_its_shape_and_opens_it(page):
    page.find("#createTask a[href='#schema-NewTask']").click()
    until(
        lambda: page.run("return document.getElementById('schema-NewTask').open"),
        "the shape is open",
    )
    assert "title" in page.find("#schema-NewTask .members").text


def test_the_rules_come_after_the_routes(page):
    headings = [one.text for one in page.browser.find_elements(By.CSS_SELECTOR, "main h2")]
    assert headings.index("Tasks") < headings.index("Rules") < headings.index("Errors")


def test_the_page_says_so_when_the_document_cannot_be_read(browser, start, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "docs", copy / "docs")
    for name in ("taskd.py", "schema.sql"):
        shutil.copy(ROOT / name, copy)
    (copy / "openapi.json").write_text("{")
    started = time.monotonic()
    server = Process(copy, command=["sh", "-c", 'exec "$0" ./taskd.py'])
    browser.get(f"http://127.0.0.1:{server.port}/docs")
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "[role=alert]"), "the page says so")
    text = browser.find_element(By.CSS_SELECTOR, "[role=alert]").text
    server.kill()
    assert text.startswith("The document at /openapi.json cannot be read: ")
    assert time.monotonic() - started < DEADLINE
