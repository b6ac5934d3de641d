"""A run that hangs ends, and says where."""

import subprocess
import sys
import time

import pytest

PROGRAM = """
import sys, time
from unet_jax.runtime.watchdog import Watchdog

def waits_for_another_host():
  time.sleep(60)

with Watchdog(int(sys.argv[1])) as dog:
  for _ in range(int(sys.argv[2])):
    dog.alive()
    time.sleep(0.3)
  if sys.argv[3] == "hang":
    waits_for_another_host()
print("done")
if sys.argv[3] == "later":
  time.sleep(2)
"""


def run(*argv):
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, *map(str, argv)],
    capture_output=True,
    text=True,
    timeout=50,
  )
  return done, time.monotonic() - start


def test_a_hang_is_shown_and_ended():
  done, seconds = run(1, 1, "hang")
  assert done.returncode == 1 and seconds < 30
  assert "waits_for_another_host" in done.stderr
  assert "Timeout" in done.stderr


@pytest.mark.parametrize(
  "argv",
  [
    (1, 6, "live"),  # Longer than a second in all, but never at once.
    (1, 1, "later"),  # Closed: nothing ends what comes after.
    (0, 1, "live"),
  ],
)
def test_what_lives_goes_on(argv):
  done, _ = run(*argv)
  assert done.returncode == 0, done.stderr
  assert done.stdout == "done\n" and not done.stderr


def test_before_the_first_step_it_waits():
  """Compiling may take long."""
  done, _ = run(1, 0, "later")
  assert done.returncode == 0
