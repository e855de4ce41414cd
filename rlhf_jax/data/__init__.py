"""Text files to batches: records → chat template → tokens and masks → a prepared set on disk → indexed batches with NumPy leaves.

`open_dataset` runs the whole way; each stage is a module of its own, readable alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from rlhf_jax.data import prepare as preparation  # the name `prepare` stays the module's
from rlhf_jax.data.batches import ComparisonData, Dataset, Host, PromptData, SequenceData, check_batching
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.judged import FeedbackData, LabelledData
from rlhf_jax.data.prefetch import Prefetcher
from rlhf_jax.data.readers import Paths, read_records
from rlhf_jax.data.records import KINDS, Demo, Feedback, Message, Preference, Prompt, Ranking, Rating, Record, Stepwise, Text
from rlhf_jax.data.shipped import default_cache, sample_file
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError, nearest

__all__ = [
    "ChatTemplate", "ComparisonData", "Dataset", "FeedbackData", "LabelledData", "Prefetcher", "PromptData", "SequenceData", "Tokenizer",
    "default_cache", "open_dataset", "sample_file", "train_tokenizer",
]


def open_dataset(
    kind: str,
    path: Paths,
    tokenizer: Tokenizer,
    *,
    template: str | ChatTemplate = "plain",
    max_length: int,
    prompt_length: int | None = None,
    pack: bool = False,
    overlong: str = "error",
    batch_size: int,
    group_size: int = 1,
    cache: str | os.PathLike[str],
    host: Host = (0, 1),
) -> Dataset[Any]:
    """Prepares `path` (once; later calls find it in `cache`) and opens it.

    Args:
      kind: one of `records.KINDS`: demo, text, preference, ranking, feedback, rating, stepwise or prompt.
      path: a .jsonl file, a folder of them, or a list of either.
      tokenizer: makes the ids; its `pad_id` is written on padding.
      template: a chat template, a shipped one's name or a file; not read for text.
      max_length: T, tokens of a row; not read for prompts.
      prompt_length: P, tokens of a prompt; for prompts only.
      pack: put several demonstrations or texts into one row.
      overlong: error, truncate or skip a conversation longer than T.
      batch_size: rows of a global batch.
      group_size: rows per prompt; for prompts only.
      cache: folder of prepared sets.
      host: which rows of every batch this process makes, (index, count), or (indices, count).

    Raises:
      UserError: a malformed row (file:line and field) or an option that does not fit.
    """
    if kind not in KINDS:
        raise UserError(f"config.data.kind expected a kind of record, got {kind!r}{nearest(kind, KINDS)}; correct it")
    if kind == "prompt" and prompt_length is None:
        raise UserError("config.data.prompt_length expected a number of tokens for prompts, got none; set it")
    if pack and kind not in ("demo", "text"):
        raise UserError(f"config.data.pack expected False for {kind} rows, which are not packed, got True; set it to False")
    check_batching(batch_size, host, group_size if kind == "prompt" else 1)
    layout: ChatTemplate | None = None
    if kind != "text":
        layout = template if isinstance(template, ChatTemplate) else ChatTemplate.load(template, variables=tokenizer.variables)
    shared: dict[str, Any] = {"batch_size": batch_size, "host": host, "pad_id": tokenizer.pad_id}
    options: dict[str, Any] = {"max_length": max_length, "prompt_length": prompt_length, "overlong": overlong}
    prepared = preparation.prepare(kind, path, tokenizer, layout, **options, cache=cache)
    if kind == "prompt":
        assert prompt_length is not None
        return PromptData(prepared, prompt_length=prompt_length, group_size=group_size, **shared)
    if kind in ("demo", "text"):
        return SequenceData(prepared, max_length=max_length, packed=pack, **shared)
    made: dict[str, Callable[..., Dataset[Any]]] = {
        "preference": ComparisonData, "ranking": ComparisonData, "feedback": FeedbackData, "rating": LabelledData, "stepwise": LabelledData,
    }
    return made[kind](prepared, max_length=max_length, **shared)


def train_tokenizer(kind: str, path: Paths, vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on every text of `path`; the same files give the same tokenizer.

    Args:
      kind: one of `records.KINDS`.
      path: as in `open_dataset`.
      vocab_size: tokens, control tokens included.
    """
    return Tokenizer.train_bpe((text for record in read_records(kind, path) for text in _texts(record)), vocab_size)


def _texts(record: Record) -> list[str]:
    """Everything that is said in a record."""
    messages: tuple[Message, ...]
    match record:
        case Text():
            return [record.text]
        case Stepwise():
            return [*(message["content"] for message in record.prompt), *record.steps]
        case Preference():
            messages = record.prompt + record.chosen + record.rejected
        case Ranking():
            messages = sum(record.responses, record.prompt)
        case Feedback() | Rating():
            messages = record.prompt + record.response
        case Demo() | Prompt():
            messages = record.messages
    return [message["content"] for message in messages]
