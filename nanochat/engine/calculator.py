"""The calculator a chat model may call: a small part of Python's expressions, parsed by `ast` without `eval`.

    numbers     7  2.5  .5  1e3  1_000  and, beyond Python, 1,000 with groups of exactly three digits
    strings     'word' or "word", printable, without backslashes
    operators   + - * / // % ** and both signs on numbers; + and * (repetition) on strings; parentheses
    strings do  s.count(t)  s.find(t)  s.index(t)  s.replace(t, u)  s.join(t)  s.upper()  s.lower()
                s.capitalize()  s.title()  s.strip()  len(s)  s[i]  s[i:j:k]

Values, and how they are printed, are Python's. Everything else is refused: names, comparisons, attributes, other calls,
string formatting with %, complex and non-finite numbers, and whatever exceeds the limits below.

An expression cannot run for long: it has at most `MAX_LENGTH` characters, so at most that many operations, and the size
of each result is bounded before it is computed. There is no shared state, signal or thread: any thread may call it.
"""

import ast
import math
import operator
import re

MAX_LENGTH = 512  # characters of an expression
MAX_DIGITS = 100  # of an int
MAX_CHARS = 256  # of a string, results included: they end up in the model's context

Value = int | float | str

_STRING = r"""(?:'[^'\\]*'|"[^"\\]*")"""
_GROUPED = re.compile(rf"({_STRING})|(?<![\w.,])([1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+(?:\.[0-9]*)?)(?![\w.,])")
# What the parser gets to see; by itself it would also take comments, 'a' 'b', r'a', 0x10, 2j and names like π.
_LEXICON = re.compile(
    rf"""(?: {_STRING} (?! \ *['"])
    | [0-9][0-9_.]* (?:[eE][+-]?[0-9_]+)? (?!\w)
    | [a-z]+ (?![\w'"])
    | [-+*/%(),.:[\] ]
    )*""",
    re.VERBOSE,
)
_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_NUM_ARGUMENTS = {"count": 1, "find": 1, "index": 1, "replace": 2, "join": 1} | dict.fromkeys(
    ("upper", "lower", "capitalize", "title", "strip"), 0
)
_FAILURES = (SyntaxError, ArithmeticError, ValueError, TypeError, LookupError, RecursionError, MemoryError)


def calculate(expression: str) -> str | None:
    """The value of `expression` as Python would print it, or None where it is refused or has no value (1/0).

    Never raises. See the module's docstring for the grammar and the limits.
    """
    if not isinstance(expression, str) or len(expression) > MAX_LENGTH or not expression.isprintable():
        return None
    plain = _GROUPED.sub(lambda match: match[1] or match[2].replace(",", ""), expression.strip())
    if not _LEXICON.fullmatch(plain):
        return None
    try:
        return str(_evaluate(ast.parse(plain, mode="eval").body))
    except _FAILURES:  # RecursionError: the caller was deep already, MemoryError: too deep for Python's parser
        return None


def _evaluate(node: ast.expr) -> Value:
    """The value of a node. Raises one of `_FAILURES` where it is refused or has none."""
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return _checked(value)
        case ast.BinOp(left, symbol, right) if type(symbol) in _BINARY:
            return _apply(type(symbol), _evaluate(left), _evaluate(right))
        case ast.UnaryOp(ast.UAdd() | ast.USub()):
            return _signed(node)
        case ast.Call(ast.Name("len"), [argument], []):
            return len(_string(argument))
        case ast.Call(ast.Attribute(owner, name), arguments, []) if _NUM_ARGUMENTS.get(name) == len(arguments):
            return _checked(getattr(_string(owner), name)(*map(_string, arguments)))
        case ast.Subscript(owner, ast.Slice(lower, upper, step)):
            return _string(owner)[slice(*(bound and _evaluate(bound) for bound in (lower, upper, step)))]
        case ast.Subscript(owner, index):
            return _string(owner)[_evaluate(index)]
    raise ValueError(f"{type(node).__name__} is outside the grammar")


def _string(node: ast.expr) -> str:
    value = _evaluate(node)
    if not isinstance(value, str):
        raise TypeError("a string is needed here")
    return value


def _signed(node: ast.expr) -> int | float:
    """The number behind any number of signs; a loop, for there may be as many signs as characters."""
    is_negative = False
    while isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        is_negative ^= isinstance(node.op, ast.USub)
        node = node.operand
    value = _evaluate(node)
    return -value if is_negative else +value


def _apply(symbol: type[ast.operator], left: Value, right: Value) -> Value:
    """`left symbol right`, refused before it is computed where the result would be too large."""
    if isinstance(left, str) and symbol is ast.Mod:
        raise ValueError("strings are not formatted")
    if symbol is ast.Mult and {type(left), type(right)} == {str, int}:
        string, times = (left, right) if isinstance(left, str) else (right, left)
        if len(string) * times > MAX_CHARS:
            raise ValueError("too long a string")
        return string * times
    if symbol is ast.Pow and isinstance(left, int) and isinstance(right, int):
        log2 = max(0, abs(left).bit_length() - 1)  # rounded down
        if log2 * right > 4 * MAX_DIGITS:  # 4 bits a digit: what passes is at most 10**200, then checked exactly
            raise ValueError("too large a power")
    return _checked(_BINARY[symbol](left, right))


def _checked(value: Value) -> Value:
    """`value` if it is a finite number or a string, within the limits."""
    is_allowed = (
        len(value) <= MAX_CHARS if isinstance(value, str)
        else abs(value) < 10**MAX_DIGITS if isinstance(value, int)
        else isinstance(value, float) and math.isfinite(value)
    )  # fmt: skip
    if not is_allowed:
        raise ValueError("beyond the limits")
    return value
