"""The atlas file: its schema, and how it is read and written. numpy and h5py only."""
