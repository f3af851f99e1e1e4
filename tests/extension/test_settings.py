"""Settings are checked at set-up; an error says what was given, where, and what is expected."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from prometheus_client import CollectorRegistry

from flask_usage_metrics import ConfigError, TrackUsage
from flask_usage_metrics.extension.settings import KEYS, read


def track(**config: Any) -> None:
    app = Flask("shop")
    app.config.update({f"TRACK_USAGE_{key}": value for key, value in config.items()})
    TrackUsage(app, [], registry=CollectorRegistry())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("INCLUDE_OR_EXCLUDE_VIEWS", "all", "must be 'include' or 'exclude', not 'all'"),
        ("METRICS_PATH", "metrics", "and needs no percent-encoding or None, not 'metrics'"),
        *(
            ("METRICS_PATH", path, "must be a path that starts with / and needs no percent-enc")
            for path in ("/<a", "/<int:x>", "/a b", "/métriques", "/a\0", "/%41", "//a", "/a?b")
        ),
        ("STATE_DIR", b"state", "must be a path or None, not "),
        ("STATE_DIR", "a\0b", "must be a path or None, not "),
        ("METRICS_TOKEN", 5, "must be a token or None, not int"),
        *(
            ("METRICS_TOKEN", empty, "must be a token or None, not an empty")
            for empty in ("", " \n")
        ),
        ("METRICS_TOKEN", " none ", "must be a token or None, not the text None"),
        ("METRICS_TOKEN", "a\nb", "not a text of several lines or with control characters"),
        ("EXCLUDE", 5, "must be a list of endpoint globs"),
        ("EXCLUDE", [5], "must be a list of endpoint globs"),
        ("MAX_SERIES", "lots", "must be a positive int, not 'lots'"),
        ("MAX_SERIES", 0, "must be a positive int, not 0"),
        ("MAX_SERIES", 1.5, "must be a positive int, not 1.5"),
        ("MAX_SERIES", True, "must be a positive int, not True"),
        ("HISTOGRAM_LABELS", ["path"], "must be a list of some of method, endpoint, status"),
        ("BUCKETS", [], "ascending positive numbers"),
        ("BUCKETS", [1, 0.5], "ascending positive numbers"),
        ("BUCKETS", [1, float("inf")], "ascending positive numbers"),
        ("BUCKETS", "a,b", "ascending positive numbers"),
        ("LABEL_NAMES", {"path": "route"}, "must be a dict of new names"),
        ("LABEL_NAMES", {"endpoint": "status"}, "must be a dict of new names"),
        ("LABEL_NAMES", {"endpoint": "le"}, "must be a dict of new names"),
        ("LABEL_NAMES", {"endpoint": "__name__"}, "must be a dict of new names"),
        ("LABEL_NAMES", ["endpoint"], "must be a dict of new names"),
        ("LABEL_NAMES", {"endpoint": 5}, "must be a dict of new names"),
        ("LABEL_NAMES", {"endpoint": "job"}, "must be a dict of new names"),
        ("LABEL_NAMES", {"endpoint": "status"}, "not {'endpoint': 'status'}, which gives two"),
        ("HISTOGRAM_LABELS", {"status": 1}, "must be a list of some of the counter's labels"),
        ("LABELS", {"plan": 1}, "must be a list of keys of g.track_var, not {'plan': 1}"),
        ("LABELS", [5], "must be a list of keys of g.track_var, not [5]"),
        *(
            ("LABELS", ["tier", name], " is no name of ASCII letters, digits and _")
            for name in ("user-plan", "", "1st", "größe", "__plan", "a b", "plan\n", 'a"b')
        ),
        *(
            ("LABELS", ["tier", name], f"can be labels, but {name!r} is a label of ours already")
            for name in ("status", "country", "exception", "sink", "version", "slo")
        ),
        *(
            ("LABELS", [name], f"but {name!r} is a label that Prometheus writes itself")
            for name in ("le", "quantile", "job", "instance")
        ),
        ("LABELS", ["plan", "tier", "plan"], "but 'plan' is there twice"),
        ("BUFFER_RECORDS", -1, "must be a positive int, not -1"),
        ("SPOOL_BYTES", 1000, "must be an int of at least 1048576, not 1000"),
        ("STATE_DIR", 5, "must be a path or None, not 5"),
        ("FLUSH_SECONDS", "soon", "a positive number of seconds up to 86400, not 'soon'"),
        ("FLUSH_SECONDS", float("nan"), "a positive number of seconds up to 86400, not nan"),
        ("FLUSH_SECONDS", 1e12, "a positive number of seconds up to 86400, not 1000000000000.0"),
        ("RETENTION_DAYS", 0, "must be a positive number of days up to 36525 or None, not 0"),
        ("RETENTION_DAYS", "soon", "not 'soon'"),
        ("RETENTION_DAYS", True, "not True"),
        ("RETENTION_DAYS", 1e300, "not 1e+300"),
        ("SLO", {"availability": 99.9}, "must be a dict of ratios between 0 and 1"),
        ("DELIVERY", "later", "must be 'background' or 'inline', not 'later'"),
        ("USE_FREEGEOIP", "maybe", "must be True or False, not 'maybe'"),
        ("FREEGEOIP_ENDPOINT", "ftp://x", "must be a URL"),
        ("COOKIE", "sometimes", "must be True or False, not 'sometimes'"),
        ("VISITORS", "weekly", "must be 'daily' or None, not 'weekly'"),
        ("VISITORS", True, "must be 'daily' or None, not True"),
        ("PRIVACY", "none", "must be 'full', 'balanced' or 'strict', not 'none'"),
        ("PRIVACY", None, "must be 'full', 'balanced' or 'strict', not None"),
        ("REDACT", ["iban", "-"], "must hold parts of names with a letter or digit, not '-'"),
        ("REDACT", {"iban": 1}, "must be a list of parts of names"),
        ("RESPECT_GPC", 2, "must be True or False, not 2"),
        ("TRUSTED_PROXIES", ["nobody"], "addresses, CIDR ranges or 'unix:', not 'nobody'"),
    ],
)
def test_a_wrong_value_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        track(**{key: value})
    assert str(raised.value).startswith(f"TRACK_USAGE_{key} must")
    assert message in str(raised.value)


PASSWORD = "Tr0ub4dor"


@pytest.mark.parametrize(
    "secret",
    [
        PASSWORD.encode(),
        [PASSWORD.encode()],
        [f"https://ann:{PASSWORD}@geo.example/"],
        {"token": f"{PASSWORD}-and-then-some-more-of-it"},
        f"ftp://ann:{PASSWORD}@geo.example/{{ip}}",
        f"http://ann:{PASSWORD}@/",
        f"http://geo.example/{{ip}}?key={PASSWORD} ",
        f"postgresql://ann:{PASSWORD}@host:port/database",
        f"postgresql://ann:{PASSWORD}@host/database?password={PASSWORD}",
        f"mysql://ann:{PASSWORD}@host/database?password={PASSWORD}",
        f"sqlite://ann:{PASSWORD}@/usage",
        f"sqlite:///usage?token%3D{PASSWORD}=1",
        f"sqlite:///usage?timeout={PASSWORD}",
        f"jsonl:ann:{PASSWORD}@host",
        f"print:{PASSWORD}",
        f"[{PASSWORD}",
        f'["x:{PASSWORD}", 1]',
        f"ann:{PASSWORD}@host",
    ],
    ids=str,
)
def test_no_message_and_no_cause_of_it_shows_a_secret(secret: Any, tmp_path: Path) -> None:
    for key in KEYS.keys() - {"TRACK_USAGE_STATE_DIR"}:  # any text is a path
        app = Flask("shop")
        app.config.update({"TRACK_USAGE_STATE_DIR": tmp_path, key: secret})
        if key == "TRACK_USAGE_FREEGEOIP_ENDPOINT":
            app.config["TRACK_USAGE_USE_FREEGEOIP"] = True
        shown = ""
        try:
            TrackUsage(app, registry=CollectorRegistry())
        except ConfigError as error:
            shown = "".join(traceback.format_exception(error))
        assert PASSWORD not in shown, key
        # Any text may be a token, a name or a path; nothing else takes one of these.
        assert shown or key.endswith(("TOKEN", "PATH", "EXCLUDE", "REDACT", "COUNTRY", "STORAGE"))


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("MAX_SERIE", "MAX_SERIES"),
        ("INCLUDE_OR_EXCLUDE", "INCLUDE_OR_EXCLUDE_VIEWS"),
        ("METRIC_PATH", "METRICS_PATH"),
    ],
)
def test_an_unknown_key_names_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as raised:
        track(**{given: 1})
    expected = f"unknown setting TRACK_USAGE_{given}: did you mean TRACK_USAGE_{nearest}?"
    assert str(raised.value) == expected


def test_labels_are_checked_together() -> None:
    with pytest.raises(ConfigError, match="some of method, endpoint, status, country, plan, not"):
        track(LABELS=["plan"], HISTOGRAM_LABELS=["plan", "tier"])
    with pytest.raises(ConfigError, match="which gives two the name 'plan'"):
        track(LABELS=["plan"], LABEL_NAMES={"endpoint": "plan"})
    with pytest.raises(ConfigError, match=r"must be a dict of new names for some of .*, plan, not"):
        track(LABELS=["plan"], LABEL_NAMES={"tier": "level"})
    track(LABELS=["plan"], LABEL_NAMES={"endpoint": "route", "plan": "endpoint"})


def test_other_keys_are_none_of_our_business() -> None:
    app = Flask("shop")
    app.config["TRACKUSAGE"] = app.config["SECRET_KEY"] = "x"
    TrackUsage(app, [], registry=CollectorRegistry())


def test_texts_of_the_environment_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "INCLUDE_OR_EXCLUDE_VIEWS": "Include",
        "METRICS_PATH": "none",
        "EXCLUDE": "static, /health",
        "TRUSTED_PROXIES": '["10.0.0.0/8"]',
        "USE_FREEGEOIP": "no",
        "MAX_SERIES": "500",
        "HISTOGRAM_LABELS": "status,endpoint",
        "BUCKETS": "0.1,1,10",
        "LABEL_NAMES": '{"endpoint": "route", "plan": "tier"}',
        "LABELS": "plan, beta",
        "FLUSH_SECONDS": "0.1",
        "DELIVERY": "inline",
        "COUNTRY": "none",
        "COOKIE": "1",
        "VISITORS": "Daily",
        "PRIVACY": "BALANCED",
        "REDACT": "iban,card",
        "RESPECT_GPC": "yes",
        "RETENTION_DAYS": "90",
    }
    for key, text in texts.items():
        monkeypatch.setenv(f"FLASK_TRACK_USAGE_{key}", text)
    app = Flask("shop")
    app.config.from_prefixed_env()
    settings = read(app.config)
    assert settings.include_only
    assert settings.metrics_path is None
    assert settings.exclude == ("static", "/health")
    assert "10.1.2.3" in settings.trusted_proxies
    assert settings.use_freegeoip is False
    assert settings.shape.max_series == 500
    assert settings.shape.histogram_labels == ("endpoint", "status")
    assert settings.shape.buckets == (0.1, 1.0, 10.0)
    assert settings.shape.label_names == {"endpoint": "route", "plan": "tier"}
    assert settings.shape.labels == ("plan", "beta")
    assert settings.flush_seconds == 0.1
    assert settings.inline
    assert settings.country is None
    assert settings.cookie is settings.daily_visitors is settings.respect_gpc is True
    assert settings.privacy == "balanced"
    assert settings.retention_days == 90
    assert settings.redact == ("iban", "card")


def test_a_set_has_the_same_order_in_each_process() -> None:
    keys = {"plan", "tier", "region", "shop", "tenant", "channel"}
    settings = read({"TRACK_USAGE_LABELS": keys, "TRACK_USAGE_BUCKETS": {8.0, 1.0, 0.5}})
    assert settings.shape.labels == tuple(sorted(keys))
    assert settings.shape.buckets == (0.5, 1.0, 8.0)


def test_every_default_is_a_valid_value() -> None:
    read({name: key.default for name, key in KEYS.items()})
