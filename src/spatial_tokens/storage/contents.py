"""What a file is, by its first bytes: for an error when it is given as a weight file."""

import codecs
from pathlib import Path

LFS_POINTER = "version https://git-lfs.github.com/spec/"

_WEB_PAGE = "a web page instead of the file: log in, accept the model's license or correct the address, and download it again"
_ARCHIVE = "a {} archive: unpack it first"
_FIRST_BYTES = {
    LFS_POINTER.encode(): "a Git LFS pointer instead of the file: run 'git lfs pull' in its repository",
    b"/annex/objects/": "a git-annex pointer instead of the file: run 'git annex get' in its repository",
    b"<!doctype html": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"<?xml": "an XML document, such as a server's error message: download the file again",
    b"\x1f\x8b": _ARCHIVE.format("gzip"),
    b"BZh": _ARCHIVE.format("bzip2"),
    b"\xfd7zXZ\0": _ARCHIVE.format("xz"),
    b"7z\xbc\xaf\x27\x1c": _ARCHIVE.format("7z"),
    b"\x28\xb5\x2f\xfd": _ARCHIVE.format("zstd"),
    b"Rar!": _ARCHIVE.format("rar"),
    b"GGUF": "a GGUF file of llama.cpp: use the checkpoint that it was converted from",
    b"\x89HDF\r\n": "an HDF5 file, such as TensorFlow's: use the PyTorch checkpoint",
    b"\x93NUMPY": "a NumPy array: use the PyTorch checkpoint",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
}


def described(path: Path) -> str | None:
    """What a file is and what to do about it, as the end of a sentence; None if it may be the weights that its name says."""
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError:
        return None
    if not start:
        return "empty: download or write it again"
    if not start.strip(b"\0"):
        return "zeros where its header should be: download or copy it again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for first, kind in _FIRST_BYTES.items():
        if start.startswith(first) or text.lower().startswith(first):
            return kind
    if start[257:262] == b"ustar":
        return _ARCHIVE.format("tar")
    return _misnamed(path, start) or _text(text)


def _misnamed(path: Path, start: bytes) -> str | None:
    """Weights of another kind than the file's name says, or a zip archive, which PyTorch's own files are too."""
    zipped, pickled = start.startswith(b"PK\x03\x04"), start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"
    if zipped and b"data.pkl" not in start:
        return _ARCHIVE.format("zip")
    if path.suffix == ".safetensors":
        return "a PyTorch file: rename it to end in .bin" if zipped or pickled else None
    header = int.from_bytes(start[:8], "little")
    return "a safetensors file: rename it to end in .safetensors" if start[8:9] == b"{" and header < path.stat().st_size else None


def _text(text: bytes) -> str | None:
    try:
        words = codecs.getincrementaldecoder("utf-8")().decode(text)  # which takes a last character that is cut in two
    except UnicodeDecodeError:
        return None
    if not words or not all(each.isprintable() or each.isspace() for each in words):
        return None
    kind = "JSON" if words[0] in "{[" else "text"
    return f"{kind} instead of weights: {' '.join(words.split())[:80]!r}"
