"""User functions: every way to get one wrong is a sentence. The foreign reward model: its own tokens, the end token exactly when ended."""

from __future__ import annotations

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import host

USER = [{"role": "user", "content": "Sort these digits: 5 3 9 1"}]


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """A user's module of rewards."""
    made = types.ModuleType("my_rewards")
    made.length = lambda prompts, responses, references: [len(r) for r in responses]
    made.two = lambda prompts, responses: [0.0]
    made.more = lambda prompts, responses, references, scale=2.0: [scale for _ in responses]
    made.number = 3
    monkeypatch.setitem(sys.modules, "my_rewards", made)
    return made


def test_a_dotted_path_is_loaded_in_both_spellings(module):
    assert host.load_reward_fn("my_rewards.length") is module.length is host.load_reward_fn("my_rewards:length")
    assert host.load_reward_fn("my_rewards.more") is module.more


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ("length", "expected a dotted path"),
        ("", "expected a dotted path"),
        (None, "expected a dotted path"),
        (".length", "expected a dotted path"),
        ("no_such_package.rewards.f", "no module 'no_such_package'"),
        ("my_rewards.lenght", r"did you mean 'length'\?"),
        ("my_rewards.number", "expected a function"),
        ("my_rewards.two", "expected a function"),
    ],
)
def test_a_bad_path_is_one_sentence(dotted, message):
    with pytest.raises(UserError, match=message) as caught:
        host.load_reward_fn(dotted, key="config.objective.reward_fn")
    assert str(caught.value).startswith("config.objective.reward_fn") and "\n" not in str(caught.value)


@pytest.mark.parametrize(("source", "message"), [("import no_such_thing_at_all", "does not import"), ("1 / 0", "ZeroDivisionError")])
def test_a_module_that_fails_on_import_says_why(tmp_path, monkeypatch, source, message):
    (tmp_path / "broken_rewards.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        host.load_reward_fn("broken_rewards.f")


def call(function, responses=("ab", "c")):
    n = len(responses)
    return host.call_reward_fn(function, [USER] * n, responses, [None] * n)


def test_a_call_returns_float32_and_passes_everything_on():
    seen = []

    def function(prompts, responses, references):
        seen.append((prompts, responses, references))
        return np.array([1, 2])

    rewards = host.call_reward_fn(function, [USER, USER], ("ab", "c"), [{"answer": 1}, None])
    np.testing.assert_array_equal(rewards, [1.0, 2.0])
    assert rewards.dtype == np.float32 and seen == [([USER, USER], ["ab", "c"], [{"answer": 1}, None])]
    np.testing.assert_array_equal(call(lambda p, r, x: [True, np.float64(0.5)]), [1.0, 0.5])
    assert host.call_reward_fn(function, [], [], []).shape == (0,)


def test_a_function_cannot_change_the_callers_lists():
    responses = ["ab", "c"]
    with pytest.raises(UserError):
        host.call_reward_fn(lambda p, r, x: r.clear() or [], [USER, USER], responses, [None, None])
    assert responses == ["ab", "c"]


def raises(prompts, responses, references):
    raise RuntimeError("the verifier is down")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "raised RuntimeError: the verifier is down; it was given 2 samples, the first being prompt 'Sort.*response 'ab'"),
        (lambda p, r, x: [1.0], "expected 2 rewards, one per response, got 1"),
        (lambda p, r, x: 1.0, "raised TypeError"),
        (lambda p, r, x: None, "raised TypeError"),
        (lambda p, r, x: [1.0, float("nan")], "got nan for sample 1, prompt 'Sort.*response 'c'"),
        (lambda p, r, x: [float("-inf"), 1.0], "got -inf for sample 0"),
        (lambda p, r, x: [1e39, 1.0], r"got 1e\+39 for sample 0"),
        (lambda p, r, x: ["1.0", 1.0], "got '1.0' for sample 0"),
        (lambda p, r, x: [1.0, None], "got None for sample 1"),
        (lambda p, r, x: [[1.0, 2.0], 1.0], r"got \[1.0, 2.0\] for sample 0"),
    ],
)
def test_what_comes_back_is_checked(function, message):
    with pytest.raises(UserError, match=message):
        call(function)


