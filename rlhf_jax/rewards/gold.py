"""The gold functions of the two embedded tasks: what a response is worth, read from the text alone.

Flow: parse the question out of the user's message, compare the response with the known answer, return a graded value in [0, 1].
Partial credit is given so that two imperfect responses can be told apart, which is what a noisy preference label needs. The gold is the
ground truth that a learned reward model only approximates: the evaluation, the pair labeller and the `grpo_gold` stage may import
this module and nothing else may (a test enforces it). It therefore imports nothing from the package.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

_SORT_PROMPT = re.compile(r"\s*Sort these digits:\s*([0-9](?:\s+[0-9])*)\s*\.?\s*")
_SUM_PROMPT = re.compile(r"\s*(?:What is|Compute|Calculate)\s+(-?[0-9]{1,9})\s*([-+*×−])\s*(-?[0-9]{1,9})\s*[?.]?\s*")
_ANSWER = re.compile(r"<answer>\s*(-?[0-9]{1,18})\s*</answer>")
_ANSWER_TAG = re.compile(r"</?answer>")
_INTEGER = re.compile(r"-?[0-9]+")


def sort(prompt: str, response: str) -> float:
    """Worth of `response` as the ascending order of the prompt's digits.

    gold = overlap · (0.3 + 0.5 · order) + 0.2 · exact

    - overlap: |response ∩ digits| / max(|response|, |digits|), as multisets of whitespace-separated words: omitted, invented and
      repeated words all cost.
    - order: of the pairs of unequal digits asked for, the share that the response holds in ascending order (1 when there is none).
    - exact: the response is the sorted list and nothing else.

    The right digits in descending order are worth 0.3, one adjacent swap among four 0.717, text without a digit of the list 0.

    Args:
      prompt: the user's message, e.g. "Sort these digits: 5 3 9 1".
      response: the assistant's text, e.g. "1 3 5 9".

    Returns:
      gold in [0, 1].

    Raises:
      ValueError: the prompt is not a sort question.
    """
    match = _SORT_PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"gold.sort: {prompt!r} is not of the form 'Sort these digits: 5 3 9 1'")
    digits, words = match.group(1).split(), response.split()
    kept = _kept_words(words, Counter(digits))
    overlap = len(kept) / max(len(words), len(digits))
    wanted = sum(a != b for a, b in itertools.combinations(digits, 2))
    ascending = sum(a < b for a, b in itertools.combinations(kept, 2))
    order = ascending / wanted if wanted else 1.0
    return overlap * (0.3 + 0.5 * order) + 0.2 * (words == sorted(digits))


def arithmetic(prompt: str, response: str) -> float:
    """Worth of `response` as the answer to a two-number question, inside `<answer>…</answer>`.

    gold = 0.4 · format + 0.3 · value + 0.3 · format · value

    - format: 1 when the response is one `<answer>integer</answer>` and nothing else, 0.5 when other text surrounds it, else 0.
    - value: 1 when the number given is right, else 0. It is read from the answer tag, and without one from anywhere in a response
      that holds a single integer.

    So `<answer>12</answer>` is worth 1 where 12 is right and 0.4 where it is wrong, `<result>12</result>` 0.3 or 0. Each part changes the
    gold by at least 0.3 whatever the other is, so that preference pairs teach both, and each is worth more beside the other.

    Args:
      prompt: the user's message, e.g. "What is 7 + 5?"; the operators are +, - and *.
      response: the assistant's text.

    Returns:
      gold in [0, 1].

    Raises:
      ValueError: the prompt is not an arithmetic question.
    """
    match = _SUM_PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"gold.arithmetic: {prompt!r} is not of the form 'What is 7 + 5?'")
    target = _evaluate(int(match.group(1)), match.group(2), int(match.group(3)))
    answers = _ANSWER.findall(response)
    if len(answers) == 1 and len(_ANSWER_TAG.findall(response)) == 2:
        form = 1.0 if _ANSWER.fullmatch(response.strip()) else 0.5
        given = answers[0]
    else:
        form = 0.0
        integers = _INTEGER.findall(response)
        given = integers[0] if len(integers) == 1 else ""
    # Longer strings of digits cannot be right, and Python refuses to parse very long ones.
    value = float(0 < len(given) <= 19 and int(given) == target)
    return 0.4 * form + 0.3 * value + 0.3 * form * value


GOLD: dict[str, Callable[[str, str], float]] = {"sort": sort, "arithmetic": arithmetic}


def sort_reward(prompts: Sequence[Sequence[Mapping[str, str]]], responses: Sequence[str], references: Sequence[object]) -> list[float]:
    """`sort` as a reward function, for verifiable-reward training (`grpo_gold`): one value per response to the last message."""
    return [sort(prompt[-1]["content"], response) for prompt, response in zip(prompts, responses, strict=True)]


def arithmetic_reward(prompts: Sequence[Sequence[Mapping[str, str]]], responses: Sequence[str], references: Sequence[object]) -> list[float]:
    """`arithmetic` as a reward function; as `sort_reward`."""
    return [arithmetic(prompt[-1]["content"], response) for prompt, response in zip(prompts, responses, strict=True)]


def _kept_words(words: list[str], budget: Counter[str]) -> list[str]:
    """The words that the prompt's multiset accounts for, in the response's order."""
    kept = []
    for word in words:
        if budget[word] > 0:
            budget[word] -= 1
            kept.append(word)
    return kept


def _evaluate(left: int, operator: str, right: int) -> int:
    if operator == "+":
        return left + right
    return left * right if operator in "*×" else left - right
