"""Reading ahead: what comes, when it is read, when it fails, how it ends."""

import functools
import threading
import time

import jax
import numpy as np
import pytest

from unet_jax.errors import UserError
from unet_jax.runtime import parallel


class Batches:
  """A generator of numbered batches that notes how many were taken."""

  def __init__(self, num, *, damaged=None, gate=None):
    self.taken, self.closed = 0, False
    self.items = self._make(num, damaged, gate)

  def _make(self, num, damaged, gate):
    try:
      for i in range(num):
        self.taken += 1
        if i == damaged:
          raise UserError(f"batch {i} is damaged")
        if i and gate is not None:
          gate.wait(timeout=30)
        yield {"id": np.arange(8, dtype=np.int32) + 8 * i}
    finally:
      self.closed = True

  def wait_for(self, taken):
    """Returns once so many were taken; fails if it takes for ever."""
    end = time.monotonic() + 30
    while self.taken < taken:
      assert time.monotonic() < end
      time.sleep(0.001)


def put_on(mesh):
  return functools.partial(parallel.put_batch, mesh=mesh)


def test_order_and_content_are_those_of_the_batches():
  mesh, batches = parallel.make_mesh(), Batches(5)
  got = list(parallel.prefetch(batches.items, put_on(mesh)))
  assert len(got) == 5 and batches.closed
  for i, (batch, arrays) in enumerate(got):
    np.testing.assert_array_equal(batch["id"], np.arange(8) + 8 * i)
    np.testing.assert_array_equal(arrays["id"], batch["id"])
    assert arrays["id"].sharding == parallel.over_data(mesh)
    assert len(arrays["id"].addressable_shards) == jax.device_count() == 8


def test_one_batch_and_no_more_is_read_ahead():
  batches = Batches(6)
  ahead = parallel.prefetch(batches.items, put_on(parallel.make_mesh()))
  assert batches.taken == 0
  for used, _ in enumerate(ahead, start=1):
    batches.wait_for(min(used + 1, 6))  # Read while this one is in use.
    time.sleep(0.02)
    assert batches.taken == min(used + 1, 6)


def test_what_fails_ahead_is_raised_where_it_is_asked_for():
  batches = Batches(9, damaged=3)
  ahead = parallel.prefetch(batches.items, put_on(parallel.make_mesh()))
  for _ in range(3):
    next(ahead)
  batches.wait_for(4)  # The damage was met, and the third batch is in use.
  with pytest.raises(UserError, match="batch 3 is damaged"):
    next(ahead)
  assert batches.closed


def test_closing_waits_for_the_batch_that_is_being_read_and_ends_it_all():
  gate = threading.Event()
  batches, threads = Batches(9, gate=gate), threading.active_count()
  ahead = parallel.prefetch(batches.items, put_on(parallel.make_mesh()))
  next(ahead)
  batches.wait_for(2)  # The thread is inside the generator now.
  timer = threading.Timer(0.1, gate.set)
  timer.start()
  ahead.close()
  timer.join()
  assert batches.closed and batches.taken == 2
  assert threading.active_count() == threads
