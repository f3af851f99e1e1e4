"""`flask usage grafana`: a folder that Prometheus and Grafana take as it is, for an app."""

from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from click.testing import Result
from flask import Flask
from helpers.dashboards import DASHBOARDS, chosen, panels, substituted, targets
from helpers.process import need, run
from prometheus_client import CollectorRegistry

from flask_usage_metrics import TrackUsage
from flask_usage_metrics.cli import usage
from flask_usage_metrics.cli.monitoring_files import (
    _renamed,
    _renamed_query,
    _renamed_rules,
    make_files,
)
from flask_usage_metrics.metrics.names import DESCRIPTIONS, LABELS

GRAFANA = Path(__file__).parents[2] / "grafana"


def write(folder: Path, *arguments: str, **config: Any) -> Result:
    app = Flask("shop")
    app.config.update({f"TRACK_USAGE_{key}": value for key, value in config.items()})
    TrackUsage(app, [], registry=CollectorRegistry())
    return app.test_cli_runner().invoke(
        usage, ["grafana", "-o", str(folder / "monitoring"), *arguments]
    )


def check(command: str, *paths: Path) -> str:
    """Have promtool check files; returns what it says."""
    binary = shutil.which("promtool")
    need(binary, "promtool")
    done = run(binary, "check", command, *paths)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.servers
def test_it_is_what_the_repository_ships_and_the_apps_own_configuration(tmp_path: Path) -> None:
    result = write(tmp_path)
    assert result.exit_code == 0, result.output
    written = {
        path.relative_to(tmp_path / "monitoring"): path.read_text()
        for path in (tmp_path / "monitoring").rglob("*")
        if path.is_file()
    }
    assert result.output == f"{len(written)} files written to {tmp_path / 'monitoring'}\n"
    configuration = written.pop(Path("prometheus.yml"))
    assert 'job_name: "shop"' in configuration
    shipped = {path.relative_to(GRAFANA) for path in GRAFANA.rglob("*.json")}
    assert len(shipped) == 3
    shipped |= {path.relative_to(GRAFANA) for path in GRAFANA.glob("rules/*.yml")}
    assert len(shipped) > 3
    assert shipped < written.keys()
    for path, text in written.items():
        assert text == (GRAFANA / path).read_text(), path
    said = check("config", tmp_path / "monitoring" / "prometheus.yml")
    assert len(re.findall(r"SUCCESS: [1-9]\d* rules found", said)) == len(
        [path for path in written if path.parts[0] == "rules"]
    )


def test_the_folder_in_the_repository_is_that_of_an_app_called_flask() -> None:
    for path, text in make_files(job="flask").items():
        assert (GRAFANA / path).read_text() == text, path


@pytest.mark.servers
def test_job_targets_path_and_token_are_the_apps(tmp_path: Path) -> None:
    options = ["--job", 'web "1"', "--target", "10.0.0.5:80", "--target", "[2001:db8::5]:80"]
    result = write(tmp_path, *options, METRICS_PATH="/usage/metrics", METRICS_TOKEN="se cret\n")
    assert result.exit_code == 0
    folder = tmp_path / "monitoring"
    configuration = (folder / "prometheus.yml").read_text()
    for line in (
        '  - job_name: "web \\"1\\""',
        '    metrics_path: "/usage/metrics"',
        "      credentials_file: metrics-token",
        '      - targets: ["10.0.0.5:80", "[2001:db8::5]:80"]',
    ):
        assert line in configuration.splitlines()
    assert "se cret" not in configuration + result.output
    token = folder / "metrics-token"
    assert token.read_text() == "se cret"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert f"{token} can be read by you only" in result.output
    check("config", folder / "prometheus.yml")


def test_metrics_on_another_port_are_found_by_the_option(tmp_path: Path) -> None:
    assert write(tmp_path, "--metrics-path", "/", METRICS_PATH=None).exit_code == 0
    assert 'metrics_path: "/"' in (tmp_path / "monitoring" / "prometheus.yml").read_text()


def test_what_somebody_changed_is_not_written_over(tmp_path: Path) -> None:
    write(tmp_path)
    folder = tmp_path / "monitoring"
    assert write(tmp_path).output == f"0 files written to {folder}\n"
    (folder / "prometheus.yml").write_text("mine")
    dashboard = next(folder.glob("dashboards/*.json"))
    dashboard.unlink()
    refused = write(tmp_path)
    assert refused.exit_code == 2
    assert "were changed: prometheus.yml\nTo write over them: --force" in refused.output
    assert (folder / "prometheus.yml").read_text() == "mine"
    assert not dashboard.exists()
    assert write(tmp_path, "--force").output == f"2 files written to {folder}\n"
    assert "shop" in (folder / "prometheus.yml").read_text()


