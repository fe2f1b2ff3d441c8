"""SentencePiece's precompiled character map: replacements of character sequences, held in a compact double array.

Layout: a little-endian uint32 with the byte length of the array, the array of uint32 nodes, then NUL-terminated UTF-8
replacements. A node packs BASE in bits 10 to 30 (shifted by 8 more if bit 9 is set), LEAF in bit 8 and the label in
bits 0 to 7; a leaf's BASE leads to a node with bit 31 set that holds the replacement's offset (Kanda, "Space- and
Time-Efficient String Dictionaries", 2018). All of it is untrusted: every index is checked.
"""

import re
import struct

from ..errors import TokenizerError

_VALUE = 0x7FFFFFFF
_LONGEST_ENTRY = 1024  # bytes; a damaged array may hold a cycle

_Trie = dict[int, "_Trie"]


class Charsmap:
    """Normalises text by a precompiled character map (none if empty), leaving the beginnings of user-defined tokens."""

    def __init__(self, blob: bytes, user_defined: list[str]):
        self._nodes: tuple[int, ...] = ()
        self._replacements = b""
        if blob:
            if len(blob) < 4:
                raise TokenizerError(
                    f"tokenizer.ggml.precompiled_charsmap: {len(blob)} bytes are too few; 5 are the least"
                )
            (size,) = struct.unpack_from("<I", blob)
            if size + 4 >= len(blob):
                raise TokenizerError(
                    f"tokenizer.ggml.precompiled_charsmap: an array of {size} bytes does not fit {len(blob)} bytes"
                )
            self._nodes = struct.unpack_from(f"<{size // 4}I", blob, 4)
            self._replacements = blob[4 + size :]
        self._kept: _Trie = {}
        for token in user_defined:
            place = self._kept
            for byte in token.encode("utf-8", "surrogateescape"):
                place = place.setdefault(byte, {})
        self._plain = self._plain_runs()

    def normalize(self, text: str) -> str:
        """The text with every longest entry replaced; TokenizerError where the map points outside itself."""
        if not self._nodes and not self._kept:
            return text
        data = text.encode()
        out: list[bytes] = []
        at = 0
        while at < len(data):
            plain = self._plain.match(data, at)
            if plain:
                out.append(plain[0])
                at = plain.end()
                continue
            length = self._kept_prefix(data, at)
            replacement = data[at : at + length]
            if not length and self._nodes:
                length, replacement = self._longest(data, at)
            if not length:
                length = _utf8_length(data, at)
                replacement = data[at : at + length] if length else b"\xef\xbf\xbd"
            out.append(replacement)
            at += length or 1
        return b"".join(out).decode("utf-8", "surrogateescape")

    def _plain_runs(self) -> re.Pattern[bytes]:
        """An expression for runs of ASCII characters that the map leaves alone.

        A character is plain if no entry is it or begins with it and another plain character, and no user-defined token
        begins with it. The last of a run is left out unless the text ends there: it may combine with what follows."""
        plain = [byte for byte in range(1, 128) if byte not in self._kept]
        if self._nodes:
            plain = [byte for byte in plain if not self._longest(bytes([byte]), 0)[0]]
            plain = [byte for byte in plain if not any(self._reaches(bytes([byte, after])) for after in plain)]
        if not plain:
            return re.compile(rb"(?!)")
        inside = b"".join(re.escape(bytes([byte])) for byte in plain)
        return re.compile(rb"[%b]+(?=[%b]|\Z)" % (inside, inside))

    def _kept_prefix(self, data: bytes, at: int) -> int:
        """The length of the longest beginning of a user-defined token here, however short: it stays as it is."""
        place = self._kept
        end = at
        while end < len(data) and data[end] in place:
            place = place[data[end]]
            end += 1
        return end - at

    def _node(self, index: int) -> int:
        if index >= len(self._nodes):
            raise TokenizerError(
                f"tokenizer.ggml.precompiled_charsmap: node {index} is outside the array of {len(self._nodes)} nodes"
            )
        return self._nodes[index]

    def _reaches(self, data: bytes) -> bool:
        """Whether some entry of the map begins with these bytes."""
        index = _base(self._node(0))
        for byte in data:
            index ^= byte
            node = self._node(index)
            if node & (1 << 31 | 0xFF) != byte:
                return False
            index ^= _base(node)
        return True

    def _longest(self, data: bytes, at: int) -> tuple[int, bytes]:
        """(length of the longest entry that data continues with, its replacement), or (0, b"")."""
        index = _base(self._node(0))
        length = offset = 0
        for i in range(at, min(len(data), at + _LONGEST_ENTRY)):
            byte = data[i]
            if byte == 0:
                break
            index ^= byte
            node = self._node(index)
            if node & (1 << 31 | 0xFF) != byte:
                break
            index ^= _base(node)
            if node >> 8 & 1:
                length = i - at + 1
                offset = self._node(index) & _VALUE
        if not length:
            return 0, b""
        end = self._replacements.find(b"\0", offset)
        if offset >= len(self._replacements) or end < 0:
            raise TokenizerError(
                f"tokenizer.ggml.precompiled_charsmap: no replacement at byte {offset} of {len(self._replacements)}"
            )
        return length, self._replacements[offset:end]


def _base(node: int) -> int:
    return (node >> 10) << ((node & 1 << 9) >> 6)


def _utf8_length(data: bytes, at: int) -> int:
    """The length of the UTF-8 sequence at a place, 0 if there is none."""
    lead = data[at]
    length = 1 if lead < 0x80 else 2 if lead >> 5 == 6 else 3 if lead >> 4 == 14 else 4 if lead >> 3 == 30 else 0
    tail = data[at + 1 : at + length]
    return length if len(tail) == length - 1 and all(byte >> 6 == 2 for byte in tail) else 0
