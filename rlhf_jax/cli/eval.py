"""Evaluates a trained network on held-out data.

A policy on prompts: greedy and sampled completions, their gold on an embedded task or a reward model's score, and against --baseline the win
rate with a paired-bootstrap interval and the sequence KL.   A reward model on pairs: accuracy, also by length, beside a length-only rule.

  rlhf-jax eval --checkpoint runs/dpo --baseline runs/sft --data test_prompts.jsonl --gold sort
  rlhf-jax eval --checkpoint runs/ppo --baseline runs/sft --data test_prompts.jsonl --judge runs/reward
  rlhf-jax eval --checkpoint runs/reward --data test_pairs.jsonl
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from absl import flags

from rlhf_jax.cli import drawn
from rlhf_jax.errors import UserError

QUEUE = 8  # prompts in one program, in batches: rows that have ended make room for them
FLAGS_HELP = {
    "--checkpoint DIR": "what is evaluated: a policy's or a reward model's workdir, its best/ folder, or one step",
    "--data FILE": "prompts (for a policy) or preference pairs (for a reward model) as JSONL",
    "--baseline DIR": "the policy to compare with, usually the SFT run",
    "--gold TASK": "score responses by the gold function of an embedded task: sort or arithmetic; or",
    "--judge DIR": "score responses by a reward model",
    "--samples N": "sampled completions per prompt (default 4)",
    "--max_new_tokens N": "default 64",
    "--temperature T": "of the samples (default 1.0)",
    "--seed S": "of samples and bootstrap (default 0)",
    "--batch_size B": "rows at once (default 64)",
    "--output FILE": "the numbers as JSON, beside the table",
}

flags.DEFINE_string("checkpoint", "", "network to evaluate")
flags.DEFINE_string("data", "", "held-out data as JSONL")
flags.DEFINE_string("baseline", "", "policy to compare with")
flags.DEFINE_string("gold", "", "embedded task")
flags.DEFINE_string("judge", "", "reward model")
flags.DEFINE_integer("samples", 4, "per prompt", lower_bound=1)
flags.DEFINE_integer("max_new_tokens", 64, "tokens", lower_bound=1)
flags.DEFINE_float("temperature", 1.0, "of the samples")
flags.DEFINE_integer("seed", 0, "of samples and bootstrap")
flags.DEFINE_integer("batch_size", 64, "rows at once", lower_bound=1)
flags.DEFINE_string("output", "", "numbers as JSON")


def main() -> int:
    """Runs the command on parsed flags."""
    options = flags.FLAGS
    for flag in ("checkpoint", "data"):
        if not getattr(options, flag):
            raise UserError(f"--{flag} is missing")
    if not os.path.exists(options.data):
        raise UserError(f"--data = {options.data!r}: no such file")
    from rlhf_jax.files import write_whole
    from rlhf_jax.saved import load_source

    source = load_source(options.checkpoint, "--checkpoint")
    values = _reward_model(source) if source.network == "reward" else _policy(source)
    for name, value in values.items():
        print(f"{name:<24} {_show(value)}")
    if options.output:
        write_whole(options.output, json.dumps(values, indent=2) + "\n")
    return 0


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _policy(source: Any) -> dict[str, Any]:
    """The comparison's row, for --checkpoint and, if given, against --baseline."""
    from rlhf_jax import data
    from rlhf_jax.data.shipped import default_cache
    from rlhf_jax.eval import compare
    from rlhf_jax.eval.models import Policy
    from rlhf_jax.saved import load_source

    options = flags.FLAGS
    if bool(options.gold) == bool(options.judge):
        raise UserError("--gold and --judge: give exactly one of them, to say what a response is worth")
    drawn.check_temperature(options.temperature, greedy=False)
    policy = Policy(source, "--checkpoint")
    if options.max_new_tokens >= policy.config.context:
        raise UserError(f"--max_new_tokens = {options.max_new_tokens} leaves no room for a prompt in a context of {policy.config.context}")
    baseline = Policy(load_source(options.baseline, "--baseline"), "--baseline") if options.baseline else policy
    if baseline.source.reader("--baseline").digest != source.reader("--checkpoint").digest:
        raise UserError(f"--baseline = {options.baseline!r} reads another tokenizer than --checkpoint: seq_kl would compare different tokens")
    one_each, several = (
        data.open_dataset(
            "prompt", options.data, source.reader("--checkpoint"), template=source.layout("--checkpoint"), max_length=policy.config.context,
            prompt_length=policy.config.context - options.max_new_tokens, batch_size=QUEUE * (options.batch_size // group or 1) * group,
            group_size=group, cache=default_cache(),
        ).trimmed()
        for group in (1, options.samples)
    )
    worth = _gold(options.gold) if options.gold else _judge(options.judge)

    def evaluated(one: Policy) -> compare.Evaluation:
        return compare.evaluate(one, baseline, one_each, several, worth, max_new_tokens=options.max_new_tokens, temperature=options.temperature,
                                seed=options.seed, rows=options.batch_size)

    ours = evaluated(policy)
    row = compare.row(ours, evaluated(baseline) if options.baseline else None, seed=options.seed)
    renamed = {"win_vs_sft": "win_vs_baseline"}
    return {renamed.get(name, name): value for name, value in row.items() if value is not None}


def _gold(task: str) -> Callable[[str, str], float]:
    from rlhf_jax.errors import nearest
    from rlhf_jax.rewards.gold import GOLD

    if task not in GOLD:
        raise UserError(f"--gold = {task!r}: not an embedded task{nearest(task, GOLD)}")
    return GOLD[task]


def _judge(path: str) -> Callable[[str, str], float]:
    """A reward model as a function of text, through its own tokenizer and template."""
    from rlhf_jax.eval.models import RewardModel, text_reward
    from rlhf_jax.saved import load_source

    score = text_reward(RewardModel(load_source(path, "--judge"), "--judge"), "--judge")
    return lambda prompt, response: float(score([[{"role": "user", "content": prompt}]], [response], [True], 1)[0])


def _reward_model(source: Any) -> dict[str, Any]:
    """Accuracy on pairs, by length, beside the better of two length rules (chosen on these pairs themselves, so an upper bound for it)."""
    import numpy as np

    from rlhf_jax import data
    from rlhf_jax.data.shipped import default_cache
    from rlhf_jax.eval import preference
    from rlhf_jax.eval.models import RewardModel

    model = RewardModel(source, "--checkpoint")
    pairs = data.open_dataset(
        "preference", flags.FLAGS.data, source.reader("--checkpoint"), template=source.layout("--checkpoint"), max_length=model.config.context,
        overlong="truncate", batch_size=flags.FLAGS.batch_size, cache=default_cache(),
    ).trimmed()
    scores, lengths = [], []
    for batch in pairs.eval_batches():
        scores.append(model.scores(batch)[batch.real])
        lengths.append(np.asarray(batch.seqs.loss_mask).sum(-1)[batch.real])
    score, length = np.concatenate(scores), np.concatenate(lengths)
    rule = preference.length_baseline(*length.T, *length.T)
    edges = sorted(set(np.quantile(length.max(-1), [0.25, 0.5, 0.75]).round().tolist()))
    by_length = preference.accuracy_by_length(*score.T, *length.T, edges=edges)
    return {
        "pairs": len(score), "accuracy": preference.accuracy(*score.T), "length_baseline": rule.accuracy, "length_rule": rule.rule,
        **{f"accuracy, {name} tokens": [value, count] for name, (value, count) in by_length.items()},
    }
