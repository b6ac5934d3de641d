"""Extra scores of a whole split: composition, sharing, aggregation, files."""

import csv
import json
import re

import jax
import numpy as np
import pytest
import skimage.metrics
from jax.sharding import Mesh
from PIL import Image
from scipy import ndimage

import unet_jax.main
from tests import runs
from tests.objectives import surface_test
from unet_jax import config as config_lib
from unet_jax import evaluate, schema, scoring
from unet_jax import workdir as workdir_lib
from unet_jax.data import pipeline
from unet_jax.errors import UserError
from unet_jax.objectives import topology

EVERY = ",".join(schema.EXTRA_METRICS)
NAMES = [n for names in schema.EXTRA_METRICS.values() for n in names]


def parse(**fields):
  config = config_lib.default_config()
  for key, value in fields.items():
    config_lib.override(config, key.replace("__", "."), str(value))
  return config_lib.parse(config)


class Arrays:
  """A source of labels at hand."""

  def __init__(self, *labels, ids=None):
    self.labels, self.ids = labels, ids
    self.names = [str(i) for i in range(len(labels))]

  def __len__(self):
    return len(self.labels)

  def size(self, index):
    return self.labels[index].shape

  def spacing(self, index):
    return None

  def instances(self, index):
    return None if self.ids is None else self.ids[index]


def score(cfg, source, predictions, *, weights=None, probabilities=None):
  extra = scoring.ExtraScores(cfg, source)
  for i, prediction in enumerate(predictions):
    label = source.labels[i]
    weight = np.ones(label.shape) if weights is None else weights[i]
    certain = np.eye(cfg.num_labels, dtype=np.float32)[prediction]
    probability = certain if probabilities is None else probabilities[i]
    extra.add(i, label, weight, prediction, probability)
  return extra.finish()


# --- A run --------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run that scores everything, and calls the best what has least VI."""
  workdir = tmp_path_factory.mktemp("trained")
  flags = [
    f"--config.eval.extra_metrics={EVERY}",
    "--config.eval.best_metric=vi",
    "--config.eval.spacing=0.5,2",
    "--config.data.synthetic_size=24",
    "--config.model.widths=4,8",
  ]
  argv = [str(a) for a in runs.arguments(workdir, *flags)]
  assert unet_jax.main.main(argv) == 0
  return workdir


def evaluate_on(trained, devices, batch_size):
  changed = config_lib.to_dict(workdir_lib.read_config(trained))
  changed["eval"]["batch_size"] = batch_size
  cfg = config_lib.parse(changed)
  grid = np.array(jax.devices()[:devices]).reshape(-1, 1)
  mesh = Mesh(grid, ("data", "space"))
  loaded = workdir_lib.load_trained(cfg, trained, mesh)
  source = pipeline.make_source(cfg, "val", trained / "split")
  return evaluate.evaluate(
    evaluate.make_eval_step(cfg, mesh),
    loaded.variables,
    source,
    loaded.normalization,
    cfg=cfg,
    mesh=mesh,
    picture_ids=range(len(source)),
  )


def test_scores_reach_every_file(trained):
  lines = [r for r in runs.read_metrics(trained) if "num_images" in r]
  best = min(lines, key=lambda r: r["vi"])
  argv = ["--workdir", str(trained), "--mode", "evaluate"]
  assert unet_jax.main.main(argv) == 0
  scores = json.loads((trained / "evaluation_val.json").read_text())
  assert scores == best
  assert set(NAMES) <= scores.keys()
  for group in schema.EXTRA_METRICS:
    assert isinstance(scores[f"{group}_undefined"], int)
  text = (trained / "evaluation_val_per_image.csv").read_text()
  rows = list(csv.DictReader(text.splitlines()))
  for name in set(NAMES) - {"ece"}:
    values = [float(row[name]) for row in rows if row[name]]
    mean = np.mean(values) if values else None
    np.testing.assert_allclose(mean, scores[name])
  assert {"hd95_class_1", "nsd_class_1"} <= rows[0].keys()
  for path in ("evaluation_val_reliability.png", "pictures/reliability.png"):
    assert np.asarray(Image.open(trained / path)).std() > 10


