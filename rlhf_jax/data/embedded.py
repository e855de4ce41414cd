"""The embedded tasks, written as JSONL from a seed: two small ones with checkable answers, and a plain corpus.

sort: "Sort these digits: 5 3 9 1" → "1 3 5 9". arithmetic: "What is 34 + 25?" → "<answer>59</answer>"; numbers of two digits, no
column carries or borrows, so that a model of 0.1 M parameters learns the rule instead of the rows. Demonstrations are flawed
*systematically*: a stated share is written the wrong way in the same manner (descending order; the tag <result>), because noise that
is independent from row to row averages out, and SFT alone would then reach the ceiling. The splits are disjoint by content, not by
wording: by the multiset of digits, and by the unordered operands with the operator.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.errors import UserError, nearest
from rlhf_jax.files import write_whole

FLAWED = 0.6  # share of demonstrations with the flaw: most, so that imitation prefers it
SPLITS = {"sft": "sft.jsonl"} | {split: f"{split}_prompts.jsonl" for split in ("rm", "rl", "valid", "test")}
SIZES: dict[str, dict[str, int]] = {  # rows, each of a content of its own
    "sort": {"sft": 3000, "rm": 1500, "rl": 2000, "valid": 256, "test": 512},
    "arithmetic": {"sft": 1500, "rm": 450, "rl": 600, "valid": 128, "test": 256},
    "lm": {"text": 120, "valid": 12},
}
Content = tuple[Any, ...]


def write_task(
    task: str, folder: str | os.PathLike[str], *, sizes: Mapping[str, int] | None = None, seed: int = 0, flawed: float = FLAWED
) -> dict[str, str]:
    """Writes a task's files, the same bytes for the same arguments.

    sort and arithmetic: `sft.jsonl` (messages), and `rm_prompts`, `rl_prompts`, `valid_prompts`, `test_prompts.jsonl` (prompt).
    lm: `text.jsonl` and `valid_text.jsonl` (text).

    Args:
      task: sort, arithmetic or lm.
      folder: created if missing.
      sizes: rows of some splits, in place of `SIZES[task]`.
      seed: decides which content falls into which split, wording and flaws.
      flawed: share of flawed demonstrations in [0, 1]; that many rows exactly, rounded.

    Returns:
      the path of every split.

    Raises:
      UserError: an unknown task or split, a size below 1, or more rows than distinct contents.
    """
    wanted = checked_sizes(task, SIZES, sizes, flawed)
    rng = random.Random(f"{task}-{seed}")
    names = {"text": "text.jsonl", "valid": "valid_text.jsonl"} if task == "lm" else SPLITS
    paths = {}
    for split, contents in disjoint(task, _CONTENTS[task](), wanted, rng).items():
        if split == "sft":
            wrong = set(rng.sample(range(len(contents)), round(flawed * len(contents))))
            rows = [_demonstration(*_ASK[task](content, rng), flawed=i in wrong) for i, content in enumerate(contents)]
        elif task == "lm":
            rows = [{"text": _story(content, rng)} for content in contents]
        else:
            rows = [{"prompt": _ASK[task](content, rng)[0]} for content in contents]
        paths[split] = os.path.join(folder, names[split])
        write_rows(paths[split], rows)
    return paths


def checked_sizes(task: str, table: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int] | None, flawed: float) -> dict[str, int]:
    """Rows of every split of a task.

    Args:
      task: one of the table's.
      table: task → split → rows.
      sizes: rows of some splits, in place of the table's.
      flawed: share of flawed demonstrations.

    Raises:
      UserError: an unknown task or split, a size below 1, a share out of [0, 1].
    """
    if task not in table:
        raise UserError(f"embedded task expected one of {', '.join(table)}, got {task!r}{nearest(task, table)}; correct it")
    if not 0 <= flawed <= 1:
        raise UserError(f"embedded task {task} flawed expected a share between 0 and 1, got {flawed}; correct it")
    wanted = dict(table[task])
    for split, size in (sizes or {}).items():
        if split not in wanted:
            raise UserError(f"embedded task {task} sizes expected a split, got {split!r}{nearest(split, wanted)}; correct it")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"embedded task {task} size of {split} expected a positive whole number, got {size!r}; raise it")
        wanted[split] = size
    return wanted


def disjoint(task: str, pool: list[Content], wanted: Mapping[str, int], rng: random.Random) -> dict[str, list[Content]]:
    """Contents for every split, none in two of them.

    Args:
      task: for errors.
      pool: distinct contents; shuffled in place.
      wanted: split → how many.
      rng: decides the order.

    Raises:
      UserError: more are wanted than there are.
    """
    if sum(wanted.values()) > len(pool):
        raise UserError(
            f"embedded task {task} sizes expected at most {len(pool)} rows over all splits (that many contents are distinct), "
            f"got {sum(wanted.values())}; lower some"
        )
    rng.shuffle(pool)
    parts = iter(pool)
    return {split: list(itertools.islice(parts, size)) for split, size in wanted.items()}


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSONL, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _demonstration(question: str, right: str, wrong: str, *, flawed: bool) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": wrong if flawed else right}]}


def _sort_contents() -> list[Content]:
    """Multisets of 3 to 6 digits, without those that read the same both ways."""
    sets = itertools.chain.from_iterable(itertools.combinations_with_replacement("0123456789", n) for n in (3, 4, 5, 6))
    return [digits for digits in sets if digits[0] != digits[-1]]


def _sort_ask(content: Content, rng: random.Random) -> tuple[str, str, str]:
    shown = rng.sample(content, len(content))
    return f"Sort these digits: {' '.join(shown)}", " ".join(sorted(content)), " ".join(sorted(content, reverse=True))


def _arithmetic_contents() -> list[Content]:
    """(operator, smaller, larger): operands and result have two digits, and each column is a sum or difference of its own."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    sums = [("+", a, b) for a, b in pairs if a % 10 + b % 10 <= 9 and a // 10 + b // 10 <= 9]
    return sums + [("-", a, b) for a, b in pairs if a % 10 <= b % 10 and a // 10 < b // 10]


def _arithmetic_ask(content: Content, rng: random.Random) -> tuple[str, str, str]:
    operator, small, large = content
    first, second = (small, large) if operator == "+" and rng.random() < 0.5 else (large, small)
    result = first + second if operator == "+" else first - second
    wording = rng.choice(("What is {}?", "Compute {}.", "Calculate {}."))
    return wording.format(f"{first} {operator} {second}"), f"<answer>{result}</answer>", f"<result>{result}</result>"


_PEOPLE = ("Ada", "Ben", "Clara", "Dario", "Emma", "Farid", "Greta", "Hugo")
_PLACES = {"harbour": "boats", "market": "apples", "library": "old maps", "mill": "sacks of flour", "garden": "roses", "station": "trains"}
_WEATHER = {"rain": "the streets shone", "snow": "every sound was soft", "wind": "the shutters rattled", "sun": "the walls were warm"}
_FINDS = ("a brass key", "a letter without a name", "a blue button", "a map of the coast")


def _lm_contents() -> list[Content]:
    return list(itertools.product(_PEOPLE, _PLACES, _WEATHER, _FINDS))


def _story(content: Content, rng: random.Random) -> str:
    person, place, weather, find = content
    hour, count = rng.choice(("early", "at noon", "in the evening")), rng.choice(("two", "three", "seven", "a dozen"))
    friend = rng.choice([name for name in _PEOPLE if name != person])
    ending = rng.choice((f"{friend} laughed and kept it.", f"{friend} had lost it a year before.", "They put it back where it had been."))
    sky = {"rain": "It rained", "snow": "It snowed", "wind": "The wind blew", "sun": "The sun shone"}[weather]
    return f"{person} went to the {place} {hour}. {sky}, and {_WEATHER[weather]}. Among {count} {_PLACES[place]} lay {find}. {ending}"


_CONTENTS: dict[str, Callable[[], list[Content]]] = {"sort": _sort_contents, "arithmetic": _arithmetic_contents, "lm": _lm_contents}
_ASK: dict[str, Callable[[Content, random.Random], tuple[str, str, str]]] = {"sort": _sort_ask, "arithmetic": _arithmetic_ask}
