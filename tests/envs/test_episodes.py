"""Episodes as rollouts, against conversations made by hand: every token, mask, position and log-prob, and how an episode can end."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from rlhf_jax.data import hf_tokenizer
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.envs import Step, episodes
from rlhf_jax.envs.calculator import Calculator
from rlhf_jax.envs.episodes import Episode, Limits, Spoken
from rlhf_jax.envs.guess import Guess
from rlhf_jax.envs.tool_calls import write
from rlhf_jax.rewards.deadline import call_within
from rlhf_jax.types import Prompts, Rollout
from tests.data.families import FAMILIES

P, LIMITS = 40, Limits(turns=4, tokens=200, turn_tokens=90)
BYTES = Tokenizer.byte_level()
ENCODER = Encoder(BYTES, ChatTemplate.load("plain"), max_length=512, prompt_length=None, overlong="error")
LANGUAGE = episodes.Language(ENCODER)
SCHEMA_CALL = write("calculator", {"expression": "34*8"})


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ids(text: str, *, end: bool = True) -> list[int]:
    return [*BYTES.encode(text)[0].tolist(), *([BYTES.end_id] if end else [])]


def prompts(questions: Sequence[str | None], samples: int = 1) -> Prompts:
    """Rows padded on the left; None is filler."""
    rows = [[] if q is None else ENCODER.prompt((user(q),)).tolist() for q in questions for _ in range(samples)]
    tokens, segments = np.zeros((len(rows), P), np.int32), np.zeros((len(rows), P), np.int32)
    for b, row in enumerate(rows):
        tokens[b, P - len(row) :], segments[b, P - len(row) :] = row, 1
    numbers = np.repeat(np.array([-1 if q is None else n for n, q in enumerate(questions)], np.int32), samples)
    made: dict[str, Any] = dict(
        tokens=tokens, segment_ids=segments, positions=np.maximum(np.cumsum(segments, -1) - 1, 0) * segments, prompt_ids=numbers,
        sample_ids=np.tile(np.arange(samples, dtype=np.int32), len(questions)),
        group_ids=np.repeat(np.arange(len(questions), dtype=np.int32), samples))
    return Prompts(**made)


def script(turns: dict[int, list[list[int]]]) -> tuple[Callable[[list[Episode]], list[Spoken]], list[list[int]]]:
    """A policy that says what is written, row by row; its log-probs count down. And who was asked, call by call."""
    asked: list[list[int]] = []

    def speak(live: list[Episode]) -> list[Spoken]:
        asked.append([episode.number for episode in live])
        found = []
        for episode in live:
            tokens = np.array(turns[episode.number][episode.turns], np.int32)
            logps = -0.5 - np.arange(len(tokens), dtype=np.float32) - 100 * episode.turns
            found.append(Spoken(tokens, logps, 2 * logps, bool(tokens[-1] in BYTES.stop_ids)))
        return found

    return speak, asked


def run(env: Any, questions: Sequence[str | None], references: Sequence[Any], turns: dict[int, list[list[int]]], *, limits: Limits = LIMITS,
        samples: int = 1, failed: float = np.nan, seconds: float = 0.0, language: Any = LANGUAGE) -> tuple[Rollout, list[Episode], list[list[int]]]:
    speak, asked = script(turns)
    guard = lambda call: call_within(seconds, call)  # noqa: E731
    played = episodes.begin(env, prompts(questions, samples), lambda i: [user(str(questions[i]))], lambda i: references[i], lambda i: 1000 + i, guard)
    episodes.play(env, played, language, speak, limits, guard)
    return episodes.to_rollout(played, limits, width=P, pad_id=BYTES.pad_id, version=7, failed=failed), played, asked


def check_row(rolled: Rollout, b: int, messages: list[dict[str, str]], logps: list[float]) -> None:
    """A row is the conversation as SFT reads it, up to its last own token, and `logps` stand at the own tokens."""
    tokens, mask = ENCODER.conversation(tuple(messages))  # type: ignore[arg-type]
    seqs, start = rolled.seqs, int(np.argmax(rolled.seqs.segment_ids[b] != 0))
    here = slice(start, start + len(tokens))
    assert seqs.tokens[b, here].tolist() == tokens.tolist()
    assert seqs.loss_mask[b, here].tolist() == mask.tolist()
    assert seqs.positions[b, here].tolist() == list(range(len(tokens)))
    assert (seqs.segment_ids[b, here] == 1).all()
    for array in (seqs.segment_ids, seqs.positions, seqs.loss_mask, rolled.sampler_logps, rolled.plain_logps):
        assert not np.delete(np.asarray(array)[b], np.arange(here.start, here.stop)).any()  # nothing on the padding of both sides
    own = np.flatnonzero(seqs.loss_mask[b])
    assert own[0] >= P and rolled.sampler_logps[b, own].tolist() == logps and rolled.plain_logps[b, own].tolist() == [2 * x for x in logps]
    assert not rolled.sampler_logps[b][~seqs.loss_mask[b]].any()
    assert seqs.loss_positions is not None
    assert seqs.loss_positions[b].tolist() == own.tolist() + [0] * (seqs.loss_positions.shape[1] - len(own))


def counted(*sizes: int) -> list[float]:
    return [-0.5 - i - 100 * turn for turn, size in enumerate(sizes) for i in range(size)]


def test_a_tool_is_called_and_a_game_is_played() -> None:
    first, second = ids(SCHEMA_CALL), ids("272")
    rolled, played, asked = run(Calculator(role="user"), ["What is 34*8?", None, "What is 1+1?"], [{"answer": 272}, None, {"answer": 2}],
                                {0: [first, second], 2: [ids("3")]})
    check_row(rolled, 0, [user("What is 34*8?"), said(SCHEMA_CALL), user("<tool_response>272</tool_response>"), said("272")],
              counted(len(first), len(second)))
    check_row(rolled, 2, [user("What is 1+1?"), said("3")], counted(2))
    assert asked == [[0, 2], [0]]  # the second turn is drawn for the first row alone
    assert rolled.scores.tolist() == [1.0, 0.0, 0.0] and rolled.truncated.tolist() == [False] * 3
    assert rolled.real.tolist() == [True, False, True] and not rolled.seqs.tokens[1].any()
    assert played[0].counts == {"tool_calls": 1, "tool_errors": 0, "malformed_calls": 0} and (played[0].turns, played[2].turns) == (2, 1)
    assert rolled.version.tolist() == [7] * 3 and rolled.prompt_ids.tolist() == [0, -1, 2] and rolled.group_ids.tolist() == [0, 1, 2]
    assert rolled.seqs.tokens.shape == (3, P + LIMITS.tokens) and rolled.seqs.loss_positions.shape == (3, LIMITS.tokens)
    assert {x.dtype.name for x in (rolled.sampler_logps, rolled.plain_logps, rolled.scores)} == {"float32"}


def test_three_turns_with_a_malformed_one() -> None:
    rolled, played, _ = run(Guess(low=1, high=9), ["Guess."], [{"secret": 5}], {0: [ids("é?"), ids("3"), ids("5")]})
    check_row(rolled, 0, [user("Guess."), said("é?"), user("say a whole number from 1 to 9"), said("3"), user("higher"), said("5")], counted(4, 2, 2))
    assert played[0].counts == {"guesses": 2, "malformed_guesses": 1} and rolled.scores.tolist() == [1.0]


def test_samples_of_a_prompt_play_one_game() -> None:
    seen: list[int] = []

    class Chance(Guess):
        def reset(self, messages: Any, reference: Any, seed: int) -> Any:
            seen.append(seed)
            return super().reset(messages, reference, seed)

    run(Chance(), ["a", "b"], [None, None], {n: [ids("0", end=False)] for n in range(6)}, samples=3)
    assert seen == [1000] * 3 + [1001] * 3


# --- how an episode ends ---


def test_out_of_turns() -> None:
    """No reply is appended that nobody reads, and what was earned stays."""
    rolled, played, _ = run(Guess(low=1, high=9), ["Guess."], [{"secret": 5}], {0: [ids("1"), ids("2")]}, limits=LIMITS._replace(turns=2))
    check_row(rolled, 0, [user("Guess."), said("1"), user("higher"), said("2")], counted(2, 2))
    assert rolled.truncated.tolist() == [True] and rolled.scores.tolist() == [0.0] and played[0].counts["guesses"] == 2


def test_a_turn_without_an_end() -> None:
    """The environment is not asked, though the guess is right."""
    rolled, played, _ = run(Guess(low=1, high=9), ["Guess."], [{"secret": 5}], {0: [ids("1"), ids("5", end=False)]})
    assert rolled.truncated.tolist() == [True] and rolled.scores.tolist() == [0.0]
    assert rolled.seqs.tokens[0][rolled.seqs.loss_mask[0]].tolist() == ids("1") + ids("5", end=False) and played[0].messages[-1] == said("5")


@pytest.mark.parametrize("room", range(1, 26))
def test_out_of_tokens(room: int) -> None:
    """Whatever the budget, the row fits, own tokens are cut where it ends, and no reply stands without a word behind it."""
    turns = [ids("1111"), ids("2222"), ids("5")]
    rolled, _, _ = run(Guess(low=1, high=9), ["Guess."], [{"secret": 5}], {0: turns}, limits=Limits(4, room, 5))
    whole, _ = ENCODER.conversation((user("Guess."), said("1111"), user("lower"), said("2222"), user("lower"), said("5")))  # type: ignore[arg-type]
    after = rolled.seqs.tokens[0, P:][rolled.seqs.segment_ids[0, P:] != 0].tolist()
    head = int((rolled.seqs.segment_ids[0, :P] != 0).sum())
    assert after == whole[head : head + len(after)].tolist() and rolled.seqs.loss_mask[0, P + len(after) - 1]
    reply = len(ENCODER.reply((user("lower"),)))
    begins, ends = [0, 5 + reply, 10 + 2 * reply], [5, 10 + reply, 12 + 2 * reply]  # of each turn
    within = any(begin < room < end for begin, end in zip(begins, ends))
    expected = room if within else max(end for end in ends if end <= room)
    assert len(after) == expected and rolled.truncated[0] == (room < ends[2]) and rolled.scores[0] == float(room >= ends[2])
    assert rolled.seqs.loss_positions.shape == (1, min(room, 20))


def test_a_stop_string_ends_a_turn_and_gets_its_end_token() -> None:
    """The end token that the policy has not drawn is the environment's: there, and not trained on."""
    turn = ids(SCHEMA_CALL, end=False)
    env = Calculator(role="user")

    def speak(live: list[Episode]) -> list[Spoken]:
        tokens = np.array(turn if live[0].turns == 0 else ids("272"), np.int32)
        return [Spoken(tokens, np.zeros(len(tokens), np.float32) - 1, np.zeros(len(tokens), np.float32) - 1, True)]

    played = episodes.begin(env, prompts(["q"]), lambda i: [user("q")], lambda i: {"answer": 272}, lambda i: 0)
    episodes.play(env, played, LANGUAGE, speak, LIMITS)
    rolled = episodes.to_rollout(played, LIMITS, width=P, pad_id=0, version=0, failed=0.0)
    tokens, mask = ENCODER.conversation((user("q"), said(SCHEMA_CALL), user("<tool_response>272</tool_response>"), said("272")))  # type: ignore[arg-type]
    real = rolled.seqs.segment_ids[0] != 0
    assert rolled.seqs.tokens[0][real].tolist() == tokens.tolist() and rolled.scores.tolist() == [1.0]
    end = len(ENCODER.prompt((user("q"),))) + len(turn)
    assert tokens[end] == BYTES.end_id and mask[end]
    mask[end] = False
    assert rolled.seqs.loss_mask[0][real].tolist() == mask.tolist()


