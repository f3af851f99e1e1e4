"""What is chosen at the top of a dashboard: data source, servers, endpoint, country."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import DatasourceVariable, QueryVariable
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from promql import HERE

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

# Every label may be missing from the histogram (TRACK_USAGE_HISTOGRAM_LABELS); only .* matches
# what is not there.
ANY = ".*"


def data_source() -> DatasourceVariable:
    return DatasourceVariable("datasource").label("Data source").type("prometheus")


def job() -> QueryVariable:
    return _several(_values("job", "Job", "flask_usage_build_info"), ".+")


def instance() -> QueryVariable:
    selector = 'flask_usage_build_info{job=~"$job"}'
    return _several(_values("instance", "Instance", selector), ".+")


def endpoint() -> QueryVariable:
    return _several(one_endpoint(), ANY)


def one_endpoint() -> QueryVariable:
    return _values("endpoint", "Endpoint", f"flask_usage_requests_total{{{HERE}}}")


def country() -> QueryVariable:
    selector = f"flask_usage_requests_total{{{HERE}}}"
    return _several(_values("country", "Country", selector), ANY)


def _values(label: str, title: str, selector: str) -> QueryVariable:
    return (
        QueryVariable(label)
        .label(title)
        .datasource(SOURCE)
        .query(f"label_values({selector}, {label})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )


def _several(variable: QueryVariable, all_value: str) -> QueryVariable:
    everything = VariableOption(selected=True, text=["All"], value=["$__all"])
    return variable.multi(True).include_all(True).all_value(all_value).current(everything)
