"""Files put together again from the uploads of a Xet client: chunks from xorbs, files from the shard that lists their chunks.

Formats: https://huggingface.co/docs/xet. Hashes of chunks and xorbs are not checked; the SHA-256 of every file is.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ENTRY = 48
BOOKEND = b"\xff" * 32
WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30


def hash_text(raw: bytes) -> str:
    """A hash as it is written in addresses: each 8 bytes as a little-endian number."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def chunks(xorb: bytes) -> list[bytes]:
    """The chunks of a serialised xorb, unpacked."""
    found, at = [], 0
    while at < len(xorb) and xorb[at] == 0:
        packed, kind = int.from_bytes(xorb[at + 1 : at + 4], "little"), xorb[at + 4]
        size = int.from_bytes(xorb[at + 5 : at + 8], "little")
        body = xorb[at + 8 : at + 8 + packed]
        content = body if kind == 0 else _lz4_frame(body)
        found.append(_ungrouped(content) if kind == 2 else content)
        if len(found[-1]) != size:
            raise ValueError("a chunk has another size than its header says")
        at += 8 + packed
    return found


def files(shard: bytes, xorbs: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """SHA-256 and content of every file that a shard lists.

    Raises:
        KeyError: It refers to a xorb that is not there.
        ValueError: A file is not what its digest says.
    """
    unpacked = {}
    at = ENTRY
    while shard[at : at + 32] != BOOKEND:
        flags, terms = struct.unpack_from("<II", shard, at + 32)
        at += ENTRY
        content = b""
        for index in range(terms):
            name = hash_text(shard[at + index * ENTRY : at + index * ENTRY + 32])
            _, _, first, last = struct.unpack_from("<4I", shard, at + index * ENTRY + 32)
            if name not in unpacked:
                unpacked[name] = chunks(xorbs[name])
            content += b"".join(unpacked[name][first:last])
        at += terms * ENTRY * (2 if flags & WITH_VERIFICATION else 1)
        if not flags & WITH_SHA256:
            raise ValueError("a file comes without its SHA-256")
        oid = hash_text(shard[at : at + 32])
        at += ENTRY
        if hashlib.sha256(content).hexdigest() != oid:
            raise ValueError("a file is not what its SHA-256 says")
        yield oid, content


def _ungrouped(data: bytes) -> bytes:
    """Undo the grouping of every fourth byte that precedes compression."""
    out, at = bytearray(len(data)), 0
    for first in range(4):
        length = len(range(first, len(data), 4))
        out[first::4] = data[at : at + length]
        at += length
    return bytes(out)


def _lz4_frame(frame: bytes) -> bytes:
    """Content of an LZ4 frame whose blocks are independent or not, without a dictionary."""
    if frame[:4] != b"\x04\x22\x4d\x18":
        raise ValueError("not an LZ4 frame")
    flags = frame[4]
    at = 7 + (8 if flags & 0x08 else 0)
    out = bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        length = size & 0x7FFFFFFF
        block = frame[at + 4 : at + 4 + length]
        if size >> 31:
            out += block
        else:
            _lz4_block(block, out)
        at += 4 + length + (4 if flags & 0x10 else 0)
    return bytes(out)


def _lz4_block(block: bytes, out: bytearray) -> None:
    """Decompress a block, and append the result to ``out``."""
    at = 0
    while at < len(block):
        token = block[at]
        length, at = _length(block, at + 1, token >> 4)
        out += block[at : at + length]
        at += length
        if at == len(block):
            return
        offset = int.from_bytes(block[at : at + 2], "little")
        length, at = _length(block, at + 2, token & 15)
        start = len(out) - offset
        # What is copied may reach into what the copy itself writes.
        pattern = out[start : start + length + 4]
        out += (pattern * (-(-(length + 4) // len(pattern))))[: length + 4]


def _length(block: bytes, at: int, short: int) -> tuple[int, int]:
    """A length whose first four bits are ``short``, and where what follows it begins."""
    if short < 15:
        return short, at
    while block[at] == 255:
        short, at = short + 255, at + 1
    return short + block[at], at + 1
