"""What crosses between the sandboxed processes, and the filter of system calls, without a sandbox."""

import errno
import json
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.evals import execution_child
from nanochat.evals.execution_child import BadMessage, Channel, ChannelClosed, explain, pack, system_call_filter, unpack

numbers = st.integers() | st.floats() | st.complex_numbers(allow_nan=False)
scalars = st.none() | st.booleans() | numbers | st.text() | st.binary()
hashable = st.recursive(
    scalars.filter(lambda value: value == value),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)


def containers(inner):
    lists = st.lists(inner, max_size=4)
    return lists | lists.map(tuple) | st.sets(hashable, max_size=4) | st.dictionaries(hashable, inner, max_size=4)


plain = st.recursive(scalars | hashable, containers, max_leaves=12)


@given(plain)
@settings(max_examples=100, deadline=None)
def test_plain_data_comes_out_as_it_went_in(value):
    assert repr(sorted_sets(unpack(json.dumps(pack(value))))) == repr(sorted_sets(value))


def sorted_sets(value: object) -> object:
    """`value` with its sets as sorted lists, so that their text can be compared."""
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted((sorted_sets(item) for item in value), key=repr)
    if isinstance(value, (list, tuple)):
        return type(value)(sorted_sets(item) for item in value)
    if isinstance(value, dict):
        return [(sorted_sets(key), sorted_sets(item)) for key, item in value.items()]
    return value


def test_subclasses_cross_as_the_type_that_they_extend():
    class Yes(int):
        __hash__ = int.__hash__

        def __eq__(self, other):
            return True

        def __pos__(self):
            return self

    class Odd(list):
        def __iter__(self):
            return iter(["not", "what", "is", "there"])

    received = unpack(json.dumps(pack([Yes(5), Odd([1, 2])])))
    assert received == [5, [1, 2]]
    assert type(received[0]) is int
    assert type(received[1]) is list


@pytest.mark.parametrize("value", [object(), int, len, (x for x in "a"), range(3), Ellipsis, [object()], {1: {2: int}}])
def test_what_is_no_plain_data_does_not_cross(value):
    with pytest.raises(TypeError, match="not plain data"):
        pack(value)


ODD_VALUES = [
    b'{"eval": ["9"]}', b'{"set": [[1]]}', b'{"tuple": 1}', b'{"tuple": [], "set": []}', b'{"bytes": [256]}',
    b'{"complex": [1, 2, 3]}', b'{"dict": [[1]]}', b"{}", b"9" * 5000,
]  # fmt: skip
ODD_LINES = [b"", b"9", b"[1]", b"[1, 2, 3, 4]", b'{"tuple": [1]}', b"[" * 200_000, b"\xff\xfe", b"[1, 'returned', 9]"]
ODD_LINES += [b'[1, "returned", %s]' % value for value in ODD_VALUES]


@pytest.mark.parametrize("line", ODD_LINES, ids=lambda line: repr(line[:40]))
def test_a_line_that_is_no_message_is_recognised(line):
    with pytest.raises(BadMessage):
        received_from(line + b"\n")


def received_from(data: bytes) -> tuple[int, str, object]:
    """What a channel makes of `data`, after which the other end closes."""
    out, into = os.pipe()
    with open(out, "rb") as reader:
        if len(data) < 60_000:
            os.write(into, data)
            os.close(into)
            return Channel(reader.fileno(), -1).receive()
        os.close(into)
    channel = Channel(-1, -1)
    channel.pending = data
    return channel.receive()


def test_a_message_of_any_size_is_bounded():
    channel = Channel(-1, -1)
    with pytest.raises(ValueError, match="too large"):
        channel.send(1, "returned", "a" * execution_child.MAX_LINE)
    out, into = os.pipe()
    os.write(into, b"9" * 10_000)
    channel = Channel(out, -1)
    channel.pending = b"9" * execution_child.MAX_LINE
    with pytest.raises(BadMessage, match="too long"):
        channel.receive()
    os.close(out)
    os.close(into)


@pytest.mark.parametrize("data", [b"", b'[1, "returned"'])
def test_the_end_of_the_other_process_is_noticed(data):
    with pytest.raises(ChannelClosed):
        received_from(data)


def test_a_failure_is_explained_with_its_line_of_the_tests():
    tests = "x = 1\nassert x == 2, 'no'\n"
    with pytest.raises(AssertionError) as caught:
        exec(compile(tests, "tests.py", "exec"), {})
    assert explain(caught.value, tests) == "AssertionError: no at \"assert x == 2, 'no'\""


# --- the filter, run by an interpreter of our own: not every machine that it is for is at hand --------

ALLOW, NOT_PERMITTED, NOT_THERE, KILL = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PID = 4711


def decision(machine: str, number: int, argument: int = 0, *, architecture: int | None = None) -> int:
    """What the filter for `machine` answers to system call `number` with its first argument."""
    program = system_call_filter(machine, PID)
    steps = [struct.unpack_from("=HBBI", program, i) for i in range(0, len(program), 8)]
    memory = {0: number, 4: architecture or ARCHITECTURES[machine], 16: argument & 0xFFFFFFFF}
    position, value = 0, 0
    while True:
        code, when_true, when_false, constant = steps[position]
        position += 1
        if code == 0x20:
            value = memory[constant]
        elif code == 0x06:
            return constant
        else:
            met = {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[code]
            position += when_true if met else when_false


@pytest.mark.parametrize(
    ("machine", "column", "read", "clone", "tgkill"), [("x86_64", 0, 0, 56, 234), ("aarch64", 1, 63, 220, 131)]
)
def test_the_filter_denies_its_list_and_allows_threads_and_ordinary_calls(machine, column, read, clone, tgkill):
    for name, numbers in execution_child._DENIED.items():
        if numbers[column] is not None:
            assert decision(machine, numbers[column]) == NOT_PERMITTED, name
    thread_flags, fork_flags = 0x3D0F00, 17  # of pthread_create and of fork in the C library
    assert decision(machine, read) == ALLOW
    assert decision(machine, clone, thread_flags) == ALLOW
    assert decision(machine, clone, fork_flags) == decision(machine, clone, 0x10000000) == NOT_PERMITTED
    assert decision(machine, 435) == NOT_THERE
    assert decision(machine, tgkill, PID) == ALLOW
    assert decision(machine, tgkill, PID + 1) == NOT_PERMITTED


def test_the_filter_knows_no_other_way_in():
    assert decision("x86_64", 57, architecture=0x40000003) == KILL  # the 32-bit calls of the same machine
    assert decision("x86_64", 0x40000000 + 39) == NOT_PERMITTED
    with pytest.raises(KeyError):
        system_call_filter("sparc64", PID)
