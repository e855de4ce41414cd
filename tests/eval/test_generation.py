"""Evaluation by sampling, on a fake tokenizer, prompt set and generator: which tokens count, what is decoded, and the sequence KL."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.eval import generation
from rlhf_jax.types import Prompts, Rollout, Sequences

PAD, END = 0, 1
WIDTH, NEW = 3, 4


class Letters:
    """Token 2 is "a", 3 is "b", …; the end token would show as "!"."""

    def decode(self, ids):
        return "".join("_!abcdefgh"[i] for i in ids)


class Questions:
    """Three prompts, two samples of each, in batches of four: the last batch holds filler rows."""

    def eval_batches(self):
        rows = [(2, 0), (2, 1), (0, 1), (0, 0), (1, 0), (1, 1), None, None]
        for part in (rows[:4], rows[4:]):
            real = jnp.array([[row is not None] for row in part])
            segments = jnp.tile(jnp.array([[0, 1, 1]]), (4, 1)) * real
            ids = jnp.array([row or (0, 0) for row in part])
            yield _prompts(segments, ids[:, 0], ids[:, 1])

    def messages(self, prompt_id):
        return [{"role": "user", "content": "old"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": f"q{prompt_id}"}]


RESPONSES = {(0, 0): [2, END], (0, 1): [2, 3, END], (1, 0): [2, 3, 4, 5], (1, 1): [END], (2, 0): [5, 5, 5, END], (2, 1): [END + 1, END]}


def _prompts(segments, prompt_ids, sample_ids):
    groups = jnp.arange(segments.shape[0])
    return Prompts(
        tokens=segments * 5, positions=segments, segment_ids=segments, prompt_ids=prompt_ids, sample_ids=sample_ids, group_ids=groups
    )


def generate(prompts, responses=RESPONSES):
    """Writes the listed responses; every other slot holds a token that must not be decoded."""
    rows = prompts.tokens.shape[0]
    tokens, real = np.full((rows, NEW), 9), np.zeros((rows, NEW), np.int32)
    for row in range(rows):
        if bool(prompts.real[row]):
            ids = responses[int(prompts.prompt_ids[row]), int(prompts.sample_ids[row])]
            tokens[row, : len(ids)], real[row, : len(ids)] = ids, 1
    segments = jnp.concatenate([prompts.segment_ids, jnp.array(real)], 1)
    seqs = Sequences(
        tokens=jnp.concatenate([prompts.tokens, jnp.array(tokens)], 1),
        positions=segments,
        segment_ids=segments,
        loss_mask=jnp.concatenate([jnp.zeros((rows, WIDTH), bool), jnp.array(real, bool)], 1),
    )
    truncated = jnp.array([END not in tokens[row][real[row] == 1] for row in range(rows)])
    return Rollout(
        seqs=seqs, sampler_logps=jnp.zeros(segments.shape), prompt_ids=prompts.prompt_ids, sample_ids=prompts.sample_ids,
        group_ids=prompts.group_ids, truncated=truncated, version=jnp.zeros(rows, jnp.int32),
    )


def gold(prompt, response):
    return len(response) / 10 if prompt.startswith("q") else -1.0


def test_records_by_hand():
    records = generation.evaluate_generation(generate, Questions(), Letters(), gold)
    assert [(r["prompt_id"], r["sample_id"]) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [r["response"] for r in records] == ["a", "ab", "abcd", "", "ddd", "a"]
    assert [r["length"] for r in records] == [2, 3, 4, 1, 4, 2]
    assert [r["truncated"] for r in records] == [False, False, True, False, False, False]
    assert [r["prompt"] for r in records] == ["q0", "q0", "q1", "q1", "q2", "q2"]
    assert [r["gold"] for r in records] == pytest.approx([0.1, 0.2, 0.4, 0.0, 0.3, 0.1])
    assert all("seq_kl" not in record for record in records)


def test_sequence_kl_counts_sampled_tokens_only():
    def policy(seqs):
        return -jnp.ones(seqs.tokens.shape) + 100.0 * ~seqs.loss_mask  # prompt and padding must not count

    def reference(seqs):
        return -1.5 * jnp.ones(seqs.tokens.shape)

    policy, reference = jax.jit(policy), jax.jit(reference)

    records = generation.evaluate_generation(generate, Questions(), Letters(), gold, policy_logps=policy, ref_logps=reference)
    assert [r["seq_kl"] for r in records] == pytest.approx([0.5 * r["length"] for r in records])
    means = generation.summarise(records)
    assert means == pytest.approx({"gold": 11 / 60, "length": 16 / 6, "truncated": 1 / 6, "seq_kl": 8 / 6, "prompts": 3})
    assert generation.by_prompt(records, "gold") == pytest.approx({0: 0.15, 1: 0.2, 2: 0.2})


def test_summary_weighs_prompts_not_samples():
    records = [{"prompt_id": 0, "gold": g, "length": 1, "truncated": False} for g in (0.0, 0.0, 0.0)]
    records.append({"prompt_id": 1, "gold": 1.0, "length": 1, "truncated": False})
    assert generation.summarise(records)["gold"] == 0.5


def test_seq_kl_estimates_the_exact_kl():
    """Sequences of up to 2 tokens over {a, end}: the KL is enumerated, the estimate is a mean over many sampled prompts."""
    p, q = 0.7, 0.4  # probability of "a" under policy and reference
    exact = (1 - p) * np.log((1 - p) / (1 - q)) + p * (np.log(p / q) + p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    rng = np.random.default_rng(0)
    draws = [[END] if rng.random() > p else [2, 2 if rng.random() < p else END] for _ in range(4000)]

    class Many:
        def eval_batches(self):
            ids = jnp.arange(len(draws))
            yield _prompts(jnp.ones((len(draws), WIDTH), jnp.int32), ids, ids * 0)

        def messages(self, prompt_id):
            return [{"role": "user", "content": "q"}]

    def logps(share):
        return lambda seqs: jnp.where(seqs.tokens == 2, jnp.log(share), jnp.log(1 - share))

    def sample(prompts):
        return generate(prompts, {(row, 0): ids for row, ids in enumerate(draws)})

    records = generation.evaluate_generation(sample, Many(), Letters(), gold, policy_logps=logps(p), ref_logps=logps(q))
    spread = np.std([r["seq_kl"] for r in records]) / len(records) ** 0.5
    assert generation.summarise(records)["seq_kl"] == pytest.approx(exact, abs=4 * spread)


def test_refuses():
    with pytest.raises(ValueError, match="both"):
        generation.evaluate_generation(generate, Questions(), Letters(), gold, policy_logps=lambda seqs: seqs.tokens)
    with pytest.raises(ValueError, match="no user message"):
        generation.last_user_message([{"role": "system", "content": "s"}])

    class Empty(Questions):
        def eval_batches(self):
            return iter(())

    with pytest.raises(ValueError, match="no prompt"):
        generation.evaluate_generation(generate, Empty(), Letters(), gold)
