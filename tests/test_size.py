"""The size of the code: how many lines of it there may be, and how long a line may be."""

from __future__ import annotations

import ast
import io
import re
import tokenize

import pytest

from processes import ROOT

pytestmark = pytest.mark.sqlite("it is about files")

# The most lines of code that each may have: as many as today. The aim is 1,400 and 700.
LINES = {"taskd.py": 2999, "taskctl.py": 1141}
WIDTH = 100  # columns of a line
TEXTS = ("*.py", "*.sql", "Makefile", "bench/*.py", "migrations/*.sql", "tests/*.py")


def lines_of_code(text: str) -> int:
    """Return the number of lines without comments, docstrings and blank lines."""
    left_out = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    counted = {
        number
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in left_out and token.type != tokenize.ENDMARKER
        for number in range(token.start[0], token.end[0] + 1)
    }
    return len(counted - docstring_lines(text))


def docstring_lines(text: str) -> set[int]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
        for number in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }


def test_comments_docstrings_and_blank_lines_are_not_counted() -> None:
    text = (
        '"""A\n\nmodule."""\n\n# a comment\nx = """\n\n"""  # 3 lines\n\ndef f():\n    """F."""\n'
    )
    assert lines_of_code(text + "    return (\n        x\n    )\n") == 3 + 1 + 3


@pytest.mark.parametrize("name", LINES)
def test_a_program_keeps_to_its_lines_of_code(name: str) -> None:
    assert lines_of_code((ROOT / name).read_text()) <= LINES[name]


def test_the_readme_of_the_tests_names_each_of_their_modules() -> None:
    tests = ROOT / "tests"
    named = set(re.findall(r"`([a-z_]+\.py)`", (tests / "README.md").read_text()))
    assert named == {path.name for path in tests.glob("*.py")}


def test_no_line_is_wider_than_100_columns() -> None:
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for pattern in TEXTS
        for path in sorted(ROOT.glob(pattern))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > WIDTH
    ]
    assert wide == []
