"""What `sample`, `eval` and `chat` say alike about how tokens are drawn and which samples are kept: flags, read and checked."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax import sampling
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.ops.logit_filters import COLDEST
from rlhf_jax.sampling import filters

FLAGS_HELP = {
    "--filters LIST": "further filters, in their order, as config.sampling.filters has them: JSON, [{\"name\": \"min_p\", \"p\": 0.05}], or "
                      "name:key=value; may be repeated",
    "--stop_strings TEXT": "ends a response; the token that completes it is kept; may be repeated",
}
KEPT_HELP = {
    "--template NAME": "chat template in place of the model's own: a shipped name or a file",
    "--cache same|bfloat16|int8": "precision of the keys and values that decoding keeps (default same, as the computation)",
    "--reward NAME": "what chooses: a reward model's run, or a function (prompts, responses, references) -> scores: rules.NAME, or its dotted path",
}
QUEUE = 8  # prompts in one program, in batches: rows that have ended make room for them
Scorer = Callable[[Sequence[Mapping[str, Any]]], np.ndarray]


def read(texts: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """The entries that --filters stands for.

    Args:
      texts: each a JSON list of objects, one object, or `name:key=value` with a JSON value, a bare word being a text.

    Raises:
      UserError: none of these.
    """
    entries: list[dict[str, Any]] = []
    for text in texts:
        if text.lstrip().startswith(("[", "{")):
            try:
                value = json.loads(text)
            except ValueError as error:
                raise UserError(f"--filters = {text!r} is no JSON ({error}): write [{{\"name\": \"min_p\", \"p\": 0.05}}]") from None
            entries += value if isinstance(value, list) else [value]
            continue
        name, colon, rest = text.partition(":")
        key, equals, value = rest.partition("=")
        if not (colon and equals):
            raise UserError(f"--filters = {text!r}: write name:key=value, for example min_p:p=0.05, or JSON")
        entries.append({"name": name.strip(), key.strip(): _value(value)})
    return tuple(entries)


def check_temperature(temperature: float, *, greedy: bool = True) -> None:
    """Refuses a --temperature by which logits cannot be divided.

    Args:
      temperature: the flag's.
      greedy: 0 stands for greedy decoding.

    Raises:
      UserError: too low, or not finite.
    """
    if not (COLDEST <= temperature < math.inf or (greedy and temperature == 0)):
        least = f"{COLDEST:g}, or 0, which is greedy" if greedy else f"{COLDEST:g}; greedy completions are evaluated besides"
        raise UserError(f"--temperature = {temperature}: must be finite and at least {least}")


def compose(texts: Sequence[str], stop_strings: Sequence[str], tokenizer: Tokenizer, vocab_size: int, max_new_tokens: int) -> sampling.Filters:
    """The flags' filters, for a tokenizer.

    Args:
      texts: --filters.
      stop_strings: --stop_strings.
      tokenizer: the policy's.
      vocab_size: of the policy's logits.
      max_new_tokens: --max_new_tokens.

    Raises:
      UserError: a filter that cannot be, named by flag.
    """
    try:
        return filters.build(read(texts), tuple(stop_strings), tokenizer=tokenizer, vocab_size=vocab_size, max_new_tokens=max_new_tokens)
    except UserError as error:
        said = str(error).replace(filters.KEY, "--filters").replace(filters.STOPS, "--stop_strings")
        raise UserError(said.replace("config.sampling.", "--")) from None


def queue(samples: int, rows: int) -> int:
    """Rows of one program, whole prompts.

    Args:
      samples: of each prompt.
      rows: --batch_size, decoded at once.
    """
    return QUEUE * max(rows // samples, 1) * samples


def scorer(name: str, rows: int) -> Scorer:
    """What --reward says of samples, opened: a mistake is found before anything is sampled.

    Args:
      name: the flag's.
      rows: a reward model scores at once.

    Returns:
      a function of samples, each with its `prompt` (messages), `response`, `truncated` and `reference`, to their scores.

    Raises:
      UserError: no such function or reward model.
    """
    if pathlib.Path(name).exists() or "/" in name:
        from rlhf_jax.eval.models import RewardModel, text_reward
        from rlhf_jax.saved import load_source

        score = text_reward(RewardModel(load_source(name, "--reward"), "--reward"), "--reward")
        return lambda found: score([row["prompt"] for row in found], [row["response"] for row in found],
                                   [not row["truncated"] for row in found], rows)
    from rlhf_jax.rewards import entries, host

    function = entries.load_function(name, "--reward")
    return lambda found: host.call_reward_fn(function, [row["prompt"] for row in found], [row["response"] for row in found],
                                             [row["reference"] for row in found], key="--reward")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
