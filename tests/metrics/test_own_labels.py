"""Values of ``g.track_var`` as labels: exact, bounded, clean, and those of the records."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, g, request
from helpers.examples import examples
from helpers.front_door import Site, samples
from helpers.process import until
from helpers.records import make_record
from helpers.watched import Watched, total
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from flask_usage_metrics import ConfigError, TrackUsage, open_storage
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.metrics.totals import Totals

Make = Callable[..., Site]

REQUESTS = "flask_usage_requests_total"
OBSERVED = "flask_usage_request_duration_seconds_count"


def plan_site(make_site: Make, **config: Any) -> Site:
    """Return a site whose pages put values into ``g.track_var``, which the test gives them."""
    site = make_site(**{"LABELS": ["plan"], **config})
    site.app.given = {}  # type: ignore[attr-defined]

    @site.app.before_request
    def note() -> None:
        g.track_var.update(site.app.given)  # type: ignore[attr-defined]

    @site.app.get("/")
    def index() -> str:
        return "x"

    @site.app.get("/broken")
    def broken() -> str:
        raise LookupError

    @site.app.get("/stream")
    def stream() -> Response:
        return Response(str(number) for number in range(3))

    return site


def visit(site: Site, path: str = "/", **given: Any) -> None:
    site.app.given = given  # type: ignore[attr-defined]
    site.get(path)


def counts(
    site: Site, *labels: str, name: str = REQUESTS, text: str | None = None
) -> dict[Any, int]:
    """Return the values of some labels of each series, and how many requests it counts."""
    found: Counter[Any] = Counter()
    for key, number in site.samples(name, text).items():
        values = tuple(dict(key)[label] for label in labels)
        found[values if len(labels) > 1 else values[0]] += int(number)
    return dict(found)


# ------------------------------------------------------------------------ values


def test_values_are_labels_of_counter_and_histogram(make_site: Make) -> None:
    site = plan_site(make_site, LABELS=["plan", "beta"])
    for plan in ("free", "gold", "gold"):
        visit(site, plan=plan, beta=True, other=1)
    visit(site, plan="gold")
    visit(site)
    visit(site, "/nowhere", plan="free")
    visit(site, "/stream", plan="free", beta=False)
    text = site.scrape()
    expected = {
        ("index", "free", "true"): 1,
        ("index", "gold", "true"): 2,
        ("index", "gold", ""): 1,
        ("index", "", ""): 1,
        ("__unmatched__", "free", ""): 1,
        ("stream", "free", "false"): 1,
    }
    for name in (REQUESTS, OBSERVED):
        assert counts(site, "endpoint", "plan", "beta", name=name, text=text) == expected
    (line,) = [line for line in text.splitlines() if line.startswith(REQUESTS) and "stream" in line]
    assert line.startswith(
        f'{REQUESTS}{{method="GET",endpoint="stream",status="200",country="ZZ",'
        'plan="free",beta="false"} '
    )
    # No other family has them.
    assert 'plan="' not in "".join(
        line for line in text.splitlines() if REQUESTS not in line and "duration" not in line
    )
    site.assert_agrees()


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("gold", "gold"),
        ("", ""),
        (None, ""),
        (True, "true"),
        (5, "5"),
        (-0.5, "-0.5"),
        (2**80, str(2**80)),
        (float("inf"), ""),
        (["gold"], ""),
        ({"a": 1}, ""),
        ({1, 2}, ""),
        (Path("gold"), "gold"),  # as the record has it
        ("größe 🦊", "größe 🦊"),
        ('a"b\\c', 'a"b\\c'),
        ("x" * 128, "x" * 128),
        ("x" * 129, "x" * 128),
        ("x" * 70_000, ""),  # the record has none of it either
        ("a\r\nb\x85\0c", "a\ufffd\ufffdb\ufffdc"),
        ("a\ud800b", "a?b"),
    ],
    ids=range(19),
)
def test_any_value_is_a_clean_text_or_none(make_site: Make, value: Any, label: str) -> None:
    site = plan_site(make_site)
    visit(site, plan=value)
    text = site.scrape()
    assert counts(site, "plan", text=text) == {label: 1}
    assert counts(site, "plan", name=OBSERVED, text=text) == {label: 1}
    # Filtered by name, in OpenMetrics, and by client_python.
    client = site.app.test_client()
    named = client.get(f"/metrics?name[]={OBSERVED}").text
    assert counts(site, "plan", name=OBSERVED, text=named) == {label: 1}
    open_metrics = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert open_metrics.text.endswith("# EOF\n")
    exported = generate_latest(site.registry).decode()
    assert counts(site, "plan", text=exported) == {label: 1}


def test_what_a_view_puts_in_place_of_the_dict_has_no_plan(make_site: Make) -> None:
    site = plan_site(make_site)

    @site.app.get("/odd")
    def odd() -> str:
        g.track_var = "gold"
        return "x"

    site.get("/odd")
    assert counts(site, "plan") == {"": 1}
    site.assert_agrees()


def test_an_exception_and_a_secret_have_labels_too(make_site: Make) -> None:
    site = plan_site(make_site, LABELS=["plan", "api_key"])
    visit(site, "/broken", plan="gold", api_key="s3cret")
    assert counts(site, "status", "plan", "api_key") == {("500", "gold", "REDACTED"): 1}
    site.assert_agrees()


def test_strict_keeps_none_and_says_so(make_site: Make, caplog: pytest.LogCaptureFixture) -> None:
    site = plan_site(make_site, PRIVACY="strict")
    assert "TRACK_USAGE_LABELS are empty" in caplog.text
    visit(site, plan="gold")
    assert counts(site, "plan") == {"": 1}
    site.assert_agrees()


# ------------------------------------------------------------------------ settings


def test_the_histogram_can_have_some_of_them(make_site: Make) -> None:
    site = plan_site(make_site, LABELS=["plan", "beta"], HISTOGRAM_LABELS=["beta", "endpoint"])
    visit(site, plan="free", beta=True)
    visit(site, plan="gold", beta=True)
    text = site.scrape()
    assert samples(text, OBSERVED) == {(("beta", "true"), ("endpoint", "index")): 2}
    assert counts(site, "plan", "beta", text=text) == {("free", "true"): 1, ("gold", "true"): 1}


def test_they_can_be_renamed(make_site: Make) -> None:
    site = plan_site(make_site, LABEL_NAMES={"plan": "tier", "status": "code"})
    visit(site, plan="gold")
    assert counts(site, "code", "tier") == {("200", "gold"): 1}
    assert counts(site, "code", "tier", name=OBSERVED) == {("200", "gold"): 1}


def test_apps_on_one_registry_have_the_same(tmp_path: Path) -> None:
    registry = CollectorRegistry()

    def track(name: str, *labels: str, registry: CollectorRegistry = registry) -> Flask:
        app = Flask(name)
        app.config.update(TRACK_USAGE_LABELS=labels, TRACK_USAGE_STATE_DIR=tmp_path / name)
        TrackUsage(app, [], registry=registry)
        app.before_request(lambda: g.track_var.update(request.args))
        return app

    one, other = track("one", "plan"), track("other", "plan")
    with pytest.raises(ConfigError, match="TRACK_USAGE_LABELS"):
        track("third", "plan", "tier")
    alone = track("fourth", "tier", registry=CollectorRegistry())
    for app in (one, other, alone):
        app.test_client().get("/?plan=gold&tier=1")
    one.test_client().get("/")
    found = samples(other.test_client().get("/metrics").text, REQUESTS)
    assert sorted((dict(key)["plan"], n) for key, n in found.items()) == [("", 1), ("gold", 2)]
    found = samples(alone.test_client().get("/metrics").text, REQUESTS)
    assert [(dict(key)["tier"], "plan" in dict(key), n) for key, n in found.items()] == [
        ("1", False, 1)
    ]
    for app in (one, other, alone):
        app.extensions["track_usage"].pipeline.close(5)


# ------------------------------------------------------------------------ bounds


def test_a_full_table_folds_the_last_of_them_first(make_site: Make) -> None:
    countries = iter(["DE", "FR", "NL", "US"] * 100)
    site = plan_site(make_site, MAX_SERIES=40, country=lambda _: next(countries))
    for number in range(100):
        site.app.given = {"plan": f"user {number}"}  # type: ignore[attr-defined]
        site.get(environ_base={"REMOTE_ADDR": f"203.0.113.{number}"})
        site.scrape()  # one after the other
    text = site.scrape()
    found = counts(site, "country", "plan", text=text)
    assert sum(found.values()) == 100
    assert {key for key in found if "__other__" in key} == {
        ("__other__", "__other__"),
        *((country, "__other__") for country in ("DE", "FR")),
    }
    assert len(found) == 43
    overflow = samples(text, "flask_usage_label_overflow_total")
    assert overflow[("label", "plan"),] == 60
    assert overflow[("label", "country"),] == 30
    assert overflow[("label", "endpoint"),] == 0
    assert counts(site, "country", "plan", name=OBSERVED, text=text) == found
    # The records keep the real values.
    assert len({record.track_var["plan"] for record in site.records()}) == 100


def test_a_label_that_grows_leaves_the_others_alone() -> None:
    totals = Totals(Shape(max_series=100, labels=("plan", "user")), "1")
    plans = ("free", "gold")
    for number in range(500):
        variables = {"plan": plans[number % 2], "user": number}
        totals.add([make_record(country="DE", track_var=variables)], {})
    found: Counter[str] = Counter()
    for labels, number in totals.families()[0].samples:
        found[labels.values[4]] += int(number)
    assert found == {"free": 250, "gold": 250}


@settings(max_examples=examples(60), deadline=None, database=None)
@given(
    records=st.lists(
        st.builds(
            make_record,
            endpoint=st.sampled_from(["a", "b", "c", None]),
            status=st.sampled_from([200, 404, 700]),
            country=st.sampled_from(["DE", "FR", None]),
            track_var=st.dictionaries(
                st.sampled_from(["plan", "beta", "x"]),
                st.none() | st.booleans() | st.integers(0, 30) | st.sampled_from(["a", "", []]),
            ),
        ),
        max_size=60,
    ),
    most=st.integers(1, 30),
    histogram=st.lists(st.sampled_from(["endpoint", "plan", "beta"]), unique=True),
    workers=st.integers(1, 3),
)
def test_each_request_is_in_one_series_however_few_there_may_be(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Any],
    most: int,
    histogram: list[str],
    workers: int,
) -> None:
    shape = Shape(max_series=most, labels=("plan", "beta"), histogram_labels=tuple(histogram))
    path = tmp_path_factory.mktemp("shared") / "totals.sqlite3"
    totals = [Totals(shape, "1") for _ in range(workers)]
    for each in totals:
        each.share(path)
    for number, record in enumerate(records):
        totals[number % workers].add([record], {})
    for each in totals:
        each.sync()
    families = {family.description.name: family for family in totals[0].families()}
    counted = families[REQUESTS].samples
    observed = families["flask_usage_request_duration_seconds"].histograms
    assert sum(n for _, n in counted) == len(records)
    assert sum(buckets[-1] for _, buckets, _ in observed) == len(records)
    assert families[REQUESTS].labels == ("method", "endpoint", "status", "country", "plan", "beta")
    # Each worker may fold into a few of its own.
    assert len(counted) <= workers * most + most // 10 + 4
    for each in totals:
        each.close()


def test_what_the_app_makes_up_is_not_remembered() -> None:
    totals = Totals(Shape(max_series=50, labels=("plan",)), "1")
    totals.add([make_record(track_var={"plan": str(number)}) for number in range(1000)], {})
    assert len(totals._counts._labels.known) == 50
    assert sum(value for _, value in totals.families()[0].samples) == 1000


# ------------------------------------------------------------------------ servers

APP = """
import os, random
from flask import Flask, g, request
from flask_usage_metrics import TrackUsage