# --- when the environment fails ---


class Faulty:
    """Says "go on", and fails in the ways that the row names."""

    role, counters = "user", ("steps",)

    def reset(self, messages: Any, reference: Any, seed: int) -> Any:
        if reference == "reset":
            raise KeyError("no row")
        return reference

    def step(self, state: Any, response: str) -> Any:
        if response == "first":
            return Step(state=state, replies=({"role": "user", "content": "go on"},), reward=0.5, counts={"steps": 1})
        if state == "raise":
            raise RuntimeError("broken")
        if state == "hang":
            time.sleep(30)
        return {"none": None, "nan": Step(state=0, reward=float("nan"), done=True), "text": Step(state=0, reward=str(1), done=True),  # type: ignore
                "mute": Step(state=0), "role": Step(state=0, replies=({"role": "tool", "content": "x"},)), "fine": Step(state=0, done=True),
                "uncounted": Step(state=0, done=True, counts=None), "many": Step(state=0, done=True, counts={"steps": "many"})}[state]  # type: ignore


FAULTS = {
    "reset": "KeyError", "raise": "broken", "hang": "longer than", "none": "no Step", "nan": "nan", "text": "'1'", "mute": "neither", "role": "tool",
    "uncounted": "counts are None", "many": "'many'",
}


def test_a_failure_is_its_rows_alone() -> None:
    kinds = [*FAULTS, "fine"]
    turns = {n: [ids("first"), ids("second")] for n in range(len(kinds))}
    rolled, played, asked = run(Faulty(), kinds, kinds, turns, seconds=0.2)
    for episode, (kind, reason) in zip(played, FAULTS.items()):
        assert reason in episode.failed, (kind, episode.failed)
    assert played[-1].failed == "" and rolled.scores[-1] == 0.5 and np.isnan(rolled.scores[:-1]).all()
    assert asked == [list(range(1, len(kinds)))] * 2 and not rolled.seqs.loss_mask[0].any()
    assert run(Faulty(), ["raise"], ["raise"], {0: turns[0]}, failed=-2.0)[0].scores.tolist() == [-2.0]


