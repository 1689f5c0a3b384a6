"""The subcommands of `atlas`, one module each: `add` declares the options, the rest runs.

Importing a module here loads neither torch nor h5py; a command loads what it needs when it runs.
"""
