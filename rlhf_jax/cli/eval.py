"""Evaluates a trained network on held-out data.

A policy on prompts: greedy and sampled completions, their gold on an embedded task or a reward model's score, and against --baseline the win
rate with a paired-bootstrap interval and the sequence KL; with --best_of the same of the sample that --reward chooses.   A reward model on pairs:
accuracy, also by length, beside a length-only rule.

  rlhf-jax eval --checkpoint runs/dpo --baseline runs/sft --data test_prompts.jsonl --gold sort
  rlhf-jax eval --checkpoint runs/ppo --baseline runs/sft --data test_prompts.jsonl --judge runs/reward
  rlhf-jax eval --checkpoint runs/sft --data test_prompts.jsonl --gold sort --best_of 16 --reward runs/reward
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

FLAGS_HELP = {
    "--checkpoint DIR": "what is evaluated: a policy's or a reward model's workdir, its best/ folder, or one step",
    "--data FILE": "prompts (for a policy) or preference pairs (for a reward model) as JSONL",
    "--baseline DIR": "the policy to compare with, usually the SFT run",
    "--gold TASK": "score responses by the gold function of an embedded task: sort or arithmetic; or",
    "--judge DIR": "score responses by a reward model",
    "--samples N": "sampled completions per prompt (default 4)",
    "--max_new_tokens N": "default 64",
    "--temperature T": "of the samples (default 1.0)",
    "--best_of N": "draw N samples of each prompt, and say besides what the one is worth that --reward scores highest",
    **drawn.KEPT_HELP,
    "--seed S": "of samples and bootstrap (default 0)",
    "--batch_size B": "rows at once, at most (default 64)",
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
flags.DEFINE_integer("best_of", 0, "samples to choose one of", lower_bound=0)
flags.DEFINE_string("reward", "", "what chooses")
flags.DEFINE_string("template", "", "chat template")
flags.DEFINE_enum("cache", "same", ["same", "bfloat16", "int8"], "precision of keys and values")
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
    from rlhf_jax.cli.opened import conversing
    from rlhf_jax.files import write_whole

    source = conversing(options.checkpoint, "--checkpoint", options.template)
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
    from rlhf_jax.eval import compare
    from rlhf_jax.eval.generation import check_prompts
    from rlhf_jax.eval.models import Policy

    options = flags.FLAGS
    _check_flags()
    policy, key = Policy(source, "--checkpoint"), "--checkpoint"
    if options.max_new_tokens >= policy.config.context:
        raise UserError(f"--max_new_tokens = {options.max_new_tokens} leaves no room for a prompt in a context of {policy.config.context}")
    baseline = _baseline(source.reader(key).digest) if options.baseline else None
    samples = options.best_of or options.samples
    one_each, several = (_prompts(source, policy.config.context, group) for group in (1, samples))
    worth = _gold(options.gold) if options.gold else _judge(options.judge)
    check_prompts(several, worth if options.gold else lambda prompt, response: 0.0, options.data, f"--gold = {options.gold!r}")
    score = drawn.scorer(options.reward, options.batch_size) if options.best_of else None

    def evaluated(one: Policy, reference: Policy | None) -> compare.Evaluation:
        return compare.evaluate(
            one, reference, one_each, several, worth, max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed,
            samples=samples, rows=options.batch_size, cache=options.cache,
        )

    ours, theirs = evaluated(policy, baseline), None if baseline is None else evaluated(baseline, None)
    row = compare.row(ours, theirs, seed=options.seed)
    if score:
        asked = [{**record, "prompt": list(several.messages(record["prompt_id"])), "reference": several.reference(record["prompt_id"])}
                 for record in ours.sampled]
        row |= compare.best_row(ours, score(asked), theirs, seed=options.seed)
    renamed = {"win_vs_sft": "win_vs_baseline", "win_best": "win_best_vs_baseline"}
    return {renamed.get(name, name): value for name, value in row.items() if value is not None}


def _check_flags() -> None:
    """Refuses flags of a policy's evaluation that do not go together."""
    options = flags.FLAGS
    if bool(options.gold) == bool(options.judge):
        raise UserError("--gold and --judge: give exactly one of them, to say what a response is worth")
    drawn.check_temperature(options.temperature, greedy=False)
    if bool(options.best_of) != bool(options.reward):
        raise UserError("--best_of and --reward go together: how many samples of each prompt, and what chooses among them")
    if options.best_of and options["samples"].present:
        raise UserError(f"--samples = {options.samples} and --best_of = {options.best_of}: give one of them; --best_of draws as many")


def _baseline(digest: str) -> Any:
    """The policy of --baseline, which must read the same tokens."""
    from rlhf_jax.cli.opened import conversing
    from rlhf_jax.eval.models import Policy

    options = flags.FLAGS
    baseline = Policy(conversing(options.baseline, "--baseline", options.template), "--baseline")
    if baseline.source.reader("--baseline").digest != digest:
        raise UserError(f"--baseline = {options.baseline!r} reads another tokenizer than --checkpoint: seq_kl would compare different tokens")
    return baseline


def _prompts(source: Any, context: int, samples: int) -> Any:
    """--data as prompts, so many rows of each."""
    from rlhf_jax import data
    from rlhf_jax.data.shipped import default_cache

    options, key = flags.FLAGS, "--checkpoint"
    return data.open_dataset(
        "prompt", options.data, source.reader(key), template=source.layout(key), max_length=context, prompt_length=context - options.max_new_tokens,
        batch_size=drawn.queue(samples, options.batch_size), group_size=samples, cache=default_cache(),
    ).trimmed()


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

    for flag in ("baseline", "gold", "judge", "best_of", "reward"):
        if value := getattr(flags.FLAGS, flag):
            raise UserError(f"--{flag} = {value!r}: --checkpoint = {flags.FLAGS.checkpoint!r} is a reward model, which writes nothing: take it out")
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
