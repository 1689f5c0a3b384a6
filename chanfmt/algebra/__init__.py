"""What is computed from finished atlases: labels, merging, comparing, exporting, validating. Pure numpy."""
