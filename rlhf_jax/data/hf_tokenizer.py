"""The text side of a Hugging Face directory: tokenizer, control tokens and chat template, read and written.

`read` follows what `transformers` 5 makes of the files: a `chat_template.jinja` wins over tokenizer_config.json, special_tokens_map.json
counts only beside a config without `added_tokens_decoder`, a named token that tokenizer.json lacks is added behind the others. What ends an
assistant's turn is read off the template, since eos often is another token (Gemma writes `<end_of_turn>`, its eos is `<eos>`).
`files` is the way back; keys of the config that mean nothing here are kept.
Deviation: tokenizer.json alone decides ids, whatever tokenizer_class says; classes of `transformers` that rebuild a tokenizer from its
vocabulary (LlamaTokenizer) give the same ids where their files agree. The token that ends a turn is special here, also where it is flagged
otherwise, so that it cannot be typed into a message.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as _Tokenizer

from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.records import Message
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError, nearest

TOKENIZER, CONFIG, MAP, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
MORE = "additional_chat_templates"  # a folder of further templates, NAME.jinja
SLOW = ("tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "tekken.json", "spiece.model")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # in the order of being added
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
_LEFT_OUT = ("added_tokens_decoder", "auto_map", "name_or_path", "special_tokens_map_file", "tokenizer_file")  # of no use elsewhere
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
Object = dict[str, Any]


def read(folder: str, *, template: str | None = None) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and the chat template of a directory; None for what it has not (a base model has no template).

    Args:
      folder: with tokenizer.json, and the other files as far as there are any.
      template: which of several named templates; None: "default".

    Raises:
      UserError: only a slow tokenizer is there, a file is damaged, a token is missing, or there is no such template.
    """
    if not os.path.isfile(os.path.join(folder, TOKENIZER)):
        if slow := [name for name in SLOW if os.path.exists(os.path.join(folder, name))]:
            raise UserError(
                f"{folder} expected a {TOKENIZER}, got {slow[0]} alone; let transformers write one: "
                f"AutoTokenizer.from_pretrained({folder!r}).save_pretrained({folder!r})"
            )
        return None, None
    config = _config(folder)
    declared = {name: _object(folder, name) for name in ("config.json", "generation_config.json")}
    inner = _complete(folder, config, declared)
    templates = _templates(folder, config)
    layout = None
    if templates or template is not None:
        name = _chosen(folder, templates, template)
        layout = ChatTemplate(templates[name], name=f"{folder}: {name}", variables=_names(config))
        templates = {other: source for other, source in templates.items() if other not in (name, "default")}
    kept = {key: value for key, value in config.items() if key not in (*_LEFT_OUT, "chat_template")}
    if templates:
        kept["chat_template"] = templates
    eos = config.get("eos_token")
    end = (turn_end(layout, inner) if layout else None) or eos
    if end is None:
        raise UserError(f"{folder}/{CONFIG} eos_token expected a token, got none; name the one that ends a document")
    stops = [index for ids in declared.values() for index in _ids(ids, "eos_token_id") if inner.id_to_token(index) is not None]
    names: Object = {"pad": config.get("pad_token") or end, "bos": config.get("bos_token"), "end": end, "eos": eos}
    return Tokenizer(_with_special(inner, end), **names, stops=stops, config=kept), layout


