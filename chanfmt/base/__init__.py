"""What every other part stands on: errors, files, text, narration. No torch, no HDF5."""
