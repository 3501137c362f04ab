"""Print mutmut's names for the functions of chapters: python tests/chapters.py Tokens Store."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TASKD = Path(__file__).parent.parent / "taskd.py"
# They run with `make test-postgresql`, which mutmut does not start.
NOT_IN_PROCESS = ("Postgres", "PostgresPool")


def mutants(chapters: list[str]) -> Iterator[str]:
    """Yield a pattern for the mutants of each class and function below one of these headings."""
    text = TASKD.read_text()
    headings = {
        number: line
        for number, line in enumerate(text.splitlines(), 1)
        if line.startswith("# --- ")
    }
    for node in ast.parse(text).body:
        above = [line for number, line in headings.items() if number < node.lineno]
        if not above or re.sub("[# -]", "", above[-1]) not in chapters:
            continue
        if isinstance(node, ast.ClassDef) and node.name not in NOT_IN_PROCESS:
            yield f"taskd.xǁ{node.name}ǁ*"
        elif isinstance(node, ast.FunctionDef):
            yield f"taskd.x_{node.name}__mutmut*"


if __name__ == "__main__":
    print(*mutants(sys.argv[1:]))
