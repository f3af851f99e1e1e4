"""Maps: a number for each country, at its place."""

from __future__ import annotations

from grafana_foundation_sdk.builders import common, geomap
from grafana_foundation_sdk.models import common as choices
from grafana_foundation_sdk.models.geomap import TooltipMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from panels import COUNT, PLAIN, at_the_end, numbered
from tables import renamed
from variables import SOURCE


def world(
    title: str, description: str, expression: str, *, label: str, missing: str
) -> geomap.Panel:
    """Show circles, the larger the more; ``label`` has the country, two letters of ISO 3166."""
    place = (
        common.FrameGeometrySource()
        .mode(choices.FrameGeometrySourceMode.LOOKUP)
        .lookup("Country")
        .gazetteer("public/gazetteer/countries.json")
    )
    circles = {
        "showLegend": False,
        "style": {
            "size": {"field": "Requests", "fixed": 5, "min": 4, "max": 30},
            "color": {"fixed": "dark-blue"},
            "opacity": 0.5,
            "symbol": {"mode": "fixed", "fixed": "img/icons/marker/circle.svg"},
        },
    }
    markers = common.MapLayerOptions().type("markers").name("Requests").tooltip(True)
    return (
        geomap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(numbered(at_the_end(expression).format(PromQueryFormat.TABLE)))
        .unit(COUNT)
        .decimals(0)
        .no_value(missing)
        .thresholds(PLAIN)
        .with_transformation(renamed({label: "Country", "Value": "Requests"}))
        .basemap(common.MapLayerOptions().type("default").name("Map"))
        .layers([markers.location(place).config(circles)])
        .view(geomap.MapViewConfig().id("zero").lat(20).lon(0).zoom(1))
        .controls(
            geomap.ControlsOptions()
            .show_zoom(True)
            .mouse_wheel_zoom(False)  # else one cannot scroll past the map
            .show_attribution(True)
        )
        .tooltip(geomap.TooltipOptions().mode(TooltipMode.DETAILS))
    )
