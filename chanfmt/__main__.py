"""`python -m chanfmt` is `atlas`, so that launchers that want a module can start a build."""

from __future__ import annotations

import sys

from chanfmt.cli.main import main

sys.exit(main())
