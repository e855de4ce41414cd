"""The embedded tasks of the two environments, written as JSONL from a seed: tiny, with checkable ends, and demonstrations that are mostly flawed.

calculator: "What is 34*88?" → a call of the calculator, its reply, "2992"; the flaw is an answer out of one's head, which is wrong. guess: "Guess my
number, 1 to 15." → the middle of what is left, turn by turn; the flaw counts up from 1. Demonstrations are played in the environments themselves,
so that their turns read as those of a rollout. Calculator rows are disjoint by operands; a guessing game has no content but its number, which the
seed of the run draws in training and the file names for evaluation.
"""

from __future__ import annotations

import os
import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.data import embedded
from rlhf_jax.data.records import Message
from rlhf_jax.envs import tool_calls
from rlhf_jax.envs.calculator import NAME, Calculator
from rlhf_jax.envs.guess import Guess
from rlhf_jax.envs.protocol import Environment
from rlhf_jax.errors import UserError, nearest

FLAWED = 0.6  # share of demonstrations with the flaw
SPLITS = {"sft": "sft.jsonl"} | {split: f"{split}_prompts.jsonl" for split in ("rl", "valid", "test")}
SIZES: dict[str, dict[str, int]] = {
    "calculator": {"sft": 800, "rl": 600, "valid": 64, "test": 256},
    "guess": {"sft": 400, "rl": 64, "valid": 30, "test": 240},
}
LOW, HIGH, GUESSES = 1, 15, 4  # the embedded game: four guesses are just enough
_Row = dict[str, Any]
_Policy = Callable[[list[Message]], str]  # the conversation so far → the next turn


def sample_file(name: str) -> str:
    """Path of a small prompt file of an embedded environment, which ships with the package: what its config's `:tiny` trains on.

    Args:
      name: calculator or guess.
    """
    if name not in SIZES:
        raise UserError(f"sample file {name!r} does not exist{nearest(name, SIZES)}")
    return str(pathlib.Path(__file__).parent / "samples" / f"{name}.jsonl")


def write_task(
    task: str, folder: str | os.PathLike[str], *, sizes: Mapping[str, int] | None = None, seed: int = 0, flawed: float = FLAWED, role: str = "user",
) -> dict[str, str]:
    """Writes a task's files, the same bytes for the same arguments: `sft.jsonl` (messages), and `rl_prompts`, `valid_prompts`,
    `test_prompts.jsonl` (prompt, and what the environment needs).

    Args:
      task: calculator or guess.
      folder: created if missing.
      sizes: rows of some splits, in place of `SIZES[task]`.
      seed: decides which row falls into which split, and which demonstrations are flawed.
      flawed: share of flawed demonstrations in [0, 1]; that many rows exactly, rounded.
      role: of the environment's replies in the demonstrations, as config.env.parameters.role.

    Returns:
      the path of every split.

    Raises:
      UserError: an unknown task or split, a size below 1, or more rows than there are.
    """
    wanted = embedded.checked_sizes(task, SIZES, sizes, flawed)
    rng = random.Random(f"{task}-{seed}")
    rows = _calculator_rows(wanted, rng) if task == "calculator" else _guess_rows(wanted, rng)
    paths = {}
    for split, found in rows.items():
        paths[split] = os.path.join(folder, SPLITS[split])
        if split == "sft":
            wrong = set(rng.sample(range(len(found)), round(flawed * len(found))))
            found = [_demonstration(task, row, role, rng, flawed=i in wrong) for i, row in enumerate(found)]
        embedded.write_rows(paths[split], found)
    return paths


def _calculator_rows(wanted: Mapping[str, int], rng: random.Random) -> dict[str, list[_Row]]:
    """Products of two-digit numbers with four digits, so that every row of a kind has its parts at the same places."""
    pool = [(a, b) for a in range(10, 100) for b in range(10, 100) if a * b >= 1000]
    parts = embedded.disjoint("calculator", pool, wanted, rng)
    return {split: [{"prompt": f"What is {a}*{b}?", "answer": a * b} for a, b in part] for split, part in parts.items()}


def _guess_rows(wanted: Mapping[str, int], rng: random.Random) -> dict[str, list[_Row]]:
    rows = {}
    for split, size in wanted.items():
        plain: _Row = {"prompt": f"Guess my number, {LOW} to {HIGH}.", "low": LOW, "high": HIGH}
        secrets = [LOW + i % (HIGH - LOW + 1) for i in range(size)]
        rng.shuffle(secrets)
        rows[split] = [dict(plain) if split == "rl" else {**plain, "secret": secret} for secret in secrets]
    return rows


def _demonstration(task: str, row: _Row, role: str, rng: random.Random, *, flawed: bool) -> _Row:
    question, reference = row["prompt"], {key: value for key, value in row.items() if key != "prompt"}
    if task == "guess":
        return {"messages": _played(Guess(role=role), question, reference, _counting if flawed else _halving, GUESSES)}
    policy = _from_the_head(row["answer"], rng) if flawed else _calling(question)
    return {"messages": _played(Calculator(role=role), question, reference, policy, 2)}


def _played(environment: Environment, question: str, reference: _Row, policy: _Policy, turns: int) -> list[Message]:
    """The conversation of an episode."""
    messages = [Message(role="user", content=question)]
    state = environment.reset(messages, reference, 0)
    for turn in range(turns):
        messages.append(Message(role="assistant", content=policy(messages)))
        step = environment.step(state, messages[-1]["content"])
        if step.done or turn == turns - 1:
            break
        state, messages = step.state, [*messages, *step.replies]
    return messages


def _calling(question: str) -> _Policy:
    """The expression to the calculator, its result to the user."""
    expression = question.removeprefix("What is ").removesuffix("?")

    def policy(messages: list[Message]) -> str:
        if len(messages) == 1:
            return tool_calls.write(NAME, {"expression": expression})
        return messages[-1]["content"].removeprefix("<tool_response>").removesuffix("</tool_response>")

    return policy


def _from_the_head(answer: int, rng: random.Random) -> _Policy:
    """A number of four digits that is not the answer."""
    return lambda _: str(rng.choice([n for n in range(1000, 10_000) if n != answer]))


def _halving(messages: list[Message]) -> str:
    low, high = LOW, HIGH
    for said, reply in zip(messages[1::2], messages[2::2]):
        guess = int(said["content"])
        low, high = (guess + 1, high) if reply["content"] == "higher" else (low, guess - 1)
    return str((low + high) // 2)


def _counting(messages: list[Message]) -> str:
    return str(LOW + len(messages) // 2)
