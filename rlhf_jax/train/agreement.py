"""What the hosts of a run compare before they start: the code that they run, and the one folder that they all write to."""

from __future__ import annotations

import hashlib
import inspect
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from rlhf_jax import checkpoint, distributed
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import Objective

PATIENCE = 10.0  # seconds until what another host wrote is seen; network file systems cache folders


def facts(config: Mapping[str, Any], objective: Objective, folder: epath.Path) -> dict[str, Any]:
    """What every host must have alike, beside the data: config, digests of this package's sources and of the objective's module, JAX's version, and
    the checkpoints to go on from. Nothing on one host.

    Args:
      config: checked, as JSON.
      objective: bound; perhaps the user's own.
      folder: --workdir.
    """
    if distributed.hosts() == 1:
        return {}
    sha, root = hashlib.sha256(), pathlib.Path(distributed.__file__).parent
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    own = pathlib.Path(inspect.getfile(inspect.unwrap(getattr(objective.loss, "func", objective.loss)))).read_bytes()
    begun = folder / checkpoint.CHECKPOINTS
    steps = sorted(int(path.name) for path in begun.iterdir() if path.name.isdigit()) if begun.exists() else []
    return {"config": config, "code": sha.hexdigest()[:16], "objective": hashlib.sha256(own).hexdigest()[:16], "jax": jax.__version__,
            "--workdir": steps}


def one_workdir(folder: epath.Path, witness: epath.Path) -> None:
    """Refuses a workdir that the hosts do not share. A collective.

    Args:
      folder: --workdir.
      witness: a file in it that the lead has written.

    Raises:
      UserError: another host does not see it.
    """
    if distributed.hosts() == 1:
        return
    (wanted, *_) = distributed.exchange(_digest(witness))
    deadline, found = time.monotonic() + PATIENCE, _digest(witness)
    while found != wanted and time.monotonic() < deadline:
        time.sleep(0.2)
        found = _digest(witness)
    seen = distributed.exchange(found == wanted)
    if not all(seen):
        raise UserError(f"--workdir = {str(folder)!r}: host {seen.index(False)} of {len(seen)} does not see what host 0 writes there: name a folder "
                        "that all hosts share, e.g. gs://…")


def _digest(path: epath.Path) -> Any:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
