"""Rules that a program can check, as reward functions on text: `(prompts, responses, references) -> scores`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def brevity(prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any]) -> list[float]:
    """1 / (1 + characters / 16): 1 for an empty response, ½ at 16 characters.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: unused.
    """
    return [1.0 / (1.0 + len(response) / 16.0) for response in responses]


def exact_match(prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any]) -> list[float]:
    """1 where the response, stripped, is the reference's `answer`, else 0.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: `{"answer": str}` of each row, from the prompt file's `reference` field.
    """
    return [float(reference is not None and response.strip() == str(reference["answer"]).strip())
            for response, reference in zip(responses, references, strict=True)]


def think_format(prompts: Sequence[Any], responses: Sequence[str], references: Sequence[Any]) -> list[float]:
    """1 where the response is one `<think>…</think>` and then anything without another opening tag, else 0.

    Args:
      prompts: messages of each row, unused.
      responses: text of each row.
      references: unused.
    """
    return [float(text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text) for text in responses]
