"""The files with which Prometheus and Grafana show an app: made for it, and written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flask_usage_metrics.errors import UsageMetricsError
from flask_usage_metrics.runtime.private_files import open_private

DEFAULT_TARGET = "host.docker.internal:8000"
"""Port 8000 of the machine, seen from the containers of docker-compose.yml."""

TOKEN_FILE = "metrics-token"


class Differs(UsageMetricsError):
    """Files exist with another text: changed by somebody, or of another version; none was written.

    Attributes:
        paths: These files, relative to the folder.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        super().__init__(", ".join(paths))


def make_files(
    *,
    job: str,
    metrics_path: str = "/metrics",
    targets: Iterable[str] = (DEFAULT_TARGET,),
    token: str | None = None,
    label_names: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the files for one app: their texts by their relative paths.

    Args:
        job: Value of the label ``job``.
        metrics_path: Path of the URL that is scraped.
        targets: The app's servers, as ``"host:port"``.
        token: Bearer token of a scrape; None: it needs none.
        label_names: Names that replace those of labels, by the latter, in queries and texts.
    """
    folder = _shipped()
    files = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for pattern in ("dashboards/*.json", "rules/*.yml", "provisioning/*/*.yml", "*compose.yml")
        for path in sorted(folder.glob(pattern))
    }
    if label_names:
        for path, text in files.items():
            if path.startswith("dashboards/"):
                files[path] = _dump(_renamed(json.loads(text), label_names))
            elif path.startswith("rules/"):
                files[path] = _renamed_rules(text, label_names)
    files["prometheus.yml"] = _configuration(job, metrics_path, targets, token is not None)
    if token is not None:
        files[TOKEN_FILE] = token
    return files


def write_files(folder: Path, files: Mapping[str, str], *, replace: bool = False) -> list[str]:
    """Write files, made by `make_files`, and the folders they are in.

    Args:
        folder: Made if need be.
        files: Texts by their relative paths.
        replace: Whether to write over files that exist with another text.

    Returns:
        The relative paths of the files that were written; files with the same text are not.

    Raises:
        Differs: Such files exist, and they are not to be replaced.
        OSError: A file cannot be written.
    """
    wanted = {path: text.encode() for path, text in files.items()}
    present = {path: (folder / path).read_bytes() for path in wanted if (folder / path).exists()}
    differing = [path for path, data in present.items() if data != wanted[path]]
    if differing and not replace:
        raise Differs(differing)
    written = [path for path in wanted if path not in present or path in differing]
    for path in written:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path == TOKEN_FILE:
            target.unlink(missing_ok=True)  # whoever made it might be able to read it
            with os.fdopen(open_private(target, exclusive=True), "wb") as file:
                file.write(wanted[path])
        else:
            target.write_bytes(wanted[path])
    return written


def _shipped() -> Path:
    """Return the folder of the files in the package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "grafana"
    return inside if inside.is_dir() else package.parent / "grafana"


def _configuration(job: str, metrics_path: str, targets: Iterable[str], has_token: bool) -> str:
    quote = json.dumps  # JSON is YAML
    lines = [
        "# Prometheus' configuration: start it with --enable-feature=exemplar-storage.",
        "global:",
        "  scrape_interval: 15s",
        "  evaluation_interval: 15s",
        "rule_files: [rules/*.yml]",
        "scrape_configs:",
        f"  - job_name: {quote(job)}",
        f"    metrics_path: {quote(metrics_path)}",
    ]
    if has_token:
        lines += ["    authorization:", f"      credentials_file: {TOKEN_FILE}"]
    lines += ["    static_configs:", f"      - targets: {quote(list(targets))}"]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------ labels renamed

_TOKENS = re.compile(
    r"""
      (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')  # with the names of label_replace among them
    | (?P<variable>\$\{[^}]*\}|\$\w+)                # Grafana's, $endpoint
    | (?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
    | (?P<other>\s+|[=!]~|.)
    """,
    re.VERBOSE | re.DOTALL,
)


def _renamed_query(query: str, names: Mapping[str, str]) -> str:
    """Return a query with labels renamed: PromQL, or that of a variable of Grafana's."""
    parts = []
    before = ""
    for match in _TOKENS.finditer(query):
        part = match[0]
        if match["name"]:
            part = names.get(part, part)
        elif match["text"] and before == "," and part[1:-1] in names:
            part = f"{part[0]}{names[part[1:-1]]}{part[-1]}"
        if not part.isspace():
            before = part
        parts.append(part)
    return "".join(parts)


def _renamed(node: Any, names: Mapping[str, str]) -> Any:
    """Return a dashboard, or a part of one, with labels renamed."""
    if isinstance(node, list):
        return [_renamed(part, names) for part in node]
    if not isinstance(node, dict):
        return node
    renamed = {}
    for key, value in node.items():
        if key in ("expr", "query", "definition") and isinstance(value, str):
            renamed[key] = _renamed_query(value, names)
        elif key == "legendFormat":
            renamed[key] = re.sub(
                r"\{\{\s*(\w+)\s*\}\}",
                lambda found: f"{{{{{names.get(found[1], found[1])}}}}}",
                value,
            )
        elif key in ("transformations", "location") or key == "tagKeys":
            renamed[key] = _renamed_fields(value, names)
        else:
            renamed[key] = _renamed(value, names)
    return renamed


def _renamed_fields(node: Any, names: Mapping[str, str]) -> Any:
    """Return settings of a panel that name the fields of a table, which are labels, renamed."""
    if isinstance(node, list):
        return [_renamed_fields(part, names) for part in node]
    if isinstance(node, dict):
        return {names.get(key, key): _renamed_fields(part, names) for key, part in node.items()}
    return names.get(node, node) if isinstance(node, str) else node


def _renamed_rules(text: str, names: Mapping[str, str]) -> str:
    """Return a file of rules with labels renamed, in expressions and in texts."""
    lines = []
    depth: int | None = None  # indentation of the expression that is being read; None: outside
    for line in text.splitlines(keepends=True):
        indent = len(line) - len(line.lstrip())
        if depth is not None and line.strip() and indent <= depth:
            depth = None
        key, colon, rest = line.partition("expr:")
        if depth is None and colon and not key.strip(" -"):
            depth = indent + len(key.lstrip())
            line = key + colon + _renamed_query(rest, names)
        elif depth is not None:
            line = _renamed_query(line, names)
        lines.append(
            re.sub(
                r"\$labels\.(\w+)", lambda found: f"$labels.{names.get(found[1], found[1])}", line
            )
        )
    return "".join(lines)


def _dump(dashboard: Any) -> str:
    return json.dumps(dashboard, indent=2, ensure_ascii=False) + "\n"
