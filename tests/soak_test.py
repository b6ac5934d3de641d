"""A few rounds of the soak; `python -m tests.soak --kills 50` for many."""

import pytest

from tests import soak


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.parametrize(
  ("what", "kills", "steps"),
  [("run", 5, 480), ("study", 4, 96), ("hosts", 3, 240)],
)
def test_broken_at_random_moments_it_ends_as_if_unbroken(
  tmp_path, what, kills, steps
):
  counts = soak.soak(what, kills, 1, tmp_path, steps=steps)
  assert sum(counts.values()) == kills