def turn_end(template: ChatTemplate, tokenizer: Tokenizer | _Tokenizer) -> str | None:
    """The added token that the template writes after an assistant's answer; None where it writes none, or refuses a question and an answer.

    Args:
      template: of the conversation.
      tokenizer: knows the tokens.
    """
    added = tokenizer.added if isinstance(tokenizer, Tokenizer) else [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    answer = "The answer."
    try:
        text = template.text((Message(role="user", content="A question?"), Message(role="assistant", content=answer)))
    except UserError:
        return None
    behind = text.rpartition(answer)[2].lstrip() if answer in text else ""
    found = [token for token in added if token.strip() and behind.startswith(token)]
    return max(found, key=len, default=None)


def fitted(tokenizer: Tokenizer, template: ChatTemplate) -> Tokenizer:
    """The tokenizer for another template than its own: `end` is what that template writes after an answer, its own stays a stop token.

    Args:
      tokenizer: of the model.
      template: of the conversations.
    """
    end = turn_end(template, tokenizer)
    if end is None or end == tokenizer.end:
        return tokenizer
    inner = _with_special(_Tokenizer.from_str(tokenizer.to_json()), end)
    return tokenizer.replace(inner=inner, end=end, eos=tokenizer.eos, stops=[*tokenizer.stops, tokenizer.end_id])


@dataclass(frozen=True)
class Added:
    """A tokenizer that knows more special tokens."""

    tokenizer: Tokenizer
    new: tuple[str, ...]  # ids from the old `vocab_size` on, in this order
    existing: tuple[str, ...]  # in the vocabulary already, now special if they were not


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Added:
    """The tokenizer with these special tokens, new ones behind the highest id.

    Args:
      tokenizer: to be extended.
      tokens: config.model.add_tokens.

    Raises:
      UserError: a token is empty, no text, or named twice.
    """
    for at, token in enumerate(tokens):
        if not isinstance(token, str) or not token.strip() or token in tokens[:at]:
            raise UserError(f"config.model.add_tokens expected different texts, got {token!r}; leave it out")
    inner = _Tokenizer.from_str(tokenizer.to_json())
    existing = tuple(token for token in tokens if inner.token_to_id(token) is not None)
    new = tuple(token for token in tokens if token not in existing)
    for token in existing:
        inner = _with_special(inner, token)
    for index, token in enumerate(new, start=tokenizer.vocab_size):
        inner.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if inner.token_to_id(token) != index:  # the library counts ids, and this vocabulary has holes
            raise UserError(
                f"config.model.add_tokens expected a tokenizer without holes in its ids, got one where {token!r} would be "
                f"{inner.token_to_id(token)} and not {index}; fill the holes in {TOKENIZER}"
            )
    return Added(tokenizer.replace(inner=inner), new, existing)


def check_fits(tokenizer: Tokenizer, declared: Mapping[str, Mapping[str, Any]], vocab_size: int, where: str) -> None:
    """Refuses a tokenizer that is not the model's; a vocabulary padded above the tokenizer's is no mistake.

    Args:
      tokenizer: reads the text.
      declared: what the model's files say, {"config.json": {…}, "generation_config.json": {…}}: bos_token_id, eos_token_id and pad_token_id
        are read, an id or a list of them.
      vocab_size: rows of the embedding.
      where: the model's path, for messages.

    Raises:
      UserError: a token without a row, an id without a token, or an id that is another token than the tokenizer's own.
    """
    if tokenizer.vocab_size > vocab_size:
        last = tokenizer.vocab_size - 1
        raise UserError(
            f"{where}: the tokenizer's token {tokenizer.token(last)!r} has id {last}, and the model's vocab_size is {vocab_size}; use the "
            "tokenizer that the model was trained with, or have its embedding resized with --config.model.add_tokens"
        )
    own: tuple[list[int | None], ...] = ([tokenizer.bos_id], [tokenizer.eos_id, tokenizer.end_id], [tokenizer.pad_id])
    for key, expected in zip(_IDS, own):
        ids = {index: file for file, content in declared.items() for index in _ids(content, key)}
        for index, file in ids.items():
            if index >= vocab_size or tokenizer.token(index) is None:
                raise UserError(
                    f"{where}/{file} {key} = {index} names no token of the tokenizer, which has {tokenizer.vocab_size} (the model's "
                    f"vocab_size is {vocab_size}); correct the id, or use the tokenizer that the model was trained with"
                )
        # Qwen's configs name a bos that its tokenizer has not; where there is no pad of its own, any id will do.
        has_own = {"bos_token_id": tokenizer.bos is not None, "pad_token_id": "pad_token" in tokenizer.variables}.get(key, True)
        if ids and has_own and not ids.keys() & set(expected):
            index, file = next(iter(ids.items()))
            name = key.removesuffix("_id")
            raise UserError(
                f"{where}/{file} {key} = {index} is {tokenizer.token(index)!r}, and the tokenizer's {name} is "
                f"{tokenizer.token(expected[0] or 0)!r} = {expected[0]}; correct the id, or {name} in {CONFIG}"
            )


def files(tokenizer: Tokenizer, template: ChatTemplate | None, *, model_max_length: int) -> dict[str, str]:
    """What an exported directory holds of the text side: file names and their contents.

    Args:
      tokenizer: of the model.
      template: of its conversations; None: a base model.
      model_max_length: tokens of context.
    """
    config = dict(tokenizer.config or {})
    more = config.pop("chat_template", {})
    named = tokenizer.variables | {"eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    if tokenizer.bos is not None:
        named["bos_token"] = tokenizer.bos
    config = {"bos_token": None, "clean_up_tokenization_spaces": False} | config | named
    config |= {"model_max_length": model_max_length, "tokenizer_class": "PreTrainedTokenizerFast"}
    found = {TOKENIZER: tokenizer.to_json(), MAP: _json(named)}
    if template is not None:
        # transformers reads the files alone where there are any, so that all templates are written as files too
        every = {"default": template.source, **more}
        config["chat_template"] = template.source if not more else [{"name": n, "template": source} for n, source in every.items()]
        found[TEMPLATE] = template.source
        found |= {f"{MORE}/{name}.jinja": source for name, source in more.items()}
    return found | {CONFIG: _json(config)}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _text(*path: str) -> str:
    file = os.path.join(*path)
    try:
        with open(file, encoding="utf-8-sig") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} expected a UTF-8 text file, got {error}; copy it again") from None


def _object(folder: str, name: str) -> Object:
    """A JSON file; {} where there is none."""
    if not os.path.exists(os.path.join(folder, name)):
        return {}
    try:
        found = json.loads(_text(folder, name))
    except ValueError as error:
        raise UserError(f"{folder}/{name} expected valid JSON, got {error}; copy it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{folder}/{name} expected a JSON object, got {type(found).__name__}; copy it again")
    return found


def _ids(content: Mapping[str, Any], key: str) -> list[int]:
    """The ids under a key of config.json, or of its text part; below 0 stands for none."""
    value = content.get(key)
    if value is None and isinstance(inner := content.get("text_config"), Mapping):
        value = inner.get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) and index < 2**31 for index in listed):
        raise UserError(f"the model's {key} expected an id or a list of ids, got {value!r}; correct it")
    return [index for index in listed if index >= 0]


