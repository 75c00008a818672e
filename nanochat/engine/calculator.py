"""The calculator a chat model may call: a small grammar, parsed and evaluated here, without `eval`.

    numbers     7  2.5  .5  1e3  1_000  and, beyond Python, 1,000 with groups of exactly three digits
    strings     'word' or "word", printable, without backslashes
    operators   + - * / // % ** and both signs on numbers; + and * (repetition) on strings; parentheses
    strings do  s.count(t)  s.find(t)  s.index(t)  s.replace(t, u)  s.join(t)  s.upper()  s.lower()
                s.capitalize()  s.title()  s.strip()  len(s)  s[i]  s[i:j:k]

Values and their text are Python's for the same expression. Everything else is refused: names, comparisons, attributes,
calls of anything but the above, string formatting by %, complex and non-finite numbers, what exceeds the limits below.

It cannot run for long: an expression has at most `MAX_LENGTH` characters, so at most that many operations, and the size
of a result is bounded before it is computed. No shared state, no signal, no thread: any thread may call it.
"""

import math
import operator
import re
from collections.abc import Callable

MAX_LENGTH = 512  # characters of an expression
MAX_DEPTH = 24  # of parentheses, brackets and chained powers: the parser's recursion
MAX_DIGITS = 100  # of an int
MAX_CHARS = 256  # of a string, results included: they end up in the model's context

Value = int | float | str

_DIGITS = r"[0-9](?:_?[0-9])*"
_POINT = rf"(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})"
_EXPONENT = rf"[eE][+-]?{_DIGITS}"
_END = r"(?![\w.])"  # what follows a number must not go on with it: 1.2.3, 5x, 007
_TOKEN = re.compile(
    rf"""\ *(?:
    (?P<grouped>[1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+(?:\.[0-9]*)?(?!,){_END})
    | (?P<float>(?:{_POINT}(?:{_EXPONENT})?|{_DIGITS}{_EXPONENT}){_END})
    | (?P<int>(?:0(?:_?0)*|[1-9](?:_?[0-9])*){_END})
    | (?P<string>'[^'\\]*'|"[^"\\]*")
    | (?P<name>[a-z]+)
    | (?P<symbol>\*\*|//|[-+*/%(),.:\[\]])
    )""",
    re.VERBOSE,
)
_BINARY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
_METHODS = {  # name: number of string arguments
    "count": 1,
    "find": 1,
    "index": 1,
    "replace": 2,
    "join": 1,
    "upper": 0,
    "lower": 0,
    "capitalize": 0,
    "title": 0,
    "strip": 0,
}


def calculate(expression: str) -> str | None:
    """The value of `expression` as Python would print it, or None where it is refused or has no value (1/0).

    Never raises. See the module's docstring for the grammar and the limits.
    """
    try:
        return str(_Parser(_tokenize(expression)).parse())
    except (_Refused, ArithmeticError, ValueError, RecursionError):  # RecursionError: the caller was deep already
        return None


class _Refused(Exception):
    """The expression is outside the grammar or the limits."""


def _tokenize(expression: str) -> list[tuple[str, str]]:
    """(kind, text) of each token, then ("end", "")."""
    if not isinstance(expression, str) or len(expression) > MAX_LENGTH or not expression.isprintable():
        raise _Refused("not a short line of printable text")
    tokens, position, end = [], 0, len(expression.rstrip())
    while position < end:
        match = _TOKEN.match(expression, position, end)
        if match is None:
            raise _Refused(f"no token at {position}")
        tokens.append((match.lastgroup, match[match.lastgroup]))
        position = match.end()
    return [*tokens, ("end", "")]


