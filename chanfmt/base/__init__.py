"""The lowest layer: errors, files, text, narration, the recorded command line. It imports no torch and no HDF5."""
