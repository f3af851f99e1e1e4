"""What the README says is what the code does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flask_usage_metrics import UsageRecord, open_storage
from flask_usage_metrics.extension.settings import KEYS
from flask_usage_metrics.metrics.names import DESCRIPTIONS
from flask_usage_metrics.records.query import EQUALITY_FILTERS
from flask_usage_metrics.storage import Storage

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def table(header: str) -> list[list[str]]:
    """Return the cells of the table whose header line begins so, without back-ticks."""
    lines = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def ticked(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_its_python_blocks_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 7
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "-W", "error", "readme.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "GET hello 200" in done.stdout
    assert (tmp_path / "instance" / "usage.sqlite3").exists()


def test_its_metrics_are_the_codes() -> None:
    written = [
        (*ticked(name), kind, tuple(ticked(labels)))
        for name, kind, labels in table("| metric | type")
    ]
    assert written == [(family.name, family.kind, family.labels) for family in DESCRIPTIONS]


def test_its_settings_are_the_codes() -> None:
    written = {
        ticked(name)[0]: ast.literal_eval(ticked(default)[0])
        for name, default, _ in table("| setting | default")
    }
    assert written == {name: key.default for name, key in KEYS.items()}


def test_its_record_fields_and_filters_are_the_codes() -> None:
    assert f"`{' '.join(UsageRecord.__struct_fields__)}`" in README
    assert f"`{' '.join(EQUALITY_FILTERS)}`" in README


@pytest.mark.parametrize("row", table("| storage | URL | reads"), ids=lambda row: row[0])
def test_its_storages_are_the_codes(row: list[str]) -> None:
    for url in ticked(row[1]):
        storage = open_storage(url)
        assert f"storage.{type(storage).__module__.rpartition('.')[2]}" in row[0]
        assert type(storage).__name__ in row[0]
        assert isinstance(storage, Storage) == (row[2] == "yes")


def test_its_links_lead_somewhere() -> None:
    headings = re.findall(r"^##+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([a-z-]+)\)", README)
    assert links
    assert set(links) <= anchors
