"""Evaluation by sampling: generate on held-out prompts, decode, ask the gold, and measure how far the policy has moved.

Flow: each evaluation batch goes through a `generate` that is passed in (greedy or sampled, any network); the tokens under the loss mask,
without the stop token, are decoded; the gold function compares the text with the prompt's last user message. With two functions that return
log-probs, every record also carries the sequence KL estimate on its own sample. Nothing here knows a network, so fakes test it.

    seq_kl = E_{y ~ π}[ Σ_t log π(y_t | y_<t, x) − log π_ref(y_t | y_<t, x) ]   (k1, unbiased; single sequences may be negative)

See: Schulman 2020, "Approximating KL divergence". On greedy outputs the same sum is no KL estimate, so it is only asked for on samples.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.types import Array, Prompts, Rollout, Sequences

Messages = Sequence[Mapping[str, Any]]
Logps = Callable[[Sequences], Array]


class EvalPrompts(Protocol):
    """What is asked of the data room's prompt set."""

    def eval_batches(self) -> Iterable[Prompts]:
        """Batches that hold every prompt once; the last one is completed with filler rows."""

    def messages(self, prompt_id: int) -> Messages:
        """The prompt's messages, ending in the user's."""

    def __len__(self) -> int:
        """How many prompts there are; their ids count from 0."""


class Decoder(Protocol):
    """What is asked of the tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the token ids."""


def evaluate_generation(
    generate: Callable[[Prompts], Rollout],
    dataset: EvalPrompts,
    tokenizer: Decoder,
    gold: Callable[[str, str], float],
    *,
    policy_logps: Logps | None = None,
    ref_logps: Logps | None = None,
) -> list[dict[str, Any]]:
    """One record per real row of the evaluation batches, in order of prompt id and sample id.

    Args:
      generate: draws one completion per row.
      dataset: the prompts.
      tokenizer: decodes response tokens.
      gold: (text of the last user message, response) -> worth.
      policy_logps: [B, T] nats of the sampled tokens under the policy, unfiltered, at the sampling temperature.
      ref_logps: the same under the reference; both or neither.

    Returns:
      {prompt_id, sample_id, prompt, response, gold, length, truncated} and, with both log-prob functions, seq_kl. `length` counts the
      sampled tokens, the stop token included.

    Raises:
      ValueError: one of the two log-prob functions is missing, or there is no real row.
    """
    if (policy_logps is None) != (ref_logps is None):
        raise ValueError("evaluate_generation: seq_kl needs both policy_logps and ref_logps")
    records = []
    for prompts in dataset.eval_batches():
        rollout = generate(prompts)
        gap = None
        if policy_logps is not None and ref_logps is not None:
            ours, theirs = jax.device_get((policy_logps(rollout.seqs), ref_logps(rollout.seqs)))
            gap = ours.astype(np.float64) - theirs.astype(np.float64)
        records += _records(jax.device_get(rollout), gap, dataset, tokenizer, gold)
    if not records:
        raise ValueError("evaluate_generation: the data set holds no prompt")
    return sorted(records, key=lambda record: (record["prompt_id"], record["sample_id"]))


def shares(samples: int, rows: int) -> tuple[int, int]:
    """How the samples of a prompt are decoded where no more than `rows` rows may be at once.

    Args:
      samples: of each prompt, neighbours.
      rows: at once; 0 = all.

    Returns:
      how many of them share one prefill, a divisor of `samples`; and the rows decoded at once, a multiple of it.
    """
    if not rows:
        return samples, 0
    group = max(size for size in range(1, min(samples, rows) + 1) if samples % size == 0)
    return group, rows // group * group


