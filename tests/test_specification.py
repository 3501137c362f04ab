"""The specification, point by point: scenarios, edge cases, requirements, success criteria."""

from __future__ import annotations

import re
import statistics
import time

import pytest

import taskd
from routes import routes
from support import (
    NEW_TASK,
    OTHER_SECRET,
    SECRET,
    TASK_KEYS,
    assert_problem,
    bearer,
    database_url,
    sign,
    token,
)

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
ROUTES = [  # method, path, body
    ("GET", "/api/{user}/tasks", None),
    ("POST", "/api/{user}/tasks", {"title": "Mine now"}),
    ("GET", "/api/{user}/tasks/{id}", None),
    ("PUT", "/api/{user}/tasks/{id}", {"title": "Mine now", "completed": True}),
    ("DELETE", "/api/{user}/tasks/{id}", None),
    ("PATCH", "/api/{user}/tasks/{id}/complete", None),
]


class WhoAmI:
    """A new resource, which takes the user from the middleware."""

    def on_get(self, req, resp):
        user = req.context.user
        resp.media = {"id": user.id, "email": user.email, "name": user.name}


def expired():
    return {"Authorization": f"Bearer {token('alice', exp=int(time.time()) - 60)}"}


def every_route(client, headers, user="alice", task_id=1):
    """Call all six routes and return the answers."""
    return [
        client.simulate_request(
            method, path.format(user=user, id=task_id), headers=headers, json=body
        )
        for method, path, body in ROUTES
    ]


# --- User story 1: secure task listing ------------------------------------------------------------


def test_us1_scenario_1_a_user_with_a_token_lists_only_their_own_tasks(alice, bob):
    milk, bread = (
        alice.add(title="Milk"),
        alice.add(title="Bread", description="Rye", completed=True),
    )
    bob.add(title="Bob's secret")
    response = alice.call("GET")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json == [milk, bread]
    assert [task["user_id"] for task in response.json] == ["alice", "alice"]


def test_us1_scenario_1_a_user_without_tasks_gets_an_empty_list(alice, bob):
    bob.add()
    response = alice.call("GET")
    assert (response.status_code, response.text) == (200, "[]")


def test_us1_scenario_2_without_a_token_listing_is_401(client, alice):
    alice.add(title="Milk")
    response = client.simulate_get("/api/alice/tasks")
    assert_problem(response, 401)
    assert response.headers["www-authenticate"] == 'Bearer realm="taskd"'
    assert "Milk" not in response.text


# --- User story 2: secure task creation -----------------------------------------------------------


def test_us2_scenario_1_a_created_task_belongs_to_the_user_of_the_token(alice):
    response = alice.call("POST", json={"title": "Buy milk", "description": "2 litres"})
    assert response.status_code == 201
    task = response.json
    assert list(task) == TASK_KEYS
    assert TIME.fullmatch(task["created_at"])
    assert task == {
        "id": 1,
        "user_id": "alice",
        **NEW_TASK,
        "title": "Buy milk",
        "description": "2 litres",
        "created_at": task["created_at"],
        "updated_at": task["created_at"],
    }
    assert response.headers["location"] == "/api/alice/tasks/1"
    assert alice.call("GET").json == [task]


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Bearer not-a-token",
        f"Bearer {token('alice', OTHER_SECRET)}",
        f"Bearer {token('alice', exp=1)}",
        f"Bearer {token('alice')}x",
    ],
    ids=["none", "garbage", "another secret", "expired", "changed"],
)
def test_us2_scenario_2_with_an_invalid_or_expired_token_creating_is_401(
    client, alice, authorization
):
    headers = {"Authorization": authorization} if authorization else {}
    response = client.simulate_post("/api/alice/tasks", headers=headers, json={"title": "Buy milk"})
    assert_problem(response, 401)
    assert response.headers["www-authenticate"].startswith('Bearer realm="taskd"')
    assert alice.call("GET").json == []


# --- User story 3: secure task management ---------------------------------------------------------


def test_us3_scenario_1_an_owner_reads_a_task(alice):
    task = alice.add(title="Milk", description="2 litres")
    alice.add(title="Bread")
    response = alice.call("GET", f"/{task['id']}")
    assert (response.status_code, response.json) == (200, task)


def test_us3_scenario_2_an_owner_updates_a_task(alice):
    task = alice.add(title="Milk", description="2 litres")
    response = alice.call(
        "PUT", f"/{task['id']}", json={"title": "Oat milk", "description": None, "completed": True}
    )
    assert response.status_code == 200
    updated = response.json
    assert updated == task | {
        "title": "Oat milk",
        "description": None,
        "completed": True,
        "updated_at": updated["updated_at"],
    }
    assert updated["updated_at"] >= task["updated_at"]
    assert alice.call("GET", f"/{task['id']}").json == updated


