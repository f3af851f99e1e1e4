"""Panels: one maker for each way of showing a number, with the settings all of that kind share.

Each takes a title, a description of what the numbers mean, queries, and:

    unit      of the values, as Grafana names it
    colors    from which value on which color means something: see `steps`
    missing   what to say where there is no value
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.builders.dashboard import FieldColor, ThresholdsConfig
from grafana_foundation_sdk.models import common as choices
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import (
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from variables import SOURCE


def steps(lowest: str, *others: tuple[float, str]) -> ThresholdsConfig:
    """Return the color of the lowest values, and from where on it is another."""
    made = [Threshold(None, lowest), *(Threshold(value, color) for value, color in others)]
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(made)


COUNT = units.NoUnit
"""Of what is shown whole: Short would make "1 K" of 1 234."""

PLAIN = steps("blue")  # without any, Grafana would paint red whatever is 80 or more
# The first color is that of what is missing, too, which is neither good nor bad.
ERRORS = steps("text", (0, "green"), (0.001, "yellow"), (0.01, "red"))
LATENCY = steps("text", (0, "green"), (0.5, "yellow"), (1, "red"))

SMALLEST_AXES = {
    units.PercentUnit: 0.02,
    units.Seconds: 0.01,
    units.RequestsPerSecond: 0.01,
    units.WritesPerSecond: 0.01,
    units.CountsPerSecond: 0.01,
}
"""Up to where an axis goes at least: a line at 0 would be drawn on one up to 100."""

BY_STATUS = {r"/^2/": "green", r"/^3/": "blue", r"/^4/": "orange", r"/^5/": "red"}


def over_time(expression: str, name: str = "", *, exemplars: bool = False) -> prometheus.Dataquery:
    """Ask for a line over the chosen range; ``{{label}}`` in its name is that label's value."""
    query = _query(expression, name).range()
    return query.exemplar(True) if exemplars else query


def at_the_end(expression: str, name: str = "") -> prometheus.Dataquery:
    """Ask for one value, at the end of the chosen range."""
    return _query(expression, name).instant()


def numbered(*queries: prometheus.Dataquery) -> list[prometheus.Dataquery]:
    """Name the queries of a panel A, B, C, ..."""
    return [query.ref_id(chr(65 + number)) for number, query in enumerate(queries)]


def big_number(
    title: str,
    description: str,
    query: prometheus.Dataquery,
    *,
    unit: str,
    colors: ThresholdsConfig = PLAIN,
    missing: str = "no data",
    named: bool = False,
) -> stat.Panel:
    """Show the last value, over a sketch of those before if the query asked for them.

    With ``named`` each number says whose it is, even if it is the only one.
    """
    mode = choices.BigValueTextMode
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(numbered(query))
        .unit(unit)
        .no_value(missing)
        .thresholds(colors)
        .color_scheme(FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .reduce_options(_last_value())
        .text_mode(mode.VALUE_AND_NAME if named else mode.AUTO)
        .color_mode(choices.BigValueColorMode.VALUE)
        .graph_mode(choices.BigValueGraphMode.AREA)
        .wide_layout(True)
        .text(common.VizTextDisplayOptions().title_size(14).value_size(30))
    )


def lines(
    title: str,
    description: str,
    *queries: prometheus.Dataquery,
    unit: str,
    marks: ThresholdsConfig | None = None,
    missing: str = "no data",
    shades: dict[str, str] | None = None,
    stacked: bool = False,
) -> timeseries.Panel:
    """Show how values change.

    Each of the ``marks`` is a line across the graph. ``shades`` of one color are for what is
    alike, by a regular expression for names. Values are ``stacked`` if they are parts of a whole.
    """
    style = (
        choices.GraphThresholdsStyleMode.DASHED if marks else choices.GraphThresholdsStyleMode.OFF
    )
    stacking = choices.StackingMode.NORMAL if stacked else choices.StackingMode.NONE
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(numbered(*queries))
        .unit(unit)
        .min(0)
        .axis_soft_max(SMALLEST_AXES.get(unit, 1))
        .no_value(missing)
        .thresholds(marks or PLAIN)
        .thresholds_style(common.GraphThresholdsStyleConfig().mode(style))
        .color_scheme(FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .line_width(1)
        .fill_opacity(40 if stacked else 8)
        .stacking(common.StackingConfig().mode(stacking).group("A"))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(choices.LegendDisplayMode.LIST)
            .placement(choices.LegendPlacement.BOTTOM)
            .calcs([])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(choices.TooltipDisplayMode.MULTI)
            .sort(choices.SortOrder.DESCENDING)
        )
    )
    for names, color in (shades or {}).items():
        value = {"mode": "shades", "fixedColor": color}
        panel.override_by_regexp(names, [DynamicConfigValue("color", value)])
    return panel


def bars(
    title: str, description: str, query: prometheus.Dataquery, *, unit: str, missing: str
) -> bargauge.Panel:
    """Show values below each other, in the order of the query."""
    return (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(numbered(query))
        .unit(unit)
        .min(0)
        .no_value(missing)
        .thresholds(PLAIN)
        .color_scheme(FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .reduce_options(_last_value())
        .orientation(choices.VizOrientation.HORIZONTAL)
        .display_mode(choices.BarGaugeDisplayMode.BASIC)
        .value_mode(choices.BarGaugeValueMode.TEXT)
        .name_placement(choices.BarGaugeNamePlacement.LEFT)
        # Else three bars are as high as ten, and their letters, too.
        .sizing(choices.BarGaugeSizing.MANUAL)
        .min_viz_height(22)
        .max_viz_height(22)
        .text(common.VizTextDisplayOptions().title_size(12).value_size(14))
        .show_unfilled(True)
    )


def heat(title: str, description: str, buckets: str, *, missing: str) -> heatmap.Panel:
    """Show how many requests took how many seconds, by what counts them in buckets."""
    query = over_time(buckets, "{{le}}", exemplars=True).format(PromQueryFormat.HEATMAP)
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(numbered(query))
        .unit(units.Short)
        .no_value(missing)
        .thresholds(PLAIN)
        .calculate(False)
        .rows_frame(heatmap.RowsHeatmapOptions().layout(choices.HeatmapCellLayout.AUTO))
        .y_axis(heatmap.YAxisConfig().unit(units.Seconds).reverse(False))
        .cell_gap(1)
        .cell_values(heatmap.CellValues().unit(units.Short).decimals(0))
        .filter_values(heatmap.FilterValueRange().le(1e-9))  # empty cells stay empty
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .scale(HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
            .fill("dark-orange")
            .reverse(False)
        )
        .exemplars_color("rgba(50,116,217,0.9)")
        .mode(choices.TooltipDisplayMode.SINGLE)
        .hide_y_histogram()
        .show_color_scale(True)
        .show_legend()
    )


def _query(expression: str, name: str) -> prometheus.Dataquery:
    query = prometheus.Dataquery().datasource(SOURCE).expr(expression)
    return query.format(PromQueryFormat.TIME_SERIES).legend_format(name or "__auto")


def _last_value() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False)
