"""How decoding runs changes nothing of what is drawn: stop strings, early ends, groups that share a prompt; and what the compiled loop may not do."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import distributed, sampling, sharding
from rlhf_jax.models import Networks, attention, networks, transformer
from rlhf_jax.sampling import filters
from rlhf_jax.types import Rollout
from tests.models import tiny
from tests.sampling.test_filters import BPE, entry, spelled
from tests.sampling.test_sampler import SETTINGS, distribution, generate, prompts, texts, trainer, trainer_logps

SCANNED = tiny.config(scan_layers=True)


def grouped(size: int) -> Any:
    """Sixteen rows, `size` samples of each prompt, neighbours."""
    batch = prompts([texts()[b // size] for b in range(16)], 7, [b // size for b in range(16)])
    return batch.replace(sample_ids=jnp.arange(16, dtype=jnp.int32) % size, group_ids=jnp.arange(16, dtype=jnp.int32) // size)


def same_rollout(a: Rollout, b: Rollout) -> None:
    """The same tokens, segments and ends; log-probs within rounding."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 if x.dtype == np.float32 else 0)


# --- sampler ≡ trainer ---

PROOF: dict[str, dict[str, Any]] = {
    "plain": {},
    "early end": {"chunk": 3, "stop_ids": (3, 5, 6, 9)},
    "cold, filtered": {"temperature": 0.6, "top_k": 9, "top_p": 0.9},
    "hot, shared, early end": {"temperature": 1.5, "top_p": 0.8, "group_size": 4, "chunk": 2},
    "scanned, shared": {"config": SCANNED, "group_size": 4},
    "refilled, rings, the head in chunks": {
        "config": tiny.config(windows=(4, 0), logits_chunk=3), "group_size": 2, "slots": 4, "chunk": 3, "temperature": 0.8, "stop_ids": (3, 5, 6, 9)},
}


@pytest.mark.parametrize("name", PROOF)
def test_sampler_and_trainer_agree_on_every_tokens_log_prob(name: str) -> None:
    """The largest gap and the 99th percentile; what was filtered, against the trainer's own logits filtered in float64."""
    how = {"config": tiny.BASE, "temperature": 1.0, **PROOF[name]}
    rollout = generate(grouped(4), **how)
    mask, config, temperature = rollout.seqs.loss_mask, how["config"], how["temperature"]
    assert 16 < mask.sum() <= 128 and (mask.sum() < 128 or "early end" not in name)
    gaps = np.abs(trainer_logps(rollout, config, temperature) - rollout.plain_logps)[mask]
    assert gaps.max() <= 1e-4 and np.percentile(gaps, 99) <= 1e-4, (gaps.max(), np.percentile(gaps, 99))
    logits = np.asarray(tiny.logits(config, tiny.params(config), rollout.seqs))
    top_k, top_p = how.get("top_k", 0), how.get("top_p", 1.0)
    drawn = [np.log(distribution(logits[b, t - 1], temperature, top_k, top_p)[rollout.seqs.tokens[b, t]]) for b, t in zip(*np.nonzero(mask))]
    assert np.abs(np.asarray(drawn) - rollout.sampler_logps[mask]).max() <= 1e-4
    assert not rollout.plain_logps[~mask].any() and not rollout.sampler_logps[~mask].any()
    apart = np.abs(rollout.plain_logps - rollout.sampler_logps)[mask].max()
    assert apart > 0.05 if top_p < 1 else apart == 0


def test_packed_rows_have_the_samplers_log_probs() -> None:
    """The trainer reads two samples in one row, without the padding between them."""
    rollout = generate(grouped(4), config=tiny.BASE, stop_ids=(3, 5, 6, 9))
    real = rollout.seqs.segment_ids != 0
    pairs = [[(rollout.seqs.tokens[b][real[b]], rollout.plain_logps[b][real[b]], rollout.seqs.loss_mask[b][real[b]]) for b in (2 * p, 2 * p + 1)]
             for p in range(8)]
    packed = [tiny.row(np.concatenate([one[0], two[0]]), lengths=(len(one[0]), len(two[0])), right=30 - len(one[0]) - len(two[0]))
              for one, two in pairs]
    found = np.asarray(trainer(tiny.nets(tiny.BASE), jax.tree.map(lambda *x: jnp.concatenate(x), *packed)))
    wanted, own = (np.stack([np.pad(np.concatenate([one[at], two[at]]), (0, 30 - len(one[0]) - len(two[0]))) for one, two in pairs]) for at in (1, 2))
    gaps = np.abs(found - wanted)[own != 0]
    assert len(gaps) > 32 and gaps.max() <= 1e-4 and np.percentile(gaps, 99) <= 1e-4, gaps.max()


