"""Widgets of the terminal browser, one per file."""
