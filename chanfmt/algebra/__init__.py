"""Computations on finished atlases: labels, merging, relabelling, comparing, exporting, validating. Pure numpy."""
