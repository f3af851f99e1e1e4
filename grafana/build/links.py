"""Links from the cells of tables to the dashboard that has more about what is in the cell."""

from __future__ import annotations

from typing import Any


def link_to(uid: str, title: str, *kept: str, **chosen: str) -> dict[str, Any]:
    """Return a link to a dashboard.

    Args:
        uid: Of that dashboard.
        title: What one sees before one clicks.
        *kept: Variables that keep their values, beside data source, servers and time.
        **chosen: By variable what it is there.
    """
    values = [f"var-{name}={value}" for name, value in chosen.items()]
    values += [f"${{{name}:queryparam}}" for name in ("datasource", "job", "instance", *kept)]
    return {"title": title, "url": f"/d/{uid}?{'&'.join(values)}&${{__url_time_range}}"}


TO_ENDPOINT = link_to(
    "flask-usage-endpoint", "All about this endpoint", "country", endpoint="${__value.raw}"
)
TO_COUNTRY = link_to(
    "flask-usage-overview", "How the app is for this country", "endpoint", country="${__value.raw}"
)
