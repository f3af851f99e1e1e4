"""Tables of numbers over the chosen range: with a row for each value of a label, or of two.

Labels are renamed at once: whatever else is said about a column names it by its title.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import common, table
from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
from grafana_foundation_sdk.models import common as choices
from grafana_foundation_sdk.models.dashboard import DataTransformerConfig, DynamicConfigValue
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from panels import COUNT, PLAIN, at_the_end, numbered
from variables import SOURCE


class Column(NamedTuple):
    """A column of numbers.

    Attributes:
        expression: Must have just the labels that tell the table's rows apart.
        colors: None: the numbers are not good or bad.
        decimals: None: as many as the number needs.
    """

    title: str
    expression: str
    unit: str
    colors: ThresholdsConfig | None = None
    decimals: int | None = None


def grid(
    title: str,
    description: str,
    rows: dict[str, str],
    *columns: Column,
    sorted_by: str,
    missing: str,
    links: dict[str, dict[str, Any]] | None = None,
) -> table.Panel:
    """Show numbers beside each other.

    ``rows`` are the titles of the labels that tell rows apart, the leftmost first; the highest
    number in the column ``sorted_by`` is on top; ``links`` are what the cells of a column lead to.
    """
    # With several queries a column of values is named after its query, else it has no name.
    named = [f"Value #{chr(65 + number)}" for number in range(len(columns))]
    values = named if columns[1:] else ["Value"]
    titles = rows | {value: column.title for value, column in zip(values, columns, strict=True)}
    panel = _table(title, description, *(column.expression for column in columns), missing=missing)
    panel.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(renamed(titles))
    panel.sort_by([common.TableSortByFieldState().display_name(sorted_by).desc(True)])
    if columns[2:]:
        width = DynamicConfigValue("custom.width", 180 if len(rows) == 1 else 110)
        for name in rows.values():
            panel.override_by_name(name, [width])
    for column in columns:
        panel.override_by_name(column.title, _cells(column))
    for name, link in (links or {}).items():
        panel.override_by_name(name, [DynamicConfigValue("links", [link])])
    return panel


def matrix(
    title: str,
    description: str,
    expression: str,
    *,
    down: tuple[str, str],
    across: tuple[str, str],
    missing: str,
    link: dict[str, Any],
) -> table.Panel:
    """Show counts by two labels, one ``down`` the side and one ``across``, each with its title.

    ``missing`` is in the cells without a count; ``link`` is what those at the side lead to.
    """
    # The counts keep their name: a title would be the title of each of their columns.
    turned = {
        "rowField": down[1],
        "columnField": across[1],
        "valueField": "Value",
        "emptyValue": "null",
    }
    side = f"{down[1]}\\{across[1]}"  # is what Grafana calls it
    return (
        _table(title, description, expression, missing=missing)
        .decimals(0)
        .with_transformation(renamed(dict([down, across])))
        .with_transformation(DataTransformerConfig(id_val="groupingToMatrix", options=turned))
        .override_by_name(
            side, [DynamicConfigValue("links", [link]), DynamicConfigValue("custom.minWidth", 160)]
        )
    )


def renamed(titles: dict[str, str]) -> DataTransformerConfig:
    """Put the fields in this order under these titles."""
    options = {
        "renameByName": titles,
        "indexByName": {name: index for index, name in enumerate(titles)},
        "excludeByName": {"Time": True},
    }
    return DataTransformerConfig(id_val="organize", options=options)


def _table(title: str, description: str, *expressions: str, missing: str) -> table.Panel:
    queries = [at_the_end(asked).format(PromQueryFormat.TABLE) for asked in expressions]
    return (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(numbered(*queries))
        .unit(COUNT)
        .no_value(missing)
        .thresholds(PLAIN)
        .min_width(70)  # else 150, and what does not fit is out of sight
        .cell_height(choices.TableCellHeight.SM)
        .show_header(True)
    )


def _cells(column: Column) -> list[DynamicConfigValue]:
    settings: dict[str, object] = {"unit": column.unit}
    if column.decimals is not None:
        settings["decimals"] = column.decimals
    if column.colors is not None:
        settings["thresholds"] = column.colors.build()
        settings["custom.cellOptions"] = {"type": "color-text"}
    return [DynamicConfigValue(name, value) for name, value in settings.items()]
