import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import color, draw, segmentation

from unet_jax.errors import UserError
from unet_jax.inspect import pictures

CORRECT, MISSED, INVENTED = (208, 208, 208), (86, 180, 233), (213, 94, 0)
WRONG, BACKGROUND = (240, 228, 66), (24, 24, 24)


def _disk(shape, radius, label=1):
  ids = np.zeros(shape, np.int32)
  center = shape[0] // 2, shape[1] // 2
  ids[draw.disk(center, radius, shape=shape)] = label
  return ids


def _row(label, prediction=None, weight=None, **more):
  prediction = label if prediction is None else prediction
  weight = np.ones(label.shape, np.float32) if weight is None else weight
  row = dict(label=label, prediction=prediction, weight=weight, name="one")
  return {**row, "image": label[..., None].astype(np.float32), **more}


def _colors_of(image):
  return {tuple(c) for c in np.asarray(image).reshape(-1, 3).tolist()}


# What the three common kinds of colour blindness see: linear RGB to linear
# RGB. Machado et al. 2009, https://doi.org/10.1109/TVCG.2009.113, severity 1.
BLIND = {
  "protan": [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
  ],
  "deutan": [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
  ],
  "tritan": [
    [1.255528, -0.076749, -0.178779],
    [-0.078411, 0.930809, 0.147602],
    [0.004733, 0.691367, 0.303900],
  ],
}


def _smallest_difference(colors, matrix):
  """The least CIEDE2000 difference of any two colors as seen."""
  rgb = np.asarray(colors) / 255
  linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
  seen = np.clip(linear @ np.asarray(matrix).T, 0, 1)
  seen = np.where(
    seen > 0.0031308, 1.055 * seen ** (1 / 2.4) - 0.055, 12.92 * seen
  )
  lab = color.rgb2lab(seen)
  distance = color.deltaE_ciede2000(lab[:, None], lab[None])
  return distance[~np.eye(len(lab), dtype=bool)].min()


@pytest.mark.parametrize("kind", BLIND)
def test_colors_differ_for_colour_blind_readers(kind):
  # 10 is a plain difference, 2.3 a barely visible one.
  errors = [CORRECT, MISSED, INVENTED, WRONG, BACKGROUND]
  assert _smallest_difference(errors, BLIND[kind]) > 10
  assert _smallest_difference(pictures.class_colors(8), BLIND[kind]) > 8
  red_and_green = [(200, 0, 0), (90, 110, 0)]  # That the measure can fail.
  assert _smallest_difference(red_and_green, BLIND["deutan"]) < 10


def test_every_class_has_its_own_color_whatever_their_number():
  colors = pictures.class_colors(256)
  assert colors.dtype == np.uint8 and len(np.unique(colors, axis=0)) == 256
  assert tuple(colors[0]) == (0, 0, 0)
  assert tuple(colors[1]) == (230, 159, 0)
  np.testing.assert_array_equal(pictures.class_colors(5), colors[:5])


def test_to_rgb_stretches_between_percentiles():
  ramp = np.linspace(-5, 20, 1001).reshape(7, 143, 1)
  rgb = pictures.to_rgb(ramp)
  low, high = np.percentile(ramp, (1, 99))
  expected = np.round(255 * np.clip((ramp - low) / (high - low), 0, 1))
  np.testing.assert_array_equal(rgb, np.repeat(expected, 3, -1))
  outlier = ramp.copy()
  outlier[0, 0] = -1e9  # One dead pixel changes nothing to speak of.
  difference = pictures.to_rgb(outlier).astype(int) - rgb
  assert np.abs(difference).max() <= 1


@settings(max_examples=40, deadline=None)
@given(
  scale=st.floats(1e-3, 1e6),
  shift=st.floats(-1e3, 1e3),
  channels=st.integers(1, 5),
)
def test_to_rgb_ignores_scale_and_shift(scale, shift, channels):
  image = np.random.default_rng(0).normal(size=(9, 8, channels))
  moved = pictures.to_rgb(image * scale + shift).astype(int)
  assert np.abs(moved - pictures.to_rgb(image)).max() <= 1


def test_to_rgb_of_odd_images():
  flat = pictures.to_rgb(np.full((4, 4, 1), 7.0))
  assert _colors_of(flat) == {(128, 128, 128)}
  broken = np.full((4, 4, 1), np.nan)
  assert _colors_of(pictures.to_rgb(broken)) == {(0, 0, 0)}
  broken[0] = 1.0
  broken[1] = 2.0
  broken[2] = np.inf
  rgb = pictures.to_rgb(broken)[:, 0, 0]
  np.testing.assert_array_equal(rgb, [0, 255, 0, 0])
  sparse = np.zeros((40, 40, 1))
  sparse[3, 3] = 1.0  # Fewer than 1 % of the pixels.
  assert pictures.to_rgb(sparse)[3, 3, 0] == 255


