"""The stock model of a config, which `chanfmt.models.stock` builds; the cut and its checks take it from here."""

from __future__ import annotations

from chanfmt.models.stock import Shapes, meta_model, meta_shapes, parse_config

__all__ = ["Shapes", "meta_model", "meta_shapes", "parse_config"]
