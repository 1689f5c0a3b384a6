"""The version, in one place. It has a module of its own, so that no module behind the front door imports the front door."""

from __future__ import annotations

__version__ = "0.1.0"
