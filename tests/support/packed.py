"""Contents of files as other programs pack them."""

from __future__ import annotations

import pyarrow as pa


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return bytes(sink.getvalue().to_pybytes())
