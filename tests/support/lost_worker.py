"""A build that loses the process of rank 1 while the other processes are busy. test_distributed.py starts it."""

from __future__ import annotations

import os
import signal
import sys
import time

from chanfmt.base.errors import ChanfmtError
from chanfmt.models.distributed import joined


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with joined("cpu") as group:

        def load() -> None:
            if group.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        try:
            group.together(load)
        except ChanfmtError as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(f"rank {group.rank}: {error.message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
