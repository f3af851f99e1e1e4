"""A real Prometheus that scrapes what a test serves, for tests of what it makes of it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests

from .process import need
from .servers import Server


class Prometheus(Server):
    """Prometheus with room for exemplars, in a folder, on a free loopback port.

    A missing Prometheus skips the test at a desk, and fails it in CI.

    Args:
        folder: For its configuration, its data and its log.
        *targets: What it scrapes each second, as ``"host:port"``.
        job: Value of the label ``job``.
        path: Where the targets' metrics are.
        rules: Files of recording and alert rules; their groups say how often.
    """

    log_name = "prometheus.log"

    def __init__(
        self,
        folder: Path,
        *targets: str,
        job: str = "shop",
        path: str = "/metrics",
        rules: Sequence[Path] = (),
    ) -> None:
        binary = shutil.which("prometheus")
        need(binary, "prometheus")
        scraped = {
            "job_name": job,
            "metrics_path": path,
            "static_configs": [{"targets": list(targets)}],
        }
        every = {"scrape_interval": "1s", "scrape_timeout": "1s"}
        configuration = {
            "global": every,
            "scrape_configs": [scraped],
            "rule_files": [str(file) for file in rules],
        }
        (folder / "prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML
        super().__init__(
            folder,
            str(binary),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            "--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
        )

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            with suppress(requests.RequestException):
                if requests.get(f"{self.address}/-/ready", timeout=5).ok:
                    return
            time.sleep(0.02)
        raise AssertionError(self.log())

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what an instant query finds now: ``{"metric": labels, "value": [time, text]}``."""
        found: list[dict[str, Any]] = self._ask("query", query=expression)["result"]
        return found

    def query_exemplars(self, expression: str) -> list[dict[str, Any]]:
        """Return the exemplars of the last hour.

        Returns:
            For each series ``{"seriesLabels": labels, "exemplars": [{"labels": labels, "value":
            text, "timestamp": seconds}, ...]}``, the oldest exemplar first.
        """
        now = time.time()
        found: list[dict[str, Any]]
        found = self._ask("query_exemplars", query=expression, start=now - 3600, end=now + 60)
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """Return the alerts that are active: ``{"labels": ..., "annotations": ..., "state": ...}``.

        The state is ``"pending"`` for as long as the rule's ``for`` says, then ``"firing"``.
        """
        found: list[dict[str, Any]] = self._ask("alerts")["alerts"]
        return found

    def _ask(self, what: str, **parameters: Any) -> Any:
        answer = requests.get(f"{self.address}/api/v1/{what}", params=parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]
