"""Programs that try to pass tests without solving them, or to get out of the sandbox; sums to break the calculator.

Data for the tests and for `dev/attack_sandbox.py`. Each program is graded by `TESTS`, which want the square of a
number, and none computes one. A program that sees or does what it must not prints `ESCAPED`. `aim` fills in the targets
for these marks: `@SECRET@` (a file to read or spoil), `@FOLDER@` (a folder that anyone may write to), `@PORT@` (a TCP
port of this machine that answers), `@VICTIM@` (a process to harm), `@PARENT@` (the process that grades).
"""

from dataclasses import dataclass
from textwrap import indent

ENTRY_POINT = "square"
TESTS = """
def check(candidate):
    for number in (3, 10, 7):
        assert candidate(number) == number * number
"""
HONEST = "def square(n):\n    return n * n\n"


@dataclass(frozen=True)
class Targets:
    """What the attacks are pointed at."""

    secret: str
    folder: str
    port: int
    victim: int
    parent: int


def aim(program: str, targets: Targets) -> str:
    """`program` with its marks replaced by `targets`."""
    for name in ("secret", "folder", "port", "victim", "parent"):
        program = program.replace(f"@{name.upper()}@", str(getattr(targets, name)))
    return program


def in_call(body: str, imports: str = "import os, sys") -> str:
    """A program that does `body` when it is called."""
    return f"{imports}\ndef square(n):\n{indent(body, '    ')}\n"


def to_all(data: str, descriptors: str = "range(3, 64)") -> str:
    """Lines that write the bytes `data` to every one of `descriptors`."""
    return f"for fd in {descriptors}:\n    try:\n        os.write(fd, {data})\n    except OSError:\n        pass\n"


def tries(body: str, imports: str = "import os, sys") -> str:
    """A program that does `body` when it is called and goes on when that fails; `body` getting through is an escape."""
    return in_call(
        f"try:\n{indent(body, '    ')}\n    print('ESCAPED')\nexcept Exception as error:\n    print(error)", imports
    )


def system_call(call: str) -> str:
    """A program that makes a call of the C library; its success is an escape."""
    return tries(f"libc = ctypes.CDLL(None)\nif {call} < 0: raise OSError", "import ctypes")


EXITS = {
    "sys.exit(0) on loading": "import sys\nsys.exit(0)",
    "os._exit(0) on loading": "import os\nos._exit(0)",
    "raise SystemExit on loading": "raise SystemExit",
    "sys.exit(0) in the call": in_call("sys.exit(0)"),
    "os._exit(0) in the call": in_call("os._exit(0)"),
    "SystemExit from a class of its own": "class Bye(SystemExit): pass\ndef square(n):\n    raise Bye(0)",
    "KeyboardInterrupt": in_call("raise KeyboardInterrupt"),
    "GeneratorExit": in_call("raise GeneratorExit"),
    "exit from a thread": in_call("threading.Thread(target=os._exit, args=(0,)).start()", "import os, threading"),
    "exit handler that prints a verdict": in_call('atexit.register(print, \'["passed", ""]\')\nsys.exit(0)',
        "import atexit, sys"),
    "abort": in_call("os.abort()"),
    "kills itself": in_call("os.kill(os.getpid(), 9)"),
    "alarm that kills itself": in_call("signal.alarm(1)\nsignal.pause()", "import signal"),
    "raises what looks like the end of the tests": in_call("raise StopIteration('passed')"),
    "exception class called Finished":
        "class Finished(BaseException):\n    status, detail = 'passed', ''\ndef square(n):\n    raise Finished",
    "exception that cannot be printed":
        "class Odd(Exception):\n    def __str__(self): raise SystemExit(0)\ndef square(n):\n    raise Odd",
    "exec of another program": in_call("os.execv(sys.executable, [sys.executable, '-c', 'pass'])"),
}  # fmt: skip

