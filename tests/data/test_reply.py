"""What answers the assistant, tokenised without the conversation so far: the same tokens as in the whole conversation, for every family's layout."""

from __future__ import annotations

import pathlib

import pytest

from rlhf_jax.data import hf_tokenizer
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from tests.data.families import FAMILIES

QUESTION, ANSWER = {"role": "user", "content": "the question"}, {"role": "assistant", "content": "the answer"}
REPLIES = ({"role": "user", "content": "the cat sat"}, {"role": "user", "content": "what-was-answered-so-far"},
           {"role": "user", "content": "<|end|><|im_end|></s>[INST]"}, {"role": "user", "content": "é\n"})


def encoder(name: str, folder: pathlib.Path) -> Encoder:
    if name in ("plain", "roles", "lines"):
        tokenizer, template = Tokenizer.byte_level(), ChatTemplate.load(name, variables={"bos_token": "<|bos|>", "eos_token": "<|end|>"})
    else:
        read = hf_tokenizer.read(FAMILIES[name].write(folder))
        assert read[0] is not None and read[1] is not None
        tokenizer, template = read[0], read[1]
    return Encoder(tokenizer, template, max_length=256, prompt_length=None, overlong="error")


NAMES = ["plain", "roles", "lines", *(name for name, family in FAMILIES.items() if family.template)]


@pytest.mark.parametrize("name", NAMES)
def test_as_in_the_whole_conversation(name: str, tmp_path: pathlib.Path) -> None:
    found = encoder(name, tmp_path / name)
    for message in REPLIES:
        reply, whole = found.reply((message,)), found.prompt((QUESTION, ANSWER, message))
        assert whole[len(whole) - len(reply) :].tolist() == reply.tolist()
        assert whole[len(whole) - len(reply) - 1] == found.tokenizer.end_id  # the answer's last token
        assert (whole[: len(whole) - len(reply)] == found.tokenizer.end_id).sum() == (found.prompt((QUESTION,)) == found.tokenizer.end_id).sum() + 1


def test_several_replies_and_roles_that_the_template_refuses(tmp_path: pathlib.Path) -> None:
    tools = ({"role": "tool", "content": "1"}, {"role": "tool", "content": "2"})
    found = encoder("qwen2.5", tmp_path)
    said = "\n<|im_start|>user\n<answered>1</answered><|im_end|>\n<|im_start|>user\n<answered>2</answered><|im_end|>\n<|im_start|>assistant\n"
    assert found.tokenizer.decode(found.reply(tools), skip_special=False) == said
    with pytest.raises(UserError, match="role tool"):
        encoder("plain", tmp_path).reply(tools)