@pytest.fixture(scope="module", params=["plain", "lines"])
def encoder(request):
    """A BPE reward model, unlike the policy's bytes."""
    corpus = ["Sort these digits: 5 3 9 1", "1 3 5 9", "What is 7 + 5?"] * 20
    tokenizer = Tokenizer.train_bpe(corpus, 300)
    return Encoder(tokenizer, ChatTemplate.load(request.param), max_length=48, prompt_length=None, overlong="error")


def test_the_end_token_stands_exactly_when_the_response_ended(encoder):
    end = encoder.tokenizer.end_id
    whole = host.response_tokens(encoder, USER, "1 3 5 9", True)
    cut = host.response_tokens(encoder, USER, "1 3 5 9", False)
    assert whole[-1] == end and (whole == end).sum() == 2  # the user's turn has one too
    np.testing.assert_array_equal(cut, whole[:-1])
    assert encoder.tokenizer.decode(cut).endswith("1 3 5 9")


def test_the_tokens_are_the_reward_models_own_and_begin_with_its_prompt(encoder):
    tokens = host.response_tokens(encoder, USER, "1 3 5 9", True)
    prompt = encoder.prompt(tuple(USER))
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
    policy = Encoder(Tokenizer.byte_level(), encoder.template, max_length=200, prompt_length=None, overlong="error")
    assert len(host.response_tokens(policy, USER, "1 3 5 9", True)) > len(tokens)


def test_it_reads_what_the_reward_model_was_trained_on(encoder):
    """Up to the end of turn, the row of a training pair is the row that is scored."""
    tokens, mask = encoder.conversation((*USER, {"role": "assistant", "content": "9 5"}), context=1)
    np.testing.assert_array_equal(host.response_tokens(encoder, USER, "9 5", True), tokens[: np.flatnonzero(mask)[-1] + 1])


def test_control_strings_in_a_response_stay_text(encoder):
    tokens = host.response_tokens(encoder, USER, "1<|end|>2", False)
    assert (tokens == encoder.tokenizer.end_id).sum() == 1  # the prompt's
    assert encoder.tokenizer.decode(tokens).endswith("1<|end|>2")


def test_an_empty_cut_response_is_the_bare_prompt(encoder):
    np.testing.assert_array_equal(host.response_tokens(encoder, USER, "", False), encoder.prompt(tuple(USER)))
    assert host.response_tokens(encoder, USER, "", True)[-1] == encoder.tokenizer.end_id


def test_a_response_over_the_context_is_refused_or_cut(encoder):
    long = "x y z " * 40
    with pytest.raises(UserError, match=r"config\.reward_from.*context is 48"):
        host.response_tokens(encoder, USER, long, True)
    cutting = Encoder(encoder.tokenizer, encoder.template, max_length=48, prompt_length=None, overlong="truncate")
    tokens = host.response_tokens(cutting, USER, long, True)
    assert len(tokens) == 48 and tokens[-1] != encoder.tokenizer.end_id


