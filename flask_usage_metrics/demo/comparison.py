"""Requests as they were stored beside requests as they were counted: sums, and differences."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

from prometheus_client.parser import text_string_to_metric_families

from flask_usage_metrics import TrackUsage
from flask_usage_metrics.demo.visitors import ask

Sums = Counter[tuple[str, str, str]]
"""Requests by endpoint, status and country."""


def read_stored(usage: TrackUsage, since: datetime) -> Sums:
    """Add up the stored records, with the metrics' labels for unknown values."""
    sums: Sums = Counter()
    for summary in usage.storage.summarize(by=("endpoint", "status", "country"), since=since):
        endpoint, status, country = summary.group.values()
        sums[endpoint or "__unmatched__", str(status), country or "ZZ"] = summary.requests
    return sums


def read_counted(port: int) -> Sums:
    """Scrape /metrics and add up the requests that were counted."""
    sums: Sums = Counter()
    for family in text_string_to_metric_families(ask(port, "GET", "/metrics")):
        if family.name == "flask_usage_requests":  # the parser takes _total away
            for _, labels, value, *_ in family.samples:
                sums[labels["endpoint"], labels["status"], labels["country"]] += int(value)
    return sums


def differences(stored: Sums, counted: Sums, sent: int) -> list[str]:
    """Return a line for each difference, and one if the totals are not what was sent."""
    found = [
        f"{' '.join(key)}: {stored[key]:,} stored, {counted[key]:,} counted"
        for key in sorted(stored.keys() | counted.keys())
        if stored[key] != counted[key]
    ]
    if not sent == stored.total() == counted.total():
        totals = f"{stored.total():,} stored, {counted.total():,} counted"
        found.append(f"in all: {sent:,} sent, {totals}")
    return found


def table(stored: Sums, counted: Sums, shown: int = 25) -> str:
    """Return a table of both, the busiest first; its last two lines are the rest and the total."""
    keys = sorted(stored.keys() | counted.keys(), key=lambda key: (-counted[key], key))
    lines = [(*key, stored[key], counted[key]) for key in keys[:shown]]
    if rest := keys[shown:]:
        sums = (sum(stored[key] for key in rest), sum(counted[key] for key in rest))
        lines.append((f"... and {len(rest):,} more", "", "", *sums))
    lines.append(("total", "", "", stored.total(), counted.total()))
    head = f"{'endpoint':16}  status  country  {'stored':>9}  {'counted':>9}"
    rows = [f"{a:16}  {b:6}  {c:7}  {d:9,}  {e:9,}" for a, b, c, d, e in lines]
    return "\n".join([head, *rows])


def live_line(port: int, usage: TrackUsage, since: datetime) -> str:
    """Return a line about all requests so far."""
    rows = usage.storage.count(since)  # first, as what is counted next is written later
    counted = read_counted(port)
    busiest: Counter[str] = Counter()
    for (endpoint, _, _), requests in counted.items():
        busiest[endpoint] += requests
    errors = sum(counted[key] for key in counted if key[1].startswith("5"))
    return (
        f"{counted.total():,} requests, {rows:,} rows, {errors:,} errors, "
        f"{len({key[2] for key in counted} - {'ZZ'})} countries, "
        f"busiest: {max(busiest, key=busiest.__getitem__, default='-')}"
    )
