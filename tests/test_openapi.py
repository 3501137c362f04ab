from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import falcon
import jsonschema_rs
import msgspec
import pytest
from schemathesis.specs.openapi.definitions import (
    OPENAPI_31,
)  # the official schema of OpenAPI documents

import taskd
from routes import routes
from support import ROOT, TASK_KEYS, Wire, bearer

pytestmark = pytest.mark.sqlite("it is about a document")

DOCUMENT: dict[str, Any] = json.loads((ROOT / "openapi.json").read_text())
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
LIST, ONE, DONE = (
    "/api/{user_id}/tasks",
    "/api/{user_id}/tasks/{task_id}",
    "/api/{user_id}/tasks/{task_id}/complete",
)
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
BODY_TYPES = {
    "NewTask": taskd.NEW_TASK,
    "TaskChanges": taskd.TASK_CHANGES,
    "Completion": taskd.COMPLETION,
}
OWNED = {"id", "user_id", "created_at", "updated_at"}
ON_EVERY_ANSWER = {"X-Request-ID"}
ON_EVERY_API_ANSWER = ON_EVERY_ANSWER | {"Cache-Control", "X-Content-Type-Options"}
ON_SOME_ANSWERS = {"Link", "Idempotency-Replayed"}  # of an operation with the same status
KEPT = ["localStorage", "sessionStorage", "document.cookie", "indexedDB"]
MARKUP = [
    "innerHTML",
    "outerHTML",
    "insertAdjacentHTML",
    "document.write",
    "eval(",
    ".style.cssText",
]
LOADED = ["@import", "url(", "<link", "<img", "src="]
PAGES = [("/openapi.json", "application/json"), ("/docs", "text/html; charset=utf-8")]
TYPES = {**dict(PAGES), "/metrics": "text/plain"}


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference into the document; a reference that leads nowhere is a KeyError."""
    while "$ref" in node:
        found: Any = DOCUMENT
        for key in node["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        node = found
    return node


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method in METHODS & item.keys():
            yield path, method, item[method]


def parameters(path: str, operation: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    listed = [*DOCUMENT["paths"][path].get("parameters", []), *operation.get("parameters", [])]
    return {(one["in"], one["name"]): one for one in map(resolve, listed)}


def responses(operation: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {int(status): resolve(response) for status, response in operation["responses"].items()}


def walk(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    ):
        yield from walk(child)


def validator(schema: dict[str, Any]) -> Any:
    """Return a validator of a schema of the document, formats included."""
    return jsonschema_rs.Draft202012Validator(
        schema | {"components": DOCUMENT["components"]}, validate_formats=True
    )


ALL = [
    pytest.param(*case, id=f"{case[1].upper()} {case[0]}")
    for case in sorted(operations(), key=lambda case: case[:2])
]
PRIVATE = [case for case in ALL if "/api/" in str(case.id) and "OPTIONS" not in str(case.id)]


# --- The document and OpenAPI ---------------------------------------------------------------------


def test_the_document_is_openapi_3_1_in_structure():
    assert re.fullmatch(r"3\.1\.\d+", DOCUMENT["openapi"])
    official = jsonschema_rs.validator_for(OPENAPI_31)
    assert [error.message for error in official.iter_errors(DOCUMENT)] == []
    assert not official.is_valid(
        DOCUMENT | {"paths": {"/": {"get": {"responses": {"two hundred": {}}}}}}
    )


def test_the_document_has_the_version_of_the_code():
    assert DOCUMENT["info"]["version"] == taskd.__version__


def test_every_reference_leads_somewhere_and_every_component_is_used():
    text = json.dumps(DOCUMENT)
    used = set(re.findall(r'"\$ref": "#/components/([^"]+)"', text))
    for node in walk(DOCUMENT):
        if "$ref" in node:
            assert set(node) == {"$ref"}
            assert isinstance(resolve(node), dict)
    kinds = ("parameters", "headers", "schemas", "responses")
    there = {f"{kind}/{name}" for kind in kinds for name in DOCUMENT["components"][kind]}
    # 405 answers the methods that are not in the document, so no operation can refer to it.
    assert there - used == {"responses/MethodNotAllowed"}


def test_every_schema_is_a_json_schema():
    schemas = [node["schema"] for node in walk(DOCUMENT) if isinstance(node.get("schema"), dict)]
    assert len(schemas) > 30
    for schema in [*SCHEMAS.values(), *schemas]:
        jsonschema_rs.meta.validate(
            {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
        )


def test_every_pattern_compiles_and_every_default_fits_its_schema():
    for node in walk(DOCUMENT):
        if isinstance(node.get("pattern"), str):
            jsonschema_rs.Draft202012Validator({"pattern": node["pattern"]})
        if "default" in node:
            jsonschema_rs.validate(node, node["default"])


def test_operation_ids_are_unique_and_each_operation_has_a_declared_tag_and_a_summary():
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(ids) == len(set(ids))
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for _, _, operation in operations():
        assert set(operation["tags"]) <= tags
        assert len(operation["tags"]) == 1
        assert operation["summary"]


@pytest.mark.parametrize(("path", "method", "operation"), ALL)
def test_each_field_of_a_path_is_a_required_parameter_and_the_reverse(path, method, operation):
    declared = parameters(path, operation)
    in_path = {name for place, name in declared if place == "path"}
    assert in_path == set(re.findall(r"\{(\w+)\}", path))
    assert all(declared["path", name]["required"] for name in in_path)
    assert ("header", "X-Request-ID") in declared


def test_every_link_leads_to_an_operation_and_names_its_parameters():
    by_id = {operation["operationId"]: (path, operation) for path, _, operation in operations()}
    links = [link for _, _, operation in operations() for response in responses(operation).values()
             for link in response.get("links", {}).values()]  # fmt: skip
    assert len(links) >= 10
    for link in links:
        names = {name for _, name in parameters(*by_id[link["operationId"]])}
        assert set(link["parameters"]) <= names


# --- The document and the router ------------------------------------------------------------------


@pytest.fixture
def app(make_app):
    return make_app(metrics=True)


def routed(app: taskd.App) -> set[tuple[str, str]]:
    return {
        (route.path, method.method.lower())
        for route in routes(app)
        for method in route.methods
        if method.method in falcon.HTTP_METHODS and method.function_name != "method_not_allowed"
        if route.path != "/"  # only redirects a browser to /docs
    }


def test_the_document_has_every_path_and_method_of_the_router_and_no_other(app):
    for_people = {("/", "get"), ("/", "head"), ("/", "options")}  # redirects a browser to /docs
    assert {(path, method) for path, method, _ in operations()} == routed(app) - for_people


def test_what_follows_from_the_declaration_of_fields_is_as_make_openapi_writes_it():
    command = [sys.executable, str(ROOT / "docs" / "openapi.py"), "--check"]
    written = subprocess.run(command, capture_output=True, text=True)
    assert (written.returncode, written.stdout, written.stderr) == (0, "", ""), "run: make openapi"


def test_every_method_of_the_document_is_known_to_its_path_and_every_other_is_405(app, client):
    for path, item in DOCUMENT["paths"].items():
        url = path.replace("{user_id}", "alice").replace("{task_id}", "1")
        allowed = client.simulate_options(url).headers["allow"].split(", ")
        assert {method.upper() for method in METHODS & item.keys()} - {"OPTIONS"} == set(
            allowed
        ) - {"OPTIONS"}
        for method in METHODS - item.keys():
            assert client.simulate_request(method.upper(), url, headers=bearer()).status_code == 405


def test_what_the_document_calls_private_is_what_asks_for_a_token(client):
    for path, method, operation in operations():
        url = path.replace("{user_id}", "alice").replace("{task_id}", "1")
        private = operation.get("security", DOCUMENT["security"]) != []
        assert (client.simulate_request(method.upper(), url).status_code == 401) == private, (
            method,
            path,
        )
        assert (401 in responses(operation)) == private, (method, path)
    scheme = DOCUMENT["components"]["securitySchemes"]["token"]
    assert (scheme["type"], scheme["scheme"], scheme["bearerFormat"]) == ("http", "bearer", "JWT")
    assert DOCUMENT["security"] == [{"token": []}]


# --- Answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "method", "operation"), ALL)
def test_the_statuses_of_an_operation_are_those_of_the_contract(path, method, operation):
    expected = {201 if method == "post" else 200}
    if path.startswith("/api/") and method != "options":
        expected |= {400, 401, 403, 413, 431, 500, 503}
        expected |= {415, 422} if method in ("post", "put", "patch") else set()
        expected |= {404, 412} if "{task_id}" in path else {422}
        expected |= {304} if path == ONE and method in ("get", "head") else set()
    expected |= (
        {"/readyz": {503}, "/metrics": {404}}.get(path, set()) if method != "options" else set()
    )
    assert set(responses(operation)) == expected


def shows_a_task(path: str, method: str, status: int) -> bool:
    return status in (201, 304, 412) or (
        "{task_id}" in path and status == 200 and method != "options"
    )


@pytest.mark.parametrize(("path", "method", "operation"), ALL)
def test_every_answer_declares_the_headers_that_it_carries(path, method, operation):
    for status, response in responses(operation).items():
        expected = ON_EVERY_API_ANSWER if path.startswith("/api/") else ON_EVERY_ANSWER
        expected = expected | ({"Location", "Idempotency-Replayed"} if status == 201 else set())
        expected = expected | (
            {"Link"} if path == LIST and status == 200 and method != "options" else set()
        )
        expected = expected | ({"ETag"} if shows_a_task(path, method, status) else set())
        expected = expected | ({"WWW-Authenticate"} if status == 401 else set())
        expected = expected | ({"Retry-After"} if status == 503 else set())
        expected = expected | ({"Allow"} if method == "options" else set())
        expected = expected | (
            {"Content-Security-Policy"} if path in dict(PAGES) and method != "options" else set()
        )
        assert set(response["headers"]) == expected, status
        optional = {
            name for name, header in response["headers"].items() if not resolve(header)["required"]
        }
        assert optional == expected & ON_SOME_ANSWERS


@pytest.mark.parametrize(("path", "method", "operation"), ALL)
def test_every_error_is_a_problem_and_every_other_answer_says_its_type(path, method, operation):
    for status, response in responses(operation).items():
        if method in ("head", "options") or status == 304:
            assert "content" not in response
        elif status >= 400:
            (media,) = response["content"].items()
            name = "ValidationProblem" if status == 422 else "Problem"
            assert media[0] == "application/problem+json"
            assert media[1]["schema"] == {"$ref": f"#/components/schemas/{name}"}
        else:
            assert set(response["content"]) == {TYPES.get(path, "application/json")}


def test_a_405_is_a_problem_with_allow():
    response = DOCUMENT["components"]["responses"]["MethodNotAllowed"]
    assert set(response["headers"]) == ON_EVERY_API_ANSWER | {"Allow"}
    assert set(response["content"]) == {"application/problem+json"}


# --- Examples -------------------------------------------------------------------------------------


def examples() -> Iterator[tuple[str, Any, Any]]:
    holders = [
        (f"{method} {path}", operation.get("requestBody", {}))
        for path, method, operation in operations()
    ]
    holders += [(f"{method} {path} {status}", response) for path, method, operation in operations()
                for status, response in responses(operation).items()]  # fmt: skip
    holders += list(DOCUMENT["components"]["responses"].items())
    for where, holder in holders:
        for media in holder.get("content", {}).values():
            for name, example in media["examples"].items():
                yield f"{where}: {name}", media["schema"], example["value"]
    for kind in ("parameters", "headers"):
        for name, one in DOCUMENT["components"][kind].items():
            if "example" in one:
                yield f"{kind}: {name}", one["schema"], one["example"]


def test_every_example_fits_its_schema():
    checked = list(examples())
    assert len(checked) > 80
    for where, schema, value in checked:
        assert validator(schema).is_valid(value), where


@pytest.mark.parametrize(("path", "method", "operation"), ALL)
def test_every_body_has_an_example(path, method, operation):
    bodies = [
        *responses(operation).values(),
        *([operation["requestBody"]] if "requestBody" in operation else []),
    ]
    for body in bodies:
        assert all(media["examples"] for media in body.get("content", {}).values())


def test_the_examples_of_errors_name_their_status():
    for path, method, operation in operations():
        for status, response in responses(operation).items():
            media = response.get("content", {}).get("application/problem+json", {"examples": {}})
            for example in media["examples"].values():
                assert example["value"]["status"] == status, (method, path)
                assert example["value"]["title"] == json.loads(taskd.problem(status, None))["title"]


def said_in_process(app: taskd.App, alice: Any, bob: Any) -> Iterator[Any]:
    """Yield answers to requests that are refused for the reasons of the examples."""
    alice.add()
    yield alice.client.simulate_get("/api/alice/tasks")
    yield alice.client.simulate_get("/api/alice/tasks", headers=bearer("alice", exp=1))
    yield bob.call("GET", "/api/alice/tasks")
    yield alice.call("GET", "/9")
    yield alice.call("POST", "/1")
    yield alice.client.simulate_get("/nowhere")
    for query in ({"limit": "0"}, {"after": "x"}, {"status": "open"}):
        yield alice.call("GET", params=query)
    for header in ("If-Match", "If-None-Match"):
        yield alice.call("GET", "/1", headers={header: "1"})
    yield alice.call("PATCH", "/1", json={"title": "x"}, headers=STALE)
    yield alice.call("POST", json={"title": "x"}, headers={"Idempotency-Key": "a b"})
    for title in "xy":
        answer = alice.call("POST", json={"title": title}, headers=KEY)
    yield answer
    yield alice.call("POST", json={"title": " "})
    yield alice.call("POST", json={"title": "x", "completed": 1, "titel": "x"})
    for body in (b"x", b"", b" " * 70_000):
        yield alice.call("POST", body=body, headers=JSON)
    yield alice.call("POST", body=b"x", headers={"Content-Type": "text/plain"})
    search = "alice", taskd.Listing(q="x")
    with app.store.page_reader(*search), app.store.page_reader(*search):
        yield alice.call("GET", params={"q": "x"})


def test_the_examples_of_errors_are_what_the_server_says(client, alice, bob, server):
    said = [answer.json for answer in said_in_process(client.app, alice, bob)]
    for head in (b"", b"Host: x\r\nX: " + b"x" * 70_000 + b"\r\n"):
        with Wire(server) as wire:
            said.append(wire.send(b"GET / HTTP/1.1\r\n" + head + b"\r\n").answer().json)
    for error in (
        taskd.TooManyTasks("1,000"),
        taskd.Unavailable("the database", ""),
        taskd.Unavailable("a list this long", ""),
        taskd.Busy("the search took over 2 s; narrow it by other parameters", ""),
    ):
        refused = taskd.HTTP_ERRORS[type(error)](error)
        said.append(json.loads(taskd.problem(refused.status_code, refused.description)))
    shown = [
        example["value"]
        for node in walk(DOCUMENT)
        for example in node.get("application/problem+json", {}).get("examples", {}).values()
    ]
    assert len(shown) > 30
    for example in shown:
        assert example in said or example["status"] == 500, example


def test_every_example_of_a_body_is_taken_by_the_server(alice):
    for path, method, operation in operations():
        for example in (
            operation.get("requestBody", {})
            .get("content", {})
            .get("application/json", {"examples": {}})["examples"]
            .values()
        ):
            task = alice.add()
            url = path.replace("{user_id}", "alice").replace("{task_id}", str(task["id"]))
            response = alice.call(method.upper(), url, json=example["value"])
            assert response.status_code in (200, 201), (method, path, example, response.text)


# --- Parameters -----------------------------------------------------------------------------------

QUERY = [
    "completed", "priority", "tag", "due_before", "due_after", "q", "sort", "limit", "after",
]  # fmt: skip
HEADERS = {
    "Idempotency-Key": taskd.IDEMPOTENCY_KEY,
    "If-None-Match": rf"(?:\*|{taskd.ENTITY_TAGS})",
    "If-Match": rf"(?:\*|{taskd.ENTITY_TAGS})",
}
TEXTS = [
    "", "true", "false", "True", "1", "0", "00", "01", "+1", "-1", "1.0", "1e2", "999", "1000",
    "1001", "10000", " 1", "id", "-id", "+id", "--id", "ID", "created_at", "-created_at",
    "updated_at", "-updated_at", "title", "-title", "title,id", "user_id", "a b", "%", "\0",
    "a\0b", "\n", "é", "x" * 1000, "x" * 1001, "\U0001f4a9" * 1000, "abc=", "_-9",
]  # fmt: skip
TAGS = [
    "*", "**", "7", '"7"', "'7'", 'W/"7"', 'w/"7"', '"', '""', '"7', '7"', '"a","b"',
    '"a", W/"b" , "c"', ',, "a",,', ",", "", '"a" "b"', '*, "a"', '"a b"', '"\xe9"', '"\t"',
    '"\\"', '"a", *',
]  # fmt: skip
KEYS = ["", "a", "a" * 255, "a" * 256, "a b", "a,b", "\t", "~!\"'", "\xe9", "\x7f"]


def taken(operation: dict[str, Any], path: str, place: str, name: str, text: str) -> bool:
    """Return whether the document allows this text as the value of a parameter."""
    schema = parameters(path, operation)[place, name]["schema"]
    if schema["type"] == "boolean":
        return text in ("true", "false")
    if schema["type"] == "array":
        return bool(validator(schema).is_valid([text]))
    if schema["type"] == "integer":
        return bool(re.fullmatch("0|-?[1-9][0-9]*", text)) and validator(schema).is_valid(int(text))
    return bool(validator(schema).is_valid(text))


@pytest.mark.parametrize(("path", "method", "operation"), ALL)
def test_an_operation_has_the_parameters_that_it_looks_at_and_no_other(
    path, method, operation, alice
):
    """Test that an operation with a parameter rejects bad values; others ignore it."""
    declared = set(parameters(path, operation))
    url = path.replace("{user_id}", "alice").replace("{task_id}", str(alice.add()["id"]))
    body = {"json": {"title": "x"}} if method in ("post", "put") or path == ONE else {}
    for place, name, status in [("query", name, 422) for name in QUERY] + [
        ("header", name, 400) for name in HEADERS
    ]:
        wrong: dict[str, Any] = (
            {"params": {name: "\0"}} if place == "query" else {"headers": {name: "\t\xe9"}}
        )
        headers = bearer() | wrong.pop("headers", {})
        response = alice.client.simulate_request(
            method.upper(), url, headers=headers, **wrong, **body
        )
        assert (response.status_code == status) == ((place, name) in declared), (
            name,
            response.text,
        )
        if method == "delete":
            url = path.replace("{user_id}", "alice").replace("{task_id}", str(alice.add()["id"]))


def test_the_parameters_of_the_query_are_those_of_the_code_in_the_same_order():
    for method in ("get", "head"):
        operation = DOCUMENT["paths"][LIST][method]
        names = [name for place, name in parameters(LIST, operation) if place == "query"]
        assert names == list(taskd.PARAMETERS) == QUERY
        assert not any(one["required"] for one in map(resolve, operation["parameters"]))


@pytest.mark.parametrize("name", QUERY)
def test_document_and_server_agree_which_values_a_parameter_of_the_query_can_have(name, alice):
    pattern, rule = taskd.PARAMETERS[name]
    operation = DOCUMENT["paths"][LIST]["get"]
    example = parameters(LIST, operation)["query", name].get("example", "")
    texts = [*TEXTS, example if isinstance(example, str) else json.dumps(example)]
    for text in [*texts, *map(str, range(1002))] if name == "limit" else texts:
        declared = taken(operation, LIST, "query", name, text)
        assert declared == bool(re.fullmatch(pattern, text)), ascii(text)
        response = alice.call("GET", params={name: text})
        # No value of `after` is accepted, because this server has made no cursor.
        accepted = declared and name != "after"
        assert (response.status_code == 200) == accepted, ascii(text)
        assert response.status_code == 200 or response.json["errors"] == [
            {"field": name, "message": rule}
        ]


def test_what_a_parameter_of_the_query_is_when_left_out_is_what_the_document_says(alice):
    for title in "cab":
        alice.add(title=title)
    declared = parameters(LIST, DOCUMENT["paths"][LIST]["get"])
    defaults = {name: declared["query", name]["schema"].get("default") for name in QUERY}
    assert defaults == dict.fromkeys(QUERY) | {"sort": "id"}
    assert alice.call("GET").json == alice.call("GET", params={"sort": defaults["sort"]}).json


@pytest.mark.parametrize("name", HEADERS)
def test_document_and_server_agree_which_values_a_header_can_have(name, alice):
    for path, method, operation in operations():
        if ("header", name) not in parameters(path, operation):
            continue
        one = parameters(path, operation)["header", name]
        assert one["schema"] == {"type": "string", "pattern": f"^{HEADERS[name]}$"}
        assert one["required"] is False
        assert "example" not in one or name == "If-Match", "a tool would send it, and be refused"
        writes = method in ("post", "put") or (path == ONE and method == "patch")
        for text in KEYS if name == "Idempotency-Key" else TAGS:
            task, body = alice.add(), {"json": {"title": "x"}} if writes else {}
            url = path.replace("{user_id}", "alice").replace("{task_id}", str(task["id"]))
            response = alice.call(method.upper(), url, headers={name: text}, **body)
            assert (response.status_code != 400) == taken(operation, path, "header", name, text), (
                ascii(text)
            )
            assert response.status_code in (200, 201, 304, 412, 400), ascii(text)


def test_an_entity_tag_and_a_link_are_as_the_code_makes_them(alice):
    headers = DOCUMENT["components"]["headers"]
    assert headers["ETag"]["schema"]["pattern"] == f"^{taskd.OWN_ENTITY_TAG}$"
    assert re.fullmatch(taskd.ENTITY_TAGS, headers["ETag"]["example"])
    cursor = headers["Link"]["example"].partition("after=")[2].partition(">")[0]
    assert len(cursor) == len(taskd.Cursors("key").write((7, 7), "alice", "id"))
    assert re.fullmatch(taskd.PARAMETERS["after"][0], cursor)


# --- Bodies ---------------------------------------------------------------------------------------


def limits(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: schema[name] for name in ("minLength", "maxLength") if name in schema}


def types(schema: dict[str, Any]) -> set[str]:
    """Return the JSON types that a schema allows, in a list or with anyOf."""
    if "anyOf" in schema:
        return {name for choice in schema["anyOf"] for name in types(choice)}
    if "enum" in schema and "type" not in schema:
        return {"string"}
    return set(schema["type"]) if isinstance(schema["type"], list) else {schema["type"]}


def string_limits(schema: dict[str, Any]) -> dict[str, Any]:
    choices = schema.get("anyOf", [schema])
    return {name: value for choice in choices for name, value in limits(choice).items()}


def schema_of(body_type: type) -> dict[str, Any]:
    return dict(msgspec.json.schema(body_type)["$defs"][body_type.__name__])


@pytest.mark.parametrize("name", BODY_TYPES)
def test_a_body_has_the_members_of_its_type_and_no_other(name):
    defaults = BODY_TYPES[name]
    assert set(SCHEMAS[name]["properties"]) == OWNED | set(defaults)
    required = {member for member, default in defaults.items() if default is ...}
    assert set(SCHEMAS[name].get("required", [])) == required
    assert SCHEMAS[name]["additionalProperties"] is False


@pytest.mark.parametrize("name", BODY_TYPES)
def test_a_body_has_the_types_limits_and_defaults_of_its_type(name):
    ours, theirs = SCHEMAS[name]["properties"], schema_of(taskd.TaskView)["properties"]
    for member in BODY_TYPES[name]:
        mine, other = ours[member], theirs[member]
        assert types(mine) == types(other), member
        assert limits(mine) == string_limits(other), member
        assert "default" not in mine, "openapi-typescript makes such a member required"


@pytest.mark.parametrize("name", BODY_TYPES)
def test_what_the_server_owns_is_accepted_whatever_it_is(name):
    for member in OWNED:
        schema = SCHEMAS[name]["properties"][member]
        assert set(schema) == {"description"}, "any value is valid"
        assert "readOnly" not in schema


def test_a_task_has_the_members_of_its_type_in_the_same_order():
    fields = msgspec.structs.fields(taskd.TaskView)
    names = [field.name for field in fields]
    assert list(SCHEMAS["Task"]["properties"]) == SCHEMAS["Task"]["required"] == names == TASK_KEYS
    theirs = schema_of(taskd.TaskView)["properties"]
    for name in names:
        assert types(SCHEMAS["Task"]["properties"][name]) == types(theirs[name]), name


def test_a_task_shows_what_a_body_may_set():
    for name in taskd.FIELDS:
        task, new = SCHEMAS["Task"]["properties"][name], SCHEMAS["NewTask"]["properties"][name]
        changes = SCHEMAS["TaskChanges"]["properties"][name]
        for keyword in ("type", "minLength", "maxLength", "pattern"):
            assert task.get(keyword) == new.get(keyword) == changes.get(keyword), (name, keyword)


# All characters up to the last that anything takes for white space, and others that look like it.
CHARACTERS = [
    chr(code) for code in [*range(0x3100), 0xFEFF, 0xFFFC, 0xFFFF, 0x1F4A9, sys.maxunicode]
]


def test_no_white_space_is_beyond_the_characters_that_are_tried():
    assert {chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()} <= set(
        CHARACTERS
    )


@pytest.mark.parametrize("member", ["title", "description"])
def test_document_and_server_agree_for_each_character_whether_it_makes_a_text(member, alice):
    schema = SCHEMAS["NewTask"]["properties"][member]
    declared, taken = (
        validator(schema).is_valid,
        msgspec.json.Decoder(taskd.FIELDS[member].type).decode,
    )
    for character in CHARACTERS:
        try:
            accepted = taken(msgspec.json.encode(character)) != "\0"
        except msgspec.ValidationError:
            accepted = False
        assert declared(character) == accepted == bool(re.search(schema["pattern"], character)), (
            ascii(character)
        )
        if character.isspace() or not accepted:
            response = alice.call("POST", json={"title": "a title"} | {member: character})
            assert (response.status_code == 201) == accepted, ascii(character)


# --- Answers of the server, against the document --------------------------------------------------


def checked(response: Any, method: str, path: str) -> None:
    """Check that the document has this answer for its operation: status, headers, body."""
    described = responses(DOCUMENT["paths"][path][method])[response.status_code]
    carried = {
        name for name in DOCUMENT["components"]["headers"] if name.lower() in response.headers
    }
    assert carried - ON_SOME_ANSWERS == set(described["headers"]) - ON_SOME_ANSWERS
    assert carried <= set(described["headers"])
    for name in carried:
        header, given = described["headers"][name], response.headers[name.lower()]
        schema = resolve(header)["schema"]
        assert validator(schema).is_valid(int(given) if schema["type"] == "integer" else given), (
            name,
            given,
        )
    if "content" in described:
        media = described["content"][response.headers["content-type"]]
        assert validator(media["schema"]).is_valid(json.loads(response.text)), response.text
    else:
        assert response.text == ""


JSON = {"Content-Type": "application/json"}
KEY, STALE = {"Idempotency-Key": "the-answers-of-the-document"}, {"If-Match": '"1-2026"'}
ANSWERS: list[tuple[str, str, dict[str, Any], int]] = [
    ("get", LIST, {}, 200),
    ("head", LIST, {}, 200),
    ("post", LIST, {"json": {"title": "ä"}, "headers": KEY}, 201),
    ("post", LIST, {"json": {"title": "ä"}, "headers": KEY}, 201),
    ("post", LIST, {"json": {"title": "b"}, "headers": KEY}, 422),
    ("post", LIST, {"json": {"title": "b"}, "headers": {"Idempotency-Key": ""}}, 400),
    ("get", LIST, {"params": {"limit": "1"}}, 200),
    ("head", LIST, {"params": {"limit": "1", "sort": "-title", "completed": "false"}}, 200),
    ("get", LIST, {"params": {"limit": "1", "q": "I"}}, 200),
    ("get", LIST, {"params": {"limit": "0"}}, 422),
    ("head", LIST, {"params": {"limit": "0"}}, 422),
    ("options", LIST, {}, 200),
    ("post", LIST, {"json": {"title": "é"}}, 201),
    ("post", LIST, {"body": b"{", "headers": JSON}, 400),
    ("post", LIST, {"body": b" " * 65537, "headers": JSON}, 413),
    ("post", LIST, {"body": b"a=b", "headers": {"Content-Type": "text/plain"}}, 415),
    ("post", LIST, {"json": {"titel": 1}}, 422),
    ("get", ONE, {}, 200),
    ("head", ONE, {}, 200),
    ("get", ONE, {"headers": {"If-None-Match": "*"}}, 304),
    ("head", ONE, {"headers": {"If-None-Match": "*"}}, 304),
    ("get", ONE, {"headers": {"If-None-Match": "7"}}, 400),
    ("head", ONE, {"headers": {"If-None-Match": "7"}}, 400),
    ("options", ONE, {}, 200),
    ("put", ONE, {"json": {"title": "c"}, "headers": STALE}, 412),
    ("put", ONE, {"json": {}, "headers": STALE}, 412),
    ("patch", DONE, {"headers": STALE}, 412),
    ("delete", ONE, {"headers": STALE}, 412),
    ("delete", ONE, {"headers": {"If-Match": "7"}}, 400),
    ("put", ONE, {"json": {"description": "x"}}, 200),
    ("patch", ONE, {"json": {"title": "c"}, "headers": STALE}, 412),
    ("patch", ONE, {"json": {"priority": "high", "due_date": None, "tags": ["a"]}}, 200),
    ("patch", ONE, {"json": {}, "headers": {"If-None-Match": "*"}}, 412),
    ("patch", ONE, {"json": {"tags": None}}, 422),
    ("patch", ONE, {"json": {}, "headers": {"If-Match": "7"}}, 400),
    ("get", ONE, {"headers": STALE}, 412),
    ("head", ONE, {"headers": STALE}, 412),
    ("patch", DONE, {"json": {}}, 200),
    ("patch", DONE, {"headers": {"If-None-Match": "*"}}, 412),
    ("delete", ONE, {"headers": {"If-None-Match": "*"}}, 412),
    ("put", ONE, {"json": []}, 422),
    ("patch", DONE, {}, 200),
    ("patch", DONE, {"json": {"completed": None}}, 422),
    ("options", DONE, {}, 200),
    ("delete", ONE, {}, 200),
    ("get", ONE, {}, 404),
    ("head", ONE, {}, 404),
    ("put", ONE, {"json": {}}, 404),
    ("patch", ONE, {"json": {}}, 404),
    ("patch", DONE, {}, 404),
    ("delete", ONE, {}, 404),
]


def test_the_servers_answers_are_those_of_the_document(alice):
    task, seen = alice.add(), set()
    for method, path, options, status in ANSWERS:
        url = path.replace("{user_id}", "alice").replace("{task_id}", str(task["id"]))
        response = alice.call(method.upper(), url, **options)
        assert response.status_code == status, (method, path, options)
        checked(response, method, path)
        seen |= {
            (path, method, name) for name in ON_SOME_ANSWERS if name.lower() in response.headers
        }
    declared = {
        (path, method, name)
        for path, method, operation in operations()
        for response in responses(operation).values()
        for name in response["headers"]
    }
    assert seen == {one for one in declared if one[2] in ON_SOME_ANSWERS}, (
        "each was seen, with a value that fits"
    )


@pytest.mark.parametrize(("path", "method", "operation"), PRIVATE)
def test_refusals_are_those_of_the_document(path, method, operation, client, bob):
    url = path.replace("{user_id}", "alice").replace("{task_id}", "1")
    for headers in ({}, {"Authorization": "Bearer a.b.c"}, bearer("alice", exp=1)):
        response = client.simulate_request(method.upper(), url, headers=headers)
        assert response.status_code == 401
        checked(response, method, path)
    response = bob.call(method.upper(), url)
    assert response.status_code == 403
    checked(response, method, path)


# --- The document and its page, as they are served ------------------------------------------------


@pytest.mark.parametrize(("path", "content_type"), PAGES)
def test_the_document_and_its_page_are_served_without_a_token(client, path, content_type):
    response = client.simulate_get(path)
    file = ROOT / {"/openapi.json": "openapi.json", "/docs": "docs/api.html"}[path]
    assert response.status_code == 200
    assert response.headers["content-type"] == content_type
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.content == file.read_bytes()
    head = client.simulate_head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == content_type


@pytest.mark.parametrize(("path", "content_type"), PAGES)
def test_the_document_and_its_page_may_load_and_call_only_this_server(client, path, content_type):
    policy = dict(
        directive.strip().partition(" ")[::2]
        for directive in client.simulate_get(path).headers["content-security-policy"].split(";")
    )
    assert policy.pop("default-src") == "'none'"
    assert policy.pop("connect-src") == "'self'"
    assert policy.pop("script-src") == policy.pop("style-src") == "'unsafe-inline'"
    assert set(policy.values()) <= {"'none'", "data:"}


def test_the_page_names_no_other_host_and_keeps_nothing():
    page = (ROOT / "docs" / "api.html").read_text()
    assert re.findall(r"https?://[^\s\"'<)]+", page) == []
    for word in KEPT + MARKUP + LOADED:
        assert word not in page, word


def test_the_document_names_no_other_host():
    assert re.findall(r"https?://[^\s\"]+", json.dumps(DOCUMENT)) == []
