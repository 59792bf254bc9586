"""A torrent file (BEP 3, version 1) of one file."""

import hashlib
from pathlib import Path
from typing import TypeAlias

Bencodable: TypeAlias = "int | bytes | str | dict[str, Bencodable]"


def bencode(value: Bencodable) -> bytes:
    """BEP 3's encoding; keys of dictionaries are sorted."""
    match value:
        case int():
            return b"i%de" % value
        case str():
            return bencode(value.encode())
        case bytes():
            return b"%d:%s" % (len(value), value)
        case dict():
            pairs = (bencode(key) + bencode(value[key]) for key in sorted(value))
            return b"d" + b"".join(pairs) + b"e"


def make(source: Path, *, piece_bytes: int, announce: str) -> tuple[bytes, bytes]:
    """The torrent of the file, and its info hash."""
    pieces = bytearray()
    with source.open("rb") as file:
        while piece := file.read(piece_bytes):
            pieces += hashlib.sha1(piece, usedforsecurity=False).digest()
    info: dict[str, Bencodable] = {
        "length": source.stat().st_size,
        "name": source.name,
        "piece length": piece_bytes,
        "pieces": bytes(pieces),
    }
    info_hash = hashlib.sha1(bencode(info), usedforsecurity=False).digest()
    return bencode({"announce": announce, "info": info}), info_hash