FORGERIES = {
    "verdict on standard output": in_call('print(\'["passed", "3 calls"]\', flush=True)'),
    "verdict on standard error": in_call('sys.stderr.write(\'["passed", "3 calls"]\\n\')'),
    "verdict on every descriptor": in_call(to_all('b\'["passed", "3 calls"]\\n\'', "range(256)")),
    "verdict on every descriptor on loading": "import os\n" + to_all('b\'["passed", ""]\\n\'', "range(256)") +
        "def square(n): pass",
    "answers written in advance": "import os\nfor n in (9, 100, 49):\n" +
        indent(to_all("b'[0, \"returned\", %d]\\n' % n"), "    ") + "def square(n): pass",
    "one request answered three times": "import __main__, gc, os, sys\ndef square(n):\n    frame = sys._getframe(1)\n"
        "    number, channel = frame.f_locals['number'], frame.f_locals['channel']\n"
        "    for value in (9, 100, 49):\n        channel.send(number, 'returned', value)\n    os._exit(0)",
    "answer of a kind that is none": "import os, sys\ndef square(n):\n    frame = sys._getframe(1)\n"
        "    frame.f_locals['channel'].send(frame.f_locals['number'], 'passed', None)\n    os._exit(0)",
    "answer of a thread to the next question":
        "import sys, threading, time\ndef square(n):\n    channel = sys._getframe(1).f_locals['channel']\n"
        "    def flood():\n        while True: channel.send(7, 'returned', 9)\n"
        "    threading.Thread(target=flood, daemon=True).start()\n    return 9",
    "tag that rebuilds nothing": in_call(to_all('b\'[1, "returned", {"eval": ["9"]}]\\n\'')),
    "message nested 200,000 deep": in_call(to_all("b'[' * 200000 + b'\\n'")),
    "message without an end": in_call("while True:\n" + indent(to_all("b'9' * 65536"), "    ")),
    "message of broken UTF-8": in_call(to_all("b'\\xff\\xfe\\x00\\n'")),
    "every descriptor closed": in_call("os.closerange(0, 256)\nimport time\ntime.sleep(60)"),
    "not a number": in_call("return float('nan')"),
}  # fmt: skip

IMPOSTORS = {
    "object equal to everything":
        "class Yes:\n    def __eq__(self, other): return True\n    __hash__ = object.__hash__\n"
        "def square(n):\n    return Yes()",
    "int equal to everything":
        "class Yes(int):\n    def __eq__(self, other): return True\n    def __pos__(self): return self\n"
        "    __hash__ = int.__hash__\ndef square(n):\n    return Yes(5)",
    "str equal to everything":
        "class Yes(str):\n    def __eq__(self, other): return True\n    def __str__(self): return self\n"
        "    __hash__ = str.__hash__\ndef square(n):\n    return Yes('9')",
    "list whose items are what is compared":
        "class Yes(list):\n    def __eq__(self, other): return True\n    def __iter__(self): yield Yes()\n"
        "def square(n):\n    return Yes()",
    "class that claims to be an int":
        "class Yes:\n    __class__ = int\n    def __eq__(self, other): return True\ndef square(n):\n    return Yes()",
    "class whose name is code": "Yes = type('9)]#', (), {'__eq__': lambda a, b: True, '__repr__': lambda a: '9'})\n"
        "def square(n):\n    return Yes()",
    "object with __reduce__":
        "class Yes:\n    def __reduce__(self): return (eval, ('9',))\n    def __getstate__(self): return 9\n"
        "def square(n):\n    return Yes()",
    "dict that looks like a tag": in_call("return {'tuple': [9], 'eval': '9'}"),
    "function": in_call("return lambda *a: True"),
    "type": in_call("return int"),
    "unittest.mock.ANY": in_call("return ANY", "from unittest.mock import ANY"),
    "list that holds itself": in_call("a = []\na.append(a)\nreturn a"),
    "list nested 100,000 deep": in_call("a = []\nfor _ in range(100000): a = [a]\nreturn a"),
    "string of 100 MB": in_call("return 'a' * 100_000_000"),
    "int of a million digits": in_call("return 10 ** 1_000_000"),
    "list of ten million numbers": in_call("return [0] * 10_000_000"),
    "set of colliding hashes": in_call("return {i * (2**61 - 1) for i in range(1, 40000)}"),
    "set that holds a list when rebuilt":
        "class L(tuple):\n    def __iter__(self): return iter([[1]])\ndef square(n):\n    return {L((1,))}",
}  # fmt: skip

