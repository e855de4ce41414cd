"""The one train step: accumulation, epochs × minibatches, refused batches, counters, what trains and what stays."""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from rlhf_jax.models import Networks, NetworkSpec, layout
from rlhf_jax.ops import rows
from rlhf_jax.ops.masking import loss_tokens
from rlhf_jax.train import optimizer
from rlhf_jax.train.assemble import full_params
from rlhf_jax.train.start import split, trains
from rlhf_jax.train.step import fill_reference, gradients, make_step
from rlhf_jax.types import Array, Comparisons, Mean, Sequences, TrainState
from tests.models import tiny
from tests.objectives.settings import bound
from tests.train import trainable

SMALL = {**trainable.OPTIMIZER, "lr": 1e-2, "clip_norm": 1.0}


def first_state(params: Any, tx: Any, carry: Any = None, seed: int = 0) -> TrainState:
    return TrainState(step=jnp.int32(0), batch_index=jnp.int32(0), params=params, opt_state=tx.init(params), key=jax.random.key(seed),
                      carry={} if carry is None else carry)


def built(objective: Any, spec: Any, *, microbatches: int = 1, epochs: int = 1, minibatches: int = 1, total: int = 10, **changes: Any) -> Any:
    """(jitted step, optimizer, rate)."""
    tx, rate = optimizer.build({**SMALL, **changes}, total)
    step = make_step(objective, spec, tx, rate, microbatches=microbatches, epochs=epochs, minibatches=minibatches)
    return tiny.jit(step), tx, rate


# --- a line for a model: one parameter, so that each number can be had by hand ---


@struct.dataclass
class Points:
    x: Array  # [B]
    y: Array  # [B]
    weight: Array  # [B]
    seen: Array  # [B], filled by prepare


def points(count: int = 8, seed: int = 0) -> Points:
    rng = np.random.default_rng(seed)
    x, y, w = rng.normal(size=count), rng.normal(size=count), rng.integers(0, 3, count)
    w[0] = 1
    f = functools.partial(jnp.asarray, dtype=jnp.float32)
    return Points(f(x), f(y), f(w), jnp.zeros(count))


def prepare(nets: Any, batch: Points, carry: Any, key: Array) -> Any:
    return batch.replace(seen=batch.seen + carry["count"]), {"count": carry["count"] + 1.0}, {"seen": Mean.of(batch.y)}


def loss(nets: Any, batch: Points, keys: Array) -> Any:
    """Two terms of different weights: a weighted square, and a linear one over all rows."""
    gap = nets.params["w"] * batch.x - batch.y
    return {"square": Mean.of(gap**2, batch.weight), "linear": Mean.of(0.1 * gap)}, {"seen/carry": Mean.of(batch.seen)}


LINE = types.SimpleNamespace(prepare=prepare, loss=loss)


def slope(w: float, p: Points) -> float:
    x, y, weight = (np.asarray(a, np.float64) for a in (p.x, p.y, p.weight))
    return float((2 * (w * x - y) * x * weight).sum() / max(weight.sum(), 1) + 0.1 * x.mean())


def line_nets(w: float = 0.7) -> Networks:
    return Networks({"w": jnp.float32(w)}, {}, NetworkSpec())


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(microbatches):
    """Weights differ between microbatches, so a mean of means would be another number."""
    batch = points()
    grads, metrics = gradients(LINE, line_nets(), batch, jax.random.split(jax.random.key(0), 8), microbatches)
    assert float(grads["w"]) == pytest.approx(slope(0.7, batch), rel=1e-5)
    assert float(metrics["loss/square"].count) == float(batch.weight.sum()) and float(metrics["loss/linear"].count) == 8
    gap = 0.7 * np.asarray(batch.x) - np.asarray(batch.y)
    assert float(metrics["loss/square"].compute()) == pytest.approx((gap**2 * np.asarray(batch.weight)).sum() / float(batch.weight.sum()), rel=1e-5)


def test_a_batch_without_weight_has_a_finite_gradient():
    batch = points().replace(weight=jnp.zeros(8))
    grads, metrics = gradients(LINE, line_nets(), batch, jax.random.split(jax.random.key(0), 8), 4)
    assert float(grads["w"]) == pytest.approx(0.1 * float(batch.x.mean()), rel=1e-5) and float(metrics["loss/square"].compute()) == 0


