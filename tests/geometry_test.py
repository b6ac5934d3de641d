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
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_every_size_is_padded_to_one_that_covers_it(depth, padding):
  for size in range(1, 600):
    pad = geometry.plan_pad(size, depth, padding)
    total = pad.before + size + pad.after
    out = geometry.output_size(total, depth, padding)
    margin = geometry.valid_loss(depth) // 2 if padding == "valid" else 0
    assert pad.before == margin, "the output starts at the first pixel"
    assert pad.after >= margin
    assert out >= size
    assert out - size <= max(size / 8, 2**depth) + 2**depth


def test_mixed_sizes_fall_into_few_shapes():
  shapes = {geometry.round_size(size, 8) for size in range(256, 513)}
  assert len(shapes) <= 10
  for size in range(1, 2000):
    rounded = geometry.round_size(size, 8)
    assert rounded >= size
    assert rounded % 8 == 0
