"""Exact arithmetic: values, refusals, and the bounds that keep any text cheap."""

from __future__ import annotations

import contextlib
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.envs.arithmetic import BITS, DEEPEST, LONGEST, SHOWN, Refused, evaluate, show


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("34*8", 272), (" 1 + 2 * 3 ", 7), ("(1+2)*3", 9), ("10-4-3", 3), ("2/4", Fraction(1, 2)), ("0.1+0.2", Fraction(3, 10)), ("2^3^2", 512),
        ("2**10", 1024), ("-2^2", -4), ("(-2)^2", 4), ("2^-2", Fraction(1, 4)), ("--3", 3), ("3×4÷6−1", 1), (".5*2", 1), ("5.", 5), ("0^0", 1),
        ("(-1)^99999999999999999999", -1), ("1^99999999999999999999", 1), ("0^7", 0), ("((7))", 7),
    ],
)
def test_values(text: str, value: Fraction | int) -> None:
    assert evaluate(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "breaks off"), ("1+", "breaks off"), ("(1", "breaks off"), ("(1 2)", "not closed"), ("1 2", "'2'"), ("*3", "'*'"), ("1)", "')'"),
        ("1/0", "zero"), ("0^-1", "zero"), ("2^0.5", "whole"), ("x+1", "'x'"), ("__import__('os')", "'_'"), ("1e5", "'e'"), ("٣+1", "'٣'"),
        ("1," + "0", "','"), ("9^9^9", "too large"), ("2^99999999999999999999", "too large"), ("1" * 65, "digits"), ("1+" * 200 + "1", "characters"),
        ("(" * 60 + "1" + ")" * 60, "deep"), ("-" * 60 + "1", "deep"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    with pytest.raises(Refused) as caught:
        evaluate(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [(Fraction(272), "272"), (Fraction(-1, 4), "-0.25"), (Fraction(1, 3), "1/3"), (Fraction(-7, 6), "-7/6"), (Fraction(12345, 1000), "12.345"),
     (Fraction(1, 100), "0.01"), (Fraction(0), "0")],
)
def test_shown(value: Fraction, text: str) -> None:
    assert show(value) == text and evaluate(text) == value


def test_a_long_result_is_refused() -> None:
    assert len(show(evaluate("9^60"))) <= SHOWN
    with pytest.raises(Refused, match="characters"):
        show(evaluate("9^99"))


EXPRESSIONS = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join) | inner.map("({})".format) | inner.map("-{}".format), max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS)
def test_against_pythons_own_fractions(text: str) -> None:
    """Python's parser on the same text, every number a Fraction."""
    spelled = "".join(f"F({part})" if part.isdigit() else part for part in _parts(text))
    try:
        expected = eval(spelled, {"F": Fraction})
    except ZeroDivisionError:
        with pytest.raises(Refused, match="zero"):
            evaluate(text)
        return
    if len(text) <= LONGEST:
        assert evaluate(text) == expected


def _parts(text: str) -> list[str]:
    parts: list[str] = []
    for character in text:
        if character.isdigit() and parts and parts[-1].isdigit():
            parts[-1] += character
        else:
            parts.append(character)
    return parts


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("0123456789+-*/^(). "))
def test_any_text_has_a_bounded_value_or_is_refused(text: str) -> None:
    try:
        value = evaluate(text)
    except Refused:
        return
    assert max(value.numerator.bit_length(), value.denominator.bit_length()) <= BITS


@pytest.mark.parametrize(
    "text",
    ["9^9^9^9", "7" * 64 + ("*" + "7" * 62) * 3, "+".join(f"1/{n}" for n in range(101, 150)), "99^300/98^300*97^300", "2^2^2^2^2^2^2^2^2",
     "(" * DEEPEST + "1" + ")" * DEEPEST + "^999" * 40],
)
def test_the_worst_is_quick(text: str) -> None:
    begin = time.perf_counter()
    with contextlib.suppress(Refused):
        show(evaluate(text[:LONGEST]))
    assert time.perf_counter() - begin < 1.0  # milliseconds, on a machine that does nothing else
