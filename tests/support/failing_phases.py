"""Builds that fail in one process, in each phase. test_distributed.py starts them in several processes.

torchrun ... -m tests.support.failing_phases MODEL DIRECTORY: for each phase, every process must raise the error of the one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from chanfmt.base.errors import ChanfmtError
from chanfmt.building.options import BuildOptions
from chanfmt.format.records import LabelSettings
from tests.support.builds import build

RANK = int(os.environ["RANK"])
PHASES = {
    "plan": (1, "chanfmt.building.build.plan_build"),
    "batch": (1, "chanfmt.building.measure._batch"),
    "core": (0, "chanfmt.building.statistics.ChannelStatistics.choose_core"),
    "cross moments": (1, "chanfmt.building.statistics.ChannelStatistics.set_core"),
    "labels": (0, "chanfmt.building.build.assemble"),
}
"""Phase to the process that fails in it, and the function that raises the error."""


def main(model: str, directory: str) -> None:
    for phase, (rank, name) in PHASES.items():

        def fail(*args: Any, phase: str = phase, **kwargs: Any) -> None:
            raise ChanfmtError(f"this fails: {phase}")

        options = BuildOptions(
            model, str(Path(directory) / f"{phase}.h5"), calib="pydoc", sequences=16, seq_len=32, batch_size="1"
        )
        with ExitStack() as stack:
            if rank == RANK:
                stack.enter_context(patch(name, fail))
            with pytest.raises(ChanfmtError, match=f"this fails: {phase}"):
                build(options, LabelSettings(rho=0.03, support_size=8))
    # After all that, the processes still work together, and continue the build whose labels failed.
    build(dataclasses.replace(options, resume=True), LabelSettings(rho=0.03, support_size=8))


if __name__ == "__main__":
    main(*sys.argv[1:])
