"""Completes prompts with a trained policy.

  rlhf-jax sample --checkpoint runs/sft --prompt "Sort these digits: 5 3 9 1"
  rlhf-jax sample --checkpoint runs/dpo/best --input prompts.jsonl --output completions.jsonl --n 4 --temperature 0.7
  rlhf-jax sample --checkpoint runs/sft --input prompts.jsonl --best_of 16 --reward runs/reward
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags

from rlhf_jax.cli import drawn
from rlhf_jax.errors import UserError

FLAGS_HELP = {
    "--checkpoint DIR": "a policy's workdir, its best/ or checkpoints/ folder, or one step",
    "--prompt TEXT": "one user message; or",
    "--input FILE": "prompts as JSONL: `prompt` (text or messages) or `messages`",
    "--output FILE": "completions as JSONL, one row per sample; default: printed",
    "--n N": "samples per prompt (default 1)",
    "--max_new_tokens N": "default 64, at most what the context leaves",
    "--temperature T": "default 1.0; 0 is greedy",
    "--top_k K, --top_p P": "filters; 0 and 1.0 switch them off (default)",
    **drawn.FLAGS_HELP,
    "--best_of N": "of N samples of each prompt, keep the one that --reward scores highest; its row holds all scores",
    **drawn.KEPT_HELP,
    "--seed S": "the same seed draws the same samples (default 0)",
    "--batch_size B": "rows at once, at most (default 64)",
}

flags.DEFINE_string("checkpoint", "", "policy to sample from")
flags.DEFINE_string("prompt", "", "one user message")
flags.DEFINE_string("input", "", "prompts as JSONL")
flags.DEFINE_string("output", "", "completions as JSONL")
flags.DEFINE_integer("n", 1, "samples per prompt", lower_bound=1)
flags.DEFINE_integer("max_new_tokens", 64, "tokens", lower_bound=1)
flags.DEFINE_float("temperature", 1.0, "0 is greedy", lower_bound=0.0)
flags.DEFINE_integer("top_k", 0, "0 = off", lower_bound=0)
flags.DEFINE_float("top_p", 1.0, "1 = off", lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_multi_string("filters", [], "name:key=value or JSON")
flags.DEFINE_multi_string("stop_strings", [], "ends of responses")
flags.DEFINE_integer("best_of", 0, "samples to choose one of", lower_bound=0)
flags.DEFINE_string("reward", "", "what scores them")
flags.DEFINE_string("template", "", "chat template")
flags.DEFINE_enum("cache", "same", ["same", "bfloat16", "int8"], "precision of keys and values")
flags.DEFINE_integer("seed", 0, "of the samples")
flags.DEFINE_integer("batch_size", 64, "rows at once", lower_bound=1)


def main() -> int:
    """Runs the command on parsed flags."""
    options = flags.FLAGS
    if not options.checkpoint:
        raise UserError("--checkpoint is missing: name a policy's workdir")
    if bool(options.prompt) == bool(options.input):
        raise UserError("--prompt and --input: give exactly one of them")
    if options.top_p <= 0:
        raise UserError(f"--top_p = {options.top_p}: must be above 0; 1.0 switches it off")
    drawn.check_temperature(options.temperature)
    if bool(options.best_of) != bool(options.reward):
        raise UserError("--best_of and --reward go together: how many samples of each prompt, and what they are worth")
    if options.best_of and options.n > 1:
        raise UserError(f"--n = {options.n} and --best_of = {options.best_of}: give one of them; --best_of keeps one sample of each prompt")
    scorer = drawn.scorer(options.reward, options.batch_size) if options.best_of else None
    rows = _sampled()
    rows = _best(rows, scorer) if scorer else [{name: value for name, value in row.items() if name != "reference"} for row in rows]
    if options.output:
        from rlhf_jax.files import write_whole

        write_whole(options.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{len(rows)} completions in {options.output}")
    else:
        for row in rows:
            sys.stdout.write(row["response"] + ("" if not row["truncated"] else " …") + "\n")
    return 0


def _sampled() -> list[dict[str, Any]]:
    """Every sample, in the prompts' order, with what the file says beside its prompt."""
    from rlhf_jax import data
    from rlhf_jax.cli.opened import conversing
    from rlhf_jax.eval.generation import responses, shares
    from rlhf_jax.eval.models import Policy

    options = flags.FLAGS
    policy = Policy(conversing(options.checkpoint, "--checkpoint", options.template), "--checkpoint")
    samples = options.best_of or options.n
    room = policy.config.context - options.max_new_tokens
    if room < 1:
        raise UserError(f"--max_new_tokens = {options.max_new_tokens} leaves no room for a prompt in a context of {policy.config.context}")
    source, key = policy.source, "--checkpoint"
    tokenizer, (group, slots) = source.reader(key), shares(samples, options.batch_size)
    filters = drawn.compose(options.filters, options.stop_strings, tokenizer, policy.config.vocab_size, options.max_new_tokens)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = options.input
        if options.prompt:
            path = str(pathlib.Path(folder) / "prompt.jsonl")
            pathlib.Path(path).write_text(json.dumps({"prompt": options.prompt}) + "\n", encoding="utf-8")
        prompts: Any = data.open_dataset(
            "prompt", path, tokenizer, template=source.layout(key), max_length=policy.config.context, prompt_length=room,
            batch_size=drawn.queue(samples, options.batch_size), group_size=samples, cache=folder,
        ).trimmed()
        for batch in prompts.eval_batches():
            rolled = policy.generate(
                batch, seed=options.seed, max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
                top_p=options.top_p, group_size=group, filters=filters, slots=slots, cache=options.cache,
            )
            for at, text in enumerate(responses(rolled, tokenizer, tokenizer.stop_ids)):
                if batch.real[at]:
                    prompt_id = int(batch.prompt_ids[at])
                    rows.append({"prompt": list(prompts.messages(prompt_id)), "response": text, "prompt_id": prompt_id,
                                 "sample_id": int(batch.sample_ids[at]), "truncated": bool(rolled.truncated[at]),
                                 "reference": prompts.reference(prompt_id)})
    return rows


def _best(rows: list[dict[str, Any]], scorer: drawn.Scorer) -> list[dict[str, Any]]:
    """The best sample of each prompt, with its score and all of them."""
    import jax.numpy as jnp

    from rlhf_jax import sampling

    best_of = flags.FLAGS.best_of
    best = sampling.best_of(jnp.asarray(scorer(rows)), n=best_of)
    print(f"rlhf-jax: best of {best_of}: at most {sampling.kl_bound(best_of):.3f} nats per response from the policy", file=sys.stderr, flush=True)
    kept = []
    for row, score, scores in zip(best.row.tolist(), best.score.tolist(), best.scores.tolist()):
        shown = {name: value for name, value in rows[row].items() if name != "reference"}
        kept.append({**shown, "score": score, "scores": scores})
    return kept