TAMPERING = {
    "builtins replaced":
        "import builtins\nbuiltins.AssertionError = KeyError\nbuiltins.isinstance = lambda a, b: True\n"
        "builtins.all = builtins.any = lambda x: True\nbuiltins.compile = builtins.exec = lambda *a: None\n"
        "def square(n): return 0",
    "json replaced": 'import json, sys\njson.dumps = lambda *a, **k: \'["passed", ""]\'\n'
        "sys.modules['json'] = None\ndef square(n): return 0",
    "os.write replaced": 'import os\nreal = os.write\nos.write = lambda fd, data: real(fd, b\'["passed", ""]\\n\')\n'
        "def square(n): return 0",
    "runner's functions replaced":
        "import __main__\n__main__.pack = lambda value: 9\n__main__.Candidate.__call__ = lambda self, n: n * n\n"
        "__main__.run_tests = lambda *a: None\n__main__.Finished = Exception\ndef square(n): return 0",
    "trace function": "import sys\nsys.settrace(lambda *a: sys.exit(0))\ndef square(n): return 0",
    "audit hook":
        "import sys\nsys.addaudithook(lambda name, args: name == 'exec' and sys.exit(0))\ndef square(n): return 0",
    "import hook":
        "import sys\nclass Finder:\n    def find_spec(self, *a): sys.exit(0)\nsys.meta_path.insert(0, Finder())\n"
        "def square(n):\n    import wave",
    "all modules removed": "import sys\nsys.modules.clear()\ndef square(n): return 0",
    "check and candidate defined by the program":
        "def check(candidate): pass\ndef candidate(n): return n * n\ntests = check\ndef square(n): return 0",
    "tests looked for in all objects": in_call("needle = 'number ' + chr(42) + ' number'\n"
        "for item in gc.get_objects():\n    if isinstance(item, (dict, list, tuple)) and len(item) < 1000:\n"
        "        if needle in repr(item): print('ESCAPED')", "import gc"),
    "tests looked for in the frames": in_call("frame = sys._getframe()\nwhile frame:\n"
        "    if any(k in frame.f_globals for k in ('check', 'verdict_fd')) or 'tests' in frame.f_locals:\n"
        "        print('ESCAPED')\n    frame = frame.f_back"),
    "tests looked for in arguments and environment": in_call("text = ' '.join(sys.orig_argv) + repr(os.environ)\n"
        "if 'candidate(number)' in text or 'NANOCHAT' in text or 'TOKEN' in text: print('ESCAPED')"),
    "__class__ chain to a file":
        tries("for kind in ().__class__.__base__.__subclasses__():\n    if kind.__name__ == 'FileLoader':\n"
        "        print(kind('x', '@SECRET@').get_data('@SECRET@'))\n        break\nelse:\n    raise OSError"),
    "pickle of os.system": tries("class P:\n    def __reduce__(self): return (os.system, ('touch @FOLDER@/spoiled',))\n"
        "if pickle.loads(pickle.dumps(P())) != 0: raise OSError", "import os, pickle"),
}  # fmt: skip