# --- groups ---


@pytest.mark.parametrize(("size", "config"), [(2, tiny.BASE), (4, SCANNED), (16, tiny.BASE)])
def test_a_shared_prompt_gives_what_a_prompt_of_ones_own_gives(size: int, config: Any) -> None:
    batch = grouped(size)
    if size == 4:  # a whole group of filler
        empty = jnp.where(jnp.arange(16)[:, None] >= 12, 0, batch.segment_ids)
        batch = batch.replace(segment_ids=empty)
    same_rollout(generate(batch, config=config, group_size=size), generate(batch, config=config))


def test_a_shared_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], Networks.prefill
    monkeypatch.setattr(Networks, "prefill", lambda self, tokens, *rest: seen.append(tokens.shape) or original(self, tokens, *rest))
    jax.eval_shape(lambda n, p: sampling.generate(n, p, jax.random.key(0), iteration=0, group_size=4, **SETTINGS), tiny.nets(), grouped(4))
    assert seen == [(4, 7)]


def test_opponents_share_prompts_too() -> None:
    batch, nets = grouped(4), tiny.nets()
    other = nets.replace(params={"policy": tiny.params(tiny.BASE, 7)})
    how = {"iteration": 0, **SETTINGS}
    run = tiny.jit(lambda a, b, p, g: sampling.generate_against(a, b, p, jax.random.key(0), group_size=g, **how), static_argnums=3)
    same_rollout(*(jax.tree.map(np.asarray, run(nets, other, batch, size)) for size in (4, 1)))


def test_eight_devices_share_prompts_without_asking_each_other() -> None:
    with tiny.uncached():  # make_mesh switches the cache off for good
        mesh = distributed.make_mesh(dict(zip(distributed.AXES, (8, 1, 1))))
    nets, batch = tiny.nets(), grouped(2)
    where = sharding.parameter_shardings(mesh, {"policy": transformer.logical_axes(tiny.BASE)}, nets.params)
    run = sharding.jit(lambda n, p: sampling.generate(n, p, jax.random.key(0), iteration=2, group_size=2, **SETTINGS), mesh)
    placed = nets.replace(params=jax.device_put(nets.params, where)), distributed.to_global(batch, sharding.row_sharding(mesh))
    with tiny.uncached():
        run = run.lower(*placed).compile(tiny.SHIPPED)
    same_rollout(jax.tree.map(np.asarray, run(*placed)), generate(batch, config=tiny.BASE))
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter", run.as_text())


# --- early end ---


@dataclasses.dataclass
class Counting:
    """A policy that notes each decode step as it runs."""

    nets: Networks
    steps: list[int]

    def decoding(self) -> Counting:
        return self

    def prefill(self, *given: Any) -> Any:
        return self.nets.prefill(*given)

    def decode(self, token: Any, position: Any, slot: Any, *rest: Any) -> Any:
        jax.debug.callback(lambda at: self.steps.append(int(at)), slot)
        return self.nets.decode(token, position, slot, *rest)


