"""Content codings of request bodies (RFC 9110, 8.4): gzip and deflate, decoded within the limit."""

from __future__ import annotations

import zlib
from typing import Final

from octavo.errors import BadRequestError, ContentCodingError
from octavo.server.http import limits

# Coding -> zlib's window bits: gzip's frame, or zlib's.
_WINDOW_BITS: Final = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
# Parts that a gzip body may consist of. zlib copies all that is left behind each.
_MAX_MEMBERS: Final = 64


def coding_of(value: bytes | None) -> bytes | None:
    """The coding that a Content-Encoding header names, None where the body is plain.

    Raises:
        ContentCodingError: one that is not decoded here, or several on top of each other.
    """
    coding = (value or b"").strip().lower()
    if coding in (b"", b"identity"):
        return None
    if coding not in _WINDOW_BITS:
        shown = coding[:100].decode("latin-1")
        raise ContentCodingError(
            f"the request's Content-Encoding {shown!r} is not supported; known: gzip, deflate"
        )
    return coding


def decode_body(body: bytes | bytearray, coding: bytes) -> bytes:
    """A body as it was before its coding, in memory for MAX_BODY_BYTES at most.

    Raises:
        BodyTooLargeError: it becomes longer.
        BadRequestError: it is not of this coding, or ends in its middle.
    """
    parts: list[bytes] = []
    room = limits.MAX_BODY_BYTES + 1
    rest = bytes(body)
    try:
        for _ in range(_MAX_MEMBERS):
            if not rest:
                break
            stream = zlib.decompressobj(_window_bits(rest, coding))
            parts.append(stream.decompress(rest, room))
            room -= len(parts[-1])
            limits.check_body_size(limits.MAX_BODY_BYTES + 1 - room)
            if not stream.eof:
                raise zlib.error("incomplete")
            # Members of gzip may follow one another, filled up with zeros.
            rest = stream.unused_data.lstrip(b"\0")
        if rest:
            raise zlib.error("too many members")
    except zlib.error:
        raise BadRequestError(f"the request body is not valid {coding.decode()}") from None
    return b"".join(parts)


def _window_bits(data: bytes, coding: bytes) -> int:
    # Some clients leave out zlib's frame, whose first two bytes hold method 8 and are together a
    # multiple of 31 (RFC 1950).
    is_framed = data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0
    return -15 if coding == b"deflate" and not is_framed else _WINDOW_BITS[coding]
