"""What `sample` and `chat` say about how tokens are drawn: --filters and --stop_strings, read and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

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


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
