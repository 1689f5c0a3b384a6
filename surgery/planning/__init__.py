"""Decide which channels a cut removes. numpy only: no torch, no model."""