@pytest.mark.parametrize(("stops", "chunk"), [((3,), 3), (tuple(range(0, tiny.V, 2)), 3), (tuple(range(tiny.V)), 5), ((), 4)])
def test_decoding_ends_when_every_row_has_and_draws_the_same(stops: tuple[int, ...], chunk: int) -> None:
    """N = 12: no more chunks run than the longest row needs, the last one cut to fit."""
    batch, settings, count = prompts(list(texts()), 6), {**SETTINGS, "stop_ids": stops, "max_new_tokens": 12, "pad_id": 1}, 12
    rolled, ran = [], []
    for size in (chunk, 0):
        noted = Counting(tiny.nets(tiny.config(layers=1)), [])
        rolled.append(jax.tree.map(np.asarray, tiny.jit(lambda p, n=noted, c=size: sampling.generate(n, p, jax.random.key(0), iteration=2, chunk=c,
                                                                                                     **settings))(batch)))
        jax.effects_barrier()
        ran.append(sorted(at - 6 for at in noted.steps))
    for x, y in zip(jax.tree.leaves(rolled[0]), jax.tree.leaves(rolled[1]), strict=True):
        np.testing.assert_array_equal(x, y)
    longest = int(rolled[0].seqs.loss_mask.sum(-1).max())
    assert ran[1] == list(range(count - 1)), "without chunks every step runs"
    assert ran[0] == list(range(min(-(-(longest - 1) // chunk) * chunk, count - 1)))
    assert (longest == 1) == (len(stops) == tiny.V)


def test_one_program_serves_rows_of_any_length() -> None:
    run = tiny.jit(lambda n, p, k: sampling.generate(n, p, k, iteration=0, **{**SETTINGS, "chunk": 2}))
    ended = {int(np.asarray(run(tiny.nets(), prompts(list(texts())[b : b + 2], 6), jax.random.key(b)).seqs.loss_mask).sum()) for b in range(8)}
    assert len(ended) > 2 and run._cache_size() == 1


# --- stop strings ---


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it() -> None:
    """Across the borders of tokens of one to four letters, beside stop tokens; what was drawn before is what is drawn without."""
    letters = tuple(at for at, piece in enumerate(spelled()) if piece and set(piece) <= set(b"ab"))
    config, needles, stop = tiny.config(vocab_size=BPE.vocab_size, layers=1), (b"babb", b"aaa"), letters[2]
    nets, batch = tiny.nets(config), prompts([(20, letters[b % 5]) for b in range(24)], 3)
    rolled, budget = {}, 8
    for strings in ((), tuple(needle.decode() for needle in needles)):
        composed = filters.build((entry("allowed", letters), entry("min_new_tokens", 3)), strings, tokenizer=BPE.replace(stops=(stop,)),
                                 vocab_size=BPE.vocab_size)
        how = {**SETTINGS, "iteration": 0, "max_new_tokens": budget, "temperature": 3.0, "stop_ids": (stop,), "filters": composed, "chunk": 4}
        run = tiny.jit(lambda n, p, h=how: sampling.generate(n, p, jax.random.key(2), **h))
        rolled[bool(strings)] = jax.tree.map(np.asarray, run(nets, batch))
    free, stopped = rolled[False], rolled[True]
    ends = {"string": 0, "stop": 0, "budget": 0}
    borders = 0
    for b in range(24):
        mine, length = stopped.seqs.tokens[b, 3:], int(stopped.seqs.loss_mask[b].sum())
        text = [b"".join(spelled()[t] for t in mine[:n]) for n in range(length + 1)]
        assert not any(needle in early for needle in needles for early in text[:length]) and stop not in mine[: length - 1]
        by_string = any(needle in text[length] for needle in needles)
        ends["string" if by_string else "stop" if mine[length - 1] == stop else "budget"] += 1
        assert bool(stopped.truncated[b]) == (length == budget and not by_string and mine[length - 1] != stop)
        assert length == budget or by_string or mine[length - 1] == stop
        assert length > 3, "neither a stop token nor a stop string before three tokens are there"
        assert not mine[length:].any() and not stopped.seqs.segment_ids[b, 3 + length :].any()
        borders += by_string and len(spelled()[mine[length - 1]]) < 3
        if not any(needle in b"".join(spelled()[t] for t in free.seqs.tokens[b, 3:7]) for needle in needles):  # min_new_tokens has changed nothing
            np.testing.assert_array_equal(mine[: length - 1], free.seqs.tokens[b, 3 : 2 + length])
    assert min(ends.values()) > 0 and borders > 2, (ends, borders)


# --- the compiled loop ---


def computations(hlo: str) -> dict[str, list[str]]:
    """The instructions of each computation."""
    found: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if line.endswith("{") and (head := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)):
            lines = found.setdefault(head[1], [])
        elif line.startswith("  "):
            lines.append(line)
    return found


def large(text: str, size: int) -> bool:
    """Whether an array of `size` elements or more occurs."""
    return any(math.prod(map(int, shape.split(","))) >= size for shape in set(re.findall(r"\w\[([\d,]+)\]", text)))


def token_loops(hlo: str, size: int) -> list[str]:
    """Bodies that run once per token: they hold arrays of `size` elements or more, no branches, and no loop that holds such an array itself."""
    bodies = {name: "\n".join(computations(hlo)[name]) for name in sorted(set(re.findall(r"body=%?([\w.\-]+)", hlo)))}
    inner = {name: [bodies[within] for within in re.findall(r"body=%?([\w.\-]+)", body)] for name, body in bodies.items()}
    return [body for name, body in bodies.items()
            if large(body, size) and " conditional(" not in body and not any(large(within, size) for within in inner[name])]


def loop_copies(hlo: str, size: int, bodies: list[str] | None = None) -> list[str]:
    """Instructions of loop bodies that write `size` elements or more and are no update in place: copies, transposes, fusions of anything else."""
    all_of = computations(hlo)
    in_place = {name for name, lines in all_of.items() if any("ROOT" in line and " dynamic-update-slice(" in line for line in lines)}
    found = []
    for body in bodies if bodies is not None else ["\n".join(all_of[name]) for name in set(re.findall(r"body=%?([\w.\-]+)", hlo))]:
        for line in body.splitlines():
            made = re.search(r"= \w+\[([\d,]+)\]\S* (copy|transpose|fusion|concatenate|pad|broadcast|dynamic-slice|convert|call)\(", line)
            if made and math.prod(map(int, made[1].split(","))) >= size and not (set(re.findall(r"calls=%?([\w.\-]+)", line)) & in_place):
                found.append(line.strip()[:120])
    return found


@pytest.mark.parametrize(("config", "chunk", "kind"), [
    (tiny.BASE, 0, "same"), (tiny.BASE, 8, "same"), (SCANNED, 0, "same"), (SCANNED, 8, "same"), (tiny.BASE, 0, "int8"),
    (tiny.config(windows=(40,)), 0, "same"), (tiny.config(windows=(40, 0), layers=4, scan_layers=True), 8, "int8"),
])
def test_the_cache_is_not_copied_per_token(config: Any, chunk: int, kind: str) -> None:
    """16 rows of 46 slots, 40 in a ring: everything else in the loop is smaller than a layer's keys."""
    slots = min(46, *(window or 46 for window in config.windows))
    assert loop_copies(compiled(config, chunk, kind), 16 * slots * config.kv_heads * config.head_dim) == []


def test_copies_of_the_cache_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dots over keys of eight bits convert them first; a layer scan writes its whole cache anew."""
    size = 16 * 46 * 8
    with monkeypatch.context() as patch:
        patch.setattr(attention, "ELEMENTWISE", ())
        assert len(loop_copies(compiled(tiny.BASE, 0, "int8"), size)) >= 2
    monkeypatch.setattr(networks, "UNROLLING", ())
    assert len(loop_copies(compiled(SCANNED, 0), size)) >= 2


def compiled(config: Any, chunk: int, kind: str = "same") -> str:
    """The optimised program of a generation of 40 tokens."""
    settings = {**SETTINGS, "max_new_tokens": 40, "chunk": chunk}
    run = jax.jit(lambda n, p, k: sampling.generate(n, p, k, iteration=0, **settings))
    return run.lower(tiny.nets(config, cache=kind), prompts(list(texts()), 6), jax.random.key(0)).compile().as_text()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(("dtype", "elementwise"), [("float32", True), ("float32", False), ("bfloat16", True)])
def test_queries_attend_to_a_cache_as_to_keys_of_their_own(softcap: float, dtype: str, elementwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last query among others, and alone over a cache: sums of products, or dots."""
    monkeypatch.setattr(attention, "ELEMENTWISE", (jax.default_backend(),) if elementwise else ())
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(3, 5, heads, 4)), dtype) for heads in (6, 2, 2))
    mask = jnp.asarray(rng.random((3, 5, 5)) < 0.7).at[:, :, 0].set(True)
    many = attention.attend(query, key, value, mask, scale=0.5, softcap=softcap)
    kept = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
    for begin in (4, 0):
        found = attention.attend_cache(query[:, begin:], *kept, mask[:, begin:], scale=0.5, softcap=softcap)
        assert found.dtype == many.dtype and found.shape == many[:, begin:].shape
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(many[:, begin:], np.float32), atol=1e-6 if dtype == "float32" else 2e-2)
