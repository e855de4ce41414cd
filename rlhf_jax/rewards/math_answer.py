r"""Whether two mathematical answers are the same, and where in a response the answer stands.

Flow: both texts are read (`math_text`) and compared by kind: sets and lists in any order, tuples and intervals with their brackets, equations up to a
factor, inequalities in either direction, matrices by entry. Expressions are equal when they agree at pseudo-random points of their variables, exactly
where all is rational and to ten digits else. What cannot be read is compared as text.
Deviation: the usual tooling asks a computer algebra system, which may run for ever on 9^{9^{9}} and evaluates what the model wrote. Here sizes are
bounded, and agreement at six points stands for identity: two different expressions pass only if they agree at all of them.

Not decided here: a bare `50` and `50\%` are both taken for either reading of a per cent, and `log` is natural.
"""

from __future__ import annotations

import cmath
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from rlhf_jax.rewards.math_text import LONGEST, Node, Unreadable, parse, spelled, without_thousands

Number = Fraction | complex
POINTS = 6
CLOSE = 1e-10  # relative, where something irrational takes part
BOXES = 8  # whose braces are looked through, from the end
LONG = 4 * LONGEST  # characters beyond which a text is compared as it stands
LARGEST_BITS = 20_000  # of an exact power
EXTRACTIONS = ("auto", "whole", "boxed", "tag", "hash", "last_number")
_NUMBER = r"[-+−]?(?:\$\s?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?\s?%?"


def extract(text: str, how: str) -> str | None:
    r"""The part of a response that is its answer, None where there is none.

    Args:
      text: the response.
      how: "whole" (the text, stripped), "boxed" (the last `\boxed{…}`), "tag" (the last `<answer>…</answer>`), "hash" (after the last
        `####`), "last_number", or "auto": the first of tag, boxed, hash, what follows "answer is" or "answer:", that is there, else a
        short text of one line whole, else the last number.
    """
    if how == "whole":
        return text.strip()
    if how == "boxed":
        return _boxed(text)
    if how == "tag":
        end = text.rfind("</answer>")
        begin = text.rfind("<answer>", 0, max(end, 0))
        return text[begin + len("<answer>") : end].strip() if begin >= 0 else None
    if how == "hash":
        return text.rpartition("####")[2].strip().split("\n")[0] if "####" in text else None
    if how == "last_number":
        digits = [match[0].strip() for match in re.finditer(_NUMBER, text) if any(c.isdigit() for c in match[0])]
        return digits[-1] if digits else None
    if how != "auto":
        raise ValueError(f"extract = {how!r}: must be one of {', '.join(EXTRACTIONS)}")
    for one in ("tag", "boxed", "hash"):
        if (found := extract(text, one)) is not None:
            inner = _boxed(found) if one == "tag" else None
            return inner if inner is not None else found
    if phrase := re.findall(r"answer\s{0,3}(?:is|:|=)[ \t]{0,3}:?[ \t]{0,3}([^\n]+)", text, flags=re.IGNORECASE):
        return re.split(r"\.(?:\s|$)", phrase[-1].strip())[0].strip().strip("*")
    return text.strip() if "\n" not in text.strip() and len(text) <= 60 else extract(text, "last_number")


