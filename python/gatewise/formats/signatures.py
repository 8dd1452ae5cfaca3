"""What kind of file begins with some bytes: for messages about files of another kind than expected."""

from __future__ import annotations

SIGNATURES = {
    b"\x89HDF\r\n\x1a\n": "HDF5, as in .h5",
    b"PK\x03\x04": "a zip archive, as in .keras, .pt and .npz",
    b"\x93NUMPY": "an array of NumPy, as in .npy",
    b"\x1f\x8b": "data that gzip compressed",
}
SAFETENSORS = "safetensors"
TEXT = {*range(0x20, 0x7F), *b"\t\n\r\f"}


def described(head: bytes) -> str:
    """The kind of a file that begins with these bytes, of which some 64 are enough."""
    for signature, name in SIGNATURES.items():
        if head.startswith(signature):
            return name
    if not head:
        return "nothing"
    if head[4:8] == b"TFL3":
        return "a model of TensorFlow Lite, as in .tflite"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a pickle, as in .pkl and in old .pt"
    if head.lstrip()[:1] in (b"{", b"["):
        return "JSON"
    if set(head) <= TEXT:
        return "text"
    if head[:1] in (b"\x08", b"\x0a"):  # the first field of a message, a number or a message
        return "protobuf, as in .onnx and .pb"
    return "bytes of no known format"
