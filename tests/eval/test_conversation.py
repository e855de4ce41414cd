"""A conversation with a policy: the tokens of `sampling.generate`, whatever is in the cache, and messages that come and go."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.eval import conversation
from rlhf_jax.eval.conversation import Chat, Sampling, Speaker
from rlhf_jax.eval.models import Policy
from rlhf_jax.saved import Source
from rlhf_jax.types import Prompts
from tests.cli.saved import config, draw

NEW = 12


def _policy(**changes) -> Policy:
    model, tokenizer = config(**changes), Tokenizer.byte_level()
    template = ChatTemplate.load("plain", variables=tokenizer.variables)
    return Policy(Source("here", "/here", "policy", model, draw(model), {}, tokenizer, template), "--model")


def _prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(6, 262, length).tolist()


def _generated(policy: Policy, prompt: list[int], settings: Sampling) -> list[int]:
    """What `rlhf-jax sample` draws, without a stop token."""
    one, ids = np.ones((1, len(prompt)), np.int32), np.zeros(1, np.int32)
    prompts = Prompts(tokens=np.array([prompt], np.int32), positions=one.cumsum(1).astype(np.int32) - 1, segment_ids=one, prompt_ids=ids,
                      sample_ids=ids, group_ids=ids)
    rolled = policy.generate(prompts, seed=settings.seed, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
                             top_k=settings.top_k, top_p=settings.top_p)
    return np.asarray(rolled.seqs.tokens)[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("settings", "changes", "lengths"),
    [
        (Sampling(temperature=0.0, max_new_tokens=NEW), {}, (1, 17)),
        (Sampling(temperature=0.8, top_k=20, top_p=0.9, max_new_tokens=NEW, seed=5), {"layers": 4, "scan_layers": True, "windows": (7, 0)}, (70,)),
    ],
)
def test_the_first_answer_is_what_sample_draws(settings, changes, lengths):
    policy = _policy(**changes)
    for length in lengths:
        speaker = Speaker(policy, (), settings)
        assert list(speaker.answer(_prompt(length), 0)) == _generated(policy, _prompt(length), settings)
        assert speaker.prefilled == length


def test_what_is_in_the_cache_changes_nothing_but_the_work(monkeypatch):
    """Prompts that go on, go back and begin anew, over a cache that must grow; each as from an empty cache."""
    monkeypatch.setattr(conversation, "FEWEST", 32)
    settings = Sampling(temperature=0.0, max_new_tokens=NEW)
    policy = _policy()
    speaker = Speaker(policy, (), settings)
    first = _prompt(20)
    answer = list(speaker.answer(first, 0))
    went_on = [*first, *answer, *_prompt(9, 1)]
    for prompt, prefilled in ((went_on, 9), (went_on[:30], 1), (first, 1), (_prompt(8, 2), 8), (went_on[:25] + _prompt(40, 3), 65)):
        found = list(speaker.answer(prompt, 0))
        assert found == list(Speaker(policy, (), settings).answer(prompt, 0))
        assert speaker.prefilled == prefilled
    assert speaker._slots == 256, "a wide prefill was padded behind its end"


def test_an_answer_ends_at_a_stop_token_at_the_budget_and_at_the_context():
    policy = _policy()
    drawn = list(Speaker(policy, (), Sampling(temperature=0.0, max_new_tokens=NEW)).answer(_prompt(10), 0))
    stop = drawn[4]
    end = drawn.index(stop) + 1
    speaker = Speaker(policy, (stop,), Sampling(temperature=0.0, max_new_tokens=NEW))
    assert list(speaker.answer(_prompt(10), 0)) == drawn[:end]
    assert list(speaker.answer([*_prompt(10), *drawn[:end], 9], 0)) and speaker.prefilled == 1, "the stop token stays in the cache"
    assert len(list(Speaker(policy, (), Sampling(max_new_tokens=3)).answer(_prompt(10), 0))) == 3
    full = Speaker(policy, (), Sampling(max_new_tokens=50))
    assert len(list(full.answer(_prompt(91), 0))) == 96 - 91


def test_prompts_of_any_length_are_traced_as_two_prefills_and_one_decode(monkeypatch):
    """At one size of the cache; each doubling of it compiles as many again."""
    traced, original = [], conversation._extend
    monkeypatch.setattr(conversation, "_extend", lambda *given: traced.append(given[2].shape[1]) or original(*given))
    policy = _policy(layers=2)
    speaker = Speaker(policy, (), Sampling(max_new_tokens=3))
    for turn, length in enumerate((1, 5, 16, 17, 40, 64, 65, 80, 92)):
        list(speaker.answer(_prompt(length, turn), turn))
    assert sorted(traced) == [1, 16, 256] and speaker._slots == 256


def test_turns_draw_different_numbers_and_a_seed_repeats():
    policy = _policy()
    settings = {seed: Sampling(seed=seed, max_new_tokens=8) for seed in (1, 2)}
    draws = [list(Speaker(policy, (), settings[seed]).answer(_prompt(5), turn)) for seed, turn in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert draws[0] == draws[3] and draws[0] != draws[1] and draws[0] != draws[2]


def test_after_an_interrupt_the_cache_is_not_trusted(monkeypatch):
    policy, settings = _policy(), Sampling(temperature=0.0, max_new_tokens=NEW)
    speaker = Speaker(policy, (), settings)
    whole = list(speaker.answer(_prompt(10), 0))
    with monkeypatch.context() as patch:
        patch.setattr(conversation, "_decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(speaker.answer(_prompt(12), 0))
    assert list(speaker.answer(_prompt(10), 0)) == whole and speaker.prefilled == 10
    answer = speaker.answer(_prompt(10), 0)
    assert [next(answer), next(answer)] == whole[:2]
    answer.close()
    assert list(speaker.answer(_prompt(10), 0)) == whole and speaker.prefilled == 1


def _chat(**settings) -> Chat:
    policy = _policy()
    source = policy.source
    return Chat(policy, source.tokenizer, source.template, Sampling(**{"temperature": 0.0, "max_new_tokens": 6} | settings))


def _last_prompt(chat: Chat, monkeypatch) -> list[list[int]]:
    """The prompts that the speaker is given from now on."""
    seen: list[list[int]] = []
    answer = Speaker.answer

    def watched(self, prompt, turn):
        seen.append(np.asarray(prompt).tolist())
        return answer(self, prompt, turn)

    monkeypatch.setattr(Speaker, "answer", watched)
    return seen


def test_messages_come_and_go(monkeypatch):
    chat = _chat()
    seen = _last_prompt(chat, monkeypatch)
    encoder = Encoder(chat._tokenizer, chat._encoder.template, max_length=96, prompt_length=None, overlong="error")
    chat.system("be brief")
    said = "".join(chat.say("hé"))
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[-1]["content"] == said and chat.truncated
    assert seen[0] == encoder.prompt(chat.messages[:2]).tolist()
    tokens = list(Speaker(chat.speaker.policy, chat.speaker.stop_ids, chat._settings).answer(seen[0], 0))
    assert said == chat._tokenizer.decode(tokens)
    list(chat.say("again"))
    assert list(seen[-1]) == encoder.prompt(chat.messages[:4]).tolist()
    assert chat.undo() and [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.undo() and not chat.undo() and chat.messages == [{"role": "system", "content": "be brief"}]
    chat.system("")
    assert chat.messages == []


def test_the_oldest_turns_are_forgotten_and_the_system_message_is_not(monkeypatch):
    chat = _chat()
    seen = _last_prompt(chat, monkeypatch)
    chat.system("S")
    for number in range(6):
        list(chat.say(f"question {number}"))
    shown = chat._tokenizer.decode(seen[-1])
    assert chat.forgotten > 0 and chat.forgotten % 2 == 0 and len(chat.messages) == 13
    assert shown.startswith("Squestion") and "question 5" in shown and "question 0" not in shown
    assert len(seen[-1]) + 6 <= 96 < len(seen[-1]) + 6 + 30, "no more than needed"


def test_a_message_that_fills_the_context_is_refused_and_not_kept():
    chat = _chat()
    list(chat.say("a"))
    with pytest.raises(UserError, match=r"the message takes 10. tokens .* reads 96: shorten it"):
        list(chat.say("x" * 100))
    assert [message["content"] for message in chat.messages[::2]] == ["a"]
    list(chat.say("y" * 90))
    assert chat.truncated and len(chat.messages) == 4, "a message that leaves some room is answered in it"


def test_an_answer_that_is_not_read_to_its_end_is_kept_as_far_as_it_came():
    chat = _chat(max_new_tokens=12)
    whole = "".join(chat.say("hello"))
    chat.undo()
    pieces = chat.say("hello")
    begun = next(pieces)
    pieces.close()
    assert begun and whole.startswith(begun) and chat.messages[-1] == {"role": "assistant", "content": begun}
