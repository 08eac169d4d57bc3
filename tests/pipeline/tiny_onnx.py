"""ONNX files of one node, written without the library: protobuf messages are tags, lengths and bytes."""

from pathlib import Path

FLOAT, INT = 1, 7


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, value: bytes | str | int) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor_value(name: str, dims: tuple[str | int, ...]) -> bytes:
    shape = b"".join(_field(1, _field(2, d) if isinstance(d, str) else _field(1, d)) for d in dims)
    return _field(1, name) + _field(2, _field(1, _field(1, FLOAT) + _field(2, shape)))


def write_mean_model(path: Path, side: int = 4, channels_first: bool = True) -> Path:
    """images -> the mean of each colour, [N, 3]: a ReduceMean over rows and columns."""
    dims = ("N", 3, side, side) if channels_first else ("N", side, side, 3)
    axes = (2, 3) if channels_first else (1, 2)
    over = _field(1, "axes") + b"".join(_field(8, axis) for axis in axes) + _field(20, INT)
    flat = _field(1, "keepdims") + _field(3, 0) + _field(20, 2)
    node = _field(1, "images") + _field(2, "means") + _field(4, "ReduceMean") + _field(5, over) + _field(5, flat)
    graph = (
        _field(1, node)
        + _field(2, "mean")
        + _field(11, _tensor_value("images", dims))
        + _field(12, _tensor_value("means", ("N", 3)))
    )
    path.write_bytes(_field(1, 7) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return path
