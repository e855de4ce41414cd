"""Completes prompts with a trained policy.

  rlhf-jax sample --checkpoint runs/sft --prompt "Sort these digits: 5 3 9 1"
  rlhf-jax sample --checkpoint runs/dpo/best --input prompts.jsonl --output completions.jsonl --n 4 --temperature 0.7
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any

from absl import flags

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
    "--seed S": "the same seed draws the same samples (default 0)",
    "--batch_size B": "rows at once (default 64)",
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
    from rlhf_jax import data
    from rlhf_jax.eval.generation import responses
    from rlhf_jax.eval.models import Policy
    from rlhf_jax.files import write_whole
    from rlhf_jax.saved import load_source

    policy = Policy(load_source(options.checkpoint, "--checkpoint"), "--checkpoint")
    slots = policy.config.context - options.max_new_tokens
    if slots < 1:
        raise UserError(f"--max_new_tokens = {options.max_new_tokens} leaves no room for a prompt in a context of {policy.config.context}")
    with tempfile.TemporaryDirectory() as folder:
        path = options.input
        if options.prompt:
            path = str(pathlib.Path(folder) / "prompt.jsonl")
            pathlib.Path(path).write_text(json.dumps({"prompt": options.prompt}) + "\n", encoding="utf-8")
        source, key = policy.source, "--checkpoint"
        tokenizer = source.reader(key)
        prompts: Any = data.open_dataset(
            "prompt", path, tokenizer, template=source.layout(key), max_length=policy.config.context, prompt_length=slots,
            batch_size=max(options.batch_size // options.n, 1) * options.n, group_size=options.n, cache=folder,
        ).trimmed()
        rows: list[dict[str, Any]] = []
        for batch in prompts.eval_batches():
            rolled = policy.generate(
                batch, seed=options.seed, max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
                top_p=options.top_p, group_size=options.n,
            )
            for at, text in enumerate(responses(rolled, tokenizer)):
                if batch.real[at]:
                    prompt_id = int(batch.prompt_ids[at])
                    rows.append({"prompt": list(prompts.messages(prompt_id)), "response": text, "prompt_id": prompt_id,
                                 "sample_id": int(batch.sample_ids[at]), "truncated": bool(rolled.truncated[at])})
    if options.output:
        write_whole(options.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{len(rows)} completions in {options.output}")
    else:
        for row in rows:
            sys.stdout.write(row["response"] + ("" if not row["truncated"] else " …") + "\n")
    return 0
