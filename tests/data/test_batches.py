import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import open_dataset
from rlhf_jax.data.tokenizer import END, Tokenizer
from rlhf_jax.errors import UserError

T = 48


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Opens small sets of every kind; rows are told apart by their text."""
    import json

    root = tmp_path_factory.mktemp("sets")
    rows = {
        "demo": [{"prompt": f"q{i}", "response": f"r{i}" * (i % 4 + 1)} for i in range(13)],
        "text": [{"text": f"t{i} " * (i % 5 + 1)} for i in range(13)],
        "preference": [{"prompt": f"q{i}", "chosen": f"good{i}", "rejected": f"b{i}"} for i in range(13)],
        "prompt": [{"prompt": f"q{i}", "reference": {"row": i}} for i in range(13)],
        "ranking": [{"prompt": f"q{i}", "responses": [f"{place}{i}" for place in "abcd"[: i % 3 + 2]]} for i in range(13)],
        "feedback": [{"prompt": f"q{i}", "completion": f"r{i}" * (i % 4 + 1), "label": i % 3 == 0} for i in range(13)],
        "rating": [{"prompt": f"q{i}", "completion": f"r{i}", "score": i / 2} for i in range(13)],
        "stepwise": [{"prompt": f"q{i}", "completions": ["s"] * (i % 3 + 1), "labels": [i % 2 == 0] * (i % 3 + 1)} for i in range(13)],
    }
    for i in range(1, 13, 2):
        rows["preference"][i]["margin"] = i
    for kind, content in rows.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    pairs = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in rows["preference"]]
    (root / "preference_as_ranking.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (root / "plain_pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')

    def open_(kind, *, tokenizer=None, file=None, **options):
        options = {"max_length": T, "prompt_length": 12, "batch_size": 4, "cache": root / "cache"} | options
        return open_dataset(kind, root / f"{file or kind}.jsonl", tokenizer or Tokenizer.byte_level(), **options)

    return open_


JUDGED = ["ranking", "feedback", "rating", "stepwise"]
KINDS = [
    ("demo", {}), ("demo", {"pack": True}), ("text", {}), ("text", {"pack": True}), ("preference", {}), ("prompt", {"group_size": 2}),
    *((kind, {}) for kind in JUDGED),
]


def leaves(batch):
    return jax.tree.leaves(batch)


def same(x, y):
    return all(np.array_equal(a, b) for a, b in zip(leaves(x), leaves(y), strict=True))


def texts(batch, tok):
    """The segments of a batch of sequences, as text, in order."""
    tokens, segments = batch.tokens.reshape(-1, batch.tokens.shape[-1]), batch.segment_ids.reshape(-1, batch.tokens.shape[-1])
    return [tok.decode(t[s == n], skip_special=False) for t, s in zip(tokens, segments) for n in range(1, s.max() + 1)]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_leaves_are_numpy_of_fixed_shape_and_type(made, kind, options):
    data = made(kind, **options)
    shapes = {tuple((type(x), x.shape, x.dtype) for x in leaves(data.batch(s, 0))) for s in range(8)}
    shapes |= {tuple((type(x), x.shape, x.dtype) for x in leaves(b)) for b in data.eval_batches()}
    assert len(shapes) == 1
    assert {(t, d) for t, _, d in shapes.pop()} <= {(np.ndarray, np.dtype(d)) for d in (np.int32, np.float32, np.bool_)}


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_batch_is_a_function_of_seed_and_index(made, kind, options):
    forward, data = made(kind, **options), made(kind, **options)
    batches = [forward.batch(s, 3) for s in range(12)]
    assert all(same(data.batch(s, 3), batches[s]) for s in (11, 0, 7, 7, 1))  # any order, another instance
    assert not all(same(data.batch(s, 4), batches[s]) for s in range(3))


@pytest.mark.parametrize(("kind", "options"), KINDS)
@given(s=st.integers(0, 40), seed=st.integers(0, 3), count=st.sampled_from([2, 4]))
@settings(max_examples=10, deadline=None)
def test_hosts_unite_to_the_global_batch(made, kind, options, s, seed, count):
    whole = made(kind, **options).batch(s, seed)
    parts = [made(kind, host=(i, count), **options).batch(s, seed) for i in range(count)]
    assert same(whole, jax.tree.map(lambda *x: np.concatenate(x), *parts))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_hosts_unite_in_evaluation(made, kind, options):
    whole = list(made(kind, **options).eval_batches())
    parts = [list(made(kind, host=(i, 2), **options).eval_batches()) for i in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    assert all(same(w, jax.tree.map(lambda *x: np.concatenate(x), *p)) for w, p in zip(whole, zip(*parts)))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_host_may_hold_blocks_that_lie_apart(made, kind, options):
    """As where neighbouring chips of a torus are not neighbours on the mesh."""
    quarters = [made(kind, host=(i, 4), **options).batch(3, 1) for i in range(4)]
    apart = made(kind, host=((0, 2), 4), **options).batch(3, 1)
    assert same(apart, jax.tree.map(lambda *x: np.concatenate(x), quarters[0], quarters[2]))


@pytest.mark.parametrize("kind", ["demo", "text"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_epoch_holds_every_row_once(made, kind, packed, tok):
    """13 rows in batches of 4 straddle epochs; slot by slot the epochs are exact."""
    data = made(kind, pack=packed)
    rows = [tok.decode(data.prepared[i]["tokens"], skip_special=False) for i in range(len(data))]
    stream = [text for s in range(12) for text in texts(data.batch(s, 5), tok)]
    first, second = stream[: len(rows)], stream[len(rows) : 2 * len(rows)]
    assert sorted(first) == sorted(second) == sorted(rows)
    assert first != second
    if packed:
        assert (data.batch(0, 5).segment_ids.max(-1) > 1).any()


@pytest.mark.parametrize("kind", ["demo", "text"])
@pytest.mark.parametrize("packed", [False, True])
def test_evaluation_holds_every_row_once_and_fills_up(made, kind, packed, tok):
    data = made(kind, pack=packed)
    batches = list(data.eval_batches())
    assert sorted(t for b in batches for t in texts(b, tok)) == sorted(
        tok.decode(data.prepared[i]["tokens"], skip_special=False) for i in range(len(data))
    )
    if not packed:
        assert [b.real.tolist() for b in batches[-2:]] == [[True] * 4, [True] + [False] * 3]
        assert not batches[-1].loss_mask[1:].any()


def test_rows_by_hand(made, tok):
    data = made("demo")
    batch = next(data.eval_batches())
    ids = tok.encode("<|bos|><|user|>q0<|end|><|assistant|>r0<|end|>")[0]
    n = len(ids)
    assert batch.tokens[0].tolist() == [*ids, *[0] * (T - n)]
    assert batch.positions[0].tolist() == [*range(n), *[0] * (T - n)]
    assert batch.segment_ids[0].tolist() == [1] * n + [0] * (T - n)
    assert np.flatnonzero(batch.loss_mask[0]).tolist() == [6, 7, 8]
    assert batch.loss_positions.shape == (4, 16)  # 13 is the most: (r12)×1 … r11 r11 r11 r11 and the end
    assert batch.loss_positions[0].tolist() == [6, 7, 8] + [0] * 13


def test_loss_positions_cover_the_mask_and_the_reading_positions(made):
    for kind in ("demo", "preference", *JUDGED):
        batch = made(kind).batch(2, 0)
        every = [batch] if kind == "demo" else [batch.seqs, batch.kl_seqs] if kind == "feedback" else [batch.seqs]
        for seqs in every:
            flat = [leaf.reshape(-1, leaf.shape[-1]) for leaf in (seqs.loss_mask, seqs.segment_ids, seqs.loss_positions)]
            for mask, segments, where in zip(*flat):
                wanted = sorted({*np.flatnonzero(mask), *np.flatnonzero(segments)[-1:]})
                assert where.tolist() == wanted + [0] * (len(where) - len(wanted))
        if kind in ("rating", "stepwise"):
            assert all(set(np.flatnonzero(w)) <= set(where) for w, where in zip(batch.weights, batch.seqs.loss_positions))


def test_the_reading_position_behind_the_response_is_visited(made):
    """The `lines` template writes a line break behind the end token: read there, though it is not trained on."""
    seqs = made("preference", template="lines").batch(0, 0).seqs
    last = (seqs.segment_ids != 0).sum(-1) - 1
    assert not np.take_along_axis(seqs.loss_mask, last[..., None], -1).any()
    assert (seqs.loss_positions == last[..., None]).any(-1).all()


def test_packed_segments_restart(made):
    batch = made("text", pack=True).batch(0, 0)
    assert batch.loss_positions is None
    for positions, segments, mask in zip(batch.positions, batch.segment_ids, batch.loss_mask):
        for n in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == n)
            assert positions[here].tolist() == list(range(len(here))) and here.tolist() == list(range(here[0], here[-1] + 1))
            assert mask[here].tolist() == [False] + [True] * (len(here) - 1)
        assert not mask[segments == 0].any()


def test_pad_may_equal_end(made):
    merged = Tokenizer(Tokenizer.byte_level()._inner, pad=END)
    plain, odd = made("demo").batch(0, 0), made("demo", tokenizer=merged).batch(0, 0)
    for name in ("positions", "segment_ids", "loss_mask", "loss_positions"):
        assert np.array_equal(getattr(plain, name), getattr(odd, name))
    assert np.array_equal(np.where(plain.segment_ids, plain.tokens, 5), odd.tokens)


def test_comparisons(made, tok):
    data = made("preference")
    batches = list(data.eval_batches())
    assert batches[0].seqs.tokens.shape == (4, 2, T)
    said = [[tok.decode(t[m]) for t, m in zip(r, k)] for r, k in zip(batches[0].seqs.tokens, batches[0].seqs.loss_mask)]
    assert said == [[f"good{i}", f"b{i}"] for i in range(4)]
    assert np.concatenate([b.margin for b in batches])[:13].tolist() == [i if i % 2 else 0 for i in range(13)]
    assert batches[-1].real.tolist() == [True, False, False, False]
    assert made("preference", file="plain_pairs").batch(0, 0).margin is None


def said(seqs, tok):
    """What the marked tokens of every row say, by branch."""
    return [tok.decode(t[m]) for t, m in zip(seqs.tokens.reshape(-1, T), seqs.loss_mask.reshape(-1, T))]


def test_rankings(made, tok):
    """K is the most responses of any row; a row with fewer ends in empty branches, and so does a filler row, which alone is not real."""
    batches = list(made("ranking").eval_batches())
    assert batches[0].seqs.tokens.shape == (4, 4, T) and batches[0].margin is None
    assert batches[0].seqs.real.tolist() == [[True] * n + [False] * (4 - n) for n in (2, 3, 4, 2)]
    assert batches[0].real.all() and batches[-1].real.tolist() == [True, False, False, False]
    assert said(batches[0].seqs, tok)[:12] == ["a0", "b0", "", "", "a1", "b1", "c1", "", "a2", "b2", "c2", "d2"]
    assert made("ranking", file="preference_as_ranking").batch(0, 0).seqs.tokens.shape == (4, 2, T)


def test_feedback_is_paired_with_the_next_response(made, tok):
    data = made("feedback")
    batch, *_, last = list(data.eval_batches())
    own = [f"r{i}" * (i % 4 + 1) for i in range(13)]
    assert said(batch.seqs, tok) == own[:4] and said(batch.kl_seqs, tok) == [*own[1:4], own[0]]
    prompts = [tok.decode(t[: m.argmax()], skip_special=False) for t, m in zip(batch.kl_seqs.tokens, batch.kl_seqs.loss_mask)]
    assert prompts == [f"<|bos|><|user|>q{i}<|end|><|assistant|>" for i in range(4)]
    assert batch.desirable.tolist() == [True, False, False, True] and batch.desirable.dtype == np.bool_ and batch.baseline is None
    for seqs in (batch.seqs, batch.kl_seqs):
        assert (seqs.positions == np.where(seqs.segment_ids, np.arange(T), 0)).all() and set(np.unique(seqs.segment_ids)) == {0, 1}
    # One real row has no other: it keeps its own response.
    assert last.real.tolist() == last.kl_seqs.real.tolist() == [True, False, False, False] and last.desirable.tolist() == [True] + [False] * 3
    assert said(last.kl_seqs, tok) == said(last.seqs, tok) == [own[12], "", "", ""]


def test_a_foreign_response_is_cut_at_the_context(made, tok):
    """Prompts of 6 tokens: 12 leave room for 6, which is less than some responses and their end."""
    batch = next(made("feedback", max_length=12, overlong="truncate").eval_batches())
    found = [tok.decode(t[m], skip_special=False) for t, m in zip(batch.kl_seqs.tokens, batch.kl_seqs.loss_mask)]
    assert found == ["r1r1<|end|>", "r2r2r2", "r3r3r3", "r0<|end|>"]
    assert batch.kl_seqs.loss_positions is None  # every slot, as T is below the smallest bucket


def test_ratings_and_steps(made, tok):
    batch = next(made("rating").eval_batches())
    ends = [len(tok.encode(f"<|bos|><|user|>q{i}<|end|><|assistant|>r{i}<|end|>")[0]) - 1 for i in range(4)]
    assert [np.flatnonzero(row).tolist() for row in batch.weights] == [[end] for end in ends]
    assert batch.targets[range(4), ends].tolist() == [0, 0.5, 1, 1.5] and batch.targets.sum() == 3
    *_, last = made("rating").eval_batches()
    assert not last.weights[1:].any() and not last.targets[1:].any()

    batch = next(made("stepwise").eval_batches())
    # bos user q 0 end assistant s ⏎ s ⏎ s end: the last step's verdict is read at the end.
    assert [np.flatnonzero(row).tolist() for row in batch.weights] == [[7], [6, 9], [6, 8, 11], [7]]
    assert [row[row_weights > 0].tolist() for row, row_weights in zip(batch.targets, batch.weights)] == [[1], [0, 0], [1, 1, 1], [0]]
    assert set(np.unique(batch.weights)) == {0.0, 1.0}


def test_prompts(made, tok):
    data = made("prompt", batch_size=6, group_size=3)
    batch = data.batch(0, 0)
    assert batch.group_ids.tolist() == [0, 0, 0, 1, 1, 1] and batch.sample_ids.tolist() == [0, 1, 2] * 2
    assert len(set(batch.prompt_ids.tolist())) == 2 and (batch.prompt_ids[:3] == batch.prompt_ids[0]).all()
    for row, i in enumerate(batch.prompt_ids):
        n = int((batch.segment_ids[row] != 0).sum())
        assert tok.decode(batch.tokens[row, -n:], skip_special=False) == f"<|bos|><|user|>q{i}<|end|><|assistant|>"
        assert batch.positions[row].tolist() == [0] * (12 - n) + list(range(n))
        assert data.messages(i) == ({"role": "user", "content": f"q{i}"},) and data.reference(i) == {"row": i}
    batches = list(data.eval_batches())
    assert np.concatenate([b.prompt_ids for b in batches]).tolist() == [i for i in range(13) for _ in range(3)] + [-1] * 3
    assert batches[-1].real.tolist() == [True] * 3 + [False] * 3 and batches[-1].group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(IndexError):
        data.messages(-1)


@pytest.mark.parametrize(("kind", "options"), [("prompt", {"prompt_length": 4000, "group_size": 2}), ("preference", {"max_length": 4000})])
def test_trimmed_batches_hold_the_same_rows_in_little_else(made, kind, options):
    """A model of a long context evaluates short rows at their own length, and few rows in a small batch."""
    whole = made(kind, batch_size=64, **options)
    data = whole.trimmed()
    longest = int(whole.prepared.lengths.max())
    (found,), (wanted,) = data.eval_batches(), whole.eval_batches()
    rows = len(whole) * options.get("group_size", 1)
    found, wanted = (getattr(batch, "seqs", batch) for batch in (found, wanted))
    assert found.tokens.shape[0] == rows < 64 == wanted.tokens.shape[0] and longest <= found.tokens.shape[-1] < 2 * longest + 16
    np.testing.assert_array_equal(found.tokens[found.segment_ids != 0], wanted.tokens[wanted.segment_ids != 0])
    np.testing.assert_array_equal(found.positions[found.segment_ids != 0], wanted.positions[wanted.segment_ids != 0])


@pytest.mark.parametrize("pack", [False, True])
def test_trimmed_documents(made, pack):
    whole = made("text", batch_size=64, pack=pack, max_length=200)
    before = whole.batch(3, 0)
    data = whole.trimmed()
    tokens = [np.sort(np.concatenate([batch.tokens[batch.segment_ids != 0] for batch in one.eval_batches()])) for one in (whole, data)]
    np.testing.assert_array_equal(*tokens)
    found = next(iter(data.eval_batches()))
    assert found.tokens.shape[-1] < 200 and found.tokens.shape[0] == len(whole)
    assert (found.loss_positions is None) == (data.loss_slots is None) and (not pack or data.loss_slots is None)
    np.testing.assert_array_equal(whole.batch(3, 0).tokens, before.tokens)  # the set that it was made of is as before
    assert data.batch(3, 0).tokens.shape == found.tokens.shape


def test_a_prompt_twice_in_a_batch_draws_other_samples(made):
    """Random keys come from (prompt, sample), so a batch larger than the data set must not repeat a pair."""
    batch = made("prompt", batch_size=60, group_size=2).batch(0, 0)
    pairs = list(zip(batch.prompt_ids.tolist(), batch.sample_ids.tolist()))
    assert len(set(pairs)) == 60 and sorted(set(batch.group_ids.tolist())) == list(range(30))


def test_batches_larger_than_the_set(made, tok):
    data = made("demo", batch_size=30)
    assert len(texts(data.batch(0, 0), tok)) == 30
    (only,) = data.eval_batches()
    assert only.real.sum() == 13


def test_how_many_batches_an_epoch_takes(made):
    data = made("demo")
    assert [data.batches_for(e, 0) for e in (1, 2, 0.5, 4, 0)] == [4, 7, 2, 13, 0]
    packed = made("demo", pack=True)
    packs = sum(b.real.sum() for b in packed.eval_batches())
    assert packed.batches_for(1, 0) <= -(-packs // 4) + 1 < 4
    assert made("prompt", batch_size=8, group_size=4).batches_for(1, 0) == 7


def test_long_documents_become_chunks(made):
    data = made("text", max_length=6)
    assert len(data) > 13 and data.prepared.lengths.max() == 6
    trained = sum(int(b.loss_mask.sum()) for b in data.eval_batches())
    assert trained == sum(len(f"t{i} " * (i % 5 + 1)) + 1 for i in range(13))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "host": (0, 2)}, r"config\.run\.batch_size expected a multiple of the 2 hosts, got 5; choose a multiple of 2"),
        ({"batch_size": 0}, r"config\.run\.batch_size expected a positive whole number, got 0"),
        ({"batch_size": 2.0}, r"config\.run\.batch_size expected a positive whole number, got 2.0"),
        ({"group_size": 3}, r"config\.run\.batch_size expected a multiple of the 3 samples per prompt, got 4"),
        ({"group_size": 0}, r"config\.sampling\.group_size expected a positive whole number, got 0"),
        ({"prompt_length": None}, r"config\.data\.prompt_length expected a number of tokens"),
        ({"pack": True}, r"config\.data\.pack expected False for prompt rows"),
    ],
)
def test_options_that_do_not_fit_fail_before_preparation(made, options, message, monkeypatch):
    monkeypatch.setattr("rlhf_jax.data.prepare.prepare", lambda *_, **__: pytest.fail("prepared first"))
    with pytest.raises(UserError, match=message):
        made("prompt", **options)


def test_an_unknown_kind(made):
    with pytest.raises(UserError, match=r"config\.data\.kind expected a kind of record, got 'demos' \(did you mean 'demo'\?\)"):
        made("demos")
