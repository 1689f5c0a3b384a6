"""`python -m surgery` is `surgery`."""

from __future__ import annotations

import sys

from surgery.cli.main import main

sys.exit(main())
