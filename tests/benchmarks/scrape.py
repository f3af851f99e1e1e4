"""What a scrape of a full table costs: our encoder beside client_python's, on the same registry.

    pip install -e .
    python tests/benchmarks/scrape.py

Both are timed in turns in one process, by its CPU time; the ratio of the medians is what travels
from one machine to another.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from statistics import median
from time import process_time

from flask import Flask
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from flask_usage_metrics import TrackUsage
from flask_usage_metrics.country.answer import ISO_CODES


def full_app(registry: CollectorRegistry, label_sets: int) -> Flask:
    """Return an app that has seen so many combinations of endpoint and country."""
    app = Flask("shop")
    app.config.from_mapping(
        TRACK_USAGE_COUNTRY="header:X-Country",
        TRACK_USAGE_TRUSTED_PROXIES="127.0.0.1",
        TRACK_USAGE_BUFFER_RECORDS=label_sets,
        TRACK_USAGE_MAX_SERIES=label_sets,
    )
    usage = TrackUsage(app, [], registry=registry)
    countries = sorted(ISO_CODES)
    endpoints = [f"page{number}" for number in range(-(-label_sets // len(countries)))]
    for endpoint in endpoints:
        app.add_url_rule(f"/{endpoint}", endpoint, lambda: "hello")
    client = app.test_client()
    asked = [(endpoint, country) for endpoint in endpoints for country in countries]
    for endpoint, country in asked[:label_sets]:
        client.get(f"/{endpoint}", headers={"X-Country": country})
    usage.flush(60.0)
    return app


def parse(text: str) -> set[tuple[str, frozenset[tuple[str, str]], float]]:
    return {
        (sample.name, frozenset(sample.labels.items()), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def cpu_seconds(work: Callable[[], object]) -> float:
    gc.collect()
    start = process_time()
    work()
    return process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label-sets", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()

    registry = CollectorRegistry()
    client = full_app(registry, given.label_sets).test_client()
    scraped = client.get("/metrics").text
    samples = parse(scraped)
    if samples != parse(generate_latest(registry).decode()):
        raise SystemExit("the two encoders tell different samples")

    contenders: dict[str, Callable[[], object]] = {
        "GET /metrics": lambda: client.get("/metrics").data,
        "GET /metrics, gzip": lambda: (
            client.get("/metrics", headers={"Accept-Encoding": "gzip"}).data
        ),
        "generate_latest": lambda: generate_latest(registry),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(given.rounds):
        for name, work in contenders.items():
            seconds[name].append(cpu_seconds(work))

    print(f"{len(samples):,} samples, {len(scraped) / 1e6:.1f} MB\n")
    print("| | CPU ms | µs a sample | of generate_latest |")
    print("|---|--:|--:|--:|")
    base = median(seconds["generate_latest"])
    for name, measured in seconds.items():
        cost = median(measured)
        each = cost / len(samples) * 1e6
        print(f"| {name} | {cost * 1e3:,.0f} | {each:.2f} | 1/{base / cost:.1f} |")


if __name__ == "__main__":
    main()