def test_a_token_is_not_written_into_a_file_that_others_hold(tmp_path: Path) -> None:
    folder = tmp_path / "monitoring"
    folder.mkdir()
    (folder / "metrics-token").write_text("old")
    with (folder / "metrics-token").open() as theirs:
        assert write(tmp_path, "--force", METRICS_TOKEN="secret").exit_code == 0
        assert theirs.read() == "old"
    assert (folder / "metrics-token").read_text() == "secret"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "monitoring").mkdir()
    (tmp_path / "monitoring" / "dashboards").write_text("a file")
    result = write(tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path / 'monitoring' / 'dashboards'}" in result.output
    assert "Traceback" not in result.output


def test_an_app_that_is_not_tracked_is_told(tmp_path: Path) -> None:
    result = Flask("shop").test_cli_runner().invoke(usage, ["grafana", "-o", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "is not tracked" in result.output
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------ labels of other names


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ('m{endpoint=~"$endpoint"}', 'm{route=~"$endpoint"}'),
        ('m{endpoint=~"${endpoint:regex}"}', 'm{route=~"${endpoint:regex}"}'),
        ("sum by (le, endpoint) (rate(m[5m]))", "sum by (le, route) (rate(m[5m]))"),
        ("m and on (endpoint) n", "m and on (route) n"),
        ("label_values(m, endpoint)", "label_values(m, route)"),
        ('m{client="endpoint", x!~"endpoint"}', 'm{client="endpoint", x!~"endpoint"}'),
        ('label_replace(m, "endpoint", "$1", "code", "(.)")',
         'label_replace(m, "route", "$1", "code", "(.)")'),
        ("job_endpoint:endpoint:rate5m + endpoint_total", None),
        (r'm{x="\"endpoint", endpoint="é"}', r'm{x="\"endpoint", route="é"}'),
        ("", None),
    ],
)  # fmt: skip
def test_only_names_of_labels_are_renamed(query: str, expected: str | None) -> None:
    assert _renamed_query(query, {"endpoint": "route"}) == (query if expected is None else expected)


@pytest.mark.servers
def test_no_label_keeps_its_name_where_all_are_renamed(tmp_path: Path) -> None:
    names = {label: f"a_{label}" for label in LABELS}
    assert write(tmp_path, LABEL_NAMES=names).exit_code == 0
    folder = tmp_path / "monitoring"
    found: list[str] = []
    for path in folder.glob("dashboards/*.json"):
        text = path.read_text()
        dashboard = json.loads(text)
        assert dashboard["uid"] in text
        found += re.findall(r'"(?:expr|query|definition)": "((?:[^"\\]|\\.)*)"', text)
        for legend in re.findall(r'"legendFormat": "([^"]*)"', text):
            for label in re.findall(r"\{\{(\w+)\}\}", legend):
                assert label not in LABELS
    assert len(found) > 50
    assert check("rules", *folder.glob("rules/*.yml"))
    found += [path.read_text() for path in folder.glob("rules/*.yml")]
    names_of_metrics = {described.name for described in DESCRIPTIONS}
    for query in found:
        for matched in re.findall(r"(?<![\w$\"':{])(\w+)\s*(?:=~|!~|!=|=\\?\")", query):
            assert matched not in LABELS, query
        for listed in re.findall(r"(?:by|without|on|ignoring)\s*\(([^)]*)\)", query):
            assert not set(re.findall(r"\w+", listed)) & {*LABELS}, query
        for label in re.findall(r"\$labels\.(\w+)", query):
            assert label not in LABELS, query
    assert names_of_metrics & set(re.findall(r"\w+", " ".join(found)))


def test_names_that_are_given_back_leave_all_as_it_was() -> None:
    names = {label: f"{label}_of_ours" for label in LABELS}
    back = {ours: label for label, ours in names.items()}
    for path, text in make_files(job="shop", label_names=names).items():
        original = make_files(job="shop")[path]
        if path.startswith("dashboards/"):
            assert text != original
            assert _renamed(json.loads(text), back) == json.loads(original)
        elif path.startswith("rules/"):
            assert text != original
            assert _renamed_rules(text, back) == original
        else:
            assert text == original


def test_queries_with_other_names_are_queries() -> None:
    names = {label: f"{label}_of_ours" for label in LABELS}
    renamed = make_files(job="shop", label_names=names)
    for path, dashboard in DASHBOARDS.items():
        mine = json.loads(renamed[f"dashboards/{path}.json"])
        values = chosen(dashboard, endpoint="cart")
        for panel in panels(mine):
            for target in targets(panel):
                promql_parser.parse(
                    substituted(target["expr"], values, range_seconds=60, rate_interval="5s")
                )
