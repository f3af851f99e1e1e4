"""The READMEs, the front page and those of the rooms, say what the code does."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest
from helpers.process import run, run_python

from flask_usage_metrics import UsageRecord, cli, open_storage
from flask_usage_metrics.extension.settings import KEYS
from flask_usage_metrics.metrics.names import DESCRIPTIONS
from flask_usage_metrics.records.query import EQUALITY_FILTERS
from flask_usage_metrics.runtime.fault_acts import ACTS
from flask_usage_metrics.storage import Storage

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "flask_usage_metrics"
FRONT_PAGE = ROOT / "README.md"
ROOMS = sorted(PACKAGE.rglob("README.md"))
READMES = [
    FRONT_PAGE,
    *ROOMS,
    ROOT / "grafana" / "README.md",
    ROOT / "tests" / "benchmarks" / "README.md",
]
MOST_LINES = 250
FAULTS = "| part | what happened"


def name_of(readme: Path) -> str:
    return str(readme.parent.relative_to(ROOT))


every_readme = pytest.mark.parametrize("readme", READMES, ids=name_of)


def table(readme: Path, header: str) -> list[list[str]]:
    """Return the cells of the table whose header line begins so."""
    text = readme.read_text()
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme.read_text(), re.DOTALL)


def prose(readme: Path) -> str:
    return re.sub(r"```.*?```", "", readme.read_text(), flags=re.DOTALL)


def ticked(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# ------------------------------------------------------------------------ the front page


def test_the_front_page_is_a_short_read() -> None:
    assert len(FRONT_PAGE.read_text().splitlines()) <= MOST_LINES


def test_the_front_page_leads_to_every_other_readme() -> None:
    led_to = {file for file, _ in links(FRONT_PAGE)}
    assert set(READMES) <= led_to


def test_the_test_command_is_where_ci_looks_for_it() -> None:
    commands = [line for line in FRONT_PAGE.read_text().splitlines() if line.endswith("&& pytest")]
    assert commands == ["pip install -e '.[test]' && pytest"]


# ------------------------------------------------------------------------ code


def run_blocks(readme: Path, folder: Path) -> str:
    """Run a README's Python blocks as one program; return its stdout."""
    done = run_python("\n".join(blocks(readme, "python")), folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_front_pages_python_runs_and_its_backup_command_too(tmp_path: Path) -> None:
    assert len(blocks(FRONT_PAGE, "python")) >= 5
    assert "GET hello 200" in run_blocks(FRONT_PAGE, tmp_path)
    (command,) = re.findall(r"^python (-c .*VACUUM INTO.*)$", FRONT_PAGE.read_text(), re.MULTILINE)
    assert run(sys.executable, *shlex.split(command), folder=tmp_path).returncode == 0
    backup = open_storage(f"sqlite:///{tmp_path / 'backup.sqlite3'}")
    assert isinstance(backup, Storage)
    assert [record.endpoint for record in backup.records()] == ["hello"]
    backup.close()


@pytest.mark.parametrize(
    "readme", [room for room in ROOMS if "```python" in room.read_text()], ids=name_of
)
def test_a_rooms_python_runs(readme: Path, tmp_path: Path) -> None:
    run_blocks(readme, tmp_path)


@every_readme
def test_its_flask_commands_exist(readme: Path) -> None:
    for line in "".join(blocks(readme, "sh")).splitlines():
        match = re.search(r"flask --app \S+ usage (.*)", line)
        if match is None:
            continue
        name, *given = shlex.split(match[1], comments=True)
        command = cli.usage.commands[name]
        command.make_context(name, given, resilient_parsing=False)


# ------------------------------------------------------------------------ tables and names


def test_its_metrics_are_the_codes() -> None:
    written = [
        (*ticked(name), kind, tuple(ticked(labels)))
        for name, kind, labels in table(PACKAGE / "metrics" / "README.md", "| metric | type")
    ]
    assert written == [(family.name, family.kind, family.labels) for family in DESCRIPTIONS]


def test_its_settings_are_the_codes() -> None:
    written = {
        ticked(name)[0]: ast.literal_eval(ticked(default)[0])
        for name, default, _ in table(FRONT_PAGE, "| setting | default")
    }
    assert written == {name: key.default for name, key in KEYS.items()}


@every_readme
def test_no_other_settings_and_metrics_are_named(readme: Path) -> None:
    text = readme.read_text()
    assert set(re.findall(r"TRACK_USAGE_[A-Z_]+", text)) <= KEYS.keys()
    families = {family.name for family in DESCRIPTIONS}
    named = set(re.findall(r"`(flask_usage_\w+_(?:total|seconds|ratio|info|up|workers))\b", text))
    assert named <= families


def test_its_record_fields_and_filters_are_the_codes() -> None:
    lists = [text.split() for text in blocks(PACKAGE / "storage" / "README.md", "text")]
    assert lists == [list(EQUALITY_FILTERS), list(UsageRecord.__struct_fields__)]


@pytest.mark.parametrize(
    "row",
    table(PACKAGE / "storage" / "README.md", "| storage | URL | reads"),
    ids=lambda row: row[0],
)
def test_its_storages_are_the_codes(row: list[str]) -> None:
    for url in ticked(row[1]):
        storage = open_storage(url)
        assert type(storage) is resolve_name(f"flask_usage_metrics.{ticked(row[0])[0]}")
        assert isinstance(storage, Storage) == (row[2] == "yes")


# ------------------------------------------------------------------------ the parts of faults


def strings(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield the texts of a module; of an f-string what is before its first value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            yield node, f"{node.values[0].value}<name>"


def test_each_fault_part_is_explained_and_there_are_no_others() -> None:
    explained = {ticked(row[0])[0] for row in table(PACKAGE / "pipeline" / "README.md", FAULTS)}
    reported = set()
    spelled = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        texts = dict(strings(tree))
        spelled |= set(texts.values())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
                of_faults = ast.unparse(node.func).endswith(("faults.report", "faults.caught"))
                of_faults |= ast.unparse(node.func).endswith("_faults[0].report")
                if of_faults and node.args[0] in texts:
                    reported.add(texts[node.args[0]])
    assert len(reported) >= 15
    assert reported <= explained
    # The log line of each says what to do.
    assert {part.removesuffix(" <name>") for part in explained} == ACTS.keys() - {"sink traces"}
    # Some are named by a variable: "username", "track_var".
    assert explained <= spelled


# ------------------------------------------------------------------------ links


def links(readme: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file and the anchor of each link that is not to another site."""
    text = re.sub(r"`[^`\n]*`", "", prose(readme))
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield (readme.parent / file).resolve() if file else readme, anchor


def anchors(readme: Path) -> list[str]:
    """Return the anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(readme), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@every_readme
def test_its_links_lead_somewhere(readme: Path) -> None:
    for file, anchor in links(readme):
        assert file.exists(), file
        if anchor:
            assert anchor in anchors(file)


@every_readme
def test_its_headings_have_anchors_of_their_own(readme: Path) -> None:
    assert len(set(anchors(readme))) == len(anchors(readme))
