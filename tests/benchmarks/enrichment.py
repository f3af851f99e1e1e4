"""What the worker spends on a record between its capture and its storage, part by part.

Microseconds of CPU time, with warm caches: 50 addresses, 20 user agents. The parts are timed in
turns in one process; told is the median of the rounds.
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

from flask_usage_metrics.capture.reading import environ_texts
from flask_usage_metrics.enrich import clients
from flask_usage_metrics.enrich.clients.own_kinds import OwnKinds
from flask_usage_metrics.enrich.country import make_country_lookup
from flask_usage_metrics.enrich.enricher import Enricher
from flask_usage_metrics.enrich.privacy.policy import PRESETS, Policy
from flask_usage_metrics.enrich.privacy.pseudonyms import Pseudonyms
from flask_usage_metrics.enrich.trusted_proxies import TrustedProxies
from flask_usage_metrics.enrich.visitors.daily_ids import VisitorIds
from flask_usage_metrics.records.address import normalise
from flask_usage_metrics.records.observation import Extras, Observation
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.state_dir import StateDir

from .report import Figure
from .variants import requests

PRESET = "full"
"""The default, which the others are compared to."""

STEP = 20
"""Observations whose records get their ids and times together; the pipeline takes 16."""


def measure(quick: bool) -> list[Figure]:
    """Return what each part takes, and the whole of it by how private records are."""
    records, rounds = (500, 3) if quick else (5_000, 15)
    with tempfile.TemporaryDirectory() as folder:
        parts, wholes = work(Path(folder, "state"))
        took: dict[str, list[float]] = {name: [] for name in (*parts, *wholes)}
        for _ in range(rounds):
            for name, (do, given) in (parts | wholes).items():
                todo = list(islice(cycle(given), records // (STEP if name in wholes else 1)))
                gc.collect()
                start = process_time()
                for item in todo:
                    do(item)
                took[name].append((process_time() - start) / records * 1e6)
    return [
        *(Figure("enriching a record, CPU", name, median(took[name]), "µs") for name in parts),
        *(
            Figure("enriching a record, whole, CPU", name, median(took[name]), "µs", against=PRESET)
            for name in wholes
        ),
    ]


Work = dict[str, tuple[Callable[[Any], object], list[Any]]]
"""What is done, and with what in turns, by name."""


def work(home: Path) -> tuple[Work, Work]:
    """Return the parts, and the whole for each preset of privacy."""
    faults = Faults()
    visitors = VisitorIds(StateDir([home], "shop"), "shop 0", faults)
    country_lookup = make_country_lookup(
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

    parts: Work = {
        "address": (lambda environ: normalise(environ["REMOTE_ADDR"]), asked),
        "country": (
            lambda environ: country_lookup.locate(environ["REMOTE_ADDR"], (), False),
            asked,
        ),
        "visitor": (identify, asked),
        "user agent": (lambda environ: clients.describe(environ["HTTP_USER_AGENT"]), asked),
        "language": (lambda environ: clients.language(environ["HTTP_ACCEPT_LANGUAGE"]), asked),
    }
    wholes: Work = {}
    for preset in PRESETS:
        policy = Policy(preset, (), respects_refusals=True, pseudonyms=Pseudonyms(lambda: [b"key"]))
        enricher = Enricher(
            "shop",
            "shop 0",
            country_lookup=country_lookup,
            trusted=TrustedProxies(()),
            visitors=visitors,
            identifies=True,
            policy=policy,
            own_kinds=OwnKinds({}),
        )
        origin = enricher.origin

        def enrich(
            step: list[Observation], enricher: Enricher = enricher, origin: Any = origin
        ) -> None:
            stamps = enricher.stamps(step, range(origin.nonce, origin.nonce + STEP))
            for seen, (record_id, started_at) in zip(step, stamps, strict=True):
                enricher.enrich(seen, origin, record_id, started_at)

        seen = observations()
        wholes[preset] = enrich, [seen[at : at + STEP] for at in range(0, len(seen), STEP)]
    return parts, wholes


def observations() -> list[Observation]:
    """Return what was captured of a hundred requests."""
    return [
        Observation(
            time_ns(),
            1_000_000,
            environ_texts(environ, ()),
            "hello",
            "/hello/<name>",
            b'{"name":"visitor1"}',
            200,
            5,
            Extras(username="ann"),
        )
        for environ in requests()
    ]
