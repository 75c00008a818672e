"""What interrupts a run: signals, and agreement among ranks."""

import signal
import subprocess
import sys

import pytest
import torch
from ranks import run_ranks

from nanochat.common import Runtime
from nanochat.training.interrupts import SAME_SIGNAL_SECONDS, Agreement, StopSignals

TWO_SIGNALS = f"""
import os, signal, time
from nanochat.training.interrupts import StopSignals
signals = StopSignals(is_main=True)
signals.listen()
os.kill(os.getpid(), signal.{{first}})
os.kill(os.getpid(), signal.{{first}})  # as from a scheduler and from torchrun
print(signals.number, flush=True)
time.sleep({SAME_SIGNAL_SECONDS} + 0.1)
os.kill(os.getpid(), signal.{{second}})
print("never reached")
"""


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGINT", "SIGTERM")])
def test_the_first_signal_is_noted_and_a_later_one_ends_the_process(first, second):
    program = TWO_SIGNALS.format(first=first, second=second)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == -getattr(signal, second)
    assert ended.stdout == f"{getattr(signal, first).value}\n"
    assert ended.stderr == f"{first}: the run saves and stops after this step; once more stops it now\n"


def test_signals_have_their_earlier_meaning_again_in_the_end():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signals = StopSignals(is_main=False)
    signals.listen()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    signals.close()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def largest_on_rank(rank: int, world_size: int) -> list[tuple[int, ...]]:
    agreement = Agreement(Runtime(rank, rank, world_size, torch.device("cpu"), torch.float32))
    return [agreement.largest(step == rank, rank * step) for step in range(3)]


def test_what_one_rank_wants_all_ranks_know_at_the_same_step(tmp_path):
    one, two = run_ranks(largest_on_rank, 2, tmp_path / "ranks")
    assert one == two == [(1, 0), (1, 1), (0, 2)]
    assert largest_on_rank(0, 1) == [(1, 0), (0, 0), (0, 0)]