def test_parts_are_strided_and_must_divide():
    parts = rows.interleave({"x": jnp.arange(6)}, 3)["x"]
    np.testing.assert_array_equal(parts, [[0, 3], [1, 4], [2, 5]])
    assert rows.count({"x": jnp.zeros((6, 2))}) == 6
    with pytest.raises(ValueError, match="6 rows in groups of 1 do not split into 4 parts"):
        rows.interleave({"x": jnp.arange(6)}, 4)


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError):
        gradients(LINE, line_nets(), points(), jax.random.split(jax.random.key(0), 7), 1)
    with pytest.raises(AssertionError):
        gradients(LINE, line_nets(), points().replace(x=jnp.zeros(9)), jax.random.split(jax.random.key(0), 8), 1)


# --- updates and counters ---


def run_line(batches: list[Points], **options: Any) -> Any:
    step, tx, rate = built(LINE, NetworkSpec(), **options)
    state, log = first_state({"w": jnp.float32(0.7)}, tx, {"count": jnp.float32(0)}), []
    for batch in batches:
        state, metrics = step(state, {}, batch)
        log.append({name: float(m.compute()) for name, m in metrics.items()})
    return state, log, rate


def test_one_update_by_hand_and_what_is_logged_of_it():
    batch = points()
    state, [log], _ = run_line([batch], clip_norm=0.0, weight_decay=0.0, schedule="linear", warmup_steps=5)
    g = slope(0.7, batch)
    assert float(state.params["w"]) == pytest.approx(0.7 - 0.2e-2 * np.sign(g), rel=1e-4)  # Adam's first step, a fifth of the rate
    assert log["optimizer/grad_norm"] == pytest.approx(abs(g), rel=1e-5)
    assert log["optimizer/lr"] == pytest.approx(0.2e-2) and log["optimizer/skipped"] == log["optimizer/nonfinite_run"] == 0
    assert {"loss/square", "loss/linear", "seen", "seen/carry"} <= log.keys()
    assert (int(state.step), int(state.batch_index), float(state.carry["count"])) == (1, 1, 1.0)


def test_counters_and_rates_over_epochs_and_minibatches():
    state, log, rate = run_line([points(seed=s) for s in range(3)], epochs=2, minibatches=4, warmup_steps=20, total=24)
    assert (int(state.step), int(state.batch_index), float(state.carry["count"])) == (24, 3, 3.0)
    for number, entry in enumerate(log):
        expected = np.mean([float(rate(n)) for n in range(8 * number, 8 * number + 8)])
        assert entry["optimizer/lr"] == pytest.approx(expected, rel=1e-5)
        assert entry["seen/carry"] == number  # prepare ran once, before the epochs


def test_epochs_and_minibatches_are_that_many_updates_of_strided_shuffled_parts():
    """Two epochs of two minibatches, done again by hand with the step's own order of rows."""
    batch, (tx, _) = points(), optimizer.build(SMALL, 10)
    state, _, _ = run_line([batch], epochs=2, minibatches=2)
    params = {"w": jnp.float32(0.7)}
    opt = tx.init(params)
    shuffle = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 0)
    orders = [np.asarray(jax.random.permutation(jax.random.fold_in(shuffle, epoch), 8)) for epoch in range(2)]
    assert not np.array_equal(*orders)
    for order in orders:
        for part in (order[0::2], order[1::2]):
            piece = jax.tree.map(lambda a: a[part], batch)  # noqa: B023
            updates, opt = tx.update({"w": jnp.float32(slope(float(params["w"]), piece))}, opt, params)
            params = optax.apply_updates(params, updates)
    assert float(state.params["w"]) == pytest.approx(float(params["w"]), rel=1e-5)


