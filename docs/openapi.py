"""Write the parts of openapi.json that follow from the code: `make openapi`.

These are the schemas of a task and of the bodies, the parameters of lists whose values taskd
knows, every example that shows a task, and which errors each operation on tasks can answer.
The rest of the document is written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import taskd  # noqa: E402

DOCUMENT = ROOT / "openapi.json"
TASKS = "/api/{user_id}/tasks"
PATHS = (TASKS, f"{TASKS}/{{task_id}}", f"{TASKS}/{{task_id}}/complete")
SPACES = "".join(map(chr, [0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]))
BLANK = rf"\t-\r\x1c-\x20\x85\xa0{SPACES}"  # escapes that RE2, Perl and ECMAScript share
PATTERNS = {None: r"^[^\x00]*$", r"\S": rf"^[^\x00]*[^\x00{BLANK}][^\x00]*$"}
IGNORED = {"description": "Owned by the server: any value is accepted and ignored."}
TIME = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z$",
}
OWNED: dict[str, dict[str, Any]] = {
    "id": {
        "type": "integer",
        "format": "int64",
        "minimum": 1,
        "maximum": taskd.MAX_TASK_NUMBER,
        "description": "Unique across all users, and never used again.",
    },
    "user_id": {
        "type": "string",
        "minLength": 1,
        "maxLength": taskd.MAX_TOKEN * 3 // 4,
        "description": "The owner: the token's `sub`.",
    },
    "created_at": TIME | {"description": "When it was created: RFC 3339, UTC, milliseconds."},
    "updated_at": TIME | {"description": "When it last changed."},
}

# The description and an example of each field.
FIELDS: dict[str, tuple[str, Any]] = {
    "title": (
        "1 to 200 characters, not only white space, no U+0000; stored exactly as sent.",
        "Buy milk",
    ),
    "description": ("At most 10,000 characters, no U+0000; null for none.", "2 litres"),
    "completed": ("Whether the task is completed.", False),
    "priority": ("`low`, `medium` or `high`; null for none.", "high"),
    "due_date": (
        "RFC 3339: a day, kept as it is, or a time, kept in UTC with milliseconds; null for none.",
        "2026-12-01",
    ),
    "tags": (
        "At most 20, each 1 to 50 characters, not only white space, no U+0000, none twice;"
        " in the order sent.",
        ["home"],
    ),
}
EXAMPLE = {name: example for name, (_, example) in FIELDS.items()}


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the schema of a type, with null among its types and portable patterns."""
    schema = msgspec.json.schema(kind)
    if "anyOf" in schema:
        [schema] = [choice for choice in schema["anyOf"] if choice != {"type": "null"}]
        schema = schema_of_json(schema)
        nullable = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
        return schema | {"type": [schema["type"], "null"]} | nullable
    return schema_of_json(schema)