def test_us3_scenario_3_an_owner_deletes_a_task_and_gets_it_back_as_it_was(alice):
    task, other = alice.add(title="Milk"), alice.add(title="Bread")
    response = alice.call("DELETE", f"/{task['id']}")
    assert (response.status_code, response.json) == (200, task)
    assert_problem(alice.call("GET", f"/{task['id']}"), 404)
    assert alice.call("GET").json == [other]


def test_us3_scenario_4_an_owner_toggles_a_task(alice):
    task = alice.add()
    states = []
    for _ in range(3):
        response = alice.call("PATCH", f"/{task['id']}/complete")
        assert response.status_code == 200
        assert response.json == task | {
            "completed": response.json["completed"],
            "updated_at": response.json["updated_at"],
        }
        states.append(response.json["completed"])
    assert states == [True, False, True]
    assert alice.call("GET", f"/{task['id']}").json["completed"] is True


# --- Edge cases -----------------------------------------------------------------------------------


def test_edge_case_another_users_task_is_404_below_ones_own_url(alice, bob):
    task = alice.add()
    for method, path, body in [
        ("GET", "", None),
        ("PUT", "", {"title": "x"}),
        ("DELETE", "", None),
        ("PATCH", "/complete", None),
    ]:
        assert_problem(bob.call(method, f"/{task['id']}{path}", json=body), 404)
    assert alice.call("GET").json == [task]


def test_edge_case_an_invalid_token_is_401_and_says_why(client):
    for bad in ["x", "a.b", "a.b.c", token(secret=OTHER_SECRET)]:
        response = client.simulate_get(
            "/api/alice/tasks", headers={"Authorization": f"Bearer {bad}"}
        )
        assert_problem(response, 401)
        assert 'error="invalid_token"' in response.headers["www-authenticate"]


def test_edge_case_a_task_that_does_not_exist_is_404(alice):
    for method, path in [("GET", ""), ("DELETE", ""), ("PATCH", "/complete")]:
        assert_problem(alice.call(method, f"/12345{path}"), 404)
    assert_problem(alice.call("PUT", "/12345", json={"title": "x"}), 404)


def test_edge_case_an_expired_token_is_401_on_every_route(client, alice):
    task = alice.add()
    for response in every_route(client, expired(), task_id=task["id"]):
        assert_problem(response, 401)
        assert 'error="invalid_token"' in response.headers["www-authenticate"]
        assert "expired" in response.json["detail"]
    assert alice.call("GET").json == [task]


def test_edge_case_a_token_for_another_user_id_than_the_urls_is_403_on_every_route(client, alice):
    task = alice.add()
    for response in every_route(client, bearer("bob"), user="alice", task_id=task["id"]):
        assert_problem(response, 403)
        assert task["title"] not in response.text
    assert alice.call("GET").json == [task]


# --- Functional requirements ----------------------------------------------------------------------


def test_fr_001_every_task_route_requires_a_token_in_the_header(client, alice):
    task = alice.add()
    for response in every_route(client, {}, task_id=task["id"]):
        assert_problem(response, 401)
    for method, path, body in ROUTES:
        path = path.format(user="alice", id=task["id"])
        assert_problem(client.simulate_request(method, f"{path}?token={token()}", json=body), 401)
        assert_problem(
            client.simulate_request(method, path, cookies={"token": token()}, json=body), 401
        )
    assert alice.call("GET").json == [task]


def test_fr_002_the_secret_comes_from_better_auth_secret(make_app, tmp_path):
    from falcon import testing

    environ = {
        "BETTER_AUTH_SECRET": OTHER_SECRET,
        "DATABASE_URL": database_url(tmp_path / "taskd.db"),
    }
    settings = taskd.Settings.load(environ, tmp_path / "none.env")
    client = testing.TestClient(
        make_app(secret=settings.secret, database_url=settings.database_url)
    )
    signed_by = {
        secret: client.simulate_get(
            "/api/alice/tasks", headers={"Authorization": f"Bearer {token(secret=secret)}"}
        )
        for secret in (OTHER_SECRET, SECRET, OTHER_SECRET + " ", OTHER_SECRET.upper())
    }
    assert {secret: response.status_code for secret, response in signed_by.items()} == {
        OTHER_SECRET: 200,
        SECRET: 401,
        OTHER_SECRET + " ": 401,
        OTHER_SECRET.upper(): 401,
    }


