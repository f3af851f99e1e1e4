"""Write the dashboards: python grafana/build; with --check say which files are not as written."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import audience
import endpoint
import overview
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

FOLDER = Path(__file__).parent.parent / "dashboards"


def main() -> int:
    """Write, or check; returns 1 if a file is not as it would be written."""
    parser = argparse.ArgumentParser(prog="python grafana/build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    dashboards = (overview.dashboard(), audience.dashboard(), endpoint.dashboard())
    texts = {FOLDER / f"{made.uid}.json": encode(made) for made in dashboards}
    others = sorted(set(FOLDER.glob("*.json")) - texts.keys())
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in [*stale, *others] if check else stale:
        print(f"{path.name} is not what grafana/build makes" if check else path.name)
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(texts[path])
    return int(check and bool(stale or others))


def encode(dashboard: Dashboard) -> str:
    """Return the JSON, which is the same for the same dashboard."""
    return json.dumps(dashboard, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.exit(main())
