"""TR-DPO: DPO whose reference follows the policy, so that the trust region moves with it.

    L = DPO's, with a moving reference: after every τ-th batch   θ_ref ← α θ + (1 − α) θ_ref

Use: long training, in which a policy that may leave the first reference far behind goes further than DPO's; a run shorter than τ batches is DPO.
See: Gorbatovski et al. 2024, section 3 (arXiv:2404.09656): α < 1 is the soft update, α = 1 the hard one.
Deviation: none. The reference starts as the policy, or as config.reference_from, and is read with the policy's configuration (rope_theta,
norm_eps). It is state, a second copy of what trains in memory and in checkpoints: leave config.reference_from empty, or the first one is kept as
well. Loss and reward/* are relative to the moving reference, a sawtooth: logps/accuracy, which needs none, selects checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.objectives import dpo
from rlhf_jax.types import Array, Comparisons, Mean, PyTree

DEFAULTS = {"beta": 0.05, "alpha": 0.6, "sync_every": 512}
RANGES = {"beta": (1e-6, math.inf), "alpha": (1e-6, 1.0), "sync_every": (1, math.inf)}


def followed(reference: PyTree, policy: PyTree, due: Array, *, alpha: float) -> PyTree:
    """α θ + (1 − α) θ_ref where an update is due, else θ_ref.

    Args:
      reference: θ_ref, a tree of arrays.
      policy: θ, a tree of the same arrays.
      due: [] bool.
      alpha: α, how far the reference goes to the policy in an update, (0, 1]; 1 = all the way.

    See: Gorbatovski et al. 2024, section 3.
    """
    chex.assert_rank(due, 0)
    return jax.tree.map(lambda ref, new: jnp.where(due, (alpha * new + (1.0 - alpha) * ref).astype(ref.dtype), ref), reference, policy)


def init_carry(nets: Any) -> PyTree:
    policy, reference = nets.params["policy"], nets.frozen.get("ref", nets.params["policy"])
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (policy, reference)]
    if shapes[0] != shapes[1]:
        raise UserError("config.reference_from: tr_dpo moves the reference towards the policy, parameter by parameter, and this checkpoint's are not "
                        "those that train: leave it empty to start from the policy itself")
    return {"policy": jax.tree.map(jnp.copy, reference), "batches": jnp.int32(0)}  # copies: the policy's buffers are donated


def prepare(
    nets: Any, batch: Comparisons, carry: PyTree, key: Array, *, alpha: float, sync_every: int
) -> tuple[Comparisons, PyTree, dict[str, Mean]]:
    """The moving reference's log-probs in place of any other's.

    Args:
      sync_every: τ, batches from one update of the reference to the next, ≥ 1.
    """
    chex.assert_shape(batch.seqs.tokens, (None, 2, None))
    due = (carry["batches"] > 0) & (carry["batches"] % sync_every == 0)
    reference = followed(carry["policy"], nets.params["policy"], due, alpha=alpha)
    ref_logps = nets.replace(params={**nets.params, "policy": reference}).policy(batch.seqs).logps
    batch = batch.replace(seqs=batch.seqs.replace(ref_logps=ref_logps))
    return batch, {"policy": reference, "batches": carry["batches"] + 1}, {}


def loss(nets: Any, batch: Comparisons, keys: Array | None, *, beta: float) -> tuple[dict[str, Mean], dict[str, Mean]]:
    chex.assert_shape(batch.seqs.tokens, (None, 2, None))
    return dpo.loss(nets, batch, keys, beta=beta)