def check_prompts(dataset: EvalPrompts, gold: Callable[[str, str], float], path: str, flag: str) -> None:
    """Refuses prompts that `evaluate_generation` could not judge, before anything is generated.

    Args:
      dataset: the prompts.
      gold: (text of the last user message, response) -> worth; cheap, or it refuses nothing.
      path, flag: the file and the flag that named the gold, for messages.

    Raises:
      UserError: a prompt without a user's message, or one that the gold cannot read.
    """
    for number in range(len(dataset)):
        try:
            prompt = last_user_message(dataset.messages(number))
        except ValueError:
            raise UserError(f"--data = {path!r}: prompt {number + 1} has no message of the user's, which a response is judged by: add one") from None
        try:
            gold(prompt, "")
        except ValueError as error:
            raise UserError(f"{flag} does not fit --data = {path!r}, whose prompt {number + 1} it cannot read ({error}): name the task's "
                            "own prompts, or a --judge") from None


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over prompts (first over a prompt's samples) of gold, length, truncated and, where present, seq_kl; `prompts` counts them.

    Args:
      records: from `evaluate_generation`, at least one.
    """
    names = [name for name in ("gold", "length", "truncated", "seq_kl") if name in records[0]]
    means: dict[str, float] = {name: float(np.mean(list(by_prompt(records, name).values()))) for name in names}
    return means | {"prompts": len({record["prompt_id"] for record in records})}


def by_prompt(records: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    """Mean of one field over each prompt's samples, by prompt id in ascending order: what win rates pair up.

    Args:
      records: from `evaluate_generation`.
      name: a numeric field.
    """
    groups: dict[int, list[float]] = collections.defaultdict(list)
    for record in records:
        groups[record["prompt_id"]].append(float(record[name]))
    return {prompt_id: float(np.mean(groups[prompt_id])) for prompt_id in sorted(groups)}


def responses(rollout: Rollout, tokenizer: Decoder, stop_ids: Sequence[int] | None = None) -> list[str]:
    """Decoded text per row: the tokens under the loss mask, without the stop token of a row that ended; "" on filler rows.

    Args:
      rollout: `seqs` [B, T].
      tokenizer: decodes.
      stop_ids: the stop tokens, where a stop string may have ended a row, whose last token is text; None: whatever ended a row is left out.
    """
    rollout = jax.device_get(rollout)
    tokens, mask, truncated = rollout.seqs.tokens, _sampled(rollout), rollout.truncated
    texts = []
    for row in range(tokens.shape[0]):
        ids = tokens[row][mask[row]].tolist()
        stopped = not truncated[row] and (stop_ids is None or not ids or ids[-1] in stop_ids)
        texts.append(tokenizer.decode(ids[:-1] if stopped else ids))
    return texts


def last_user_message(messages: Messages) -> str:
    """Content of the last message of role "user".

    Raises:
      ValueError: there is none.
    """
    for message in reversed(messages):
        if message["role"] == "user":
            return message["content"]
    raise ValueError(f"evaluation prompt {messages!r} has no user message")


def _records(
    rollout: Rollout, gap: np.ndarray | None, dataset: EvalPrompts, tokenizer: Decoder, gold: Callable[[str, str], float]
) -> list[dict[str, Any]]:
    mask = _sampled(rollout)
    texts = responses(rollout, tokenizer)
    rows = []
    for row in np.flatnonzero(rollout.real):
        prompt_id = int(rollout.prompt_ids[row])
        prompt = last_user_message(dataset.messages(prompt_id))
        record = {
            "prompt_id": prompt_id,
            "sample_id": int(rollout.sample_ids[row]),
            "prompt": prompt,
            "response": texts[row],
            "gold": float(gold(prompt, texts[row])),
            "length": int(mask[row].sum()),
            "truncated": bool(rollout.truncated[row]),
        }
        if gap is not None:
            record["seq_kl"] = float(gap[row][mask[row]].sum())
        rows.append(record)
    return rows


def _sampled(rollout: Rollout) -> Any:
    """[B, T] bool, the policy's own tokens; `rollout` holds NumPy leaves."""
    return rollout.seqs.loss_mask & (rollout.seqs.segment_ids != 0)