def test_fr_002_every_bit_of_the_signature_is_verified(client):
    good = token()
    start = good.rindex(".") + 1
    for position in range(start, len(good)):
        changed = good[:position] + ("A" if good[position] != "A" else "B") + good[position + 1 :]
        response = client.simulate_get(
            "/api/alice/tasks", headers={"Authorization": f"Bearer {changed}"}
        )
        assert_problem(response, 401)
    for bad in (good[:start], good[:-1], good[: start + 10]):
        assert_problem(
            client.simulate_get("/api/alice/tasks", headers={"Authorization": f"Bearer {bad}"}), 401
        )


def test_fr_003_the_user_id_of_the_token_must_be_the_user_id_of_the_url(client):
    expected = {"alice": 200, "bob": 403, "Alice": 403, "alice%20": 403, "alic": 403, "alicee": 403}
    answers = {
        user: client.simulate_get(f"/api/{user}/tasks", headers=bearer("alice"))
        for user in expected
    }
    assert {user: response.status_code for user, response in answers.items()} == expected


def test_fr_003_the_user_id_is_the_sub_claim_and_no_other(client):
    claims = {
        "userId": "alice",
        "user_id": "alice",
        "id": "alice",
        "email": "alice",
        "uid": "alice",
    }
    mail_link = sign({"alg": "HS256"}, claims | {"exp": int(time.time()) + 900})
    assert_problem(
        client.simulate_get("/api/alice/tasks", headers={"Authorization": f"Bearer {mail_link}"}),
        401,
    )
    login = {"Authorization": f"Bearer {token('bob', **claims)}"}
    assert_problem(client.simulate_get("/api/alice/tasks", headers=login), 403)
    assert client.simulate_get("/api/bob/tasks", headers=login).status_code == 200


def test_fr_004_without_a_valid_token_every_route_answers_401_whatever_else_is_wrong(client):
    for headers in (
        {},
        expired(),
        {"Authorization": "Basic YWxpY2U6eA=="},
        bearer(secret=OTHER_SECRET),
    ):
        for response in every_route(client, headers, task_id=0):
            assert_problem(response, 401)
            assert response.headers["www-authenticate"].startswith('Bearer realm="taskd"')


def test_fr_005_only_the_users_own_tasks_are_returned(alice, bob):
    tasks = {person.name: [] for person in (alice, bob)}
    for number in range(20):
        person = alice if number % 3 else bob
        tasks[person.name].append(person.add(title=f"{person.name} {number}"))
    for person in (alice, bob):
        assert person.call("GET").json == tasks[person.name]
        for task in tasks["alice"] + tasks["bob"]:
            response = person.call("GET", f"/{task['id']}")
            if task["user_id"] == person.name:
                assert (response.status_code, response.json) == (200, task)
            else:
                assert_problem(response, 404)


def test_fr_006_a_created_task_is_the_users_whatever_the_body_says(alice, bob):
    task = alice.add(title="Milk", user_id="bob", id=99)
    assert (task["user_id"], task["id"]) == ("alice", 1)
    assert bob.call("GET").json == []


def test_fr_007_a_user_updates_their_own_tasks_but_not_anothers(alice, bob):
    task = alice.add()
    assert_problem(bob.call("PUT", f"/{task['id']}", json={"title": "Bob's"}), 404)
    assert_problem(bob.call("PUT", f"/api/alice/tasks/{task['id']}", json={"title": "Bob's"}), 403)
    assert alice.call("GET", f"/{task['id']}").json == task
    assert alice.call("PUT", f"/{task['id']}", json={"title": "Alice's"}).json["title"] == "Alice's"


def test_fr_007_an_update_cannot_give_a_task_away(alice, bob):
    task = alice.add()
    response = alice.call("PUT", f"/{task['id']}", json={"user_id": "bob", "title": "Still mine"})
    assert (response.status_code, response.json["user_id"]) == (200, "alice")
    assert bob.call("GET").json == []


def test_fr_008_a_user_deletes_their_own_tasks_but_not_anothers(alice, bob):
    task = alice.add()
    assert_problem(bob.call("DELETE", f"/{task['id']}"), 404)
    assert_problem(bob.call("DELETE", f"/api/alice/tasks/{task['id']}"), 403)
    assert alice.call("GET").json == [task]
    assert alice.call("DELETE", f"/{task['id']}").json == task
    assert_problem(alice.call("DELETE", f"/{task['id']}"), 404)


