"""What the screens show and keep: the atlas in memory, marks, protect files, watching. Pure numpy, no widgets."""