def _config(folder: str) -> Object:
    """tokenizer_config.json, completed from special_tokens_map.json where that still counts."""
    config = _object(folder, CONFIG)
    if "added_tokens_decoder" not in config:
        config |= _object(folder, MAP)
    return config


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """Every named token, in the order in which missing ones are added."""
    keys = [*_NAMED, *(key for key in config if key.endswith("_token") and key not in _NAMED)]
    return {key: config[key] for key in keys if isinstance(config.get(key), str)}


def _complete(folder: str, config: Object, declared: Mapping[str, Object]) -> _Tokenizer:
    """The tokenizer with all tokens that the config names; `config` is brought to plain names, and completed from ids of the model's files.

    (GPT-2's files name no token at all: the class of `transformers` knows them, here the ids of config.json do.)
    """
    layout = _object(folder, TOKENIZER)
    try:
        listed = {token["content"]: token for token in layout["added_tokens"]}
        flags = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, dict)}
        config |= {key: value.get("content") for key, value in flags.items()}
        if bad := next((key for key in _NAMED if not isinstance(config.get(key), str | None)), None):
            raise ValueError(f"tokenizer_config.json has {bad} = {config[bad]!r}, which is no text")
        by_id = {token["id"]: content for content, token in listed.items() if token["special"]}
        for key in _IDS:
            ids = [index for content in reversed([*declared.values()]) for index in _ids(content, key)]
            if key.removesuffix("_id") not in config and ids and ids[0] in by_id:
                config[key.removesuffix("_id")] = by_id[ids[0]]
        if config.get("pad_token") is None and layout.get("padding"):
            config["pad_token"] = layout["padding"]["pad_token"]
        wanted: dict[str, Object] = {}  # not in tokenizer.json
        for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            home = listed if token["content"] in listed else wanted
            home.setdefault(token["content"], {}).update({flag: token[flag] for flag in _FLAGS if flag in token})
        for key, name in _names(config).items():
            given = {flag: value for flag, value in flags.get(key, {}).items() if flag in _FLAGS}
            home = listed if name in listed else wanted
            home.setdefault(name, {"content": name, "normalized": False, **given})["special"] = True
        for name in _extra(config):
            home = listed if name in listed else wanted
            home.setdefault(name, {"content": name, "normalized": False, "special": True})
        inner = _Tokenizer.from_str(json.dumps(layout))
        inner.add_tokens([AddedToken(**token) for token in wanted.values()])
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"{folder}/{TOKENIZER} expected a tokenizer, got {type(error).__name__}: {error}; save it again") from None
    return inner


def _extra(config: Mapping[str, Any]) -> Iterable[str]:
    """Tokens of the lists of special tokens, as text."""
    for key in _EXTRA:
        value = config.get(key) or ()
        for token in value.values() if isinstance(value, Mapping) else value:
            yield token if isinstance(token, str) else token["content"]


def _templates(folder: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Every template by name; files win over the config, all of it."""
    found: dict[str, str] = {}
    if os.path.exists(os.path.join(folder, TEMPLATE)):
        found["default"] = _text(folder, TEMPLATE)
    if os.path.isdir(more := os.path.join(folder, MORE)):
        found |= {name.removesuffix(".jinja"): _text(more, name) for name in sorted(os.listdir(more)) if name.endswith(".jinja")}
    given = config.get("chat_template")
    if found or not given:
        return found
    if isinstance(given, str):
        return {"default": given}
    named = given if isinstance(given, dict) else {entry["name"]: entry["template"] for entry in given if isinstance(entry, dict)}
    if bad := next((name for name, source in named.items() if not re.fullmatch(r"\w[\w.-]*", name) or not isinstance(source, str)), None):
        raise UserError(f"{folder}/{CONFIG} chat_template expected texts under names, got {bad!r}; use letters, digits, _ . and -")
    return named


def _chosen(folder: str, templates: Collection[str], name: str | None) -> str:
    if name is None and len(templates) == 1:
        return next(iter(templates))
    wanted = name or "default"
    if wanted not in templates:
        raise UserError(f"{folder} expected a chat template {wanted!r}, got none of this name{nearest(wanted, templates)}; choose one of its own")
    return wanted


def _with_special(inner: _Tokenizer, name: str) -> _Tokenizer:
    """The tokenizer with a token of its vocabulary flagged special."""
    own = next((token for token in inner.get_added_tokens_decoder().values() if token.content == name), None)
    if own is None:
        inner.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    if own is None or own.special:
        return inner
    layout = json.loads(inner.to_str())
    for token in layout["added_tokens"]:
        token["special"] |= token["content"] == name
    return _Tokenizer.from_str(json.dumps(layout))
