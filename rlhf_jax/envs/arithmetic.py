"""Exact arithmetic on text: a small parser over fractions, no `eval`.

    sum → product (± product)*     product → signed (× or ÷ signed)*     signed → ± signed | power     power → atom (^ signed)?

Every size is bounded (text, nesting, digits of a number, bits of every intermediate result), and with them the time: a few milliseconds at worst, so
that no clock, which would not be reproducible, has to decide what an expression is worth.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 256  # characters of an expression
DEEPEST = 32  # brackets and signs within each other
DIGITS = 64  # of a number as it is written
BITS = 2048  # of numerator and denominator of every intermediate result
SHOWN = 64  # characters of a result
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(\*\*|[-+*/^()]))")
_SIGNS = str.maketrans("×·÷−", "**/-")


class Refused(ValueError):
    """Why there is no result, a sentence without its end."""


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of numbers, + - * / ^ (also **) and brackets.

    Args:
      expression: any text.

    Raises:
      Refused: no expression, too large, a division by zero, or a power that is no fraction.
    """
    if len(expression) > LONGEST:
        raise Refused(f"an expression has at most {LONGEST} characters")
    parser = _Parser(_tokens(expression.translate(_SIGNS)))
    value = parser.sum(0)
    if parser.next is not None:
        raise Refused(f"{parser.next!r} is not expected there")
    return value


def show(value: Fraction) -> str:
    """A value as it is read: a whole number, a decimal where it ends, else `numerator/denominator`.

    Args:
      value: exact.

    Raises:
      Refused: longer than SHOWN characters.
    """
    places, rest = 0, value.denominator
    for factor in (2, 5):
        count = 0
        while rest % factor == 0:
            rest, count = rest // factor, count + 1
        places = max(places, count)
    if rest == 1 and places:
        digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
        text = f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    else:
        text = str(value)
    if len(text) > SHOWN:
        raise Refused(f"the result has more than {SHOWN} characters")
    return text


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise Refused(f"{text[at:].lstrip()[0]!r} is no part of an expression")
        number, sign = match.groups()
        if number and len(number) > DIGITS:
            raise Refused(f"a number has at most {DIGITS} digits")
        found.append(number or sign)
        at = match.end()
    return found


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise Refused("the numbers become too large")
    return value


class _Parser:
    """Recursive descent over tokens; every method takes how deep it stands."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at = tokens, 0

    @property
    def next(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self) -> str:
        token = self.next
        if token is None:
            raise Refused("the expression breaks off")
        self._at += 1
        return token

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self.next in ("+", "-"):
            sign, other = self._take(), self._product(depth)
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._signed(depth)
        while self.next in ("*", "/"):
            sign, other = self._take(), self._signed(depth)
            if sign == "/" and not other:
                raise Refused("division by zero")
            value = _bounded(value * other if sign == "*" else value / other)
        return value

    def _signed(self, depth: int) -> Fraction:
        if depth > DEEPEST:
            raise Refused(f"brackets and signs go at most {DEEPEST} deep")
        if self.next in ("+", "-"):
            sign = self._take()
            value = self._signed(depth + 1)
            return -value if sign == "-" else value
        return self._power(depth)

    def _power(self, depth: int) -> Fraction:
        base = self._atom(depth)
        if self.next not in ("^", "**"):
            return base
        self._take()
        exponent = self._signed(depth + 1)
        if exponent.denominator != 1:
            raise Refused("an exponent must be a whole number")
        if not base and exponent < 0:
            raise Refused("division by zero")
        if abs(base) in (0, 1):  # whatever the exponent's size
            return base if exponent % 2 else abs(base) if exponent else Fraction(1)
        size = max(base.numerator.bit_length(), base.denominator.bit_length())  # at least 2
        if (size - 1) * abs(exponent.numerator) > BITS:
            raise Refused("the numbers become too large")
        return _bounded(base**exponent.numerator)

    def _atom(self, depth: int) -> Fraction:
        token = self._take()
        if token == "(":
            value = self.sum(depth + 1)
            if self._take() != ")":
                raise Refused("a bracket is not closed")
            return value
        if token[0].isdigit() or token[0] == ".":
            return Fraction(token)
        raise Refused(f"{token!r} is not expected there")