def test_every_row_is_seen_once_in_an_epoch():
    seen = types.SimpleNamespace(prepare=prepare, loss=lambda nets, b, keys: ({"one": Mean.of(nets.params["w"] * b.x)}, {"y": Mean.of(b.y)}))
    step, tx, _ = built(seen, NetworkSpec(), epochs=3, minibatches=4, microbatches=2)
    batch = points()
    _, metrics = step(first_state({"w": jnp.float32(1)}, tx, {"count": jnp.float32(0)}), {}, batch)
    assert float(metrics["y"].count) == 24 and float(metrics["y"].total) == pytest.approx(3 * float(batch.y.sum()), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"epochs": 2, "minibatches": 2}, {"microbatches": 4}])
def test_a_non_finite_batch_leaves_no_trace_but_its_count(options):
    updates = options.get("epochs", 1) * options.get("minibatches", 1)
    broken = points(seed=1).replace(x=jnp.full(8, jnp.nan))
    state, log, _ = run_line([points(), broken, broken], ema_decay=0.5, **options)
    alone, _, _ = run_line([points()], ema_decay=0.5, **options)
    assert float(state.params["w"]) == float(alone.params["w"]) and float(state.carry["count"]) == 1.0
    tiny.close(state.opt_state.inner_state, alone.opt_state.inner_state, rtol=0, atol=0)
    assert [entry["optimizer/skipped"] for entry in log] == [0, 1, 1]
    assert [entry["optimizer/nonfinite_run"] for entry in log] == [0, updates, 2 * updates]
    assert (int(state.step), int(state.batch_index), int(state.opt_state.total_notfinite)) == (3 * updates, 3, 2 * updates)
    good, after, rate = run_line([points(), broken, points(seed=2)], **options)
    straight, _, _ = run_line([points(), points(seed=2)], **options)
    assert after[-1]["optimizer/nonfinite_run"] == 0
    if not options.get("minibatches"):  # the order of rows goes by the number of the batch
        assert float(good.params["w"]) == pytest.approx(float(straight.params["w"]), rel=1e-6)
    skipped_rates = [float(rate(n)) for n in range(updates, 2 * updates)]
    assert after[-1]["optimizer/lr"] == pytest.approx(np.mean(skipped_rates), rel=1e-6)


def test_one_broken_minibatch_of_two_is_skipped_alone():
    batch = points()
    state, [log], _ = run_line([batch.replace(x=batch.x.at[2].set(jnp.nan))], minibatches=2)
    assert log["optimizer/skipped"] == 0.5 and float(state.params["w"]) != pytest.approx(0.7) and float(state.carry["count"]) == 1.0


WEIGHED = types.SimpleNamespace(prepare=prepare, loss=lambda nets, p, keys: ({"square": Mean.of((nets.params["w"] * p.x - p.y) ** 2, p.weight)}, {}))


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"minibatches": 2}])
def test_a_batch_without_weight_is_no_update(options):
    """Momentum, weight decay, the average and the rate stay where they were; a later batch goes on as if it had not been there."""
    step, tx, rate = built(WEIGHED, NetworkSpec(), ema_decay=0.5, weight_decay=0.1, warmup_steps=5, **options)
    empty, broken = points().replace(weight=jnp.zeros(8)), points().replace(x=jnp.full(8, jnp.nan))
    runs = []
    for batches in ([points(), empty], [points()], [points(), broken, empty.replace(x=broken.x)]):
        state = first_state({"w": jnp.float32(0.7)}, tx, {"count": jnp.float32(0)})
        for batch in batches:
            state, metrics = step(state, {}, batch)
        runs.append((state, {name: float(m.compute()) for name, m in metrics.items()}))
    (state, log), (alone, before), (after, last) = runs
    updates = options.get("minibatches", 1)
    tiny.close((state.params, state.opt_state, state.carry), (alone.params, alone.opt_state, alone.carry), rtol=0, atol=0)
    assert (int(state.step), int(state.batch_index)) == (updates, 2)
    assert (log["optimizer/empty"], log["optimizer/skipped"], log["optimizer/nonfinite_run"]) == (1, 0, 0) and before["optimizer/empty"] == 0
    assert log["optimizer/lr"] == pytest.approx(float(rate(updates)))
    assert (last["optimizer/empty"], last["optimizer/skipped"], last["optimizer/nonfinite_run"]) == (1, 0, updates), "it neither fails nor succeeds"
    assert int(after.opt_state.total_notfinite) == updates


