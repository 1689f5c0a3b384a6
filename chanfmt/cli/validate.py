"""`atlas validate`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from chanfmt.base.text import printable
from chanfmt.cli import framework

if TYPE_CHECKING:
    import argparse

    from chanfmt.algebra.validate.findings import Finding


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "validate",
        help="check files against the specification",
        description=(
            "Check every FILE against the specification: structure, references, values, digests. Exit code 0 when "
            "all are valid, 1 when one is not, 2 when one is not there."
        ),
    )
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.algebra.validate.contained import validate_contained
    from chanfmt.algebra.validate.findings import ERROR
    from chanfmt.format import schema
    from chanfmt.hub.locate import locate_atlas

    results = {name: validate_contained(locate_atlas(os.path.expanduser(name)).path) for name in arguments.files}
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
    print(printable(f"{name}: {verdict}"))
    for finding in findings:
        print(printable(f"  {finding.rule.severity} {finding.code} {finding.path} {finding.message}"))
    for fix in dict.fromkeys(finding.rule.fix for finding in findings):
        print(f"  {fix}")
