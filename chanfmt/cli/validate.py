"""`atlas validate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.cli import framework

if TYPE_CHECKING:
    import argparse

    from chanfmt.algebra.validate.findings import Finding


EXAMPLES = (
    "atlas validate llama.h5",
    "atlas validate a.h5 b.h5 --json",
)


@dataclass(frozen=True)
class FilesOptions:
    """Which files."""

    files: tuple[str, ...] = field(
        metadata={"help": "atlases to check: files, or hf://REPO/FILE", "positional": "FILE", "nargs": "+"}
    )


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "validate",
        "check files against the specification",
        run=_run,
        options=lambda: (FilesOptions,),
        examples=EXAMPLES,
        description=(
            "Check every FILE against the specification: structure, references, values, digests. The exit code is 0 if all files "
            "are valid, 1 if a file is not valid, 2 if a file is missing."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.algebra.validate.contained import validate_contained
    from chanfmt.algebra.validate.findings import ERROR
    from chanfmt.format import schema
    from chanfmt.hub.locate import locate_atlas

    results = {name: validate_contained(locate_atlas(name).path) for name in arguments.files}
    valid = {name: not any(finding.rule.severity == ERROR for finding in findings) for name, findings in results.items()}
    if arguments.json:
        framework.print_json(
            {
                "specification": schema.FORMAT_VERSION,
                "files": [
                    {
                        "file": name,
                        "valid": valid[name],
                        "findings": [
                            {
                                "code": finding.code,
                                "severity": finding.rule.severity,
                                "path": finding.path,
                                "message": finding.message,
                                "fix": finding.rule.fix,
                            }
                            for finding in findings
                        ],
                    }
                    for name, findings in results.items()
                ],
            }
        )
    else:
        for name, findings in results.items():
            _print(name, findings, f"valid atlas {schema.FORMAT_VERSION}" if valid[name] else "invalid")
    return 0 if all(valid.values()) else 1


def _print(name: str, findings: list[Finding], verdict: str) -> None:
    framework.print_line(f"{name}: {verdict}")
    for finding in findings:
        framework.print_line(f"  {finding.rule.severity} {finding.code} {finding.path} {finding.message}")
    for fix in dict.fromkeys(finding.rule.fix for finding in findings):
        framework.print_line(f"  {fix}")
