"""One tokenizer class over `tokenizers.Tokenizer`: byte-level, a byte-level BPE trained here, or any tokenizer.json.

Text becomes ids with character offsets, so that masks are read off one tokenization of the whole conversation. Control tokens are
recognised in text that a chat template wrote and nowhere else: `shield` swaps the first character of every control string inside a
message for a stand-in of equal length before the template runs, `unshield` swaps it back and returns those positions, and `encode`
reads no control token there. So a user who types `<|end|>` gets the bytes of `<|end|>`.
Deviation: the usual tooling recognises control strings wherever they come from.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as _Tokenizer

from rlhf_jax.data.records import ROLES
from rlhf_jax.errors import UserError, nearest

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SPECIALS = (PAD, BOS, *(f"<|{role}|>" for role in ROLES), END)  # ids 0..5 in every tokenizer made here


@dataclass(frozen=True)
class Stand:
    """Which stand-in hides which first character of a control string, for one conversation."""

    original: dict[str, str | int | None]


class Tokenizer:
    """Text ↔ ids. `pad`, `bos`, `end` name control tokens; padding may be the end token, since no code asks `token == pad`.

    Raises:
      UserError: the tokenizer has no such token.
    """

    def __init__(self, inner: _Tokenizer, *, pad: str = PAD, bos: str = BOS, end: str = END) -> None:
        self._inner = _Tokenizer.from_str(inner.to_str())
        self._literal = _Tokenizer.from_str(inner.to_str())
        self._literal.encode_special_tokens = True  # control strings are ordinary text here
        for tokenizer in (self._inner, self._literal):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        added = self._inner.get_added_tokens_decoder()
        self.specials = {token.content: index for index, token in sorted(added.items()) if token.special}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self.specials, key=lambda s: (-len(s), s)))) or r"(?!)")
        self.pad, self.bos, self.end = pad, bos, end
        self.pad_id, self.bos_id, self.end_id = (self._control(name, token) for name, token in (("pad", pad), ("bos", bos), ("end", end)))

    def _control(self, name: str, token: str) -> int:
        if token not in self.specials:
            hint = nearest(token, self.specials)
            raise UserError(f"config.tokenizer.{name} expected a special token of the tokenizer, got {token!r}{hint}; name one of its own")
        return self.specials[token]

    @classmethod
    def byte_level(cls) -> Tokenizer:
        """One id per UTF-8 byte behind the control tokens: 262 ids, any text, nothing to train."""
        vocab = {token: index for index, token in enumerate((*SPECIALS, *_alphabet()))}
        inner = _Tokenizer(models.BPE(vocab=vocab, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(_added())
        return cls(inner)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with at most `vocab_size` ids, control tokens and 256 bytes included; the same texts give the same merges.

        Args:
          texts: the corpus; control strings in it are plain text.
          vocab_size: ≥ 262; a small corpus may yield fewer.

        Raises:
          UserError: vocab_size is too small or the corpus is empty.
        """
        floor = len(SPECIALS) + 256
        if vocab_size < floor:
            raise UserError(f"config.tokenizer.vocab_size expected at least {floor} (bytes and control tokens), got {vocab_size}; raise it")
        inner = _Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        inner.decoder = decoders.ByteLevel()
        corpus = iter(texts)
        first = next((text for text in corpus if text), None)
        if first is None:
            raise UserError("config.tokenizer.path expected text to train a BPE on, got an empty corpus; name a data file with text")
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=_added(), initial_alphabet=_alphabet(), show_progress=False, min_frequency=2
        )
        inner.train_from_iterator(itertools.chain([first], corpus), trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, pad: str = PAD, bos: str = BOS, end: str = END) -> Tokenizer:
        """Reads a tokenizer.json, or the one in a folder.

        Raises:
          UserError: nothing is there, or it is no tokenizer.json.
        """
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else os.fspath(path)
        if not os.path.isfile(file):
            raise UserError(f"config.tokenizer.path expected a tokenizer.json, got {file!r}, which is not there; check the path")
        try:
            inner = _Tokenizer.from_file(file)
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"config.tokenizer.path expected a tokenizer.json, got {file!r} ({error}); save it again") from None
        return cls(inner, pad=pad, bos=bos, end=end)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json to `path` (a file name), whole or not at all."""
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(self._inner.to_str(pretty=True))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included: every id is below it."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def digest(self) -> str:
        """Hex digest of all that decides ids: the tokenizer.json and the names of pad, bos and end."""
        return hashlib.sha256(json.dumps([self._inner.to_str(), self.pad, self.bos, self.end]).encode()).hexdigest()

    def encode(self, text: str, *, literal: Collection[int] = (), control: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Ids and where in the text each comes from.

        Args:
          text: any Unicode text.
          literal: character positions at which no control token may begin (from `unshield`).
          control: recognise control tokens at all; False for plain text.

        Returns:
          ids [n] int32; offsets [n, 2] int32, characters [start, end). The bytes of one character share its offsets.
        """
        if not control:
            return _arrays([(self._literal.encode(text, add_special_tokens=False), 0)])
        if not literal:
            return _arrays([(self._inner.encode(text, add_special_tokens=False), 0)])
        # `tokenizers` itself splits at added tokens first and handles the pieces apart; here the split skips the literal positions.
        banned, pieces, begin, at = frozenset(literal), [], 0, 0
        while match := self._pattern.search(text, at):
            if match.start() in banned:
                at = match.start() + 1
                continue
            pieces.append((self._literal.encode(text[begin : match.start()], add_special_tokens=False), begin))
            pieces.append((self._inner.encode(match.group(), add_special_tokens=False), match.start()))
            begin = at = match.end()
        pieces.append((self._literal.encode(text[begin:], add_special_tokens=False), begin))
        return _arrays(pieces)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Args:
          ids: [n] token ids.
          skip_special: leave control tokens out.
        """
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def shield(self, contents: Sequence[str]) -> tuple[list[str], Stand]:
        """`contents` with the first character of every control string replaced by a stand-in that occurs in none of them.

        A beginning of a control string at the end of a content is hidden too, so that none forms across the border with the
        template's text. Lengths do not change, and neither do the template's own control strings.

        Args:
          contents: all the message contents of one conversation.

        Returns:
          the shielded contents; what `unshield` needs.
        """
        firsts = sorted({special[0] for special in self.specials if special})
        stand = dict(zip(firsts, unused_characters(contents, len(firsts))))
        return [self._shielded(content, stand) for content in contents], Stand({v: k for k, v in stand.items()})

    def _shielded(self, content: str, stand: dict[str, str]) -> str:
        if not any(first in content for first in stand):
            return content
        letters, tail = list(content), len(content.rstrip())
        for special in self.specials:
            start = content.find(special)
            while start >= 0:
                letters[start] = stand[special[0]]
                start = content.find(special, start + 1)
            for end in {tail, len(content)}:  # a template may strip the white space behind
                for size in range(1, min(len(special) - 1, end) + 1):
                    if content.endswith(special[:size], 0, end):
                        letters[end - size] = stand[special[0]]
        return "".join(letters)

    @staticmethod
    def unshield(text: str, stand: Stand) -> tuple[str, list[int]]:
        """The text with its own characters back, and the positions of those that were hidden, for `encode(literal=…)`."""
        literal = [i for i, letter in enumerate(text) if letter in stand.original]
        return (text.translate(str.maketrans(stand.original)), literal) if literal else (text, [])


def unused_characters(texts: Sequence[str], count: int) -> list[str]:
    """`count` private-use characters (planes 15 and 16) that occur in none of `texts`.

    Raises:
      UserError: the texts use all of them.
    """
    used = set().union(*texts) if texts else set()
    codes = itertools.chain(range(0x10F000, 0x10FFFE), range(0xF0000, 0xFFFFE), range(0x100000, 0x10F000))
    found = list(itertools.islice((chr(code) for code in codes if chr(code) not in used), count))
    if len(found) < count:
        raise UserError("a message expected some unused private-use character, got text with all of them; remove them from the message")
    return found


def _added() -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in SPECIALS]


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _arrays(pieces: list) -> tuple[np.ndarray, np.ndarray]:
    ids = [np.asarray(encoding.ids, np.int32) for encoding, _ in pieces]
    offsets = [np.asarray(encoding.offsets, np.int32).reshape(-1, 2) + np.int32(begin) for encoding, begin in pieces]
    return np.concatenate(ids), np.concatenate(offsets)