def test_rows_are_the_scores_of_what_was_predicted(trained):
  """From the arrays to the columns, by libraries of others."""
  cfg = workdir_lib.read_config(trained)
  source = pipeline.make_source(cfg, "val", trained / "split")
  result = evaluate_on(trained, 1, 3)
  scored = 0
  for i, row in enumerate(result.rows):
    truth, predicted = source[i]["instances"], result.predictions[i]
    objects = topology.components(predicted)
    error, *_ = skimage.metrics.adapted_rand_error(
      truth, objects, ignore_labels=(0,)
    )
    np.testing.assert_allclose(row["rand_error"], error)
    vi = skimage.metrics.variation_of_information(
      truth, objects, ignore_labels=(0,)
    )
    np.testing.assert_allclose(row["vi"], vi.sum())
    masks = truth > 0, predicted > 0
    if all(mask.any() for mask in masks):
      scored += 1
      expected = surface_test.published(*masks, (0.5, 2.0), 1.0)
      ours = [row[name] for name in ("hd95", "asd", "nsd")]
      np.testing.assert_allclose(ours, expected)
  assert scored >= 3


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (8, 8)])
def test_scores_do_not_know_devices_or_batch_size(trained, devices, batch_size):
  expected, got = (
    evaluate_on(trained, 1, 3),
    evaluate_on(trained, devices, batch_size),
  )
  # Probabilities differ in the last bits of float32; thresholds of them may.
  close = {"loss", "ece", "isbi_rand_by_threshold", "isbi_rand_max"}
  for key, value in expected.summary.items():
    if key in close:
      np.testing.assert_allclose(got.summary[key], value, rtol=1e-4)
    else:
      np.testing.assert_equal(got.summary[key], value, err_msg=key)
  np.testing.assert_allclose(got.bins, expected.bins, rtol=1e-4)


def test_the_cost_is_told_and_without_extras_nothing_is(
  tmp_path, capfd, trained
):
  argv = ["--workdir", str(trained), "--mode", "evaluate"]
  assert unet_jax.main.main(argv) == 0
  (line,) = re.findall(
    "extra metrics of 5 images, seconds: .*", capfd.readouterr().err
  )
  for group in schema.EXTRA_METRICS:
    assert re.search(rf"{group} \d+\.\d\d[,;]", line)
  assert (
    unet_jax.main.main(
      [
        *argv,
        "--config.eval.extra_metrics=()",
        "--config.eval.best_metric=dice",
      ]
    )
    == 0
  )
  assert "extra metrics" not in capfd.readouterr().err
  scores = json.loads((trained / "evaluation_val.json").read_text())
  assert not set(NAMES) & scores.keys()


# --- Aggregation --------------------------------------------------------------


def test_undefined_images_are_left_out_and_counted():
  cfg = parse(eval__extra_metrics="surface,instances,rand,vi,warping")
  empty, full = np.zeros((6, 6), int), np.zeros((6, 6), int)
  full[1:4, 1:5] = 1
  source = Arrays(empty, full, full, full)
  summary, rows, bins = score(cfg, source, [empty, full, empty, full])
  assert bins is None
  # Image 0 has nothing to find and nothing found; in image 2 all is missed.
  diagonal = np.hypot(6, 6)
  assert summary["surface_undefined"] == summary["instances_undefined"] == 1
  np.testing.assert_allclose(summary["hd95"], diagonal / 3)
  np.testing.assert_allclose(summary["nsd"], 2 / 3)
  np.testing.assert_allclose(summary["ap"], 2 / 3)
  np.testing.assert_equal(summary["hd95_per_class"], [np.nan, diagonal / 3])
  assert np.isnan(rows[0]["ap"]) and rows[2]["ap"] == 0
  # A truth without objects has no pair of pixels; warping has its answer.
  assert summary["rand_undefined"] == summary["vi_undefined"] == 1
  assert summary["warping_undefined"] == 0
  assert [row["warping_error"] for row in rows] == [0, 0, 1 / 36, 0]
  alone, _, _ = score(cfg, Arrays(empty), [empty])
  assert np.isnan(alone["hd95"]) and alone["surface_undefined"] == 1


def test_the_best_threshold_is_one_for_all_images():
  rows = [
    {"isbi_rand": 0.5, "isbi_info": 1.0, "isbi_rand_by_threshold": [0.9, 0.5]},
    {"isbi_rand": 0.1, "isbi_info": 0.0, "isbi_rand_by_threshold": [0.0, 0.7]},
  ]
  summary = scoring.summarize(rows, ("isbi",))
  assert summary["isbi_rand_by_threshold"] == [0.45, 0.6]
  assert summary["isbi_rand_max"] == 0.6


