"""One module per question of the report; its ``make(units)`` gives the `chanfmt.reporting.section.Section`."""
