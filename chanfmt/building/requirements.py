"""What a build needs besides the model. It is checked before the model is looked for, because that may be a long download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.errors import UsageError
from chanfmt.building.options import RECOMPUTE, STREAM
from chanfmt.data.arrays import InputFile, read_inputs
from chanfmt.data.text import SELF, check_text
from chanfmt.models.load import pick_device, pick_dtype

if TYPE_CHECKING:
    from chanfmt.building.options import BuildOptions


def check_requirements(options: BuildOptions) -> InputFile | None:
    """Check the values of ``options``, the calibration sources, the device and the packages. No model is looked for.

    Returns:
        The file of inputs, if ``options`` name one.

    Raises:
        UsageError: A value is not allowed, or a calibration source does not exist or cannot be used.
        ModelError: The device cannot be used.
        MissingPackageError: A package is missing that ``options`` need.
    """
    options.check()
    pick_dtype(options.dtype, pick_device(options.device))
    if options.inputs is None:
        for source in options.shares:
            if source != SELF:
                check_text(source)
        return None
    file = read_inputs(options.inputs)
    if options.order in (RECOMPUTE, STREAM) and not file.holds_tokens:
        raise UsageError(
            f"{options.order_flag} runs token sequences, and {file.name} holds {', '.join(sorted(file.arrays))}",
            hint=f"leave out {options.order_flag}, or use --dtype bfloat16 or --device-map auto for a large model",
        )
    return file
