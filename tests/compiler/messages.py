"""Reads the launch message: protocol buffers, without their library."""

import struct
import zlib


def fields(message: bytes) -> list[tuple[int, int | float | bytes]]:
    """A message's fields: numbers with values, messages in it still encoded."""
    found, at = [], 0

    def varint():
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        match tag & 7:
            case 0:
                value = varint()
            case 2:
                size = varint()
                value, at = message[at : at + size], at + size
            case 5:
                (value,), at = struct.unpack_from("<f", message, at), at + 4
            case wire_type:
                raise ValueError(f"a field of wire type {wire_type}")
        found.append((tag >> 3, value))
    return found


def call_fields(payload: bytes) -> list[tuple[int, int | bytes]]:
    """Of TritonAnyKernelCall.kernel_call, both parts in a row."""
    return [f for number, value in fields(zlib.decompress(payload)) if number == 1 for f in fields(value)]


def kernel_fields(payload: bytes) -> dict:
    """Of TritonAnyKernelCall.kernel_call.kernel, both parts merged."""
    return dict(f for number, value in call_fields(payload) if number == 1 for f in fields(value))
