"""What each token adds to a text: joined, the decoded text."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models

from rlhf_jax.data.spelling import token_bytes
from rlhf_jax.data.tokenizer import END, SPECIALS, Tokenizer
from rlhf_jax.errors import UserError

TEXT = "Sorted: 1 2 3, naïve – 日本語 👍🏽\n\tabab "


def pieces(decoder: object, *words: str) -> Tokenizer:
    """A vocabulary of control tokens, all bytes as `<0xNN>`, and words."""
    vocabulary = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    inner = Inner(models.BPE({token: index for index, token in enumerate(vocabulary)}, [], byte_fallback=True))
    inner.decoder = decoder
    inner.add_special_tokens(list(SPECIALS))
    return Tokenizer(inner)


METASPACE = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
TOKENIZERS = {
    "byte": Tokenizer.byte_level(),
    "bpe": Tokenizer.train_bpe([TEXT] * 4, 290),
    "sentencepiece": pieces(METASPACE, "▁the", "a▁", "ü", "▁"),
    "metaspace": pieces(decoders.Sequence([decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback(), decoders.Fuse()]), "▁the", "a", "▁"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_joined_they_are_the_decoded_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    spelled = token_bytes(tokenizer)
    assert len(spelled) == tokenizer.vocab_size and not any(spelled[index] for index in tokenizer.specials.values())
    rng, words = np.random.default_rng(0), [at for at, s in enumerate(spelled) if s.isascii()]
    rows = [tokenizer.encode(TEXT)[0]] if name in ("byte", "bpe") else [[*words, *(at for at, s in enumerate(spelled) if len(s) > 1)]]
    rows += [rng.choice(words, 30) for _ in range(5)]
    for row in rows:
        assert b"".join(spelled[int(index)] for index in row).decode() == tokenizer.decode(row)


def test_added_tokens_that_are_text_are_spelled_as_they_are() -> None:
    inner = Inner.from_str(Tokenizer.byte_level().to_json())
    inner.add_tokens(["<think>", "two words"])
    tokenizer = Tokenizer(inner)
    assert token_bytes(tokenizer)[-2:] == [b"<think>", b"two words"] and token_bytes(tokenizer)[tokenizer.specials[END]] == b""


def test_wordpieces_and_an_unknown_decoder() -> None:
    spelled = token_bytes(pieces(decoders.WordPiece(), "the", "##re"))
    assert spelled[-2:] == [b" the", b"re"]
    with pytest.raises(UserError, match="'CTC' decoder"):
        token_bytes(pieces(decoders.CTC()))
