"""What the screens show and change: the atlas in memory, marks, protect files, watching. Nothing here imports Textual."""