# --- what the policy reads next ---


def test_prefixes() -> None:
    env, first = Calculator(role="user"), ids(SCHEMA_CALL)
    played = episodes.begin(env, prompts(["What is 34*8?", "a", "b"], 2), lambda i: [user("")], lambda i: {"answer": 1}, lambda i: 0)
    states: list[Any] = []

    def speak(live: list[Episode]) -> list[Spoken]:
        width = max(len(episode.prompt) + len(episode.tokens) for episode in live) + 3
        states.append(episodes.prefixes(live, rows=8, width=width, pad_id=9))
        texts = [first if episode.number in (0, 3) and not episode.turns else ids("2") for episode in live]
        return [Spoken(np.array(t, np.int32), np.zeros(len(t)), np.zeros(len(t)), True) for t in texts]

    episodes.play(env, played, LANGUAGE, speak, LIMITS)
    (before, none), (after, generated) = states
    assert before.prompt_ids.tolist() == [0, 0, 1, 1, 2, 2, -1, -1] and before.sample_ids.tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
    assert none.tolist() == [0] * 8 and generated.tolist() == [len(first)] * 2 + [0] * 6
    assert after.prompt_ids.tolist() == [0, 1, -1, -1, -1, -1, -1, -1] and after.sample_ids.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    tokens, _ = ENCODER.conversation((user("What is 34*8?"), said(SCHEMA_CALL)))  # type: ignore[arg-type]
    whole = [*tokens.tolist(), *ENCODER.reply((user("<tool_response>272</tool_response>"),)).tolist()]
    row = after.segment_ids[0] != 0
    assert after.tokens[0][row].tolist() == whole and row[-1] and (np.flatnonzero(row)[0] + len(whole)) == after.tokens.shape[1]
    assert after.positions[0][row].tolist() == list(range(len(whole))) and (after.tokens[0][~row] == 9).all()
    assert not after.segment_ids[2:].any() and ((after.group_ids >= 0) & (after.group_ids < 8)).all()


def test_foreign_templates_frame_replies_in_their_own_words(tmp_path: pathlib.Path) -> None:
    tokenizer, template = hf_tokenizer.read(FAMILIES["qwen2.5"].write(tmp_path))
    assert tokenizer is not None
    language = episodes.Language(Encoder(tokenizer, template, max_length=64, prompt_length=None, overlong="error"))
    reply = ({"role": "tool", "content": "272", "name": "calculator"},)
    text = "\n<|im_start|>user\n<answered>272</answered><|im_end|>\n<|im_start|>assistant\n"
    stop = tokenizer.specials["<|endoftext|>"]
    assert stop in tokenizer.stop_ids
    for last, before in ((tokenizer.end_id, ""), (stop, ""), (5, "<|im_end|>")):
        assert tokenizer.decode(language.reply(reply, last), skip_special=False) == before + text
