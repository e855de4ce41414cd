"""The bytes that each token adds to a text, read off a tokenizer's decoder.

Joined, the bytes of a row's tokens are its decoded text, so that a text can be looked for across token borders. Control tokens add nothing.
Deviation: a decoder that treats the first token of a text apart (it drops a leading space) is followed from the second one on, and white space that
a WordPiece decoder tidies away before punctuation is kept.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from tokenizers import pre_tokenizers

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_NEUTRAL = ("Fuse", "Strip")  # join pieces, or trim the ends of the whole text
_SIZE = 256  # bytes


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """What each id adds to the text; empty for control tokens and for ids without a token.

    Args:
      tokenizer: any; `vocab_size` ids.

    Raises:
      UserError: its decoder is of a kind whose pieces cannot be read one by one.
    """
    steps = _steps(json.loads(tokenizer.to_json()).get("decoder"))
    control = set(tokenizer.specials.values())
    tokens = ((None if index in control else tokenizer.token(index)) for index in range(tokenizer.vocab_size))
    return [b"" if token is None else _spelled(token, steps) for token in tokens]


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return [{"type": "Spaced"}]
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _spelled(token: str, steps: list[dict[str, Any]]) -> bytes:
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            letters = _letters()
            return bytes(letters[letter] for letter in token) if all(letter in letters for letter in token) else token.encode()
        if kind == "ByteFallback" and (byte := _BYTE.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if kind == "Replace" and "String" in step["pattern"]:
            token = token.replace(step["pattern"]["String"], step["content"])
        elif kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif kind == "WordPiece":
            token = token.removeprefix(step["prefix"]) if token.startswith(step["prefix"]) else " " + token
        elif kind == "BPEDecoder":
            token = token.removesuffix(step["suffix"]) + " " if token.endswith(step["suffix"]) else token
        elif kind == "Spaced":
            token = " " + token
        elif kind not in (*_NEUTRAL, "ByteFallback"):
            raise UserError(f"texts cannot be looked for in the tokens of a tokenizer with a {kind!r} decoder: name token ids in their place")
    return token.encode()


@functools.cache
def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for: printable ones themselves, the others in order from U+0100 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    printable = [byte for byte in range(_SIZE) if chr(byte) in alphabet]
    others = [byte for byte in range(_SIZE) if chr(byte) not in alphabet]
    return {chr(byte): byte for byte in printable} | {chr(_SIZE + at): byte for at, byte in enumerate(others)}
