"""Faults between a client and the Hub."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Fault:
    """Something that goes wrong with some requests.

    Attributes:
        method: Of the requests it meets.
        path: Pattern searched in their path.
        first: The first of these requests that it meets, counted from 1.
        times: How many it meets from there on.
        status: Answer with this error in place of the real answer.
        message: What the error says.
        code: ``X-Error-Code`` of the error.
        headers: Headers of the error, such as ``Retry-After``.
        cut: Close the connection after this many bytes: of the request's body where it has one, else of the answer's.
        pace: Seconds of pause before each kilobyte, of the request's body where it has one, else of the answer's.
        alter: Change the body of the answer; its length in the headers follows, other headers do not.
        met: Set when it meets its first request.
    """

    method: str
    path: str
    first: int = 1
    times: int = 1
    status: int = 0
    message: str = "injected"
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    pace: float = 0.0
    alter: Callable[[bytes], bytes] | None = None
    met: threading.Event = field(default_factory=threading.Event)
    seen: int = 0

    def meets(self, method: str, path: str) -> bool:
        """Whether this fault meets the request. Requests with its method and path are counted."""
        if method != self.method or not re.search(self.path, path):
            return False
        self.seen += 1
        if not self.first <= self.seen < self.first + self.times:
            return False
        self.met.set()
        return True
