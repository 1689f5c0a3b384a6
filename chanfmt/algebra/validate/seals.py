"""Level 4: digests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.format.digest import SEAL, SEAL_BYTES, content_sha256, file_sha256

if TYPE_CHECKING:
    from chanfmt.algebra.validate.findings import Report
    from chanfmt.format.container import Container


def check_digests(container: Container, report: Report) -> None:
    """Add breaches of the rules E4.. to ``report``."""
    stated = container.attribute("", "content_sha256")
    report.check(content_sha256(container) == stated, "E401", "/@content_sha256", "is not the digest of the content")
    if SEAL in container and container.path is not None:
        node = container.nodes[SEAL]
        same = node.nbytes == SEAL_BYTES and file_sha256(container.descriptor, node.offset) == container.read(SEAL).tobytes()
        report.check(same, "E402", f"/{SEAL}", "is not the digest of the file's bytes")