def test_fr_009_a_user_toggles_their_own_tasks_but_not_anothers(alice, bob):
    task = alice.add()
    assert_problem(bob.call("PATCH", f"/{task['id']}/complete"), 404)
    assert_problem(bob.call("PATCH", f"/api/alice/tasks/{task['id']}/complete"), 403)
    assert alice.call("GET", f"/{task['id']}").json == task
    assert alice.call("PATCH", f"/{task['id']}/complete").json["completed"] is True


def test_the_task_routes_are_served_by_the_two_resources_that_were_asked_for(app):
    served = {route.path: route.class_name for route in routes(app)}
    assert {path: name for path, name in served.items() if path.startswith("/api/")} == {
        "/api/{user_id}/tasks": "TaskResource",
        "/api/{user_id}/tasks/{task_id}": "TaskResource",
        "/api/{user_id}/tasks/{task_id}/complete": "TaskCompleteResource",
    }


def test_fr_010_the_middleware_leaves_the_user_in_the_request_context(app, client):
    app.add_route("/api/{user_id}/whoami", WhoAmI())
    response = client.simulate_get(
        "/api/alice/whoami", headers=bearer("alice", email="a@example.com", name="Alice")
    )
    assert response.json == {"id": "alice", "email": "a@example.com", "name": "Alice"}
    response = client.simulate_get(
        "/api/alice/whoami", headers=bearer("alice", email=None, name=None)
    )
    assert response.json == {"id": "alice", "email": None, "name": None}


def test_fr_010_the_middleware_guards_a_route_that_knows_nothing_of_tokens(app, client):
    app.add_route("/api/{user_id}/whoami", WhoAmI())
    assert_problem(client.simulate_get("/api/alice/whoami"), 401)
    assert_problem(client.simulate_get("/api/alice/whoami", headers=expired()), 401)
    assert_problem(client.simulate_get("/api/alice/whoami", headers=bearer("bob")), 403)


def test_fr_011_ownership_holds_on_every_operation(client, alice, bob):
    task = alice.add()
    statuses = [
        [
            response.status_code
            for response in every_route(client, bearer("bob"), user=user, task_id=task["id"])
        ]
        for user in ("alice", "bob")
    ]
    assert statuses == [[403] * 6, [200, 201, 404, 404, 404, 404]]
    assert alice.call("GET").json == [task]
    assert [found["user_id"] for found in bob.call("GET").json] == ["bob"]


# --- Success criteria -----------------------------------------------------------------------------


def test_sc_001_and_sc_004_every_request_of_an_authenticated_user_succeeds(alice):
    statuses = []
    for number in range(50):
        task = alice.add(title=f"Task {number}")
        path = f"/{task['id']}"
        statuses += [
            alice.call("GET", path).status_code,
            alice.call("PUT", path, json={"description": "x" * number}).status_code,
            alice.call("PATCH", f"{path}/complete").status_code,
            alice.call("GET").status_code,
            alice.call("DELETE", path).status_code,
        ]
    assert statuses == [200] * 250


@pytest.mark.parametrize(
    "headers", [{}, bearer(secret=OTHER_SECRET), expired()], ids=["none", "wrong", "expired"]
)
def test_sc_002_a_401_takes_less_than_100_ms(client, headers):
    def once():
        started = time.perf_counter()
        assert_problem(client.simulate_get("/api/alice/tasks", headers=headers), 401)
        return time.perf_counter() - started

    assert statistics.median(once() for _ in range(20)) < 0.1


def test_sc_003_no_request_of_another_user_reads_or_changes_anything(client, alice):
    tasks = [
        alice.add(title=f"Secret {number}", description="Nobody's business") for number in range(3)
    ]
    for user in (
        "alice",
        "bob",
        "ALICE",
        "alice%00",
        "%61lice",
        "*",
        "%25",
        "_",
        "",
        "..",
        "alice'--",
    ):
        for slashes in ("", "/", "//"):
            for task in tasks:
                for headers in (
                    bearer("bob"),
                    bearer("*"),
                    bearer("%"),
                    bearer("alice' OR 1=1--"),
                    {},
                ):
                    for response in every_route(
                        client, headers, user=user, task_id=f"{slashes}{task['id']}"
                    ):
                        assert response.status_code in (200, 201, 401, 403, 404)
                        assert "Secret" not in response.text
                        assert "Nobody" not in response.text
    assert alice.call("GET").json == tasks


def test_sc_005_verifying_a_token_takes_less_than_50_ms():
    tokens, good = taskd.Tokens(taskd.Settings(secret=SECRET)), token()

    def once():
        started = time.perf_counter()
        assert tokens.verify(good).id == "alice"
        return time.perf_counter() - started

    assert statistics.median(once() for _ in range(20)) < 0.05
