"""The calculator against Python's own evaluation, and what it must refuse."""

import ast
import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine.calculator import MAX_CHARS, MAX_DEPTH, MAX_DIGITS, MAX_LENGTH, calculate
from tests.attacks import FALSE_SUMS

LETTERS = "abrüЖ字 .,-'\""
ints = st.one_of(st.integers(0, 30), st.integers(0, 10**12)).map(str)
floats = st.one_of(
    st.floats(0, 1e20, allow_nan=False).map(repr),
    st.builds("{}.{}".format, st.integers(0, 999), st.integers(0, 99)),
    st.builds("{}{}{}".format, st.sampled_from(["5.", ".5", "1_0", "1_0.2_5", "0.5", "00"]), st.just("e"), ints),
    st.sampled_from(["1_000", "5.", ".25", "00", "0_0", "01.5", "1e3", "2.5E-3"]),
)
strings = st.text(LETTERS, max_size=8).map(lambda text: repr(text) if "\\" not in repr(text) else "''")


def arithmetic(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions made of smaller ones; operators and spaces as they come."""
    spaces = st.sampled_from(["", " ", "  "])
    operators = st.sampled_from("+ - * / // %".split())
    return st.one_of(
        st.builds("".join, st.tuples(inner, spaces, operators, spaces, inner)),
        st.builds("({})".format, inner),
        st.builds("{}{}".format, st.sampled_from(["-", "+", "- -", "--"]), inner),
    )


def string_operations(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    index = st.one_of(st.integers(-9, 9).map(str), st.just(""))
    return st.one_of(
        st.builds("{}.{}({})".format, inner, st.sampled_from(["count", "find", "index", "join"]), inner),
        st.builds("{}.replace({}, {})".format, inner, inner, inner),
        st.builds("{}.{}()".format, inner, st.sampled_from(["upper", "lower", "capitalize", "title", "strip"])),
        st.builds("len({})".format, inner),
        st.builds("{}[{}:{}]".format, inner, index, index),
        st.builds("{}[{}:{}:{}]".format, inner, index, index, index),
        st.builds("{}[{}]".format, inner, index),
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "*"]), st.one_of(inner, ints)),
        st.builds("({})".format, inner),
    )


def by_python(expression: str) -> object:
    """What Python makes of `expression`: a value, or the exception it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return eval(expression, {"__builtins__": {"len": len}})
        except Exception as error:
            return error


def beyond_limits(value: object) -> bool:
    if isinstance(value, (int, float)):
        return not math.isfinite(value) if isinstance(value, float) else abs(value) >= 10**MAX_DIGITS
    return isinstance(value, (complex, Exception)) or (isinstance(value, str) and len(value) > MAX_CHARS)


def may_be_refused(expression: str) -> bool:
    """Whether a part of `expression` has no value in Python, or one beyond the calculator's limits."""
    try:
        nodes = [node for node in ast.walk(ast.parse(expression.strip(), mode="eval")) if isinstance(node, ast.expr)]
    except SyntaxError:
        return True
    parts = [ast.get_source_segment(expression.strip(), node) for node in nodes if not isinstance(node, ast.Slice)]
    return any(beyond_limits(by_python(part)) for part in parts)


def assert_agrees(expression: str) -> None:
    result = calculate(expression)
    if result is None:
        assert may_be_refused(expression), expression
    else:
        assert result == str(by_python(expression)), expression


@given(st.recursive(ints | floats, arithmetic, max_leaves=8) | st.recursive(strings, string_operations, max_leaves=6))
@settings(max_examples=600, deadline=None)
def test_arithmetic_and_string_operations_agree_with_python(expression):
    assert_agrees(expression)


@given(st.integers(-12, 12), st.integers(-40, 40), st.sampled_from([".5", "2.0", "1e2", "0"]))
@settings(max_examples=200, deadline=None)
def test_powers_agree_with_python(a, b, c):
    powers = f"{a}**{b} ({a})**{b} ({a})**{c} -{c}**{b} {c}**-{c}**{b % 3} 2**{b % 4}**2"
    for expression in powers.split():
        assert_agrees(expression)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_a_string_or_none(text):
    result = calculate(text)
    assert result is None or isinstance(result, str)


@given(st.text("0123456789.,_eE+-*/%()[]:'\"abclenout ", max_size=40).filter(lambda text: "**" not in text))
@settings(max_examples=500, deadline=None)
def test_what_is_accepted_is_what_python_accepts(text):
    result = calculate(text)
    if result is not None and "," not in text:
        assert result == str(by_python(text.strip()))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("7/2", "3.5"), ("6/2", "3.0"), ("7//2", "3"), ("-7//2", "-4"), ("-7%3", "2"), ("2+3*4", "14"),
        ("(2+3)*4", "20"), ("-2**2", "-4"), ("2**-1", "0.5"), ("2**3**2", "512"), ("0.1+0.2", "0.30000000000000004"),
        ("1,000+1", "1001"), ("1,234,567.5*2", "2469135.0"), ("(1,000)*2,000", "2000000"), (" 1 + 1 ", "2"),
        ("'strawberry'.count('r')", "3"), ('"strawberry".count("r")', "3"), ("'strawberry'.find('w')", "4"),
        ("'hello'.upper()", "HELLO"), ("'hello'[::-1]", "olleh"), ("'hello'[1]", "e"), ("'hello'[1:3]+'!'*3", "el!!!"),
        ("len('hello')*2", "10"), ("'-'.join('abc')", "a-b-c"), ("'a'.upper().count('A') + 1", "2"),
    ],
)  # fmt: skip
def test_examples(expression, expected):
    assert calculate(expression) == expected