def test_to_rgb_keeps_channels_apart():
  image = np.zeros((8, 8, 5))
  image[:4, :, 0] = image[:, :4, 1] = image[4:, :, 2] = 1
  rgb = pictures.to_rgb(image)
  np.testing.assert_array_equal(rgb, 255 * image[..., :3])
  two = pictures.to_rgb(image[..., :2])
  np.testing.assert_array_equal(two[..., :2], rgb[..., :2])
  assert not two[..., 2].any()


def test_overlay_tints_inside_and_draws_a_one_pixel_rim():
  label = _disk((40, 50), 12)
  label[_disk((40, 50), 5) > 0] = 2
  image = np.full((40, 50, 3), 100, np.uint8)
  out = pictures.overlay(image, label, alpha=0.5, num_labels=3)
  rim = segmentation.find_boundaries(label, connectivity=1, mode="inner")
  rim |= segmentation.find_boundaries(label, connectivity=1, mode="thick")
  rim &= label > 0
  colors = pictures.class_colors(3).astype(float)
  expected = np.full((40, 50, 3), 100.0)
  inside = (label > 0) & ~rim
  expected[inside] = np.round(0.5 * 100 + 0.5 * colors[label[inside]])
  expected[rim] = colors[label[rim]]
  np.testing.assert_array_equal(out, expected)


def test_overlay_leaves_background_and_unknown_ids_alone():
  image = np.random.default_rng(0).integers(0, 255, (6, 6, 3)).astype(np.uint8)
  label = np.array([0, 255, -1, 2, 0, 0]).repeat(6).reshape(6, 6)
  out = pictures.overlay(image, label, num_labels=2)
  np.testing.assert_array_equal(out, image)


def test_error_map_names_each_kind_of_pixel():
  label = np.array([[0, 1, 2, 1, 0, 1, 1]])
  found = np.array([[0, 1, 2, 0, 2, 2, 0]])
  weight = np.array([[1, 1, 0.5, 1, 1, 1, 0]])
  out = pictures.error_map(label, found, weight)
  kinds = [BACKGROUND, CORRECT, CORRECT, MISSED, INVENTED, WRONG]
  assert [tuple(c) for c in out[0, :6].tolist()] == kinds
  assert tuple(out[0, 6]) not in {*kinds}


def test_error_map_hatches_what_is_ignored():
  label = np.ones((12, 12), int)
  out = pictures.error_map(label, 1 - label, np.zeros((12, 12)))
  shades = _colors_of(out)
  assert len(shades) == 2
  assert all(len(set(shade)) == 1 for shade in shades)  # Greys.
  # Diagonal: the same along it, both shades across it.
  np.testing.assert_array_equal(out[1:, :-1], out[:-1, 1:])
  assert len(_colors_of(out[0])) == 2


def test_to_2d_takes_the_fullest_slice_of_the_shortest_axis():
  rng = np.random.default_rng(0)
  label = np.zeros((9, 7, 8), np.int32)
  label[:, 2] = rng.integers(0, 2, (9, 8))
  label[:, 5] = 3
  weight = np.ones(label.shape, np.float32)
  image = rng.normal(size=(9, 7, 8, 2))
  row = _row(label, weight=weight, image=image)
  flat, note = pictures.to_2d(row)
  assert note == "slice 5 of 0..6, axis 1"
  np.testing.assert_array_equal(flat["label"], label[:, 5])
  np.testing.assert_array_equal(flat["image"], image[:, 5])
  weight[:, 5] = 0  # What is ignored does not attract.
  assert pictures.to_2d(row)[1].startswith("slice 2 ")
  assert pictures.to_2d(_row(0 * label))[1].startswith("slice 3 ")
  square = _row(label[0])
  assert pictures.to_2d(square) == (square, "")


def _cells(sheet):
  """The four columns of a panel of one image, titles and legend cut off."""
  array = np.asarray(sheet)
  return [array[44:300, 8 + 264 * i : 8 + 264 * i + 256] for i in range(4)]


