"""`atlas import-imatrix`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework

if TYPE_CHECKING:
    import argparse


EXAMPLES = (
    "atlas import-imatrix llama.imatrix.gguf --model meta-llama/Llama-3.2-1B -o llama-activation.h5",
    "atlas import-imatrix imatrix.dat --model ./Llama-Q4_K_M.gguf -o llama-activation.h5",
)


@dataclass(frozen=True)
class ImportOptions:
    """Which matrix, of which model."""

    file: str = field(metadata={"help": "importance matrix of llama.cpp: GGUF, or the older .dat", "positional": "FILE"})
    model: str = field(
        metadata={
            "help": "the model that the matrix was measured on: Hub id, directory or .gguf file",
            "flag": "--model",
            "kind": "model",
            "metavar": "MODEL",
        }
    )
    output: str = field(
        metadata={"help": "atlas file to write", "flag": "--output", "short": "-o", "metavar": "ATLAS", "kind": "atlas"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the model on the Hub"})
    chunk_size: int = field(
        default=512, metadata={"help": "tokens of a chunk, for a .dat file, which does not say it", "metavar": "N"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output if it exists"})


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "import-imatrix",
        "make an atlas of activation power from llama.cpp's imatrix",
        run=_run,
        options=lambda: (ImportOptions,),
        examples=EXAMPLES,
        description=(
            "Make an atlas from the importance matrix that llama-imatrix wrote, or that somebody published. The atlas holds the "
            "activation power of every channel and the norms of its weights. Metrics that need a gradient, such as LP, are absent."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.base.claims import claimed
    from chanfmt.base.files import check_target, output_path
    from chanfmt.base.inputs import input_path
    from chanfmt.building.import_imatrix import imported
    from chanfmt.format.writer import write_atlas
    from chanfmt.hub.locate import locate_model
    from chanfmt.models.imatrix_file import read_imatrix

    options = framework.parse_options(arguments, ImportOptions)
    path, output = input_path(options.file), output_path(options.output)
    check_target(output, overwrite=options.overwrite)
    # A file that is not a matrix is refused before a model is downloaded.
    read_imatrix(path, options.chunk_size)
    source = locate_model(options.model, revision=options.revision)
    with claimed(output):
        content = imported(path, source, chunk_size=options.chunk_size)
        digest = write_atlas(content, output, overwrite=options.overwrite)
    channels = sum(block.n_channels * max(1, block.n_experts) for block in content.blocks)
    say(f"wrote {output}: activation power of {channels:,} channels in {len(content.blocks)} FFNs, and norms of their weights")
    if arguments.json:
        framework.print_json(
            {
                "file": str(output),
                "content_sha256": digest,
                "ffns": len(content.blocks),
                "channels": channels,
                "tokens": content.calibration.tokens,
                "dropped": list(content.dropped),
            }
        )
    return 0
