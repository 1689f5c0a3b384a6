"""One question of the report each: ``make(units)`` gives its `chanfmt.reporting.section.Section`."""