def test_panel_shows_input_truth_prediction_and_error():
  label, found = _disk((32, 32), 10), _disk((32, 32), 8)
  sheet = pictures.panel([_row(label, found)])
  image, truth, prediction, error = _cells(sheet)
  big = np.kron(label, np.ones((8, 8), int))  # 32 pixels -> 256, squares.
  np.testing.assert_array_equal(image, 255 * big[..., None].repeat(3, -1))
  np.testing.assert_array_equal(
    truth, pictures.overlay(image.copy(), big, num_labels=2)
  )
  big_found = np.kron(found, np.ones((8, 8), int))
  np.testing.assert_array_equal(
    prediction, pictures.overlay(image.copy(), big_found, num_labels=2)
  )
  np.testing.assert_array_equal(
    error, pictures.error_map(big, big_found, np.ones((256, 256)))
  )


def test_panel_tints_nothing_that_is_ignored():
  label = np.ones((32, 32), np.int32)
  weight = label.astype(np.float32)
  weight[:, :16] = 0
  _, truth, prediction, _ = _cells(pictures.panel([_row(label, None, weight)]))
  for cell in (truth, prediction):
    assert _colors_of(cell[:, :128]) == {(128, 128, 128)}
    assert (128, 128, 128) not in _colors_of(cell[:, 128:])


def test_panel_draws_any_mix_of_sizes_in_columns_of_one_width():
  shapes = [(1, 1), (3, 700), (700, 3), (300, 200), (16, 16)]
  rows = [_row(_disk(shape, 5)) for shape in shapes]
  sheet = pictures.panel(rows)
  assert sheet.width == 4 * 256 + 5 * 8
  alone = [pictures.panel([row]).height for row in rows]
  frame = 2 * 22  # Titles and legend, once a sheet.
  assert sheet.height == sum(alone) - (len(rows) - 1) * frame


def test_panel_shrinks_a_small_error_but_does_not_lose_it():
  label = np.zeros((1024, 1024), np.int32)
  found = label.copy()
  found[501, 503] = 1
  error = _cells(pictures.panel([_row(label, found)]))[3].astype(int)
  red, green = error[125, 125, :2]
  assert red > 24 + 5 and red > green


def test_legend_names_only_what_can_occur():
  label = _disk((16, 16), 5)

  def legend(weight, ids):
    sheet = pictures.panel([_row(label, ids, weight)])
    return _colors_of(
      sheet.crop((0, sheet.height - 22, sheet.width, sheet.height))
    )

  ones = np.ones((16, 16))
  binary = legend(ones, label)
  assert {CORRECT, MISSED, INVENTED} <= binary
  assert WRONG not in binary and (150, 150, 150) not in binary
  assert WRONG in legend(ones, 2 * label)
  half = ones.copy()
  half[0] = 0
  assert (150, 150, 150) in legend(half, label)
  ignored = label.copy()
  ignored[0] = 255  # Beyond the classes, but of weight 0.
  assert WRONG not in legend(half, ignored)


def test_captions_show_scores_and_the_end_of_long_names():
  label = _disk((16, 16), 5)

  def caption(**more):
    sheet = np.asarray(pictures.panel([_row(label, **more)]))[22:44]
    return np.flatnonzero((sheet < 128).any(axis=(0, 2)))

  plain, scored = caption(), caption(scores={"dice": 0.5, "iou": None})
  assert scored.max() > plain.max() + 50
  long = caption(name="folder/" * 60 + "end")
  assert long.max() < 1064 - 300  # Room for scores beside it.


def test_panel_of_volumes_shows_their_slice():
  label = np.zeros((6, 32, 32), np.int32)
  label[4] = _disk((32, 32), 9)
  sheet = pictures.panel([_row(label)])
  flat = pictures.panel([_row(label[4])])
  for got, want in zip(_cells(sheet), _cells(flat), strict=True):
    np.testing.assert_array_equal(got, want)
  assert sheet != flat  # The caption names the slice.


def test_panel_of_signals_draws_bars_along_one_axis():
  label = np.arange(240) // 60  # 0 1 2 3
  found = label.copy()
  found[:60], found[90:120] = 1, 0
  weight = np.ones(240)
  weight[200:] = 0
  rows = [_row(label, found, weight, image=np.zeros((240, 2)))] * 2
  array = np.asarray(pictures.panel(rows))
  left, width = 8 + 84, 1064 - 16 - 84
  at = lambda i: left + int((i + 0.5) * width / 240)
  colors = pictures.class_colors(4)
  top = 22 + 96 + 12  # The middle of the first bar.
  truth, prediction, error = (array[top + 20 * k] for k in range(3))
  assert tuple(truth[at(100)]) == tuple(prediction[at(80)]) == tuple(colors[1])
  assert tuple(truth[at(150)]) == tuple(colors[2])
  assert tuple(truth[at(230)]) == tuple(truth[at(30)])  # Ignored: no class.
  assert tuple(error[at(30)]) == INVENTED
  assert tuple(error[at(100)]) == MISSED
  assert tuple(error[at(150)]) == CORRECT
  assert len(_colors_of(error[at(202) : at(238)])) == 2  # Hatched.