def test_calibration_adds_up_the_pixels_of_all_images():
  cfg = parse(eval__extra_metrics="calibration")
  small, large = np.ones((1, 2), int), np.zeros((3, 10), int)
  source = Arrays(small, large)
  sure = [np.full((*x.shape, 2), [0.2, 0.8], np.float32) for x in source.labels]
  summary, rows, bins = score(
    cfg, source, [small, large + 1], probabilities=sure
  )
  np.testing.assert_allclose([r["ece"] for r in rows], [0.2, 0.8], rtol=1e-6)
  np.testing.assert_allclose(summary["ece"], 0.8 - 2 / 32, rtol=1e-6)
  assert bins[:, 0].sum() == 32 and bins[:, 2].sum() == 2


@pytest.mark.parametrize("way", ["components", "watershed"])
def test_what_has_weight_0_changes_nothing(way):
  cfg = parse(
    eval__extra_metrics=EVERY,
    eval__instances_from=way,
    eval__boundary_class=2,
    data__num_classes=3,
  )
  rng = np.random.default_rng(0)
  label, prediction = rng.integers(0, 3, (2, 24, 30))
  label[8:16, 8:16] = prediction[7:15, 8:17] = 1
  weight = np.ones((24, 30))
  weight[:, 14:20] = 0
  ids = topology.components(label == 1)

  def of(fill):
    ignored = weight == 0
    probability = rng.random((24, 30, 3)).astype(np.float32)
    probability[~ignored] = np.eye(3, dtype=np.float32)[prediction[~ignored]]
    swap = lambda x: np.where(ignored, fill, x)
    source = Arrays(swap(label), ids=[swap(ids)])
    return score(
      cfg,
      source,
      [swap(prediction)],
      weights=[weight],
      probabilities=[probability],
    )

  expected = of(0)
  assert expected[0]["ap"] > 0
  for fill in (1, 2):
    np.testing.assert_equal(of(fill), expected)


def test_objects_come_from_the_source_else_from_the_label():
  """Two nuclei that touch: the mask alone knows one."""
  label = np.zeros((6, 10), int)
  label[1:5, 1:9] = 1
  ids = np.where(np.arange(10) < 5, 1, 2) * label
  cfg = parse(eval__extra_metrics="instances")
  assert score(cfg, Arrays(label), [label])[0]["ap"] == 1
  assert score(cfg, Arrays(label, ids=[ids]), [label])[0]["ap50"] == 0
  # With a boundary class both sides are grown alike.
  parted = label.copy()
  parted[1:5, 4:6] = 2
  cfg = parse(
    eval__extra_metrics="instances",
    eval__instances_from="watershed",
    eval__boundary_class=2,
    data__num_classes=3,
  )
  assert score(cfg, Arrays(parted), [parted])[0]["ap"] == 1
  assert score(cfg, Arrays(parted, ids=[ids]), [parted])[0]["ap"] == 1


def test_a_membrane_is_a_boundary_and_its_cells_are_the_objects():
  """The classes of ISBI 2012: 0 = membrane, 1 = cell."""
  cfg = parse(
    eval__extra_metrics="isbi,rand",
    eval__boundary_class=0,
    eval__foreground="0",
    data__num_classes=2,
  )
  label = np.ones((12, 20), int)
  label[:, 9:12] = 0
  prediction = np.ones((12, 20), int)
  prediction[:, 7:14] = 0
  summary, _, _ = score(cfg, Arrays(label), [prediction])
  assert summary["isbi_rand"] == summary["isbi_info"] == 1
  assert summary["rand_error"] > 0.1  # The wide membrane is an object there.


@pytest.mark.parametrize("shape", [(40,), (10, 12, 14)])
def test_signals_and_volumes_are_scored(shape):
  """Two objects, one of which moved by a pixel along the first axis."""
  cfg = parse(
    model__dims=len(shape),
    eval__extra_metrics="surface,rand,vi,instances,calibration",
    eval__instances_from="watershed",
    eval__boundary_class=2,
    data__num_classes=3,
    data__crop_size="64",
  )
  label, prediction = np.zeros((2, *shape), int)
  label[1:4] = label[6:9] = 1
  prediction[1:4] = prediction[7:10] = 1
  source = Arrays(label)
  source.spacing = lambda index: (2.0,) * len(shape)
  summary, _, _ = score(cfg, source, [prediction])
  # 2 of 4 pixels shared along the axis: IoU 1/2 is no hit.
  assert (summary["ap50"], summary["f1"]) == (1 / 3, 1 / 2)
  assert summary["hd95"] == 2.0  # A pixel, in the data's unit.
  assert 0 < summary["rand_error"] < 1
  np.testing.assert_allclose(summary["ece"], 2 / shape[0])
  perfect, _, _ = score(cfg, source, [label])
  assert (perfect["ap"], perfect["vi"], perfect["nsd"]) == (1, 0, 1)


