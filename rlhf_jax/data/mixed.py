"""Rows of several forms to token rows: what a network is asked to read, whatever the file calls it.

`token_ids`, with a `loss_mask` of the same length if some of them are the completion: as they stand, no tokenizer needed.
`text`: a document. An imported tokenizer adds what it adds in `transformers`; with a tokenizer made here it is framed as in training.
`messages`: a conversation, of which the assistant's turns are the completion. `prompt` + `completion` (or `response`), strings or messages: the
conversation that training makes of them; without a template (`raw`) two strings, joined as they are.
The forms may be mixed in one file. A row that has `token_ids` is read by them, whatever else it holds, so that what was scored can be scored again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.readers import JsonRow, Paths, data_files, json_rows
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError

FORMS = "token_ids, text, messages, or prompt + completion"
ANSWERS = ("completion", "response")


@dataclass(frozen=True)
class Item:
    """One row to read."""

    tokens: np.ndarray  # [n] int32, n ≥ 1
    completion: np.ndarray | None  # [n] bool, which tokens are the completion; None where the row does not say. Never the first
    source: str
    line: int

    @property
    def place(self) -> str:
        """`file:line`."""
        return f"{self.source}:{self.line}"

    def cut(self, length: int) -> Item:
        """The first `length` tokens."""
        return Item(self.tokens[:length], None if self.completion is None else self.completion[:length], self.source, self.line)


class MixedReader:
    """Reads rows of any form.

    Args:
      tokenizer: None serves `token_ids` only.
      template: None serves `token_ids` and `text`, and with `raw` also prompt and completion.
      vocab_size: every id of `token_ids` lies below it.
      raw: join prompt and completion as they are, without a template.
      missing: what a row needs and is not there → what the user may do about it; keys "tokenizer" and "template".
    """

    def __init__(
        self, tokenizer: Tokenizer | None, template: ChatTemplate | None, *, vocab_size: int, raw: bool = False,
        missing: dict[str, str] | None = None,
    ) -> None:
        self.tokenizer, self.template, self.vocab_size, self.raw = tokenizer, template, vocab_size, raw
        self._missing = {"tokenizer": "write token_ids", "template": "name a chat template"} | (missing or {})

    def items(self, path: Paths) -> Iterator[Item]:
        """The rows of files in order.

        Args:
          path: see `readers.data_files`.

        Raises:
          UserError: a row is malformed, or needs a tokenizer or a template that is not there.
        """
        for file in data_files(path):
            empty = True
            for row in json_rows(file):
                empty = False
                yield self.item(row)
            if empty:
                raise UserError(f"{file}:1 row expected a JSON object, got an empty file; write one row per line with {FORMS}")

    def item(self, row: JsonRow) -> Item:
        """One row. Raises as `items`."""
        found = [name for name in ("text", "messages") if row.has(name)]
        found += [f"prompt + {name}" for name in ANSWERS if row.has("prompt", name)]
        if row.has("token_ids"):
            tokens, completion = self._ids(row)
        elif not found:
            raise row.bad("row", FORMS, sorted(row.fields), "name what is to be read")
        elif len(found) > 1:
            raise row.bad("row", f"one of {FORMS}", found, "keep what is to be read")
        elif found[0] == "text":
            tokens, completion = self._text(row), None
        else:
            tokens, completion = self._conversation(row, found[0])
        if not len(tokens):
            raise row.bad(found[0], "at least one token", "", "fill in or remove the row")
        return Item(tokens, completion, row.source, row.line)

    def _ids(self, row: JsonRow) -> tuple[np.ndarray, np.ndarray | None]:
        ids, mask = row.fields["token_ids"], row.fields.get("loss_mask")
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise row.bad("token_ids", "a non-empty list of whole numbers", ids, "write the tokens' ids")
        if (wrong := next((i for i in ids if not 0 <= i < self.vocab_size), None)) is not None:
            raise row.bad("token_ids", f"ids of the model's vocabulary, 0 to {self.vocab_size - 1}", wrong, "tokenize with the model's own tokenizer")
        if mask is None:
            return np.array(ids, np.int32), None
        if not isinstance(mask, list) or len(mask) != len(ids) or not all(m in (0, 1) for m in mask):
            raise row.bad("loss_mask", f"{len(ids)} entries of true or false, one per token", mask, "mark the completion's tokens, or leave it out")
        completion = np.array(mask, bool)
        completion[:1] = False  # nothing predicts the first token
        return np.array(ids, np.int32), completion

    def _text(self, row: JsonRow) -> np.ndarray:
        tokenizer, text = self._tokenizer(row, "text"), row.text("text")
        if tokenizer.config is not None:
            return tokenizer.encode_document(text)
        ids, _ = tokenizer.encode(text, control=False)
        first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return np.concatenate([first, ids, [tokenizer.eos_id]]).astype(np.int32)

    def _conversation(self, row: JsonRow, form: str) -> tuple[np.ndarray, np.ndarray]:
        tokenizer = self._tokenizer(row, form)
        answer = form.removeprefix("prompt + ")
        if self.raw:
            return self._joined(row, tokenizer, answer)
        if self.template is None:
            raise row.bad(form, "a model with a chat template", "none", self._missing["template"])
        prompt = () if form == "messages" else row.turns("prompt", "user")
        messages = row.messages("messages") if form == "messages" else prompt + row.turns(answer, "assistant")
        try:
            return self._encoder.conversation(messages, len(prompt), row.tools)
        except UserError as error:
            raise UserError(f"{row.source}:{row.line} {error}") from None

    def _joined(self, row: JsonRow, tokenizer: Tokenizer, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and completion tokenized as one text; a token that reaches from one into the other is the completion's."""
        if answer == "messages":
            raise row.bad("messages", "text, because no chat template is used", "messages", "write text or prompt + completion")
        prompt, said = row.text("prompt"), row.text(answer)
        ids, offsets = tokenizer.encode(prompt + said, control=False)
        mask = offsets[:, 1] > len(prompt)
        begins = tokenizer.config is None or tokenizer.bos_id in tokenizer.encode_document("")[:1]
        if tokenizer.bos_id is not None and begins:
            ids, mask = np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32), np.concatenate([[False], mask])
        mask[:1] = False
        return ids, mask

    @functools.cached_property
    def _encoder(self) -> Encoder:
        assert self.tokenizer is not None
        return Encoder(self.tokenizer, self.template, max_length=2, prompt_length=None, overlong="error")  # its limits are for records

    def _tokenizer(self, row: JsonRow, form: str) -> Tokenizer:
        if self.tokenizer is None:
            raise row.bad(form, "a model with a tokenizer", "none", self._missing["tokenizer"])
        return self.tokenizer