class _Parser:
    """Recursive descent, one method per level of precedence, each returning the value of what it read."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def parse(self) -> Value:
        value = self.sum()
        if self.tokens[self.position][0] != "end":
            raise _Refused("text after the expression")
        return value

    def take(self, *symbols: str) -> str:
        """The next token if it is one of `symbols`, else ""."""
        kind, text = self.tokens[self.position]
        if kind != "symbol" or text not in symbols:
            return ""
        self.position += 1
        return text

    def expect(self, symbol: str) -> None:
        if not self.take(symbol):
            raise _Refused(f"{symbol} expected")

    def nested(self, rule: Callable[[], Value]) -> Value:
        """The value of `rule()`, one level deeper."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Refused("nested too deeply")
        value = rule()
        self.depth -= 1
        return value

    def sum(self) -> Value:
        value = self.product()
        while symbol := self.take("+", "-"):
            value = _apply(symbol, value, self.product())
        return value

    def product(self) -> Value:
        value = self.signed()
        while symbol := self.take("*", "/", "//", "%"):
            value = _apply(symbol, value, self.signed())
        return value

    def signed(self) -> Value:
        negative = signed = False
        while symbol := self.take("+", "-"):
            negative ^= symbol == "-"
            signed = True
        value = self.power()
        if signed and isinstance(value, str):
            raise _Refused("a sign before a string")
        return -value if negative else value

    def power(self) -> Value:
        base = self.postfix()
        return _apply("**", base, self.nested(self.signed)) if self.take("**") else base  # binds tighter on its left

    def postfix(self) -> Value:
        value = self.atom()
        while symbol := self.take(".", "["):
            if not isinstance(value, str):
                raise _Refused("only strings have methods and characters")
            value = self.method(value) if symbol == "." else self.subscript(value)
        return value

    def atom(self) -> Value:
        if self.take("("):
            value = self.nested(self.sum)
            self.expect(")")
            return value
        kind, text = self.tokens[self.position]
        self.position += 1
        if kind == "string":
            return _checked(text[1:-1])
        if kind in ("int", "float", "grouped"):
            is_int = kind == "int" or (kind == "grouped" and "." not in text)
            return _checked((int if is_int else float)(text.replace(",", "")))
        if kind == "name" and text == "len":
            return len(*self.string_arguments(1))
        raise _Refused("a value expected")

    def method(self, string: str) -> Value:
        kind, name = self.tokens[self.position]
        self.position += 1
        if kind != "name" or name not in _METHODS:
            raise _Refused("no such method")
        arguments = self.string_arguments(_METHODS[name])
        return _checked(getattr(str, name)(string, *arguments))

    def string_arguments(self, count: int) -> list[str]:
        self.expect("(")
        arguments = []
        for i in range(count):
            if i:
                self.expect(",")
            arguments.append(self.nested(self.sum))
        self.expect(")")
        if not all(isinstance(argument, str) for argument in arguments):
            raise _Refused("string arguments expected")
        return arguments

    def subscript(self, string: str) -> str:
        """`[i]` or `[i:j:k]` after `string`, any of i, j, k left out of the second."""
        bounds: list[int | None] = [None]
        while not self.take("]"):
            if self.take(":"):
                bounds.append(None)
            elif bounds[-1] is None:
                bounds[-1] = self.nested(self.sum)
            else:
                raise _Refused("] expected")
        if len(bounds) > 3 or not all(bound is None or isinstance(bound, int) for bound in bounds):
            raise _Refused("whole numbers expected in brackets")
        if len(bounds) > 1:
            return string[slice(*bounds)]
        if bounds[0] is None or not -len(string) <= bounds[0] < len(string):
            raise _Refused("no such character")
        return string[bounds[0]]


def _apply(symbol: str, left: Value, right: Value) -> Value:
    """`left symbol right`, refused before it is computed where the result would be too large."""
    if isinstance(left, str) or isinstance(right, str):
        if symbol == "+" and isinstance(left, str) and isinstance(right, str):
            return _checked(left + right)
        if symbol != "*" or {type(left), type(right)} != {str, int}:
            raise _Refused("no such operation on strings")
        string, times = (left, right) if isinstance(left, str) else (right, left)
        if len(string) * times > MAX_CHARS:
            raise _Refused("too long a string")
        return string * times
    if symbol == "**" and isinstance(left, int) and isinstance(right, int) and _log2(left) * right > 4 * MAX_DIGITS:
        raise _Refused("too large a power")  # 4 bits a digit: what passes is at most 10**200, then checked exactly
    return _checked(_BINARY[symbol](left, right))


def _log2(number: int) -> int:
    """Rounded down, of the magnitude; 0 for 0."""
    return max(0, abs(number).bit_length() - 1)


def _checked(value: Value) -> Value:
    """`value` if it is a finite number or a string, within the limits."""
    if isinstance(value, complex):
        raise _Refused("a complex number")
    if isinstance(value, float) and not math.isfinite(value):
        raise _Refused("not a finite number")
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        raise _Refused("too large a number")
    if isinstance(value, str) and len(value) > MAX_CHARS:
        raise _Refused("too long a string")
    return value
