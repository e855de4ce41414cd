"""Every public function on arrays opens with a shape assertion: read off the syntax trees of the rooms that compute."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

import pytest

from tests.house import PROTOCOL, Function, Module, called, house

ASSERTED = ("ops", "objectives", "models", "sampling", "train")
ARRAY_TYPES = {"Array", "Sequences", "Comparisons", "Prompts", "Rollout", "Unpaired", "Labelled"}


def _body(function: Function) -> list[ast.stmt]:
    """The statements after the docstring and after guards of the form `if …: raise …`, which refuse a user's mistake."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    while body and isinstance(body[0], ast.If) and isinstance(body[0].body[-1], ast.Raise) and not body[0].orelse:
        body = body[1:]
    return body


def _asserts(statement: ast.stmt) -> bool:
    """Whether a statement is a call `chex.assert_…(…)`."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func).startswith("chex.assert_")


def _opens(function: Function, module: Module) -> bool:
    """Whether a function opens with a chex assertion, or calls a `_check…` helper of its module that does, in its first statement."""
    body = _body(function)
    if not body:
        return False
    if _asserts(body[0]):
        return True
    helpers = {f.name: f for f in module.tree.body if isinstance(f, Function) and f.name.startswith("_check")}
    calls = {called(node.func) for node in ast.walk(body[0]) if isinstance(node, ast.Call)} if not _nests(body[0]) else set()
    return any(_asserts(_body(helpers[name])[0]) for name in calls & helpers.keys())


def _nests(statement: ast.stmt) -> bool:
    return any(isinstance(node, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(statement))


def takes_arrays(function: Function) -> bool:
    """Whether a parameter or the result is annotated with an array or a batch of them, optional or in a tuple too.

    A function that returns functions, or maps names to arrays, has no shape of its own to assert.
    """
    arguments = function.args
    hints = [a.annotation for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.annotation] + [function.returns]
    for hint in hints:
        source = ast.unparse(hint) if hint is not None else ""
        if not re.search(r"\b(Callable|Mapping|dict|Iterator|type)\b", source) and set(re.findall(r"\w+", source)) & ARRAY_TYPES:
            return True
    return False


def _public_functions(module: Module) -> Iterator[Function]:
    """Module-level functions, and methods of classes that are no Linen modules; names without an underscore."""
    for node in module.tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, Function):
            yield node
        elif not any("nn.Module" in ast.unparse(base) for base in node.bases):
            yield from (f for f in node.body if isinstance(f, Function) and not f.name.startswith("_"))


def _imported(module: Module) -> dict[str, str]:
    """Local names of what is imported from the package: {"loss_tokens": "rlhf_jax.ops.masking.loss_tokens", …}."""
    names = {}
    for node in module.tree.body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _delegates(function: Function, module: Module, modules: Mapping[str, Module]) -> bool:
    """Whether the first statement hands the batch to a function of ops or objectives that opens with an assertion."""
    body, known = _body(function), _imported(module)
    for node in ast.walk(body[0]) if body and not _nests(body[0]) else ():
        if isinstance(node, ast.Call) and any("batch" in re.findall(r"\w+", ast.unparse(argument)) for argument in node.args):
            owner, _, name = known.get(called(node.func), f"{module.name}.{called(node.func)}").rpartition(".")
            if owner in modules and owner.split(".")[1] in ("ops", "objectives"):
                home = modules[owner]
                if any(isinstance(f, Function) and f.name == name and _opens(f, home) for f in home.tree.body):
                    return True
    return False


def unasserted(modules: Mapping[str, Module]) -> list[str]:
    """Public array functions that do not open with a chex assertion.

    `loss` and `prepare` of an objective, whose arrays all sit in `batch`, may instead hand it in their first statement to a function of
    ops or objectives that does (`mask = loss_tokens(batch.seqs)`); `init_carry` is given no array.
    """
    found = []
    for module in modules.values():
        if module.room not in ASSERTED:
            continue
        for function in _public_functions(module):
            protocol = module.room == "objectives" and function.name in PROTOCOL
            if protocol and function.name == "init_carry":
                continue
            if not (protocol or takes_arrays(function)) or _opens(function, module):
                continue
            if not (protocol and _delegates(function, module, modules)):
                found.append(f"{module.name}.{function.name}:{function.lineno}")
    return found


def test_public_array_functions_open_with_a_shape_assertion():
    assert unasserted(house()) == []


def test_the_rule_on_assertions_sees_most_of_the_maths():
    seen = {room: sum(takes_arrays(f) for m in house().values() if m.room == room for f in _public_functions(m)) for room in ASSERTED}
    assert seen["ops"] >= 25 and seen["objectives"] >= 20 and seen["models"] >= 15 and seen["sampling"] >= 3 and seen["train"] >= 1, seen


GOOD = 'def f(x: Array) -> Array:\n    """Doc."""\n    chex.assert_rank(x, 2)\n    return x'
HELPED = GOOD.replace("chex.assert_rank(x, 2)\n    return x", "return _check(x)") + "\n\ndef _check(x):\n"


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        (GOOD, 0),
        (GOOD.replace("    chex.assert_rank(x, 2)\n", ""), 1),
        (GOOD.replace("chex.assert_rank(x, 2)\n    return x", "y = 2 * x\n    chex.assert_rank(y, 2)\n    return y"), 1),
        (GOOD.replace("chex.assert_rank(x, 2)", "if x is None:\n        raise UserError('no')\n    chex.assert_rank(x, 2)"), 0),
        (GOOD.replace("chex.assert_rank(x, 2)", "if x.ndim == 2:\n        chex.assert_rank(x, 2)"), 1),
        (GOOD.replace("chex.assert_rank(x, 2)", "assert x.ndim == 2"), 1),
        (HELPED + "    chex.assert_rank(x, 2)\n    return x", 0),
        (HELPED + "    return x", 1),
        ("def f(seqs: Sequences | None) -> float:\n    return 1.0", 1),
        ("def f(n: int) -> tuple[Array, int]:\n    return g(n), n", 1),
        ("class Nets:\n    def policy(self, seqs: Sequences) -> Any:\n        return 0", 1),
        ("def _f(x: Array) -> Array:\n    return x", 0),
        ("def f(n: int) -> int:\n    return n", 0),
    ],
)
def test_a_function_without_an_assertion_is_caught(source, caught):
    assert len(unasserted({"rlhf_jax.ops.new": Module("rlhf_jax.ops.new", source)})) == caught


@pytest.mark.parametrize(
    ("body", "caught"),
    [
        ("mask = loss_tokens(batch.seqs)\n    return {}, {}", 0),
        ("return {'a': nets.policy(batch).logps}, {}", 1),
        ("logps = nets.policy(batch).logps\n    mask = loss_tokens(batch)\n    return {}, {}", 1),
        ("mask = loss_tokens(other)\n    return {}, {}", 1),
        ("chex.assert_rank(batch.tokens, 2)\n    return {}, {}", 0),
    ],
)
def test_an_objective_that_asserts_nothing_is_caught(body, caught):
    source = f"from rlhf_jax.ops.masking import loss_tokens\n\ndef loss(nets: Any, batch: Sequences, keys: Any):\n    {body}"
    new = Module("rlhf_jax.objectives.new", source)
    masking = house()["rlhf_jax.ops.masking"]
    assert unasserted({masking.name: masking, new.name: new}) == ([f"{new.name}.loss:3"] if caught else [])