PROCESSES = {
    "fork": tries("os.fork()"),
    "fork that answers twice": in_call("os.fork()\nreturn 9"),
    "fork bomb": in_call("while True:\n    try: os.fork()\n    except OSError: pass"),
    "daemon":
        tries("if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)",
        "import os, time"),
    "subprocess": tries("subprocess.run(['/bin/sh', '-c', 'id'], check=True)", "import subprocess"),
    "posix_spawn": tries("os.posix_spawn(sys.executable, [sys.executable, '-c', 'pass'], {})"),
    "multiprocessing": tries("p = multiprocessing.Process(target=print)\np.start()", "import multiprocessing"),
    "pty": tries("pty.spawn('/bin/sh')", "import pty"),
    "fork and clone past Python":
        tries("libc = ctypes.CDLL(None)\nif libc.fork() < 0 and libc.syscall(435, bytes(88), 88) < 0: raise OSError",
        "import ctypes"),
    "x32 system calls": tries("libc = ctypes.CDLL(None)\n"
        "x32 = [libc.syscall(0x40000000 + n) for n in (57, 39, 41)] if os.uname().machine == 'x86_64' else [-1]\n"
        "if max(x32) < 0: raise OSError", "import ctypes, os"),
    "thread bomb":
        in_call("while True:\n    try: threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "    except RuntimeError: break", "import threading, time"),
    "thread that does not end": in_call("threading.Thread(target=time.sleep, args=(600,)).start()\nsys.exit(0)",
        "import sys, threading, time"),
    "kills everything":
        in_call("for pid in (-1, 0, 1, 2, os.getppid(), @PARENT@, @VICTIM@):\n    for number in (9, 15, 19):\n"
        "        try: os.kill(pid, number)\n        except OSError: pass"),
    "kills its process group": tries("os.killpg(0, 9)"),
    "signals a thread of another process": system_call("libc.tgkill(@VICTIM@, @VICTIM@, 9)"),
    "stops its parent": tries("os.kill(os.getppid(), signal.SIGSTOP)", "import os, signal"),
    "ptrace": tries("libc = ctypes.CDLL(None)\n"
        "if all(libc.ptrace(16, pid, 0, 0) < 0 for pid in (os.getppid(), 1, @PARENT@, @VICTIM@)): raise OSError",
        "import ctypes, os"),
    "memory of another process": tries("open('/proc/@PARENT@/mem', 'rb').read(1)"),
    "environment of its parent":
        tries("open(f'/proc/{os.getppid()}/environ').read() + open('/proc/@PARENT@/environ').read()"),
    "limits raised": tries("resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))",
        "import resource"),
    "becomes root": tries("os.setuid(0) if os.getuid() else os.chown('@SECRET@', 1, 1)"),
    "new user namespace": system_call("libc.unshare(0x10000000)"),
    "new mount": system_call("libc.mount(b'tmpfs', b'/scratch', b'tmpfs', 0, None)"),
    "priority and real-time scheduling": tries("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))"),
    "io_uring": system_call("libc.syscall(425, 8, bytes(120))"),
}  # fmt: skip

NETWORK = {
    "TCP to this machine": tries("socket.create_connection(('127.0.0.1', @PORT@), 1)", "import socket"),
    "TCP to another machine": tries("socket.create_connection(('1.1.1.1', 53), 1)", "import socket"),
    "UDP": tries("socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@))", "import socket"),
    "DNS": tries("socket.getaddrinfo('localhost.example.com', 80)", "import socket"),
    "HTTP": tries("urllib.request.urlopen('http://127.0.0.1:@PORT@/', timeout=1)", "import urllib.request"),
    "a server": tries("socket.create_server(('127.0.0.1', 0))", "import socket"),
    "a Unix socket": tries("socket.socket(socket.AF_UNIX).bind('\\0nanochat')", "import socket"),
    "netlink and vsock": tries("try: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nexcept OSError:\n"
        "    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)", "import socket"),
}  # fmt: skip

FILES = {
    "secret read": tries("print(open('@SECRET@').read())"),
    "secret read by a raw system call":
        tries("libc = ctypes.CDLL(None)\nfd = libc.open(b'@SECRET@', 0)\n"
        "if fd < 0: raise OSError\nprint(os.read(fd, 100))", "import ctypes, os"),
    "secret through a link": tries("os.symlink('@SECRET@', 'link')\nprint(open('link').read())"),
    "secret through a way up": tries("print(open('../' * 30 + '@SECRET@'.lstrip('/')).read())"),
    "secret overwritten": tries("open('@SECRET@', 'w').write('spoiled')"),
    "secret deleted": tries("os.unlink('@SECRET@')"),
    "file in another folder": tries("open('@FOLDER@/spoiled', 'w').write('x')"),
    "/etc/passwd": tries("print(open('/etc/passwd').read())"),
    "/etc/shadow": tries("print(open('/etc/shadow').read())"),
    "home folders": tries("print(os.listdir('/home'))"),
    "keys in the home folder": tries("for path in ('~/.ssh', '~/.cache', '~/.netrc', '~/.bashrc'):\n"
        "    if os.path.exists(os.path.expanduser(path.replace('~', '/root'))): break\nelse: raise OSError"),
    "/proc and /sys": tries("os.listdir('/proc/self') + os.listdir('/sys/kernel')"),
    "devices": tries("os.open('/dev/sda', 0) or os.listdir('/dev')"),
    "a device of its own": tries("os.mknod('disk', 0o60600, os.makedev(254, 0))\nopen('disk', 'rb').read(1)"),
    "the standard library spoiled": tries("open(os.__file__, 'a').write('#')"),
    "the interpreter spoiled": tries("open(sys.executable, 'r+b')"),
    "a file in the root": tries("open('/spoiled', 'w')"),
    "installed packages": tries("folders = sys.path + site.getsitepackages()\n"
        "if not any(os.listdir(folder) for folder in folders if folder.endswith('-packages')): raise OSError",
        "import os, site, sys"),
    "out of a changed root": tries("os.mkdir('jail')\nfd = os.open('.', 0)\nos.chroot('jail')\nos.fchdir(fd)\n"
        "for _ in range(30): os.chdir('..')\nos.chroot('.')\nprint(open('@SECRET@'.lstrip('/')).read())"),
    "inherited descriptors":
        in_call("import stat\nfor fd in range(256):\n    try: mode = os.fstat(fd).st_mode\n"
        "    except OSError: continue\n    if not stat.S_ISFIFO(mode): print('ESCAPED')"),
    "disk filled": tries("for i in range(100):\n    open(f'f{i}', 'wb').write(bytes(4 << 20))"),
    "one large file": tries("open('big', 'wb').write(bytes(32 << 20))"),
    "one large file with a hole": tries("os.truncate(os.open('big', os.O_CREAT | os.O_RDWR), 1 << 40)"),
    "memory files": tries("os.write(os.memfd_create('x'), bytes(4096))"),
    "shared memory": system_call("libc.shmget(0, 1 << 24, 0o1600)"),
}  # fmt: skip

RESOURCES = {
    "10 GB in one piece": in_call("bytearray(10 << 30)"),
    "list that doubles": in_call("a = [0]\nwhile True: a += a"),
    "memory map": in_call("m = mmap.mmap(-1, 8 << 30)\nm[::4096] = bytes(len(m[::4096]))", "import mmap"),
    "memory error caught for ever":
        in_call("a = []\nwhile True:\n    try: a.append(bytearray(1 << 20))\n    except MemoryError: pass"),
    "output without end": in_call("while True: print('x' * 1000)"),
    "errors without end": in_call("while True: sys.stderr.write('x' * 1000)"),
    "output in a trickle": in_call("while True:\n    os.write(1, b'.')\n    time.sleep(0.001)", "import os, time"),
    "10 MB in one line": in_call("os.write(1, b'x' * 10_000_000)"),
    "output that is not UTF-8": in_call("os.write(1, bytes(range(256)))\nsys.stdout.buffer.write(b'\\xff\\xfe')"),
    "lone surrogates": in_call("print('\\ud800')\nreturn '\\udfff'"),
    "control characters": in_call("print('\\x1b[2J\\x1b]0;spoiled\\x07\\0')"),
    "sleep": in_call("time.sleep(600)", "import time"),
    "sleep on loading": "import time\ntime.sleep(600)\ndef square(n): pass",
    "busy loop": in_call("while True: pass"),
    "busy loop on loading": "while True: pass",
    "loop that catches everything":
        in_call("while True:\n    try:\n        while True: pass\n    except BaseException: pass"),
    "all signals ignored":
        in_call("for number in set(signal.Signals) - {9, 19}:\n    signal.signal(number, signal.SIG_IGN)\n"
        "while True: pass", "import signal"),
    "four busy threads": in_call("def busy():\n    while True: hashlib.sha256(bytes(1 << 20))\n"
        "for _ in range(4): threading.Thread(target=busy).start()\nbusy()", "import hashlib, threading"),
    "9**9**9": in_call("return 9**9**9"),
    "9**9**9 as a constant": "X = 9**9**9\ndef square(n): return X",
    "regular expression without end": in_call("re.match('(a+)+$', 'a' * 60 + 'b')", "import re"),
    "waits for input": in_call("return input()"),
    "waits for a lock": in_call("lock = threading.Lock()\nlock.acquire()\nlock.acquire()", "import threading"),
    "recursion": in_call("return square(n)"),
    "stack overflow": in_call("sys.setrecursionlimit(10**9)\nreturn square(n) + [1]"),
    "stack overflow in C": in_call("a = []\nfor _ in range(10**6): a = [a]\nsys.setrecursionlimit(10**9)\nrepr(a)"),
    "null pointer": in_call("ctypes.string_at(0)", "import ctypes"),
    "dies while answering": in_call("threading.Timer(0.01, os._exit, (0,)).start()\nreturn 'a' * 900_000",
        "import os, threading"),
    "garbage collector freed twice": in_call("ctypes.pythonapi.Py_DecRef(ctypes.py_object(None))\n"
        "for _ in range(10**5): ctypes.pythonapi.Py_DecRef(ctypes.py_object(None))", "import ctypes"),
}  # fmt: skip

SOURCES = {
    "empty program": "",
    "no such function": "def cube(n): return n ** 3",
    "function that is a number": "square = 9",
    "syntax error": "def square(n) return n * n",
    "source nested 10,000 deep": "square = " + "(" * 10_000 + "9" + ")" * 10_000,
    "source of 100,000 signs": "square = " + "-" * 100_000 + "9",
    "null characters": "def square(n): return n\0 * n",
    "lone surrogates in the source": "def square(n): return '\ud800'",
    "source of 2 MB": "x = '" + "a" * 2_000_000 + "'\ndef square(n): return 0",
    "another encoding declared": "# coding: rot13\nqrs fdhner(a): erghea a * a",
    "name in look-alike letters": "def ѕquare(n): return n * n",
    "async function": "async def square(n): return n * n",
    "decorator that exits": "import os\n@lambda f: os._exit(0)\ndef square(n): return 0",
    "stops at the main guard": "if __name__ == '__main__':\n    square = lambda n: n * n",
    "star import of everything": "from ctypes import *\nfrom os import *\n_exit(0)\ndef square(n): return 0",
}  # fmt: skip

ATTACKS: dict[str, dict[str, str]] = {
    "exits": EXITS, "forgeries": FORGERIES, "impostors": IMPOSTORS, "tampering": TAMPERING, "processes": PROCESSES,
    "network": NETWORK, "files": FILES, "resources": RESOURCES, "sources": SOURCES,
}  # fmt: skip

FALSE_SUMS = {  # expressions that the calculator must refuse at once
    "tower of powers": "9**9**9", "taller tower": "9**9**9**9**9**9", "power by steps": "((((9**99)**99)**99)**99)",
    "product of powers": "*".join(["9**99"] * 60), "negative tower": "(-9)**(9**9)", "float power": "10.0**400",
    "infinity": "1e999", "division by zero": "1/0", "complex number": "(-8)**0.5",
    "100,000 parentheses": "(" * 100_000 + "1" + ")" * 100_000, "200 parentheses": "(" * 200 + "1" + ")" * 200,
    "chain of powers": "**".join(["2"] * 150), "a megabyte of digits": "9" * 1_000_000,
    "a megabyte of signs": "-" * 1_000_000 + "1", "huge string": "'a'*10**10",
    "string by replacing": "'" + "a" * 200 + "'.replace('a', 'aaaaaaaaaa')",
    "string by joining": "('" + "a" * 200 + "').join('" + "b" * 200 + "')", "padding": "'%1000000000d' % 1",
    "format": "'{:1000000000}'.format(1)", "format to attributes": "'{0.__class__}'.format(1)",
    "import": "__import__('os').system('id')", "eval": "eval('1+1')", "exec": "exec('x=1')",
    "file": "open('/etc/passwd').read()", "__class__ chain": "().__class__.__base__.__subclasses__()",
    "__class__ of a string": "''.__class__.__mro__[1].__subclasses__()", "method not on the list": "'a'.encode()",
    "lambda": "(lambda: 1)()", "walrus": "(x := 9)", "comprehension": "[9**9 for x in 'a'*9]", "f-string": "f'{9**9}'",
    "name": "x", "builtin": "max(1, 2)", "comparison": "1 < 2", "statement": "1; import os", "newline": "1\nimport os",
    "comment": "1 # + 1", "full-width digits": "１+１", "superscript": "3²", "look-alike minus": "3 − 1",
    "no-break space": "1\u00a0+ 1", "zero-width space": "1\u200b+1", "lone surrogate": "'\ud800'",
    "null character": "1\0+1", "escape in a string": "'\\x41'", "named escape": "'\\N{BULLET}'",
    "unfinished string": "'abc", "nothing": "",
}  # fmt: skip
