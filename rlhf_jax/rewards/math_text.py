r"""Answers in LaTeX or plain notation, read into expressions.

Flow: spellings of the same thing are made one (`\dfrac`, `\left(`, `\text{ cm}`, `−`), the text is cut into tokens, and a recursive descent makes a
tree of tuples whose first entry names its kind. Numbers are exact fractions. Nothing is ever evaluated as Python, and every text is read in bounded
time. Deviation from a computer algebra system: this is a reader for answers, a line long; what it does not understand is left to a comparison of
texts.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

Node = tuple[Any, ...]

LONGEST = 500  # characters; a longer text is no answer
DEEPEST = 40  # nested brackets
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "ln", "log",
    "lg", "exp", "abs", "sqrt", "floor", "ceil",
}
_SPELLINGS = (  # in this order
    (r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|textstyle|limits|middle)(?![a-zA-Z])", ""),
    (r"(?<!\\)\\[,;:!> ]|\\q?quad|~|\u00a0|\{,\}(?=\d{3})", ""),
    (r"\\text(?:bf|it|rm)?\{\s*(?:and|or)\s*\}|\b(?:and|or)\b", ","),
    (r"\^\{?\s*(?:\\circ|°)\s*\}?|\\degree|°", ""),
    (r"\\\$|\\pounds|[$€£]", ""),
    (r"\\%", "%"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\(?:cdot|times|ast)(?![a-zA-Z])|[×·⋅∗]", "*"),
    (r"\\div(?![a-zA-Z])|÷", "/"),
    ("[−–]", "-"),
    (r"\\(?:leqslant|leq|le)(?![a-zA-Z])|≤", "<="),
    (r"\\(?:geqslant|geq|ge)(?![a-zA-Z])|≥", ">="),
    (r"\\(?:neq|ne)(?![a-zA-Z])|≠", "≠"),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\infty|\binfinity\b|\binf\b", "∞"),
    (r"\\pi(?![a-zA-Z])|\bpi\b", "π"),
    (r"\\cup(?![a-zA-Z])", "∪"),
    (r"\\in(?![a-zA-Z])", "∈"),
    (r"\\(?:emptyset|varnothing)(?![a-zA-Z])|∅", "⦃⦄"),
    (r"\\(?:pm|mp)(?![a-zA-Z])|\+/?-(?=[\d\\√])", "±"),
    (r"\\(?:lfloor|rfloor|lceil|rceil)", lambda m: {"lf": "⌊", "rf": "⌋", "lc": "⌈", "rc": "⌉"}[m[0][1:3]]),
    (r"\\[lr]?vert|\\\|", "|"),
    (r"\\\{|\\lbrace", "⦃"),
    (r"\\\}|\\rbrace", "⦄"),
    (r"\\begin\{(?:[pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?", "⟦"),
    (r"\\end\{(?:[pbvBV]?matrix|array)\}", "⟧"),
    (r"\\operatorname\*?\{([a-zA-Z]+)\}", r"\\\1"),
)
_UNIT = re.compile(r"(?<=[\d})%π])\s*\\(?:text|mathrm|mbox|textrm)\{[^{}]*\}(?:\^\{?-?\d\}?)?\s*$")
_WORDS = re.compile(r"\\(?:text|mathrm|mathbf|mathit|mbox|textbf|textrm|textit|mathbb)\{([^{}]*)\}")
_TOKEN = re.compile(r"\s*(\d+\.\d*|\.\d+|\d+|\\[a-zA-Z]+|[a-zA-Z]+|<=|>=|\\\\|\S)")


class Unreadable(ValueError):
    """The text is no expression that this module understands."""


def spelled(text: str) -> str:
    """`text` with one spelling for each thing, delimiters, units and a final full stop removed."""
    text = text.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            text = text[len(opening) : len(text) - len(closing)].strip()
    for pattern, plain in _SPELLINGS:
        text = re.sub(pattern, plain, text)
    text = _UNIT.sub("", text)
    text = _WORDS.sub(r" \1 ", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".,;").strip()


def without_thousands(text: str) -> str:
    """1,234,567 → 1234567, where it stands in no brackets."""
    out, depth, at = [], 0, 0
    for match in re.finditer(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|[(\[{⦃]|[)\]}⦄]", text):
        if match[0] in "([{⦃":
            depth += 1
        elif match[0] in ")]}⦄":
            depth -= 1
        elif depth == 0:
            out += [text[at : match.start()], match[0].replace(",", "")]
            at = match.end()
    return "".join([*out, text[at:]])


def parse(text: str) -> Node:
    """The tree of a spelled text.

    Kinds: ("num", Fraction), ("var", name), ("const", "pi" | "e" | "i" | "inf"), ("add" | "mul" | "div" | "pow" | "mixed", a, b),
    ("neg" | "percent" | "factorial", a), ("call", name, a), ("root", n, a), ("logbase", b, a), ("binom", n, k),
    ("seq", opening, closing, items), ("set" | "union" | "list", items), ("matrix", rows), ("rel", operators, sides).

    Args:
      text: from `spelled`.

    Raises:
      Unreadable: it is no expression.
    """
    if not text or len(text) > LONGEST:
        raise Unreadable(text[:50])
    reader = _Reader(_TOKEN.findall(text), text)
    items = reader.items(("",))
    return items[0] if len(items) == 1 else ("list", tuple(items))


class _Reader:
    """Recursive descent over tokens; `peek` is "" at the end."""

    def __init__(self, tokens: list[str], text: str) -> None:
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0
        self.product_of_letters = re.search(r"[\d+*/^=<>_\\-]", text) is not None

    @property
    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek
        if not token or (expected and token != expected):
            raise Unreadable(f"expected {expected or 'more'}, found {token!r}")
        self.at += 1
        return token

    def items(self, closings: tuple[str, ...]) -> list[Node]:
        """Relations separated by commas up to a closing, which is not taken."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("nested too deeply")
        found = []
        if self.peek not in closings or self.peek == "":
            found.append(self.relation())
            while self.peek in (",", ";"):
                self.take()
                found.append(self.relation())
        if self.peek not in closings:
            raise Unreadable(f"unexpected {self.peek!r}")
        self.depth -= 1
        return found

    def relation(self) -> Node:
        sides, operators = [self.union()], []
        while self.peek in ("=", "<", ">", "<=", ">=", "≠", "∈"):
            operators.append(self.take())
            sides.append(self.union())
        return ("rel", tuple(operators), tuple(sides)) if operators else sides[0]

    def union(self) -> Node:
        parts = [self.sum()]
        while self.peek == "∪":
            self.take()
            parts.append(self.sum())
        return ("union", tuple(parts)) if len(parts) > 1 else parts[0]

    def sum(self) -> Node:
        node = self.product()
        while self.peek in ("+", "-"):
            operator, right = self.take(), self.product()
            node = ("add", node, right if operator == "+" else ("neg", right))
        return node

    def product(self) -> Node:
        if self.peek in ("-", "+"):
            sign = self.take()
            node = self.product()
            return ("neg", node) if sign == "-" else node
        node = self.power()
        while True:
            if self.peek in ("*", "/"):
                operator = self.take()
                right = self.signed_power()
                node = ("mul" if operator == "*" else "div", node, right)
            elif self._begins_factor():
                before, mixed = node, self.peek == "\\frac" or (self.peek.isdigit() and node[0] == "num")
                node = self._juxtaposed(before, mixed)
            else:
                return node

    def signed_power(self) -> Node:
        if self.peek == "-":
            self.take()
            return ("neg", self.signed_power())
        return self.power()

    def _juxtaposed(self, before: Node, mixed: bool) -> Node:
        """A product without a sign; a whole number before a fraction of numbers is a mixed number: 2 1/2, 2\\frac{1}{2}."""
        if not mixed:
            return ("mul", before, self.power())
        whole = before[0] == "num" and before[1].denominator == 1
        if self.peek.isdigit():
            top = self.take()
            if not whole or self.peek != "/" or not (self.at + 1 < len(self.tokens) and self.tokens[self.at + 1].isdigit()):
                raise Unreadable("two numbers side by side")
            self.take()
            bottom = self.take()
            return ("mixed", before, ("div", ("num", Fraction(top)), ("num", Fraction(bottom))))
        part = self.power()
        plain = part[0] == "div" and part[1][0] == part[2][0] == "num"
        return ("mixed", before, part) if whole and plain else ("mul", before, part)

    def _begins_factor(self) -> bool:
        token = self.peek
        if token == "|":
            return self.bars == 0
        return bool(token) and (token[0].isalnum() or (token[0] == "\\" and token != "\\\\") or token in ("(", "{", "π", "∞", "√", "⌊", "⌈"))

    def power(self) -> Node:
        base = self.postfix()
        if self.peek in ("^", "**"):
            self.take()
            exponent = self.argument() if self.peek in ("{", "\\") else self.signed_power()
            return ("pow", base, exponent)
        if self.peek == "*" and self.at + 1 < len(self.tokens) and self.tokens[self.at + 1] == "*":
            self.at += 2
            return ("pow", base, self.signed_power())
        return base

    def postfix(self) -> Node:
        node = self.primary()
        while self.peek in ("!", "%"):
            node = ("factorial", node) if self.take() == "!" else ("percent", node)
        return node

    def primary(self) -> Node:
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return ("num", Fraction(token + "0" if token.endswith(".") else token))
        if token in ("(", "["):
            return self.bracketed(token)
        if token in ("{", "⦃"):
            items = self.items(("}",) if token == "{" else ("⦄",))
            self.take()
            if token == "{" and len(items) == 1:
                return items[0]
            return ("set", tuple(items))
        if token == "⟦":
            return self.matrix()
        if token in ("|", "⌊", "⌈"):
            return self.between(token)
        if token in ("π", "∞"):
            return ("const", "pi" if token == "π" else "inf")
        if token == "√":
            return ("root", ("num", Fraction(2)), self.argument())
        if token[0] == "\\" and len(token) > 1 and token[1].isalpha():
            return self.command(token[1:])
        if token.isalpha() and token.isascii():
            return self.letters(token)
        raise Unreadable(f"unexpected {token!r}")

    def bracketed(self, opening: str) -> Node:
        items = self.items((")", "]"))
        closing = self.take()
        if opening == "(" and closing == ")" and len(items) == 1:
            return items[0]
        return ("seq", opening, closing, tuple(items))

    def between(self, opening: str) -> Node:
        name, closing = {"|": ("abs", "|"), "⌊": ("floor", "⌋"), "⌈": ("ceil", "⌉")}[opening]
        self.bars += opening == "|"
        (inner,) = self.items((closing,)) or [("num", Fraction(0))]
        self.take()
        self.bars -= opening == "|"
        return ("call", name, inner)

    def matrix(self) -> Node:
        rows: list[tuple[Node, ...]] = []
        row = [self.sum()]
        while True:
            token = self.take()
            if token == "&":
                row.append(self.sum())
                continue
            rows.append(tuple(row))
            if token == "⟧":
                return ("matrix", tuple(rows))
            if token != "\\\\":
                raise Unreadable(f"unexpected {token!r} in a matrix")
            if self.peek == "⟧":
                self.take()
                return ("matrix", tuple(rows))
            row = [self.sum()]

    def argument(self) -> Node:
        """What a command takes: a group, or one token, of a number one digit."""
        if self.peek == "{" or not self.peek.isdigit() or len(self.peek) == 1:
            if self.peek == "-":
                return self.signed_power()
            return self.primary()
        digits = self.peek
        self.tokens[self.at] = digits[1:]
        return ("num", Fraction(digits[0]))

    def command(self, name: str) -> Node:
        if name == "frac":
            return ("div", self.argument(), self.argument())
        if name == "binom":
            return ("binom", self.argument(), self.argument())
        if name == "sqrt":
            degree: Node = ("num", Fraction(2))
            if self.peek == "[":
                self.take()
                degree = self.sum()
                self.take("]")
            return ("root", degree, self.argument())
        if name in FUNCTIONS:
            return self.function(name)
        return self.subscripted(name)

    def function(self, name: str) -> Node:
        base: Node | None = None
        power: Node | None = None
        if self.peek == "_":
            self.take()
            base = self.argument()
        if self.peek == "^":
            self.take()
            power = self.argument()
        inner = self.argument() if self.peek in ("(", "{") else self._open_argument()
        node: Node = ("root", ("num", Fraction(2)), inner) if name == "sqrt" else ("call", name, inner)
        if base is not None:
            node = ("logbase", base, inner)
        return node if power is None else ("pow", node, power)

    def _open_argument(self) -> Node:
        """sin 2x: factors up to the next sign."""
        if self.peek == "-":
            self.take()
            return ("neg", self._open_argument())
        node = self.power()
        while self._begins_factor() and self.peek.lstrip("\\") not in FUNCTIONS:
            node = ("mul", node, self.power())
        return node

    def letters(self, run: str) -> Node:
        if run in FUNCTIONS:
            return self.function(run)
        if len(run) == 1:
            return self.subscripted(run)
        if len(run) > 3 or not self.product_of_letters:
            raise Unreadable(f"{run!r} is a word")
        self.at -= 1
        self.tokens[self.at : self.at + 1] = list(run)
        return self.primary()

    def subscripted(self, name: str) -> Node:
        if self.peek == "_":
            self.take()
            if self.peek != "{":
                return ("var", f"{name}_{self.take()}")
            self.take()
            inner = ""
            while self.peek != "}":
                inner += self.take()
            self.take()
            return ("var", f"{name}_{inner}")
        return ("const", name) if name in ("e", "i") else ("var", name)
