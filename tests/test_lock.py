"""requirements.lock pins, with hashes, every package that serves."""

from __future__ import annotations

import re
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement

from support import ROOT

pytestmark = pytest.mark.sqlite("not about the database")

ENTRY = (
    r"(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)( ; .+)?(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)"
)


def locked() -> dict[str, str]:
    """Return the version of each locked package; each has a hash, and the file has nothing else."""
    text = (ROOT / "requirements.lock").read_text().replace(" \\\n    ", " ")
    entries = [re.fullmatch(ENTRY, line) for line in text.splitlines()]
    assert all(entries), "each line is a package with its version and hashes: run make lock"
    return {entry["name"]: entry["version"] for entry in entries if entry}


def normalised(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def direct() -> list[Requirement]:
    """Return the packages in requirements.txt and requirements-postgresql.txt."""
    lines = [
        line
        for name in ("requirements.txt", "requirements-postgresql.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


def test_every_direct_dependency_is_locked_at_its_pinned_version() -> None:
    versions = locked()
    for requirement in direct():
        assert f"=={versions[normalised(requirement.name)]}" == str(requirement.specifier), (
            "run make lock"
        )


def test_every_package_below_them_is_locked_too_and_no_other() -> None:
    found, waiting = set(), [(one.name, tuple(sorted(one.extras))) for one in direct()]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in found:
            continue
        found.add((name, extras))
        for text in distribution(name).requires or ():
            needed = Requirement(text)
            environments = [{"extra": extra} for extra in extras or ("",)]
            if not needed.marker or any(map(needed.marker.evaluate, environments)):
                waiting.append((needed.name, tuple(sorted(needed.extras))))
    needed_here = {normalised(name) for name, _ in found}
    assert needed_here <= locked().keys(), "run make lock"
    elsewhere = locked().keys() - needed_here
    assert elsewhere <= {"colorama", "tzdata", "typing-extensions"}, "of other platforms only"


def test_the_container_installs_what_is_locked_and_nothing_else() -> None:
    text = (ROOT / "deploy" / "Containerfile").read_text()
    assert re.findall(r"pip install [^&\\]*", text) == [
        "pip install --no-cache-dir --disable-pip-version-check "
        "--require-hashes -r requirements.lock "
    ]
