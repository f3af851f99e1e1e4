"""Facts that are derived from a record's fields, in one place for all outputs."""

from __future__ import annotations

import pytest
from helpers.records import make_record

from flask_usage_metrics.metrics.objectives import Objective
from flask_usage_metrics.records.summary import summarize_records


@pytest.mark.parametrize("status", [0, 200, 404, 499, 500, 503, 599, 600, 999])
def test_a_server_error_is_a_status_of_500_to_599(status: int) -> None:
    expected = status in (500, 503, 599)
    record = make_record(status=status)
    assert record.is_server_error is expected
    (summary,) = summarize_records([record], (), None, (1.0,))
    assert summary.errors == expected
    event = Objective("availability", 0.999).event(record)
    assert event == ("availability", "bad" if expected else "good")