def test_padding_goes_to_the_bucket_but_not_over_the_context():
    rows = [np.array([5, 6, 7], np.int32), np.zeros(0, np.int32), np.array([8], np.int32)]
    seqs = host.padded_rows(rows, bucket=4, max_length=10, pad_id=3)
    np.testing.assert_array_equal(seqs.tokens, [[5, 6, 7, 3], [3, 3, 3, 3], [8, 3, 3, 3]])
    np.testing.assert_array_equal(seqs.segment_ids, [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(seqs.positions, [[0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert not seqs.loss_mask.any() and seqs.real.tolist() == [True, False, True]
    lengths = [host.padded_rows([np.arange(n)], bucket=4, max_length=10, pad_id=0).tokens.shape[1] for n in (1, 4, 5, 8, 9, 10)]
    assert lengths == [4, 4, 8, 8, 10, 10]


def test_scores_do_not_depend_on_neighbours_and_shapes_are_few(encoder):
    traces = []

    @jax.jit
    def jitted(seqs):
        traces.append(seqs.tokens.shape)
        assert seqs.tokens.shape == seqs.segment_ids.shape
        return (seqs.tokens * (seqs.segment_ids != 0)).sum(-1) + 1000.0

    def score(seqs):
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(seqs))
        return jitted(jax.device_put(seqs))

    reward = host.RetokenisedReward(encoder, score, bucket=16)
    rows = [(USER, "1 3 5 9", True), (None, "ignored", True), (USER, "9", False), (USER, "", True)]
    with jax.transfer_guard("disallow"):
        scores = reward(*zip(*rows))
    expected = [0.0 if prompt is None else host.response_tokens(encoder, prompt, text, stop).sum() + 1000.0 for prompt, text, stop in rows]
    np.testing.assert_array_equal(scores, expected)
    assert scores.dtype == np.float32
    longer = reward([USER, None, None, None], ["1 3 5 9 1 3 5 9", "", "", ""], [True] * 4)
    assert longer[0] == host.response_tokens(encoder, USER, "1 3 5 9 1 3 5 9", True).sum() + 1000.0
    assert len(traces) == len(set(traces)) and all(shape[0] == 4 and shape[1] % 16 == 0 for shape in traces)
    with pytest.raises(ValueError, match="RetokenisedReward"):
        reward([USER], ["a", "b"], [True])
    with pytest.raises(ValueError, match="bucket"):
        host.RetokenisedReward(encoder, score, bucket=0)


def test_a_numpy_row_batch_is_scored_by_the_learned_reading(encoder):
    """`learned.score_sequences` on the padded rows reads each row's own last token."""
    from rlhf_jax.rewards import learned

    nets = types.SimpleNamespace(reward=lambda seqs, keys=None: types.SimpleNamespace(scores=jnp.asarray(seqs.tokens, jnp.float32)))
    reward = host.RetokenisedReward(encoder, jax.jit(lambda seqs: learned.score_sequences(nets, seqs)), bucket=8)
    scores = reward([USER, USER, None], ["1 3 5 9", "1", ""], [True, False, True])
    cut = host.response_tokens(encoder, USER, "1", False)[-1]
    np.testing.assert_array_equal(scores, [encoder.tokenizer.end_id, cut, 0.0])


# --- failures that do not end the run ---


def outcome(function, responses=("a", "bb", "ccc"), **more):
    failures = {}
    values = host.call_reward_fn(function, [USER] * len(responses), responses, [None] * len(responses), failures=failures, **more)
    return values.tolist(), failures


def picky(prompts, responses, references):
    if "bb" in responses:
        raise KeyError("bb")
    return [float(len(r)) for r in responses]


def test_a_row_fails_alone_where_its_value_says_so():
    values, failures = outcome(lambda p, r, x: [1.0, float("nan"), host.Failed("cannot judge it")])
    assert values[0] == 1.0 and np.isnan(values[1:]).all() and failures == {1: "returned nan", 2: "cannot judge it"}
    values, failures = outcome(lambda p, r, x: [float("inf"), "1", None])
    assert np.isnan(values).all() and set(failures) == {0, 1, 2}


@pytest.mark.parametrize(
    ("function", "reason"),
    [(picky, "raised KeyError: 'bb'"), (lambda p, r, x: [1.0], "returned 1 rewards for 3 responses"), (lambda p, r, x: 1.0, "raised TypeError")],
)
def test_a_call_fails_with_all_its_rows(function, reason):
    values, failures = outcome(function)
    assert np.isnan(values).all() and set(failures) == {0, 1, 2} and all(said.startswith(reason) for said in failures.values())


def test_called_row_by_row_only_the_bad_row_fails():
    values, failures = outcome(picky, each=True)
    assert values[0] == 1.0 and np.isnan(values[1]) and values[2] == 3.0 and failures == {1: "raised KeyError: 'bb'"}
    with pytest.raises(UserError, match=r"raised KeyError: 'bb'; it was given 1 samples.*response 'bb'"):
        host.call_reward_fn(picky, [USER] * 2, ["a", "bb"], [None] * 2, each=True)


def test_a_call_that_takes_too_long_fails():
    def slow(prompts, responses, references):
        while "bb" in responses:
            pass
        return [1.0] * len(responses)

    values, failures = outcome(slow, timeout=0.2, each=True)
    assert values[0] == values[2] == 1.0 and failures == {1: "raised TimeoutError: it took longer than 0.2 s"}
    with pytest.raises(UserError, match=r"raised TimeoutError: it took longer than 0\.2 s"):
        host.call_reward_fn(slow, [USER], ["bb"], [None], timeout=0.2)


def test_a_judged_failure_is_an_error_by_default():
    with pytest.raises(UserError, match=r"failed on sample 0, prompt 'Sort.*: no reference; set config.reward_failure.policy"):
        call(lambda p, r, x: [host.Failed("no reference"), 1.0])
