"""What the worker spends on a record between its capture and its storage, part by part.

    pip install -e '.[country]'
    python tests/benchmarks/enrichment.py

Microseconds of CPU time a record, with warm caches: 50 addresses, 20 user agents. The parts are
timed in turns in one process; shown are the least and the median of the rounds.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import process_time, time, time_ns
from typing import Any

from variants import requests

from flask_usage_metrics import clients
from flask_usage_metrics.address import TrustedProxies, normalise
from flask_usage_metrics.country import make_locator
from flask_usage_metrics.enrichment import Enricher
from flask_usage_metrics.faults import Faults
from flask_usage_metrics.observation import Observation, environ_texts
from flask_usage_metrics.privacy import PRESETS, Policy
from flask_usage_metrics.pseudonyms import Pseudonyms
from flask_usage_metrics.state import State
from flask_usage_metrics.visitors import VisitorIds

RECORDS = 5_000
ROUNDS = 15


def observations() -> list[Observation]:
    """Return what was captured of a hundred requests."""
    return [
        Observation(
            time_ns(),
            1_000_000,
            number,
            environ_texts(environ.get),
            None,
            "hello",
            "/hello/<name>",
            b'{"name":"visitor1"}',
            200,
            None,
            5,
            False,
            "ann",
            None,
        )
        for number, environ in enumerate(requests())
    ]


def main() -> None:
    faults = Faults()
    state = State([Path(tempfile.mkdtemp(), "state")], "shop")
    visitors = VisitorIds(state, "shop 0", faults)
    locator = make_locator(
        "auto",
        trusted_proxies=False,
        use_freegeoip=False,
        freegeoip_endpoint=None,
        function=None,
        faults=faults,
    )
    asked = requests()
    now = time()

    def identify(environ: dict[str, Any]) -> object:
        return visitors.identify(
            now, environ["REMOTE_ADDR"], environ["HTTP_USER_AGENT"], environ["HTTP_HOST"]
        )

    parts: dict[str, tuple[Callable[[Any], object], list[Any]]] = {
        "address": (lambda environ: normalise(environ["REMOTE_ADDR"]), asked),
        "country": (lambda environ: locator.locate(environ["REMOTE_ADDR"], (), False), asked),
        "visitor": (identify, asked),
        "user agent": (lambda environ: clients.describe(environ["HTTP_USER_AGENT"]), asked),
        "language": (lambda environ: clients.language(environ["HTTP_ACCEPT_LANGUAGE"]), asked),
    }
    for preset in PRESETS:
        policy = Policy(preset, (), respects_refusals=True, pseudonyms=Pseudonyms(lambda: [b"key"]))
        enricher = Enricher(
            "shop",
            "shop 0",
            locator=locator,
            trusted=TrustedProxies(()),
            visitors=visitors,
            policy=policy,
        )
        origin = enricher.origin

        def enrich(
            seen: Observation, enricher: Enricher = enricher, origin: Any = origin
        ) -> object:
            return enricher.enrich(seen, origin)

        parts[f"the whole record, {preset}"] = enrich, observations()

    took: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, (work, given) in parts.items():
            todo = list(islice(cycle(given), RECORDS))
            gc.collect()
            start = process_time()
            for item in todo:
                work(item)
            took[name].append((process_time() - start) / RECORDS * 1e6)
    print(f"{'µs a record':28} {'least':>7} {'median':>7}")
    for name, times in took.items():
        print(f"{name:28} {min(times):7.2f} {median(times):7.2f}")
    five = list(parts)[:5]
    least, middle = (sum(how(took[name]) for name in five) for how in (min, median))
    print(f"{'these five together':28} {least:7.2f} {middle:7.2f}")


if __name__ == "__main__":
    main()