@pytest.mark.parametrize(
    "expression",
    [
        " ", "()", "1+", "1 2", "1%0", "0**-1", "1e308*10", "True", "None", "1==1", "1 if 1 else 2", "1,00", "1,0000",
        "1,000,00", "0,123", "12,34", "1,2", "1__0", "1_", "_1", "007", "0x10", "1j", "5.upper()", "'a'.__class__",
        "''.__class__.__base__.__subclasses__()", "().__class__", "print(1)", "'a'.format('b')",
        "'a'.zfill(10)", "'a'.center(10)", "'a'-'b'", "'a'*1.5", "-'a'", "'a'[5]", "'a'[1.0]", "'a'[::0]", "'a'['b']",
        "'a' 'b'", "'a\n'", "1\n+1", "1#comment", "[1]", "{1}", "r'a'", "b'a'", "'''a'''", "'a", "1;1", "~1", "1@1",
        "1&1", "not 1", "len(1)", "len", "len()", "'a'.count", "'a'.count()", "'a'.count(1)", "'a'.count('a','b')",
        "'a'.index('b')", "²", "2²", "٣", "2×3", "6÷2", "2−1", "1\u00a0+1", "1\u200b", "'\x00'", None, 7, b"1+1",
    ],
)  # fmt: skip
def test_everything_else_is_refused(expression):
    assert calculate(expression) is None


TOO_LARGE = [
    "10**100", "2**10**10", "9**99*9**99*9**99", "1.5**99999", "'a'*1000000000", "10**90*'a'", "''*10**90",
    "'ab'.join('" + "c" * 300 + "')", "'" + "a" * 300 + "'", "'" + "a" * 250 + "'.replace('a', 'aa')", "(" * 100_000,
    "[" * 500, "'a'" + "[0" * 100 + "]" * 100, "**".join(["1"] * 100), "-" * 10_000 + "1", "9" * (MAX_LENGTH + 1),
    "9" * (MAX_DIGITS + 1), "1+" * 100_000 + "1",
]  # fmt: skip


@pytest.mark.parametrize("expression", [*FALSE_SUMS.values(), *TOO_LARGE])
def test_attacks_and_what_is_too_large_are_refused_at_once(expression):
    start = time.perf_counter()
    assert calculate(expression) is None
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize(
    "expression",
    [
        "(" * (MAX_DEPTH - 1) + "1" + ")" * (MAX_DEPTH - 1), "-" * (MAX_LENGTH - 1) + "1",
        "1+" * (MAX_LENGTH // 2 - 1) + "1", "7**99*7", "9" * MAX_DIGITS, "1**" * 10 + "1", "(-1)**" + "9" * 90,
        "2**-" + "9" * 90, "'a'" + ".upper()" * 60, "'" + "a" * 250 + "'.replace('a', '').join('b')",
    ],
)  # fmt: skip
def test_what_is_just_within_the_limits_is_computed(expression):
    assert calculate(expression) == str(by_python(expression))


def test_many_threads_get_the_same_answers():
    expressions = [f"{i}*{i}+'{'r' * (i % 9)}'.count('r')" for i in range(400)]
    expected = [calculate(expression) for expression in expressions]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(calculate, expressions)) == expected


def test_a_caller_near_the_recursion_limit_gets_none_or_the_answer():
    def deeper(levels: int) -> str | None:
        return calculate("((((1+1))))") if levels == 0 else deeper(levels - 1)

    for levels in range(500, 960, 5):
        try:
            result = deeper(levels)
        except RecursionError:  # of `deeper` itself
            break
        assert result in ("2", None)
