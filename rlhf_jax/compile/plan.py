"""A config and a topology to what its programs cost: outline → programs → measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax import distributed
from rlhf_jax.compile.cache import Cache
from rlhf_jax.compile.measure import Measured, measure, total
from rlhf_jax.compile.outline import outline
from rlhf_jax.compile.programs import programs
from rlhf_jax.compile.search import Candidate, candidates, search
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.launch.topologies import Topology
from rlhf_jax.objectives import Objective
from rlhf_jax.train.config import trained_rows

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run costs on a topology, laid out in one way."""

    topology: Topology
    mesh: Mapping[str, int]
    found: list[Measured]
    notes: list[str]  # what was stood in for

    def to_json(self) -> dict[str, Any]:
        """Plain values: `programs.<name>` and the whole."""
        rows = {one.name: one.to_json() for one in self.found}
        return {"topology": self.topology.name, "chips": self.topology.chips, "mesh": dict(self.mesh), **total(self.found), "programs": rows,
                "notes": self.notes}


@dataclasses.dataclass(frozen=True)
class Planner:
    """Measures a run's programs.

    Args:
      config: checked (train.config.check, files=False).
      objective: bound.
      topology: what to compile for.
      devices: its.
      cache: of measurements.
      say: told what is being compiled.
      only: names of programs; () = all.
    """

    config: Mapping[str, Any]
    objective: Objective
    topology: Topology
    devices: Sequence[Any]
    cache: Cache
    say: Say
    only: tuple[str, ...] = ()

    def plan(self, config: Mapping[str, Any] | None = None) -> Plan:
        """The run as the config lays it out.

        Args:
          config: in the place of the planner's own.

        Raises:
          UserError: a mesh that does not divide, or a program that the run has not.
        """
        config = config or self.config
        section = config["mesh"]
        sizes = {axis: section[axis] for axis in distributed.AXES}
        mesh = distributed.make_mesh(sizes, section["devices"], self.devices, slices=section["slices"], rules=section["rules"])
        exp, notes = outline(config, self.objective, mesh)
        plain, _ = outline({**config, "model": {**config["model"], "remat": "none", "logits_chunk": 0}}, self.objective, mesh)
        every, without = programs(exp), programs(plain)
        names = [program.name for program in every]
        for name in self.only:
            if name not in names:
                raise UserError(f"--programs {name}: this run has {', '.join(names)}{nearest(name, names)}")
        loops = config["sampling"]["max_new_tokens"] - 1 if exp.online else 1
        found = []
        for program, model in zip(every, without, strict=True):
            if not self.only or program.name in self.only:
                self.say(f"compiling {program.name} for {self.topology.name} …")
                found.append(measure(program, model, self.topology, mesh.shape, loops, self.cache))
        return Plan(self.topology, mesh.shape, found, notes)

    def ranked(self) -> list[Candidate]:
        """Every layout that divides, best bound first."""
        mesh = distributed.make_mesh({"data": 1, "fsdp": -1}, 0, self.devices)
        sized = {**self.config, "run": {**self.config["run"], "microbatches": 1}}
        spec = outline(sized, self.objective, mesh)[0].spec
        named = {name: model for name in ("policy", "reward", "critic", "ref") if (model := getattr(spec, name)) is not None}
        own = self.config["network"]
        named = {own: named[own], **named}
        data, run = self.config["data"], self.config["run"]
        length = data["prompt_length"] + self.config["sampling"]["max_new_tokens"] if data["kind"] == "prompt" else data["max_length"]
        trained = (own, "critic")
        return candidates(self.config, named, trained, self.topology, trained_rows(self.config, self.objective) // run["minibatches"], length)

    def search(self, best: int) -> list[tuple[Candidate, Plan]]:
        """The best few layouts, compiled; those that fit first, by the bound of what was compiled.

        Args:
          best: how many.
        """
        plans: dict[int, Plan] = {}

        def compiled(one: Candidate) -> list[Measured]:
            plans[id(one)] = self.plan(one.apply(self.config))
            return plans[id(one)].found

        return [(one, plans[id(one)]) for one, _ in search(self.ranked(), compiled, self.say, best)]
