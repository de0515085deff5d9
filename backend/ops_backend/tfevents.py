"""Records of a TensorBoard event file: the few fields of Event, Summary and TensorProto that a scalar takes.

Field numbers are those of tensorboard/compat/proto/{event,summary,tensor}.proto. A scalar is a tensor of one double: it
keeps the 64 bits, where `simple_value` is a float32.
"""

import struct
from collections.abc import Mapping

import google_crc32c

_VARINT, _DOUBLE, _BYTES = 0, 1, 2
_DT_DOUBLE = 2
_DATA_CLASS_SCALAR = 1


def record(data: bytes) -> bytes:
    """One record of a TFRecord file: length, its checksum, data, its checksum."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def file_version(wall_time_s: float) -> bytes:
    """The first event of a file."""
    return _double(1, wall_time_s) + _bytes(3, b"brain.Event:2")


def scalars(wall_time_s: float, step: int, values: Mapping[str, float]) -> bytes:
    """One event with every value of a step."""
    summary = b"".join(_bytes(1, _value(name, value)) for name, value in values.items())
    return _double(1, wall_time_s) + _varint(2, step) + _bytes(5, summary)


def _value(name: str, value: float) -> bytes:
    return _bytes(1, name.encode()) + _TENSOR + struct.pack("<d", value) + _SCALAR


def _double(field: int, value: float) -> bytes:
    return _number(field << 3 | _DOUBLE) + struct.pack("<d", value)


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3 | _VARINT) + _number(value)


def _bytes(field: int, data: bytes) -> bytes:
    return _number(field << 3 | _BYTES) + _number(len(data)) + data


def _number(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _masked(data: bytes) -> bytes:
    crc: int = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


# TensorProto, but for its eight last bytes, and SummaryMetadata, which says what plugin shows it.
_TENSOR = _bytes(8, _varint(1, _DT_DOUBLE) + _bytes(2, b"") + _bytes(6, bytes(8)))[:-8]
_SCALAR = _bytes(9, _bytes(1, _bytes(1, b"scalars")) + _varint(4, _DATA_CLASS_SCALAR))