def test_on_real_membranes(data_root):
  """A slice of ISBI 2012 against itself, and with thicker membranes."""
  cfg = parse(
    data__source="folder",
    data__dir=data_root / "isbi2012",
    data__num_classes=2,
    eval__foreground="0",
    eval__boundary_class=0,
    eval__extra_metrics="isbi,rand,warping,instances,surface",
  )
  source = pipeline.make_source(cfg, "val", None)
  label = source[0]["label"]
  assert len(np.unique(source.instances(0))) > 50

  def of(prediction):
    extra = scoring.ExtraScores(cfg, source)
    extra.add(0, label, np.ones(label.shape), prediction, np.eye(2)[prediction])
    return extra._rows[0]

  same = of(label)
  assert (same["rand_error"], same["warping_error"], same["ap"]) == (0, 0, 1)
  assert (same["isbi_rand"], same["hd95"]) == (1, 0)
  # A pixel more on each side: cells that are no thinner stay as they were.
  thick = of(ndimage.binary_erosion(label, np.ones((3, 3)), border_value=1) * 1)
  assert thick["isbi_rand"] > 0.98 and thick["warping_error"] < 0.005
  assert thick["hd95"] <= 2 and thick["ap"] < 0.9
  merged = of(np.ones_like(label))
  assert merged["isbi_rand"] < 0.3


# --- Settings -----------------------------------------------------------------


def test_the_table_names_what_each_score_gives():
  label = np.zeros((8, 8), int)
  label[2:5, 2:5] = 1
  for group, names in schema.EXTRA_METRICS.items():
    only = parse(eval__extra_metrics=group)
    summary, _, _ = score(only, Arrays(label), [label])
    assert set(names) <= summary.keys()


def test_a_perfect_prediction_is_best_in_the_direction_said():
  """Against one that merges two objects, loses a third and invents another."""
  cfg = parse(eval__extra_metrics=EVERY)
  label, other = np.zeros((2, 14, 14), int)
  label[1:5, 1:5] = label[1:5, 6:10] = label[9:12, 1:5] = 1
  other[1:5, 1:10] = other[8:13, 9:13] = 1
  summary, _, _ = score(cfg, Arrays(label), [label])
  worse, _, _ = score(cfg, Arrays(label), [other])
  for name in {*NAMES, "isbi_rand_max"} - {"rand_recall", "vi_split"}:
    assert evaluate.score(summary, name) > evaluate.score(worse, name), name
  split = label.copy()
  split[1:5, 3] = 0
  worse, _, _ = score(cfg, Arrays(label), [split])
  for name in ("rand_recall", "vi_split"):
    assert evaluate.score(summary, name) > evaluate.score(worse, name), name


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"extra_metrics": "surfaces"}, "nearest: 'surface'"),
    ({"best_metric": "hd95"}, "add 'surface' to eval.extra_metrics"),
    ({"extra_metrics": "rand,rand"}, "names one twice"),
    ({"instances_from": "watershed"}, "grows objects over eval.boundary_class"),
    ({"boundary_class": 2}, "eval.boundary_class=2: no such class; nearest: 1"),
    ({"instance_classes": "1,3"}, "no such class; nearest: 1"),
    (
      {"instance_classes": "1", "boundary_class": 1},
      "is also in eval.instance_classes",
    ),
    ({"spacing": "1,1,2"}, "give 2 entries"),
    ({"spacing": "0,1"}, "too small"),
  ],
)
def test_settings_that_do_not_fit_are_refused(fields, words):
  with pytest.raises(UserError) as error:
    parse(**{f"eval__{key}": value for key, value in fields.items()})
  assert words in str(error.value)


def test_topology_of_volumes_is_refused():
  with pytest.raises(UserError, match="'warping' is defined for two axes"):
    parse(model__dims=3, eval__extra_metrics="warping")
