"""Small Hugging Face directories in the style of the families that people have: tokenizer.json, configs and a chat template each.

The templates are our own words for the families' layouts. Vocabularies are written by hand: ids can be counted.
"""

import dataclasses
import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ("the", "cat", "sat", "answer", "question")


def byte_level(specials, *, plain=(), regex=True, normalizer=None, first=None, flags=None):
    """GPT-2's kind: 256 bytes, a few merges, then added tokens; `first` is a token that the post-processor puts before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for word in WORDS for left, right in _merges(word)] + [("Ġ", word) for word in WORDS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*alphabet, *(a + b for a, b in merges)]))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    inner.decoder, inner.normalizer = decoders.ByteLevel(), normalizer
    _add(inner, specials, plain, flags)
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    if first:
        single = processors.TemplateProcessing(single=f"{first}:0 $A:0", special_tokens=[(first, inner.token_to_id(first))])
        inner.post_processor = processors.Sequence([inner.post_processor, single])
    return inner


def sentencepiece(specials, style, *, plain=(), flags=None):
    """Llama 2's kind: `▁` for a space, one token per byte of an unknown character.

    Args:
      style: "prepend" (a normalizer writes ▁ before every piece of text), "first" (Metaspace, before the text alone), or "never" (Gemma).
    """
    pieces = ["▁", *map(chr, range(33, 127)), "\n"]
    merges = [(left, right) for word in WORDS for left, right in _merges(word)] + [("▁", word) for word in WORDS] + [("▁", "▁")]
    listed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *(a + b for a, b in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(listed))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif style == "first":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence(steps if style == "never" else [*steps, decoders.Strip(" ", 1, 0)])
    _add(inner, ["<unk>", "<s>", "</s>", *specials], plain, flags)
    inner.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", special_tokens=[("<s>", 1)])
    return inner


def _merges(word):
    return [(word[:size], word[size]) for size in range(1, len(word))]


def _add(inner, specials, plain, flags):
    flags = flags or {}
    inner.add_tokens([AddedToken(t, special=t not in plain, **{"normalized": False, **flags.get(t, {})}) for t in (*specials, *plain)])


LLAMA3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set said = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set said = '' %}{% set rest = messages %}{% endif %}
{{- '<|head|>system<|tail|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n' + said + '<|eot|>' }}
{%- for m in rest %}
    {{- '<|head|>' + m.role + '<|tail|>\\n\\n' + m.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\\n\\n' }}{% endif %}"""
QWEN25 = """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}
{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{% for t in tools %}{{ t | tojson(separators=(',', ':')) }}{% endfor %}
{{- '</tools><|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'system' and loop.first %}{% continue %}{% endif %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\\n<answered>' + m.content + '</answered><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
        {%- for c in m.tool_calls or [] %}{{- '<call>' + c.function | tojson + '</call>' }}{% endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# The last answer shows its thoughts, or an empty thought; earlier answers lose theirs.
QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set said, thought = m.content, m.reasoning_content or '' %}
    {%- if '</think>' in said %}
        {%- set thought = said.split('</think>')[0].split('<think>')[-1] | trim %}{% set said = said.split('</think>')[-1] | trim %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
    {{- said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}
{%- endfor %}"""
PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
ZEPHYR = """{% for m in messages %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
# The block holds the header and the line break behind, as SmolLM3's does.
SMOL = """{% for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@dataclasses.dataclass(frozen=True)
class Family:
    """One directory, and what is to be read out of it."""

    inner: Tokenizer
    config: dict[str, Any]  # tokenizer_config.json
    template: str | None
    end: str  # expected
    said: str  # what of the answer "cat" is trained on, decoded with control tokens
    ids: dict[str, Any] = dataclasses.field(default_factory=dict)  # config.json
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)  # generation_config.json
    system: bool = True  # takes a system message
    bos: str | None = None  # expected
    pad: str | None = None  # expected; None: the end token

    def write(self, folder):
        """The directory."""
        folder.mkdir(exist_ok=True, parents=True)
        self.inner.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        for name, content in (("tokenizer_config", config), ("config", self.ids), ("generation_config", self.generation)):
            if content:
                (folder / f"{name}.json").write_text(json.dumps(content))
        if self.template:
            (folder / "chat_template.jinja").write_text(self.template)
        return str(folder)


# Added tokens begin at 279 (bytes) and 379 (sentencepiece, where <unk>, <s> and </s> are 0, 1, 2).
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PHI = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
FAMILIES = {
    "llama3": Family(
        byte_level(["<|begin|>", "<|end_of_text|>", "<|head|>", "<|tail|>", "<|eot|>", "<|eom|>"], first="<|begin|>"),
        {"bos_token": "<|begin|>", "eos_token": "<|eot|>"}, LLAMA3, "<|eot|>", "cat<|eot|>",
        ids={"eos_token_id": 283}, generation={"eos_token_id": [280, 284, 283]}, bos="<|begin|>",
    ),
    "qwen2.5": Family(
        byte_level(CHATML, normalizer=normalizers.NFC()),
        {"bos_token": None, "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}, "pad_token": "<|endoftext|>", "unk_token": None},
        QWEN25, "<|im_end|>", "cat<|im_end|>", ids={"bos_token_id": 279}, generation={"eos_token_id": [281, 279]}, pad="<|endoftext|>",
    ),
    "qwen2.5-base": Family(
        byte_level(CHATML), {"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, QWEN25, "<|im_end|>",
        "cat<|im_end|>", ids={"eos_token_id": 279}, pad="<|endoftext|>",
    ),
    "qwen3": Family(
        byte_level(CHATML, plain=("<think>", "</think>")), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, QWEN3, "<|im_end|>",
        "<think>\n\n</think>\n\ncat<|im_end|>", pad="<|endoftext|>",
    ),
    "gemma": Family(
        sentencepiece(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "never"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}, GEMMA, "<end_of_turn>", "cat<end_of_turn>",
        system=False, bos="<bos>", pad="<pad>",
    ),
    "mistral": Family(
        sentencepiece([], "first"), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, MISTRAL, "</s>", "cat</s>",
        system=False, bos="<s>",
    ),
    "llama2-legacy": Family(
        sentencepiece([], "prepend"), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, MISTRAL, "</s>", "cat</s>",
        system=False, bos="<s>",
    ),
    "phi3": Family(
        sentencepiece(PHI, "prepend", flags={token: {"rstrip": True} for token in PHI}),
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}, PHI3, "<|end|>", "cat<|end|>",
        bos="<s>", pad="<|endoftext|>",
    ),
    "zephyr": Family(
        sentencepiece([], "first"), {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}, ZEPHYR, "</s>", "cat</s>",
        bos="<s>", pad="</s>",
    ),
    "smol": Family(byte_level(CHATML), {"eos_token": "<|im_end|>"}, SMOL, "<|im_end|>", "cat<|im_end|>"),
    "gpt2": Family(
        byte_level(["<|endoftext|>"], flags={"<|endoftext|>": {"normalized": True}}), {"model_max_length": 1024, "tokenizer_class": "GPT2Tokenizer"},
        None, "<|endoftext|>", "", ids={"model_type": "gpt2", "bos_token_id": 279, "eos_token_id": 279}, bos="<|endoftext|>",
    ),
}