def test_tokens_and_padding_of_a_batch_are_counted():
    """Three real tokens of eight slots, the first of a segment no one's to train on, whatever the mask says."""
    segments = jnp.array([[1, 1, 1, 0], [0, 0, 0, 0]])
    ones = jnp.ones((2, 4), jnp.int32)
    seqs = Sequences(tokens=ones, positions=ones, segment_ids=segments, loss_mask=ones > 0)
    first = types.SimpleNamespace(prepare=lambda nets, b, carry, key: (b, carry, {}),
                                  loss=lambda nets, b, keys: ({"one": Mean.of(nets.params["w"] * b.tokens, b.loss_mask)}, {}))
    step, tx, _ = built(first, NetworkSpec(), microbatches=2)
    metrics = step(first_state({"w": jnp.float32(1)}, tx), {}, seqs)[1]
    found = {name: float(metrics[name].compute()) for name in ("data/tokens", "data/loss_tokens", "data/padding")}
    assert found == {"data/tokens": 3, "data/loss_tokens": 2, "data/padding": 5 / 8}


def test_one_empty_minibatch_of_two_is_left_out_alone():
    step, tx, _ = built(WEIGHED, NetworkSpec(), minibatches=2)
    weight = jnp.zeros(8).at[0].set(1.0)
    state, metrics = step(first_state({"w": jnp.float32(0.7)}, tx, {"count": jnp.float32(0)}), {}, points().replace(weight=weight))
    assert float(metrics["optimizer/empty"].compute()) == 0.5 and int(state.step) == 1 and float(state.carry["count"]) == 1.0


def test_a_carry_that_turns_non_finite_is_not_taken():
    def spoil(nets, batch, carry, key):
        return batch, {"count": carry["count"] + jnp.inf}, {}

    step, tx, _ = built(types.SimpleNamespace(prepare=spoil, loss=loss), NetworkSpec())
    state, _ = step(first_state({"w": jnp.float32(0.7)}, tx, {"count": jnp.float32(4)}), {}, points())
    assert float(state.carry["count"]) == 4.0 and float(state.params["w"]) != pytest.approx(0.7)


def test_dropout_keys_follow_the_run_the_step_and_the_row():
    def noisy(nets, batch, keys):
        drawn = jax.vmap(jax.random.uniform)(keys)
        return {"noise": Mean.of(nets.params["w"] * drawn)}, {"first": Mean.of(drawn[:1]), "all": Mean.of(drawn)}

    step, tx, _ = built(types.SimpleNamespace(prepare=prepare, loss=noisy), NetworkSpec())
    fresh = lambda seed: first_state({"w": jnp.float32(1)}, tx, {"count": jnp.float32(0)}, seed)  # noqa: E731
    state, one = step(fresh(0), {}, points())
    _, two = step(state, {}, points())
    _, again = step(fresh(0), {}, points())
    _, other = step(fresh(1), {}, points())
    values = [float(m["all"].compute()) for m in (one, two, other)]
    assert len(set(values)) == 3 and float(again["all"].compute()) == values[0]
    split_step, _, _ = built(types.SimpleNamespace(prepare=prepare, loss=noisy), NetworkSpec(), microbatches=4)
    _, parts = split_step(fresh(0), {}, points())
    assert float(parts["all"].compute()) == pytest.approx(values[0], rel=1e-6)


# --- with real networks ---


def test_the_reference_is_filled_in_where_it_is_missing_alone():
    nets, batch = trainable.networks("dpo"), trainable.batch("dpo", rows=2)
    expected = tiny.jit(lambda n, s: n.ref(s).logps)(nets, batch.seqs)
    tiny.close(tiny.jit(fill_reference)(nets, batch).seqs.ref_logps, expected, atol=1e-6)
    tiny.close(tiny.jit(fill_reference)(nets, batch.seqs).ref_logps, expected, atol=1e-6)
    kept = batch.replace(seqs=batch.seqs.replace(ref_logps=jnp.ones_like(expected)))
    assert (fill_reference(nets, kept).seqs.ref_logps == 1).all()
    assert fill_reference(nets.replace(frozen={}), batch).seqs.ref_logps is None


