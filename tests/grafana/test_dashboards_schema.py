"""The dashboards are values of the types that Grafana publishes, panels' options included."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.dashboards import DASHBOARDS, panels
from helpers.process import need, run

pytestmark = pytest.mark.servers

Dashboard = dict[str, Any]

PACKAGES = {"@grafana/schema": "13.2.3", "typescript": "7.0.2"}

TYPES = """
import type {
  AnnotationQuery, Dashboard, FieldConfig, Panel, RowPanel,
} from "{raw}/dashboard/x/types.gen";
{imports}
// JSON has texts where TypeScript has enumerations.
type Json<T> = T extends string ? `${T}`
  : T extends Array<infer U> ? Array<Json<U>>
  : T extends object ? { [K in keyof T]: Json<T[K]> } : T;

type Kind<Type, Options, Custom = never> = Omit<Panel, "type" | "options" | "fieldConfig"> & {
  type: Type;
  options: Partial<Options>;
  fieldConfig: {
    defaults: Omit<FieldConfig, "custom"> & { custom?: Partial<Custom> };
    overrides: Array<{
      matcher: { id: "byName" | "byRegexp"; options: string };
      properties: Array<{ id: string; value: unknown }>;
    }>;
  };
};
type Known = Kind<"bargauge", bargauge.Options> | Kind<"geomap", geomap.Options>
  | Kind<"heatmap", heatmap.Options, heatmap.FieldConfig> | Kind<"stat", stat.Options>
  | Kind<"table", table.Options, table.FieldConfig>
  | Kind<"timeseries", timeseries.Options, timeseries.FieldConfig>;

// The schema leaves the query of an annotation to the data source.
type Checked = Json<Omit<Dashboard, "annotations" | "panels"> & {
  annotations: { list: Array<AnnotationQuery & { expr: string; titleFormat: string }> };
  panels: Array<Known | (Omit<RowPanel, "panels"> & { panels: Known[] })>;
}>;
"""
PANEL_TYPES = ("bargauge", "geomap", "heatmap", "stat", "table", "timeseries")


@pytest.fixture(scope="session")
def types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Grafana's schema and a TypeScript compiler in it."""
    npm = shutil.which("npm")
    need(npm, "npm")
    folder = tmp_path_factory.mktemp("types")
    (folder / "package.json").write_text(json.dumps({"dependencies": PACKAGES}))
    install = (npm, "install", "--ignore-scripts", "--no-audit", "--no-fund")
    done = run(*install, folder=folder, seconds=300)
    if done.returncode != 0:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(done.stderr)
    return folder


def complaints(folder: Path, **dashboards: Dashboard) -> str:
    """Return what the compiler says of dashboards as values of Grafana's types."""
    raw = "./node_modules/@grafana/schema/dist/types/raw"
    imports = "\n".join(
        f'import type * as {panel} from "{raw}/composable/{panel}/panelcfg/x/types.gen";'
        for panel in PANEL_TYPES
    )
    source = TYPES.replace("{imports}", imports).replace("{raw}", raw)
    for name, dashboard in dashboards.items():
        source += f"export const {name}: Checked = {json.dumps(dashboard, indent=1)};\n"
    (folder / "dashboards.ts").write_text(source)
    tsc = [folder / "node_modules" / ".bin" / "tsc", "--noEmit", "--strict", "--skipLibCheck"]
    modules = ["--module", "nodenext", "--moduleResolution", "nodenext", "dashboards.ts"]
    checked = run(*tsc, *modules, folder=folder, seconds=300)
    assert checked.returncode in (0, 1, 2)
    return checked.stdout


def test_grafanas_schema_allows_them(types: Path) -> None:
    by_name = {uid.replace("-", "_"): dashboard for uid, dashboard in DASHBOARDS.items()}
    assert complaints(types, **by_name) == ""


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        pytest.param({"refresh": 30}, "'number' is not assignable to type 'string'", id="type"),
        pytest.param({"refreshes": "1m"}, "'\"refreshes\"' does not exist", id="unknown-key"),
        pytest.param({"graphTooltip": 7}, "'7' is not assignable", id="none-of-the-choices"),
    ],
)
def test_it_does_not_allow_just_anything(types: Path, changed: Dashboard, complaint: str) -> None:
    broken = DASHBOARDS["flask-usage-overview"] | changed
    assert complaint in complaints(types, broken=broken)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        pytest.param("graphMood", "area", id="unknown"),
        pytest.param("graphMode", "aria", id="none-of-the-choices"),
    ],
)
def test_nor_any_option_of_a_panel(types: Path, option: str, value: str) -> None:
    broken = json.loads(json.dumps(DASHBOARDS["flask-usage-overview"]))
    next(panels(broken))["options"][option] = value
    assert option in complaints(types, broken=broken) or value in complaints(types, broken=broken)
