"""A small shop with simulated visitors, for the README: python -m flask_usage_metrics.demo.

`shop` is the app, `visitors` are its clients, `comparison` tells whether storage and metrics agree.
"""

from __future__ import annotations

from flask_usage_metrics.demo.shop import create_app

__all__ = ["create_app"]
