import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from unet_jax.runtime import signals

ROOT = pathlib.Path(__file__).parents[2]
# A loop that polls, "saves" and leaves with the contract's status.
LOOP = """
import sys, time
from unet_jax.runtime import signals
def run():
  with signals.GracefulStop() as stop:
    print("ready", flush=True)
    for step in range(600):
      time.sleep(0.05)
      if stop.requested is not None:
        print("saving", flush=True)
        time.sleep(float(sys.argv[1]))
        print("saved", flush=True)
        raise signals.Stopped(stop.requested)
try:
  run()
except signals.Stopped as stopped:
  sys.exit(signals.exit_status(stopped.signum))
"""


def _start(code, *args):
  process = subprocess.Popen(
    [sys.executable, "-c", code, *args],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  return process


@pytest.mark.parametrize(
  "signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_one_signal_saves_and_exits_with_the_status_of_the_contract(
  signum, status
):
  with _start(LOOP, "0") as process:
    process.send_signal(signum)
    out, err = process.communicate(timeout=20)
  assert process.returncode == status
  assert out == "saving\nsaved\n"
  assert err.split("\n") == [
    "",
    "stopping after this step; press again to quit at once",
    "",
  ]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_of_any_kind_ends_the_process_at_once(second):
  with _start(LOOP, "30") as process:
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(second)
    out, err = process.communicate(timeout=10)
  assert process.returncode == -second  # By the signal, not by an exit.
  assert out == ""
  assert "Traceback" not in err


def test_second_signal_ends_a_process_that_waits_in_compiled_code():
  # A lock held for ever stands for XLA: no Python handler can run meanwhile.
  code = """
import ctypes, signal
from unet_jax.runtime import signals
libc = ctypes.PyDLL(None)  # Keeps the interpreter lock, as if stuck.
with signals.GracefulStop() as stop:
  print("ready", flush=True)
  while stop.requested is None:
    signal.pause()
  print("stuck", flush=True)
  while True:
    libc.sleep(60)
"""
  with _start(code) as process:
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
  assert process.returncode == -signal.SIGTERM


def test_handlers_are_restored_after_none_and_after_one_signal(capfd):
  def mine(signum, frame):
    raise AssertionError("called")

  before = signal.getsignal(signal.SIGINT)
  old = signal.signal(signal.SIGTERM, mine)
  try:
    with signals.GracefulStop() as stop:
      assert stop.requested is None
    assert signal.getsignal(signal.SIGTERM) is mine
    with signals.GracefulStop() as stop:
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop.requested == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGINT) is before
  finally:
    signal.signal(signal.SIGTERM, old)
  assert "stopping after this step" in capfd.readouterr().err


def test_handlers_are_restored_when_the_body_raises():
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with pytest.raises(ZeroDivisionError), signals.GracefulStop():
    raise ZeroDivisionError
  assert before == (
    signal.getsignal(signal.SIGINT),
    signal.getsignal(signal.SIGTERM),
  )


def test_does_nothing_outside_the_main_thread():
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def body():
    with signals.GracefulStop() as stop:
      seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=body)
  thread.start()
  thread.join()
  assert seen == [(None, before)]


def test_stopped_names_the_signal():
  assert str(signals.Stopped(15)) == "stopped by SIGTERM"
  assert signals.Stopped(2).signum == 2
