"""Sizes, checked by walking through the network pixel by pixel."""

import pytest

from unet_jax import geometry


def walk(size, depth):
  """What valid convolutions and even poolings leave of `size`; None if odd."""
  sizes = []
  for _ in range(depth):
    size -= 2
    size -= 2
    if size <= 0 or size % 2:
      return None
    sizes.append(size)
    size //= 2
  size -= 4
  if size <= 0:
    return None
  for skip in reversed(sizes):
    size *= 2
    assert skip >= size
    size -= 4
  return size if size > 0 else None


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_valid_sizes_equal_a_walk_through_the_network(depth):
  for size in range(1, 700):
    expected = walk(size, depth)
    assert geometry.is_legal(size, depth, "valid") == (expected is not None)
    if expected is not None:
      assert geometry.output_size(size, depth, "valid") == expected


def test_the_papers_numbers():
  assert geometry.output_size(572, 4, "valid") == 388
  assert geometry.valid_loss(4) == 184
  assert geometry.crop_margins(4) == [88, 40, 16, 4]
  legal = [s for s in range(1, 600) if geometry.is_legal(s, 4, "valid")]
  assert legal == list(range(188, 600, 16))


def test_an_illegal_size_names_its_neighbours():
  with pytest.raises(ValueError, match="nearest: 556, 572"):
    geometry.output_size(570, 4, "valid")
  with pytest.raises(ValueError, match="nearest: 188"):
    geometry.output_size(100, 4, "valid")
  with pytest.raises(ValueError, match="nearest: 96, 112"):
    geometry.output_size(100, 4, "same")


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("multiple", [1, 12, 32])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_padding_is_the_least_that_covers(depth, multiple, padding):
  """By trying every size in turn."""
  margin = (sum_of_losses(depth) if padding == "valid" else 0) // 2
  for size in range(1, 300):
    covered = next(n for n in range(size, 2 * 300) if n % multiple == 0)
    for wanted in range(covered + 2 * margin, 2000):
      if padding == "same":
        if wanted % 2**depth == 0 and wanted % multiple == 0:
          break
      elif (walk(wanted, depth) or 0) >= covered:
        break
    pad = geometry.plan_pad(size, depth, padding, multiple)
    assert pad == geometry.Pad(margin, wanted)


def sum_of_losses(depth):
  """The smallest legal input less what comes out of it."""
  size = next(s for s in range(1, 1000) if walk(s, depth))
  return size - walk(size, depth)


def test_a_legal_size_is_left_alone():
  assert geometry.plan_pad(264, 3, "same") == geometry.Pad(0, 264)
  assert geometry.plan_pad(388, 4, "valid") == geometry.Pad(92, 572)
  for size in range(8, 2000, 8):
    assert geometry.plan_pad(size, 3, "same").size == size


def test_a_network_that_pads_on_the_way_up_takes_what_a_pooling_leaves():
  assert geometry.size_rule("same", "pad_up") == "any"
  assert geometry.size_rule("valid", "pad_input") == "valid"
  for depth in (1, 2, 4):
    for size in range(1, 70):
      legal = size >> depth > 0  # Halved, rounding down, it leaves a pixel.
      assert geometry.is_legal(size, depth, "any") == legal
      padded = geometry.plan_pad(size, depth, "any")
      assert padded == geometry.Pad(0, max(size, 2**depth))
  assert geometry.plan_pad(37, 4, "any", multiple=8).size == 40
  assert geometry.output_size(37, 4, "any") == 37
  with pytest.raises(ValueError, match="size 15 does not survive"):
    geometry.output_size(15, 4, "any")