app = Flask(__name__)
app.config.from_prefixed_env()
usage = TrackUsage(app)

@app.route("/")
def index():
    g.track_var["plan"] = random.choice(["free", "gold", "größe", 5, True, None])
    g.track_var["user"] = f"user {random.randrange(40)}"
    return str(os.getpid())
"""


def by_label(server: Watched, label: str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for key, number in samples(server.scrape() or "", REQUESTS).items():
        found[dict(key).get(label, "not there")] += int(number)
    return dict(found)


def by_row(folder: Path, label: str) -> dict[str, int]:
    storage = open_storage(f"sqlite:///{folder}/instance/usage.sqlite3")
    found = storage.summarize(by=(f"track_var.{label}",))  # type: ignore[attr-defined]
    storage.close()
    return {one.group[f"track_var.{label}"] or "": one.requests for one in found}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="servers are told apart on Linux")
def test_killed_workers_and_another_list_of_labels_lose_none(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "gunicorn", "shop:app", "-w", "3", "-b", "127.0.0.1:{port}")

    def served(labels: str, **more: str) -> Watched:
        environment = {"FLASK_TRACK_USAGE_LABELS": labels, **more}
        return Watched(tmp_path, *command, app=APP, **environment)

    with served("plan") as server:
        before = {*server.visit(60)}
        server.kill(min(before))
        server.visit_others({min(before)})
        server.visit(60)
        server.assert_one_number()
        assert by_label(server, "plan") == by_row(tmp_path, "plan")
        assert by_label(server, "plan").keys() == {"free", "gold", "größe", "5", "true", ""}
        # What nobody has counted yet is left to the next server.
        least = server.answered + 20
        server.visit(20)
        server.end_all(signal.SIGKILL)
        most = least + server.failed
    with served("plan,user", FLASK_TRACK_USAGE_MAX_SERIES="30") as server:
        server.visit(60)
        until(lambda: least <= server.stored() - 60 <= most, True, 20)
        until(lambda: total(server.scrape() or "") >= 60, True, 10)
        # The table is full by now, for whoever answers.
        server.visit(40)
        until(lambda: least <= server.stored() - 100 <= most, True, 20)
        until(lambda: total(server.scrape() or "") >= 100, True, 10)
        # A server that was started anew counts anew: what it answers, and what it found.
        counted, rows = by_label(server, "plan"), by_row(tmp_path, "plan")
        assert 100 <= sum(counted.values()) <= 120 + most - least
        assert sum(rows.values()) == server.stored()
        assert all(
            number <= rows.get(plan, 0) or plan == "__other__" for plan, number in counted.items()
        )
        assert by_label(server, "user")["__other__"] > 20
        assert not server.complaints
