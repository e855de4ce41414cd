"""Scores rows of tokens or text with a saved network: a policy's log-prob of every token, or a reward model's score of every row.

  rlhf-jax score --model runs/sft --input rows.jsonl --output scored.jsonl
  rlhf-jax score --model models/Llama-3.2-1B --input rows.jsonl --output scored.jsonl --dtype bfloat16 --fsdp 4
  rlhf-jax score --model runs/sft --config configs/dpo.py --config.data.train=pairs.jsonl --output runs/sft_logps

A row has `text`, `messages`, `prompt` + `completion` (strings or messages; `response` will do), or `token_ids`, which need no tokenizer. It comes
back with all its fields and `token_ids`; from a policy `logps` (nats, one per token, 0 for the first), from a reward model `score`; where the row
says which tokens are the completion, also `loss_mask`, and from a policy `completion_logp`, the sum over them. Of `messages` the assistant's turns
are the completion.
With --config, the rows are those that a run of this config would train and validate on, and the output is a folder that its
--config.reference_from may name in place of --model: the reference's log-probs are then read and not computed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
from collections import Counter
from typing import Any, TextIO

from absl import flags

from rlhf_jax.cli.configs import define_config, loaded_config
from rlhf_jax.errors import UserError
from rlhf_jax.files import whole
from rlhf_jax.ops.logit_filters import COLDEST

FLAGS_HELP = {
    "--model DIR": "a policy or a reward model: a run's workdir, its best/ folder, one step, or a Hugging Face directory",
    "--input FILE": "rows as JSONL, or a folder of such files; or",
    "--config FILE[:VARIANT], --config.KEY=VALUE": "a run's config, as for rlhf-jax train",
    "--output PATH": "scored rows as JSONL, in the order of the input; with --config a new folder",
    "--temperature T": "divides a policy's logits (default 1.0)",
    "--template NAME": "chat template in place of the model's own: a shipped name or a file; none joins prompt and completion as they are",
    "--overlong error|truncate|skip": "what becomes of rows longer than the context (default error)",
    "--context N": "tokens of the longest row (default: the model's)",
    "--batch_tokens N": "tokens at once, padding included (default 16384)",
    "--dtype float32|bfloat16": "of the computation (default: a run's own; float32 for a Hugging Face directory)",
    "--fsdp N, --tensor N": "devices over which parameters are split (default 1)",
}
SHOWN = 8  # overlong rows that the refusal lists

FOR_ROWS = ("template", "temperature", "overlong", "context", "batch_tokens", "dtype")  # flags that a config decides

define_config()
flags.DEFINE_string("model", "", "network that scores")
flags.DEFINE_string("input", "", "rows as JSONL")
flags.DEFINE_string("output", "", "scored rows as JSONL")
flags.DEFINE_float("temperature", 1.0, "divides the logits")
flags.DEFINE_string("template", "", "chat template")
flags.DEFINE_enum("overlong", "error", ["error", "truncate", "skip"], "rows longer than the context")
flags.DEFINE_integer("context", 0, "tokens; 0 = the model's", lower_bound=0)
flags.DEFINE_integer("batch_tokens", 16384, "tokens at once", lower_bound=1)
flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "of the computation")
flags.DEFINE_integer("fsdp", 1, "devices", lower_bound=1)
flags.DEFINE_integer("tensor", 1, "devices", lower_bound=1)


def main() -> int:
    """Runs the command on parsed flags."""
    options = flags.FLAGS
    for flag in ("model", "output"):
        if not getattr(options, flag):
            raise UserError(f"--{flag} is missing")
    if (options.config is None) != bool(options.input):
        raise UserError("--input and --config: give exactly one of them, to say what is scored")
    return _rows() if options.config is None else _references()


def _references() -> int:
    """The reference's log-probs of a run's rows, as a folder."""
    from rlhf_jax.cli.opened import meshed, new_folder
    from rlhf_jax.saved import load_source
    from rlhf_jax.train.config import check
    from rlhf_jax.train.reference_cache import write_references

    options = flags.FLAGS
    if given := [flag for flag in FOR_ROWS if options[flag].present]:
        raise UserError(f"--{given[0]}: a run's rows are scored as its config says; leave the flag out")
    config = loaded_config().copy_and_resolve_references()
    with config.unlocked():
        config.reference_from = options.model
    checked, _ = check(config)
    with new_folder(options.output, "--output") as folder, meshed(options.fsdp, options.tensor) as mesh:
        counts = write_references(checked, load_source(options.model, "--model"), "--model", folder, mesh, _say)
    said = " and ".join(f"{number} tokens of config.data.{name}" for name, number in counts.items())
    print(f"{said} scored; train with --config.reference_from={options.output}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _rows() -> int:
    """The rows of a file."""
    options = flags.FLAGS
    if not COLDEST <= options.temperature < math.inf:
        raise UserError(f"--temperature = {options.temperature}: must be finite and above 0, at least {COLDEST:g}, since it divides the logits")
    output = pathlib.Path(options.output)
    if output.is_dir():
        raise UserError(f"--output = {options.output!r} is a folder: name a file")
    from rlhf_jax.cli.opened import chosen, meshed, with_template
    from rlhf_jax.data.readers import data_files
    from rlhf_jax.eval.scoring import Scorer
    from rlhf_jax.saved import load_source

    files = data_files(options.input)
    if output.exists() and any(output.samefile(file) for file in files):
        raise UserError(f"--output = {options.output!r} is the input: name another file")
    raw = options.template == "none"
    source = with_template(load_source(options.model, "--model"), "" if raw else options.template)
    if source.network == "reward" and options.temperature != 1.0:
        raise UserError(f"--temperature = {options.temperature}: --model = {options.model!r} is a reward model, which has no logits to divide")
    source = dataclasses.replace(source, config=chosen(source.config, options.context, options.dtype))
    items, counts = _items(source, files, raw)
    with meshed(options.fsdp, options.tensor) as mesh:
        scorer = Scorer(source, "--model", batch_tokens=options.batch_tokens, temperature=options.temperature, mesh=mesh)
    with whole(output) as stream:
        replaced = _score(scorer, items, files, stream)
    tokens = sum(len(item.tokens) for item in items)
    said = "".join(f", {counts[name]} {name}" for name in ("truncated", "skipped") if counts[name])
    print(f"{len(items)} rows of {tokens} tokens scored{said}; {output}")
    for name, number in sorted(replaced.items()):
        print(f"rlhf-jax: {number} rows had a field {name!r} of their own, which the scorer's replaced", file=sys.stderr)
    return 0


def _items(source: Any, files: list[str], raw: bool) -> tuple[list[Any], Counter[str]]:
    """All rows that will be scored: a mistake in the last one is found before the first is scored."""
    from rlhf_jax.data.mixed import MixedReader

    options, context = flags.FLAGS, source.config.context
    reader = MixedReader(
        source.tokenizer, source.template, vocab_size=source.config.vocab_size, raw=raw,
        missing={"tokenizer": f"--model = {options.model!r} has none, so write token_ids",
                 "template": "name one with --template, or --template none to join prompt and completion as they are"},
    )
    items, counts, long = [], Counter[str](), []
    for item in reader.items(files):
        if len(item.tokens) <= context:
            items.append(item)
        elif options.overlong == "truncate":
            items.append(item.cut(context))
            counts["truncated"] += 1
        elif options.overlong == "skip":
            counts["skipped"] += 1
        else:
            long.append(f"{item.place} ({len(item.tokens)})")
    if long:
        more = f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
        raise UserError(f"{len(long)} rows are longer than the context of {context} tokens: {', '.join(long[:SHOWN])}{more}; set --overlong "
                        "truncate or skip, or raise --context")
    if not items:
        raise UserError(f"--input = {options.input!r}: every row is longer than the context of {context} tokens; raise --context")
    return items, counts


def _score(scorer: Any, items: list[Any], files: list[str], stream: TextIO) -> Counter[str]:
    """Scores and writes, window by window; the rows' own fields are read once more. Returns how often a field of the same name was replaced."""
    from rlhf_jax.data.readers import json_rows
    from rlhf_jax.eval.scoring import Progress, windows

    progress = Progress(len(items), _say)
    fields = (row for file in files for row in json_rows(file))
    replaced = Counter[str]()
    for window in windows(items, scorer.batch_tokens):
        for item, values in zip(window, scorer.score(window, progress)):
            row = next((row for row in fields if (row.source, row.line) == (item.source, item.line)), None)
            if row is None:
                raise UserError(f"--input: {item.source} changed while it was read; run the command again")
            made = _row(item, values, scorer.rewards)
            replaced.update(name for name in ("logps", "score", "completion_logp") if name in made and name in row.fields)
            stream.write(_line({**row.fields, **made}))
    return replaced


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate in a field that is only passed on
        text = json.dumps(row)
    return text + "\n"


def _row(item: Any, values: Any, rewards: bool) -> dict[str, Any]:
    """The output's fields; numbers with the 9 digits that tell one float32 from every other."""
    made: dict[str, Any] = {"token_ids": item.tokens.tolist()}
    if rewards:
        made["score"] = float(f"{float(values):.9g}")
    else:
        made["logps"] = [float(f"{value:.9g}") for value in values.tolist()]
    if item.completion is not None:
        made["loss_mask"] = item.completion.tolist()
        if not rewards:
            made["completion_logp"] = float(f"{values[item.completion].astype('float64').sum():.9g}")
    return made