def schema_of_json(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of msgspec's with the patterns of this document."""
    if "enum" in schema:
        return {"type": "string", **schema}
    if schema["type"] == "array":
        return schema | {"items": schema_of_json(schema["items"])}
    if schema["type"] == "string":
        pattern = schema.get("pattern")
        return schema | {"pattern": PATTERNS.get(pattern, pattern)}
    return schema


def fields(*names: str) -> dict[str, Any]:
    """Return the properties of these fields."""
    return {
        name: schema_of(taskd.FIELDS[name].type) | {"description": FIELDS[name][0]}
        for name in names
    }


def body(about: str, *names: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the schema of a body with these fields; what the server owns is ignored."""
    return {
        "type": "object",
        "description": about,
        "additionalProperties": False,
        **({"required": list(required)} if required else {}),
        "properties": fields(*names) | dict.fromkeys(OWNED, IGNORED),
    }


def schemas() -> dict[str, Any]:
    """Return the schemas of a task and of the bodies."""
    names = taskd.TaskView.__struct_fields__
    properties = OWNED | fields(*taskd.FIELDS)
    required = [name for name, field in taskd.FIELDS.items() if field.default is ...]
    return {
        "Task": {
            "type": "object",
            "description": "A task has all of these members, in this order.",
            "additionalProperties": False,
            "required": list(names),
            "properties": {name: properties[name] for name in names},
        },
        "NewTask": body(
            "The body of POST. A member that is left out is null, false or an empty array.",
            *taskd.FIELDS,
            required=tuple(required),
        ),
        "TaskChanges": body(
            "The body of PUT and PATCH: the fields to change; the others keep their values.",
            *taskd.FIELDS,
        ),
        "Completion": body(
            "The optional body of PATCH on `complete`; an empty object toggles.", "completed"
        ),
    }


def sort_schema() -> dict[str, Any]:
    """Return the schema of `sort`, with names for the generators that make an enumeration of it."""
    orders = [f"{sign}{name}" for name in taskd.ORDERS for sign in ("", "-")]
    names = [
        f"{order.lstrip('-')}{'_descending' * order.startswith('-')}".upper() for order in orders
    ]
    return {"type": "string", "enum": orders, "default": "id", "x-enum-varnames": names}


def errors(path: str, method: str) -> dict[int, str]:
    """Return the errors that an operation on tasks can answer: names of responses by status."""
    found = {
        400: "MalformedRequest",
        401: "Unauthorized",
        403: "Forbidden",
        413: "ContentTooLarge",
        431: "HeaderTooLarge",
        500: "InternalServerError",
        503: "ServiceUnavailable",
    }
    if "{task_id}" in path:
        found |= {400: "MalformedTag", 404: "NotFound", 412: "PreconditionFailed"}
    elif method == "post":
        found |= {403: "ForbiddenToCreate"}
    else:
        found |= {422: "WrongParameter", 503: "ListUnavailable"}
    if method in ("post", "put", "patch"):
        found |= {400: "BadRequest", 415: "UnsupportedMediaType", 422: "UnprocessableContent"}
    return {status: f"{name}{'Head' * (method == 'head')}" for status, name in found.items()}


def with_errors(path: str, method: str, responses: dict[str, Any]) -> dict[str, Any]:
    """Return the responses of an operation on tasks in order of status, its errors among them."""
    whole = {status: one for status, one in responses.items() if int(status) < 400} | {
        str(status): {"$ref": f"#/components/responses/{name}"}
        for status, name in errors(path, method).items()
    }
    return dict(sorted(whole.items()))


def for_head(responses: dict[str, Any]) -> dict[str, Any]:
    """Return these responses, and those of them that HEAD can get once more without their body."""
    names = {name for path in PATHS for name in errors(path, "head").values()}
    plain = {name: one for name, one in responses.items() if not name.endswith("Head")}
    return plain | {
        f"{name}Head": {
            "description": f"{one['description']} HEAD has no body.",
            "headers": one["headers"],
        }
        for name, one in plain.items()
        if f"{name}Head" in names
    }


def examples(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the tasks in the examples of the document."""
    if isinstance(node, dict) and {"id", "user_id", "title"} <= node.keys():
        yield node
    children = node.values() if isinstance(node, dict) else node
    for child in children if isinstance(node, dict | list) else ():
        yield from examples(child)


def complete(task: dict[str, Any]) -> dict[str, Any]:
    """Return an example of a task with all its members, in their order."""
    given = EXAMPLE | task
    return {name: given[name] for name in taskd.TaskView.__struct_fields__}


def generate(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with what follows from the code written anew."""
    document["info"]["version"] = taskd.__version__
    components = document["components"]
    components["schemas"] = schemas() | {
        name: schema for name, schema in components["schemas"].items() if name not in schemas()
    }
    parameters = components["parameters"]
    parameters["sort"]["schema"] = sort_schema()
    tags = schema_of(taskd.FIELDS["tags"].type)
    parameters["tag"]["schema"] = {"type": "array", "items": tags["items"], "maxItems": 20}
    parameters["user_id"]["schema"] = {
        name: OWNED["user_id"][name] for name in ("type", "minLength", "maxLength")
    }
    for path in PATHS:
        for method, operation in document["paths"][path].items():
            if method not in ("parameters", "options"):
                operation["responses"] = with_errors(path, method, operation["responses"])
    components["responses"] = for_head(components["responses"])
    for task in examples([document["paths"], components["responses"]]):
        whole = complete(task)
        task.clear()
        task.update(whole)
    create = document["paths"][TASKS]["post"]["requestBody"]
    full = create["content"]["application/json"]["examples"]["full"]
    full["value"] = EXAMPLE
    return document


def text(document: dict[str, Any]) -> str:
    """Return the document as its file has it."""
    return json.dumps(document, indent=2, ensure_ascii=True) + "\n"


if __name__ == "__main__":
    before = DOCUMENT.read_text()
    after = text(generate(json.loads(before)))
    if sys.argv[1:] == ["--check"]:
        sys.exit(before != after)
    DOCUMENT.write_text(after)