def test_a_reliability_diagram_has_bars_as_high_as_the_accuracy():
  bins = np.zeros((10, 3))
  bins[5], bins[9] = (40, 22, 20), (120, 114, 120)  # Right: 1/2 and always.
  image = np.asarray(pictures.reliability(bins)).astype(int)
  blue = np.abs(image - np.array(pictures._BLUE)).sum(-1) < 60
  blue = blue[52:453]  # The plot, 400 pixels high.
  width = 400 // 10
  at = lambda m: 64 + m * width + width // 2
  heights = [blue[:, at(m)].sum() for m in range(10)]
  # The line of the mean confidence is drawn over a bar.
  assert abs(heights[5] - 200) <= 8 and abs(heights[9] - 400) <= 8
  assert sum(heights) - heights[5] - heights[9] == 0
  red = np.abs(image - np.array(pictures._VERMILLION)).sum(-1) < 60
  # Beside the diagonal, which crosses the bar in the middle.
  rows = np.flatnonzero(red[52:453, at(5) - 12])
  assert abs(rows.mean() - 400 * (1 - 0.55)) <= 3
  empty = np.asarray(pictures.reliability(np.zeros((10, 3))))
  assert empty.shape == image.shape


def test_curves_draw_each_point_where_it_belongs():
  blue = np.array((0, 114, 178))
  # Points on round numbers: the axes are 0..100 and 0..1.
  records = [
    {"step": 0, "split": "train", "loss": 1.0},
    {"step": 0, "split": "val", "dice": 0.5},
    {"step": 50, "split": "train", "loss": None},
    {"step": 50, "split": "train"},
    {"step": 100, "split": "train", "loss": 0.0},
  ]
  array = np.asarray(pictures.curves(records, ("train/loss",))).astype(int)
  assert array.shape == (300, 480, 3)
  is_line = np.abs(array - blue).sum(-1) < 60
  is_line[:32] = False  # The legend.
  y, x = np.nonzero(is_line)
  left, right, top, bottom = 64, 460, 34, 258
  assert abs(x.min() - left) <= 2 and abs(x.max() - right) <= 2
  expected = top + (x - left) / (right - left) * (bottom - top)
  assert np.abs(y - expected).max() < 3  # A straight line, falling.
  assert len(np.unique(x)) > 380


def test_curves_keep_the_color_of_a_split_across_charts():
  records = [
    {"step": s, "split": split, "loss": 1 / s, "dice": 1 - 1 / s}
    for s in (1, 2, 3)
    for split in ("train", "val")
  ]
  keys = ("train/loss", "val/loss", "val/dice")
  array = np.asarray(pictures.curves(records, keys))
  assert array.shape == (300, 960, 3)
  blue, vermillion = (0, 114, 178), (213, 94, 0)
  assert blue in _colors_of(array[:, :480])
  assert vermillion in _colors_of(array[:, 480:])
  assert blue not in _colors_of(array[:, 480:])


@pytest.mark.parametrize("values", [[], [3.0], [0.5, 0.5], [-2.0, 1e-9]])
def test_curves_of_few_or_equal_values(values):
  records = [
    {"step": i, "split": "val", "dice": v} for i, v in enumerate(values)
  ]
  assert pictures.curves(records, ("val/dice",)).size == (480, 300)


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
@settings(max_examples=200, deadline=None)
def test_ticks_are_few_round_and_enclose(low, span):
  ticks = pictures.ticks(np.array([low, low + span]))
  step = ticks[1] - ticks[0]
  slack = 1e-6 * step
  assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack
  assert 4 <= len(ticks) <= 12
  digit = step / 10 ** np.floor(np.log10(step) + 1e-6)
  assert min(abs(digit - m) for m in (1, 2, 5, 10)) < 1e-3


def test_save_png_tells_in_one_line_that_it_cannot(tmp_path):
  (tmp_path / "taken").touch()
  path = tmp_path / "taken" / "picture.png"
  with pytest.raises(UserError, match="a folder in its path is a file"):
    pictures.save_png(path, np.zeros((2, 2, 3), np.uint8))


def test_save_png_is_read_back_and_leaves_nothing_else(tmp_path):
  array = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)
  path = tmp_path / "a" / "b" / "picture.png"
  pictures.save_png(path, array[..., 0])
  pictures.save_png(path, Image.fromarray(array))
  with Image.open(path) as image:
    np.testing.assert_array_equal(np.asarray(image), array)
  assert os.listdir(path.parent) == ["picture.png"]