def _boxed(text: str) -> str | None:
    """The content of the last whole \\boxed{…} or \\fbox{…}, braces balanced."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*", text))[-BOXES:]):
        if match.end() >= len(text) or text[match.end()] != "{":
            single = re.match(r"[^\s{}$]+", text[match.end() :])
            return single[0] if single else None
        depth = 0
        for at in range(match.end(), len(text)):
            escaped = text[at - 1] == "\\"
            depth += (text[at] == "{" and not escaped) - (text[at] == "}" and not escaped)
            if depth == 0:
                return text[match.end() + 1 : at].strip()
    return None


def as_number(text: str) -> Fraction | None:
    r"""The rational number that a text is, per cent as hundredths, None for anything else, a sum that is left to do included.

    Args:
      text: e.g. `1,234.5`, `-3/4`, `1 1/2`, `12%`, `$5`, `2e-3`, `\frac{1}{3}`.
    """
    value, finished = _worked_out(text)
    return value if isinstance(value, Fraction) and finished else None


def number_in(text: str) -> Fraction | None:
    """The number that a text is, else the last one that it holds: `18 dollars`, `9*2 = $18 every day`. None of a sum that is left to do.

    Args:
      text: of an answer.
    """
    value, finished = _worked_out(text)
    if value is None:
        last = extract(text, "last_number")
        return None if last is None else as_number(last)
    return value if isinstance(value, Fraction) and finished else None


def _worked_out(text: str) -> tuple[Number | None, bool]:
    """The value of a text without variables, and whether nothing of it is left to do; None where it has none."""
    plain = text.strip().replace("−", "-")
    if len(plain) > LONG:
        return None, False
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d{1,3}", plain):
        return Fraction(plain), True
    try:
        node = parse(without_thousands(spelled(plain)))
        return evaluate(node, {}), not _unfinished(node)
    except (Unreadable, ArithmeticError, ValueError, RecursionError):
        return None, False


def same(answer: str, reference: str, *, finished: bool = False) -> bool:
    """Whether two answers are the same.

    Args:
      answer, reference: LaTeX or plain text.
      finished: refuse an answer that leaves arithmetic to do which the reference has done: `7 + 5`, `2^{10}`, `24/2` where it says a number. Without
        it a model learns to answer with the question.
    """
    if max(len(answer), len(reference)) > LONG:
        return answer.strip() == reference.strip()
    a, b = spelled(answer), spelled(reference)
    if _as_text(a) == _as_text(b):
        return bool(_as_text(a))
    return any(_same_reading(x, y, finished) for x in _readings(a, "=" in b) for y in _readings(b, "=" in a))


def _unfinished(node: object) -> bool:
    """Whether a part without variables works out to a rational number and is not written as one. Powers of ten are a way of
    writing, and so is a fraction, unless it is a whole number."""
    if not isinstance(node, tuple) or not node:
        return False
    kind = node[0]
    ten = kind == "pow" and node[1] == ("num", Fraction(10))
    scaled = kind == "mul" and node[1][0] == "num" and node[2][0] == "pow" and node[2][1] == ("num", Fraction(10))
    if ten or scaled:
        return False
    if kind in ("add", "mul", "pow", "factorial", "binom", "root", "div", "call", "logbase") and not _variables(node):
        value = _value(node, {})
        if isinstance(value, Fraction) and (kind != "div" or value.denominator == 1):
            return True
    return any(_unfinished(child) for child in node)


def _as_text(text: str) -> str:
    return re.sub(r"[\s{}]+", "", text.replace("\\frac", "frac")).casefold()


def _readings(text: str, other_relates: bool) -> list[str]:
    """What a text may mean: with and without thousands separators and per cent; `x = 5` as 5 where the other answer is no equation; ± as both."""
    if "=" in text and not other_relates and not re.search("[<>≠]", text):
        text = text.rpartition("=")[2].strip()
    if "∈" in text:
        text = text.rpartition("∈")[2].strip()
    based = re.fullmatch(r"([0-9A-Fa-f]+)_\{?\s*(\d+)\s*\}?", text)
    if based:
        text = based[1]
    readings = [text]
    if without_thousands(text) != text:
        readings.append(without_thousands(text))
    if text.endswith("%"):
        readings += [reading.rstrip("% ") for reading in list(readings)]
    return [f"{r.replace('±', '+')}, {r.replace('±', '-')}" if "±" in r else r for r in readings]


def _same_reading(answer: str, reference: str, finished: bool) -> bool:
    try:
        a, b = parse(answer), parse(reference)
        return (not finished or not _unfinished(a) or _unfinished(b)) and _equal(a, b)
    except (Unreadable, ArithmeticError, ValueError, RecursionError):
        return False


def _equal(a: Node, b: Node) -> bool:
    kinds = {a[0], b[0]}
    if kinds <= {"list", "set"} and ("list" in kinds or a[0] == b[0]):
        return _any_order(a[1], b[1], distinct="set" in kinds)
    if a[0] == b[0] == "union":
        return _any_order(a[1], b[1], distinct=True)
    if a[0] == b[0] == "seq":
        return a[1:3] == b[1:3] and _in_order(a[3], b[3])
    if a[0] == b[0] == "matrix":
        return len(a[1]) == len(b[1]) and all(_in_order(x, y) for x, y in zip(a[1], b[1]))
    if a[0] == b[0] == "rel":
        return _same_relations(a, b)
    if kinds & {"list", "set", "union", "seq", "matrix", "rel"}:
        return False
    return _agree(a, b)


def _in_order(first: Sequence[Node], second: Sequence[Node]) -> bool:
    return len(first) == len(second) and all(_equal(x, y) for x, y in zip(first, second))


def _any_order(first: Sequence[Node], second: Sequence[Node], *, distinct: bool) -> bool:
    """Each item of one has its own in the other; `distinct` counts repeated items once."""
    if distinct:
        first, second = (_without_repeats(items) for items in (first, second))
    rest = list(second)
    for item in first:
        match = next((i for i, other in enumerate(rest) if _equal(item, other)), None)
        if match is None:
            return False
        rest.pop(match)
    return not rest


def _without_repeats(items: Sequence[Node]) -> list[Node]:
    kept: list[Node] = []
    for item in items:
        if not any(_equal(item, other) for other in kept):
            kept.append(item)
    return kept


def _same_relations(a: Node, b: Node) -> bool:
    """Chains of relations as sets of `difference operator 0`, with < and <= turned into > and >=."""

    def links(node: Node) -> list[tuple[str, Node]]:
        found = []
        for operator, left, right in zip(node[1], node[2], node[2][1:]):
            if operator in ("<", "<="):
                left, right, operator = right, left, operator.replace("<", ">")
            found.append((operator, ("add", left, ("neg", right))))
        return found

    first, rest = links(a), links(b)
    if len(first) != len(rest):
        return False
    for operator, difference in first:
        match = next((i for i, (o, d) in enumerate(rest) if o == operator and _proportional(difference, d, positive=o in (">", ">="))), None)
        if match is None:
            return False
        rest.pop(match)
    return True


def _proportional(a: Node, b: Node, *, positive: bool) -> bool:
    ratios: list[Number] = []
    for point in _points(a, b):
        x, y = _value(a, point), _value(b, point)
        if x is None or y is None or not x or not y:
            continue
        ratios.append(x / y if isinstance(x, Fraction) and isinstance(y, Fraction) else complex(x) / complex(y))
    if len(ratios) < 2 or (positive and complex(ratios[0]).real <= 0):
        return False
    return all(_close(ratio, ratios[0]) for ratio in ratios)


def _agree(a: Node, b: Node) -> bool:
    if not _variables(a) and not _variables(b):
        x, y = _value(a, {}), _value(b, {})
        return x is not None and y is not None and _close(x, y)
    compared = 0
    for point in _points(a, b):
        x, y = _value(a, point), _value(b, point)
        if (x is None) != (y is None):
            return False
        if x is not None and y is not None:
            if not _close(x, y):
                return False
            compared += 1
    return compared >= 2


def _variables(node: object) -> set[str]:
    if isinstance(node, tuple):
        if node and node[0] == "var":
            return {node[1]}
        return set().union(*map(_variables, node)) if node else set()
    return set()


def _points(a: Node, b: Node) -> list[dict[str, Fraction]]:
    """Rational values of the variables, of both signs, the same in every process."""
    names = sorted(_variables(a) | _variables(b))
    draw = lambda name, i: zlib.crc32(f"{name}:{i}".encode())  # noqa: E731
    return [
        {name: (-1) ** (i + n) * Fraction(draw(name, i) % 89 + 2, draw(name, -i - 1) % 13 + 7) for n, name in enumerate(names)}
        for i in range(POINTS)
    ]


def _value(node: Node, point: Mapping[str, Number]) -> Number | None:
    try:
        value = evaluate(node, point)
    except (ArithmeticError, ValueError):
        return None
    return None if isinstance(value, complex) and cmath.isnan(value) else value


def _close(x: Number, y: Number) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    first, second = complex(x), complex(y)
    if cmath.isinf(first) or cmath.isinf(second):
        return first == second
    return abs(first - second) <= CLOSE * max(abs(first), abs(second)) + 1e-13


def evaluate(node: Node, point: Mapping[str, Number]) -> Number:
    """The value of an expression, exact where it is rational.

    Args:
      node: from `parse`.
      point: the value of each variable.

    Raises:
      ArithmeticError, ValueError: it has none there, or one too large to be worth the time.
    """
    kind, *rest = node
    if kind == "num":
        return rest[0]
    if kind == "var":
        if rest[0] not in point:
            raise ValueError(f"{rest[0]} has no value")
        return point[rest[0]]
    if kind == "const":
        return {"pi": complex(math.pi), "e": complex(math.e), "i": 1j, "inf": complex(math.inf)}[rest[0]]
    if kind == "call":
        return _call(rest[0], evaluate(rest[1], point))
    if kind not in _OPERATIONS:
        raise ValueError(f"{kind} has no value")
    return _OPERATIONS[kind](*(evaluate(child, point) for child in rest))


def _both(exact: Callable[[Fraction, Fraction], Fraction], rough: Callable[[complex, complex], complex]) -> Callable[[Number, Number], Number]:
    def operate(x: Number, y: Number) -> Number:
        return exact(x, y) if isinstance(x, Fraction) and isinstance(y, Fraction) else rough(complex(x), complex(y))

    return operate


def _power(x: Number, y: Number) -> Number:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        if y.denominator == 1:
            bits = max(x.numerator.bit_length(), x.denominator.bit_length()) * abs(y.numerator)
            if bits > LARGEST_BITS and abs(x) != 1:
                raise OverflowError("the power is too large")
            return x**y.numerator
        if x >= 0 and y.denominator <= 64:
            return _power(_root(Fraction(y.denominator), x), Fraction(y.numerator))
    return complex(x) ** complex(y)


def _root(degree: Number, x: Number) -> Number:
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 <= degree <= 64:
        return _power(x, 1 / degree if isinstance(degree, Fraction) else 1 / complex(degree))
    n = degree.numerator
    if not isinstance(x, Fraction):
        return -_root(degree, -x) if n % 2 and x.imag == 0 and x.real < 0 else x ** (1 / n)
    if x < 0:
        if n % 2 == 0:
            inner = _root(degree, -x)
            return complex(inner) * cmath.exp(1j * math.pi / n) if n != 2 else complex(0, float(abs(complex(inner))))
        return -_root(degree, -x)
    top, bottom = _whole_root(x.numerator, n), _whole_root(x.denominator, n)
    if top is not None and bottom is not None:
        return Fraction(top, bottom)
    return complex(float(x) ** (1 / n))


def _whole_root(x: int, n: int) -> int | None:
    """The integer whose n-th power is x ≥ 0, if there is one."""
    low, high = 0, 1 << (x.bit_length() // n + 1)
    while low < high:
        middle = (low + high) // 2
        if middle**n < x:
            low = middle + 1
        else:
            high = middle
    return low if low**n == x else None


def _factorial(x: Number) -> Number:
    if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= 1000:
        raise ValueError("no factorial")
    return Fraction(math.factorial(x.numerator))


def _binomial(n: Number, k: Number) -> Number:
    if not (isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1 and 0 <= k <= n <= 1000):
        raise ValueError("no binomial coefficient")
    return Fraction(math.comb(n.numerator, k.numerator))


_OPERATIONS: dict[str, Callable[..., Number]] = {
    "add": _both(lambda x, y: x + y, lambda x, y: x + y),
    "mul": _both(lambda x, y: x * y, lambda x, y: x * y),
    "div": _both(lambda x, y: x / y, lambda x, y: x / y),
    "mixed": _both(lambda x, y: x + y, lambda x, y: x + y),
    "neg": lambda x: -x,
    "percent": lambda x: x / 100,
    "pow": _power,
    "root": _root,
    "factorial": _factorial,
    "binom": _binomial,
    "logbase": lambda b, x: cmath.log(complex(x)) / cmath.log(complex(b)),
}
_ANALYTIC: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh, "exp": cmath.exp,
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "asin": cmath.asin, "acos": cmath.acos, "atan": cmath.atan,
    "ln": cmath.log, "log": cmath.log, "lg": cmath.log10,
    "cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x),
}


def _call(name: str, x: Number) -> Number:
    if name == "abs":
        return abs(x) if isinstance(x, Fraction) else complex(abs(x))
    if name in ("floor", "ceil"):
        real = x if isinstance(x, Fraction) else Fraction(x.real)
        return Fraction(math.floor(real) if name == "floor" else math.ceil(real))
    return _ANALYTIC[name](complex(x))