def test_at_the_first_update_ppos_ratio_is_one_and_the_kl_to_an_equal_reference_zero():
    nets = trainable.networks("ppo")
    step, tx, _ = built(bound("ppo"), nets.spec, microbatches=2)
    carry = bound("ppo").init_carry(nets)
    frozen = {"ref": jax.tree.map(jnp.array, nets.params["policy"])}
    _, metrics = step(first_state(nets.params, tx, carry), frozen, trainable.batch("ppo", rows=8))
    values = {name: float(m.compute()) for name, m in metrics.items()}
    assert values["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5) and values["policy/clip_frac"] == 0
    assert abs(values["objective/kl"]) < 1e-5 and abs(values["policy/approx_kl"]) < 1e-9


@pytest.mark.parametrize(
    ("pattern", "scan"), [("layers/scan/0of1/(query|value)", True), ("layers/1|norm", False), ("ends/lm_head", True)]
)
def test_frozen_leaves_do_not_move_by_a_bit_and_have_no_optimizer_state(pattern, scan):
    config = tiny.config(vocab_size=16, scan_layers=scan)
    whole = {"policy": layout.to_runtime(tiny.params(tiny.config(vocab_size=16)), int(scan))}
    trained, base = split(whole, trains(pattern, False))
    step, tx, _ = built(bound("sft"), NetworkSpec(policy=config), weight_decay=0.1)
    state = first_state(trained, tx)
    batch = trainable.batch("sft", rows=4)
    for _ in range(2):
        state, metrics = step(state, {"base": base}, batch)
    before, after = tiny.canonical(whole), tiny.canonical(jax.tree.map(np.asarray, _merged(state.params, base)))
    assert before.keys() == after.keys() and base and trained
    chosen = set(tiny.canonical(trained))
    for path, old in before.items():
        assert np.array_equal(after[path], old) == (path not in chosen), path
    sizes = {leaf.size for leaf in jax.tree.leaves(trained)}
    moments = optax.tree.get(state.opt_state, "mu")
    assert set(tiny.canonical(moments)) == chosen and {m.size for m in jax.tree.leaves(moments)} == sizes
    assert np.isfinite(float(metrics["loss/nll"].compute()))
    saved = full_params(state.params, {"base": base})
    assert jax.tree.structure(saved) == jax.tree.structure({"policy": tiny.params(tiny.config(vocab_size=16))})


def _merged(params: Any, base: Any) -> Any:
    if not isinstance(params, dict):
        return params
    return {key: _merged(params[key], base[key]) if key in params and key in base else params.get(key, base.get(key)) for key in {**base, **params}}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("scan", [False, True])
def test_training_lowers_the_loss(name, scan):
    config = tiny.config(vocab_size=16, scan_layers=scan)
    params = {"policy": layout.to_runtime(tiny.params(tiny.config(vocab_size=16)), int(scan))}
    step, tx, _ = built(bound("sft"), NetworkSpec(policy=config), name=name, lr=3e-2, total=30)
    state, batch, losses = first_state(params, tx), trainable.batch("sft", rows=4), []
    for _ in range(30):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss/nll"].compute()))
    assert losses[-1] < 0.3 * losses[0]
    assert int(loss_tokens(batch).sum()) == int(metrics["loss/nll"].count)


def test_a_moving_average_trains_beside_the_parameters():
    params = {"policy": tiny.params(trainable.MODEL)}
    step, tx, _ = built(bound("sft"), NetworkSpec(policy=trainable.MODEL), ema_decay=0.5)
    state, _ = step(first_state(params, tx), {}, trainable.batch("sft", rows=4))
    average = optimizer.evaluation_params(state.params, state.opt_state)
    tiny.close(average, jax.tree.map(lambda a, b: (a + b) / 2, params, state.params), rtol=1e-5, atol=1e-6)


def test_a_pair_batch_counts_its_real_rows_alone():
    nets, batch = trainable.networks("dpo"), trainable.batch("dpo", rows=8)
    assert isinstance(batch, Comparisons) and int(batch.real.sum()) == 7
    step, tx, _ = built(bound("dpo"), nets.spec, microbatches=4)
    _, metrics = step(first_state(nets.params, tx), nets.frozen, batch)
    assert float(metrics["loss/dpo"].count) == 7
