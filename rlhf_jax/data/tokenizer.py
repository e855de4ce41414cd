"""One tokenizer class over `tokenizers.Tokenizer`: byte-level, a byte-level BPE trained here, or any tokenizer.json.

Text becomes ids with character offsets, so that masks are read off one tokenization of the whole conversation. Control tokens are
recognised in text that a chat template wrote and nowhere else: `shield` swaps the first character of every control string inside a
message for a stand-in of equal length before the template runs, `unshield` swaps it back and returns those positions, and `encode`
reads no control token there. So a user who types `<|end|>` gets the bytes of `<|end|>`.
Deviation: the usual tooling recognises control strings wherever they come from. Added tokens that are not special (`<think>` of some
models) are part of the language: they are recognised everywhere, here too.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as _Tokenizer

from rlhf_jax.errors import UserError, nearest
from rlhf_jax.files import write_whole

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SPECIALS = (PAD, BOS, "<|system|>", "<|user|>", "<|assistant|>", END)  # ids 0..5 in every tokenizer made here
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Stand:
    """Which stand-in hides which first character of a control string, for one conversation."""

    original: dict[str, str | int | None]


class Tokenizer:
    """Text ↔ ids. `pad`, `bos`, `end` name control tokens; padding may be the end token, since no code asks `token == pad`.

    Args:
      inner: the tokenizer of the `tokenizers` library; it is copied.
      pad: written on padding.
      bos: begins a document; None or "" where the model has none (Qwen).
      end: what an assistant's turn ends with.
      eos: what a document ends with, where that is another token (Gemma's `<eos>` beside `<end_of_turn>`); None: `end`.
      stops: ids of more tokens that end a generation; any tokens, some models list a line break.
      config: the tokenizer_config.json that it came with, kept for the way back and for the template's variables.

    Raises:
      UserError: the tokenizer has no such token.
    """

    def __init__(
        self, inner: _Tokenizer, *, pad: str = PAD, bos: str | None = BOS, end: str = END, eos: str | None = None, stops: Sequence[int] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._inner = _Tokenizer.from_str(inner.to_str())
        self._inner.no_padding()
        self._inner.no_truncation()
        added = self._inner.get_added_tokens_decoder()
        self.added = {token.content: index for index, token in sorted(added.items())}  # never split, wherever they stand
        self.specials = {token.content: index for index, token in sorted(added.items()) if token.special}  # not in messages
        longest_first = sorted(self.specials, key=lambda special: (-len(special), special))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._begins = re.compile(f"(?={self._pattern.pattern})")  # matches at every first character, of overlapping ones too
        self._firsts = sorted({special[0] for special in self.specials if special})
        self._beginnings = {special[:size] for special in self.specials for size in range(1, len(special))}
        self._longest = max(map(len, self.specials), default=0)
        self._wide = {index for index, token in added.items() if (token.lstrip or token.rstrip) and token.content.strip()}
        self._normalized = any(token.normalized for token in added.values() if token.special)
        self._reader: tuple[dict[str, str], _Tokenizer] | None = None
        self.pad, self.bos, self.end, self.eos = pad, bos or None, end, eos or end
        self.stops, self.config = tuple(map(int, stops)), None if config is None else dict(config)
        self.pad_id, self.end_id, self.eos_id = (self._control(k, v) for k, v in (("pad", pad), ("end", end), ("eos", self.eos)))
        self.bos_id = None if self.bos is None else self._control("bos", self.bos)
        self.stop_ids = tuple(dict.fromkeys((self.end_id, self.eos_id, *self.stops)))

    def _control(self, name: str, token: str) -> int:
        if token not in self.specials:
            hint = nearest(token, self.specials)
            raise UserError(f"config.tokenizer.{name} expected a special token of the tokenizer, got {token!r}{hint}; name one of its own")
        return self.specials[token]

    @property
    def control_tokens(self) -> dict[str, Any]:
        """The constructor's other arguments as JSON values, those at their default left out: what `load(path, **control_tokens)` takes."""
        more = {"eos": self.eos if self.eos != self.end else None, "stops": list(self.stops), "config": self.config}
        return {"pad": self.pad, "bos": self.bos, "end": self.end} | {name: value for name, value in more.items() if value}

    @property
    def variables(self) -> dict[str, str]:
        """What a chat template may read: `bos_token`, `eos_token` … as `transformers` has them; one that is missing is undefined."""
        if self.config is None:
            named = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
            return {name: token for name, token in named.items() if token}
        return {name: token for name, token in self.config.items() if name.endswith("_token") and isinstance(token, str)}

    def replace(self, **changes: Any) -> Tokenizer:
        """A copy with other constructor arguments, `inner` among them.

        Args:
          **changes: by name.
        """
        return Tokenizer(changes.pop("inner", self._inner), **(self.control_tokens | changes))

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
    def load(cls, path: str | os.PathLike[str], **control_tokens: Any) -> Tokenizer:
        """Reads a tokenizer.json, or the one in a folder.

        Args:
          path: the file or the folder.
          **control_tokens: pad, bos, end … as the constructor takes them.

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
        return cls(inner, **control_tokens)

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return self._inner.to_str(pretty=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json to `path` (a file name), whole or not at all."""
        write_whole(path, self.to_json())

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included: every id is below it."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def has_byte_tokens(self) -> bool:
        """Whether the decoder joins tokens such as `<0xE2>` to characters, as SentencePiece vocabularies have them."""
        return self._inner.decoder is not None and b"ByteFallback" in self._inner.decoder.__getstate__()

    @functools.cached_property
    def digest(self) -> str:
        """Hex digest of all that decides ids: the tokenizer.json and the names of pad, bos, end and eos."""
        names = [self.pad, self.bos, self.end] + ([self.eos] if self.eos != self.end else [])
        return hashlib.sha256(json.dumps([self._inner.to_str(), *names]).encode()).hexdigest()

    def reads_like(self, other: Tokenizer) -> bool:
        """Whether both give every token the same id, so that networks of the one can read rows of the other."""
        return self._inner.get_vocab(with_added_tokens=True) == other._inner.get_vocab(with_added_tokens=True)

    def token(self, index: int) -> str | None:
        """The token with this id, as the vocabulary spells it; None where there is none.

        Args:
          index: ≥ 0.
        """
        return self._inner.id_to_token(index)

    def encode(self, text: str, *, literal: Collection[int] = (), control: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Ids and where in the text each comes from; nothing is put before or behind.

        Args:
          text: any Unicode text.
          literal: character positions at which no control token may begin (from `unshield`).
          control: recognise control tokens at all; False for plain text.

        Returns:
          ids [n] int32; offsets [n, 2] int32, characters [start, end). The bytes of one character share its offsets.

        Raises:
          UserError: the vocabulary has no other way to write a control string than the control token.
        """
        hidden: list[int] = []
        if literal or not control:
            banned = frozenset(literal)
            hidden = [match.start() for match in self._begins.finditer(text) if not control or match.start() in banned]
        if not hidden and not self._normalized:
            return self._arrays(text, self._inner.encode(text, add_special_tokens=False))
        ids, offsets = self._arrays(text, self._read(text, hidden))
        forged = np.isin(ids, list(self.specials.values())) & np.isin(offsets[:, 0], hidden)
        if forged.any():  # a vocabulary of whole words, or Unigram's, has control tokens among its ordinary pieces
            raise UserError(f"a message expected text, got {self.token(int(ids[forged][0]))!r}, which this tokenizer cannot write as text; remove it")
        return ids, offsets

    def encode_document(self, text: str) -> np.ndarray:
        """Ids [n] int32 of raw text as `transformers` gives them for `tokenizer(text)`: the tokenizer's own post-processor adds BOS or EOS,
        and control strings in the text are control tokens.

        Args:
          text: any Unicode text.
        """
        return np.asarray(self._inner.encode(text).ids, np.int32)

    def _read(self, text: str, hidden: Sequence[int]) -> Encoding:
        """The whole text in one pass, control tokens at `hidden` excepted.

        Encoding the pieces between control tokens apart would give other ids: Metaspace writes its mark before the first piece only,
        and a token may swallow the white space beside it. So a stand-in goes through the library's search for added tokens, and the
        first step of its normalizer puts the character itself back, offsets included.
        """
        stand = dict(zip(self._firsts, map(chr, range(0x10F000, 0x10FFFE))))
        if any(letter in text for letter in stand.values()):
            stand = dict(zip(self._firsts, unused_characters([text], len(self._firsts))))
        if self._reader is None or self._reader[0] != stand:
            self._reader = (stand, self._with_stand_ins(stand))
        letters = list(text)
        for position in hidden:
            letters[position] = stand[text[position]]
        return self._reader[1].encode("".join(letters), add_special_tokens=False)

    def _with_stand_ins(self, stand: Mapping[str, str]) -> _Tokenizer:
        """The tokenizer with stand-ins as another spelling of the characters; special tokens are searched for in the text as written, since
        a normalized one would be found after the stand-ins are gone."""
        layout = json.loads(self._inner.to_str())
        for token in layout["added_tokens"]:
            token["normalized"] = token["normalized"] and not token["special"]
        steps = [{"type": "Replace", "pattern": {"String": hidden}, "content": letter} for letter, hidden in stand.items()]
        own = [layout["normalizer"]] if layout["normalizer"] else []
        layout["normalizer"] = {"type": "Sequence", "normalizers": [*steps, *own]}
        return _Tokenizer.from_str(json.dumps(layout))

    def _arrays(self, text: str, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray(encoding.ids, np.int32)
        offsets = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
        if self._wide:  # the white space beside such a token is not its own: it may be the answer's
            for at in np.flatnonzero(np.isin(ids, list(self._wide))):
                covered = text[offsets[at, 0] : offsets[at, 1]]
                offsets[at] += (len(covered) - len(covered.lstrip()), len(covered.rstrip()) - len(covered))
        return ids, offsets

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Args:
          ids: [n] token ids.
          skip_special: leave control tokens out.
        """
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Turns ids into text as they arrive.

        Args:
          skip_special: leave control tokens out.
        """
        return TextStream(self, skip_special)

    def shield(self, contents: Sequence[str]) -> tuple[list[str], Stand]:
        """`contents` with the first character of every control string replaced by a stand-in that occurs in none of them.

        A beginning of a control string at the end of a content is hidden too, so that none forms across the border with the
        template's text. Lengths do not change, and neither do the template's own control strings.

        Args:
          contents: all the message contents of one conversation.

        Returns:
          the shielded contents; what `unshield` needs.
        """
        stand = dict(zip(self._firsts, unused_characters(contents, len(self._firsts), printable=True)))
        return [self._shielded(content, stand) for content in contents], Stand({v: k for k, v in stand.items()})

    def _shielded(self, content: str, stand: dict[str, str]) -> str:
        if not any(first in content for first in stand):
            return content
        hidden = {match.start() for match in self._begins.finditer(content)}
        for end in (len(content.rstrip()), len(content)):  # a template may strip the white space behind
            hidden |= {at for at in range(max(end - self._longest, 0), end) if content[at:end] in self._beginnings}
        return "".join(stand[letter] if at in hidden else letter for at, letter in enumerate(content)) if hidden else content

    @staticmethod
    def unshield(text: str, stand: Stand) -> tuple[str, list[int]]:
        """The text with its own characters back, and the positions of those that were hidden, for `encode(literal=…)`."""
        literal = [i for i, letter in enumerate(text) if letter in stand.original]
        return (text.translate(str.maketrans(stand.original)), literal) if literal else (text, [])


class TextStream:
    """Text of ids that arrive one by one: `"".join(map(push, ids)) + finish()` is `decode(ids)`.

    A character is held back until its bytes are complete. Byte tokens of a SentencePiece vocabulary are read as one run, which is
    all text or all U+FFFD, so the run is held back until it ends. Each piece is the difference of two decodings that begin at the same
    earlier token, because decoders treat the first token of a text apart (they drop its leading space).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, frozenset(tokenizer.specials.values()) if skip_special else frozenset()
        self._runs = tokenizer.has_byte_tokens
        self._window: list[int] = []  # begins with a token whose text is out, or is all there was
        self._known = ""  # text of the window that is out

    def push(self, index: int) -> str:
        """The text that this id completes, often one token's, sometimes "".

        Args:
          index: a token id.
        """
        index = int(index)
        token = self._tokenizer.token(index)
        if token is None or index in self._skip:
            return ""
        self._window.append(index)
        if self._runs and _BYTE.fullmatch(token):
            return ""
        text = self._text()
        whole = text.removesuffix("\ufffd")  # an incomplete character is decoded as one U+FFFD
        piece, self._known = whole[len(self._known) :], whole
        if whole == text:
            self._window = [index]
            self._known = self._text()
        return piece

    def finish(self) -> str:
        """What is still held back, incomplete characters as U+FFFD."""
        text = self._text()
        piece, self._known = text[len(self._known) :], text
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special=False)


def unused_characters(texts: Sequence[str], count: int, *, printable: bool = False) -> list[str]:
    """`count` private-use characters (planes 15 and 16) that occur in none of `texts`.

    Args:
      texts: to avoid.
      count: how many.
      printable: rare ideographs (extension D) first: a template that prints an object as Python does would escape private-use characters.

    Raises:
      UserError: the texts use all of them.
    """
    used = set().union(*texts) if texts else set()
    letters = range(0x2B740, 0x2B81E) if printable else ()
    codes = itertools.chain(letters, range(0x10F000, 0x10FFFE), range(0xF0000, 0xFFFFE), range(0x100000, 0x10F000))
    found = list(itertools.islice((chr(code) for code in codes if chr(code) not in used), count))
    if len(found) < count:
        raise UserError("a message expected some unused private-use character, got text with all of them; remove them from the message")
    return found


def _added() -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in SPECIALS]


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())
