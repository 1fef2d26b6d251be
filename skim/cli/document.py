"""Read what the user asks about: files and standard input become one document.

Several files are joined in the order given, each under a header with its name, so that an answer
can say where it comes from. Refuses files that cannot be read or are not UTF-8, and no text at all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from skim.errors import InvalidRequest

STDIN = "-"


def read_document(files: Sequence[str]) -> str:
    """Text of the files; `-` is standard input.

    Raises:
        InvalidRequest: names the file, and the first byte that is not UTF-8.
    """
    texts = [_read(name) for name in files]
    if len(files) > 1:
        names = ["standard input" if name == STDIN else name for name in files]
        texts = [f"# {name}\n\n{text}" for name, text in zip(names, texts, strict=True)]
    document = "\n\n".join(texts)
    if not document.strip():
        raise InvalidRequest.field_value("file", "nothing but whitespace", "a text")
    return document


def _read(name: str) -> str:
    try:
        if name == STDIN:
            data = sys.stdin.buffer.read()
        else:
            with open(name, "rb") as file:
                data = file.read()
    except OSError as error:
        raise InvalidRequest(
            f"file {name}: {error.strerror}", field="file", got=name, allowed="a readable file"
        ) from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"file {name} must be UTF-8, got invalid byte 0x{data[error.start]:02x} "
            f"at offset {error.start}",
            field="file",
            reason="INVALID_UTF8",
            got=f"0x{data[error.start]:02x} at byte {error.start}",
            allowed="UTF-8",
        ) from None
