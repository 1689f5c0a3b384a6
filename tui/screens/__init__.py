"""Screens of the terminal browser, one a file."""
