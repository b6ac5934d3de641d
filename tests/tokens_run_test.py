"""Sentences from training to prediction, as a user would tag them."""

import contextlib
import io
import json
import re
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

from tests import runs
from unet_jax import config as config_lib
from unet_jax import predict, program
from unet_jax import workdir as workdir_lib
from unet_jax.data import pipeline
from unet_jax.main import main
from unet_jax.runtime import parallel

STEPS = 16
WORDS = {
  "Ann": "B-PER",
  "Lee": "I-PER",
  "Rome": "B-LOC",
  "sees": "O",
  "and": "O",
  ".": "O",
}


def write_data(root, seed=0):
  """Sentences whose tags follow from the words: BIO, of 1 to 30 tokens."""
  rng = np.random.default_rng(seed)
  for split, count in (("train", 40), ("val", 25)):
    blocks = []
    for _ in range(count):
      words = rng.choice(list(WORDS), rng.integers(1, 31))
      blocks.append("".join(f"{w}\t{WORDS[w]}\n" for w in words))
    (root / f"{split}.tsv").write_text("\n".join(blocks))


def flags(root, **others):
  fields = {
    "model.dims": 1,
    "model.widths": "4,6",
    "model.embedding": "both",
    "model.word_width": 6,
    "model.character_width": 3,
    "model.character_features": 4,
    "model.word_dropout": 0.1,
    "model.embedding_dropout": 0.1,
    "data.source": "tokens",
    "data.dir": root,
    "data.normalize": "none",
    "data.num_classes": 4,
    "data.num_words": 12,
    "data.num_characters": 30,
    "data.max_characters": 4,
    "data.crop_size": 16,
    "data.buckets": 8,
    "augment.flip": "false",
    "augment.turn": "false",
    "augment.brightness": 0,
    "loss.terms": "cross_entropy",
    "eval.best_metric": "entity_f1",
    "train.num_steps": STEPS,
    **{k.replace("__", "."): v for k, v in others.items()},
  }
  return [f"--config.{key}={value}" for key, value in fields.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  root = tmp_path_factory.mktemp("sentences")
  write_data(root)
  return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
  workdir, said = tmp_path_factory.mktemp("trained"), io.StringIO()
  with contextlib.redirect_stderr(said):
    assert main(runs.arguments(workdir, *flags(data))) == 0
  assert " sentences/s " in said.getvalue() and "images" not in said.getvalue()
  return workdir


def pairs_of(path):
  """Sentences of a table as lists of (form, tag)."""
  blocks = path.read_text().strip("\n").split("\n\n")
  return [[tuple(x.split("\t")) for x in b.split("\n")] for b in blocks]


def brute_force_f1(truth, found):
  """Of well-formed or ill-formed BIO text, by a regular expression."""

  def read(tags):
    # A type after nothing or after another type begins, as conlleval says.
    fixed = []
    for before, tag in zip(["O", *tags], tags, strict=False):
      starts = tag[0] == "I" and before[1:] != tag[1:]
      fixed.append("B" + tag[1:] if starts else tag)
    text = " ".join(fixed) + " "
    matches = re.finditer(r"B-(\w+) (?:I-\1 )*", text)
    return {(text[: m.start()].count(" "), m.group()) for m in matches}

  sums = np.zeros(3)
  for pair in zip(truth, found, strict=True):
    a, b = map(read, pair)
    sums += len(a & b), len(a), len(b)
  return 2 * sums[0] / (sums[1] + sums[2])


def test_what_is_predicted_is_what_was_scored(trained, data, tmp_path, capsys):
  assert main(runs.arguments(trained, mode="evaluate")[2:]) == 0
  assert "25 sentences: accuracy" in capsys.readouterr().err
  scores = json.loads((trained / "evaluation_val.json").read_text())
  assert scores["accuracy"] == scores["pixel_accuracy"]
  argv = ["--workdir", trained, "--mode", "predict", "--input"]
  argv += [data / "val.tsv", "--output", tmp_path]
  argv += ["--config.predict.probability=true"]
  assert main(list(map(str, argv))) == 0
  truth, found = map(pairs_of, (data / "val.tsv", tmp_path / "val_tags.tsv"))
  assert [[f for f, _ in s] for s in truth] == [
    [f for f, _ in s] for s in found
  ]
  right = [
    a == b for s, t in zip(truth, found, strict=True)
    for a, b in zip(s, t, strict=True)
  ]  # fmt: skip
  assert np.mean(right) == pytest.approx(scores["accuracy"], abs=1e-12)
  tags = [
    [[t for _, t in s] for s in sentences] for sentences in (truth, found)
  ]
  expected = brute_force_f1(*tags)
  assert scores["entity_f1"] == pytest.approx(expected, abs=1e-12)
  assert 0.1 < scores["accuracy"] < 1, "a test of one side only"
  probability = np.load(tmp_path / "val_probability.npy")
  names = ["B-LOC", "B-PER", "I-PER", "O"]
  best = [names[k] for k in probability.argmax(-1)]
  assert best == [tag for sentence in tags[1] for tag in sentence]
  np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-5)


def test_text_a_folder_and_the_split_itself_can_be_tagged(trained, tmp_path):
  folder, out = tmp_path / "in", tmp_path / "out"
  folder.mkdir()
  (folder / "a.txt").write_text("Ann sees Rome .\n\nLee and Zoe\n")
  (folder / "b.tsv").write_text("Ann\nsees\n\nRome\n")
  common = ["--workdir", str(trained), "--mode", "predict"]
  argv = [*common, "--input", str(folder), "--output", str(out)]
  assert main(argv) == 0
  forms = [[f for f, _ in s] for s in pairs_of(out / "a_tags.tsv")]
  assert forms == ["Ann sees Rome .".split(), "Lee and Zoe".split()]
  tagger = predict.load_predictor(trained)
  for sentence in pairs_of(out / "a_tags.tsv") + pairs_of(out / "b_tags.tsv"):
    words, tags = zip(*sentence, strict=True)
    assert tagger(words) == tagger(" ".join(words)) == list(tags)
  assert tagger([]) == []
  assert main([*common, "--output", str(out)]) == 0
  assert len(pairs_of(out / "val_tags.tsv")) == 25


def test_a_bad_file_is_named_and_the_others_go_on(trained, tmp_path, capsys):
  (tmp_path / "a.tsv").write_text("Ann\n")
  (tmp_path / "b.tsv").write_bytes(b"Ann\n\xff\n")
  argv = ["--workdir", trained, "--mode", "predict", "--input", tmp_path]
  argv += ["--output", tmp_path / "out"]
  assert main(list(map(str, argv))) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith("error: 1 of 2 files") and "b.tsv:2" in error
  assert (tmp_path / "out" / "a_tags.tsv").exists()


def test_a_run_that_was_cut_goes_on_to_the_bit(trained, data, tmp_path):
  """In two pieces through the same buckets; the second reads a vocabulary."""
  argv = runs.arguments(tmp_path, *flags(data))
  process = runs.start(*argv, devices=8)
  while process.poll() is None:
    if (tmp_path / "checkpoints" / "6").exists():
      process.kill()
    time.sleep(0.001)
  assert runs.finish(process)[0] == -signal.SIGKILL
  assert main(argv) == 0
  runs.assert_same_run(trained, tmp_path, STEPS)


def test_weights_of_another_vocabulary_are_refused(trained, tmp_path, capsys):
  write_data(tmp_path, seed=1)
  with open(tmp_path / "train.tsv", "a") as file:
    file.write("\nRome\tB-LOC\n" * 200)
  more = {"train.init_from": trained, "train.num_steps": 2}
  argv = runs.arguments(tmp_path / "work", *flags(tmp_path, **more))
  assert main(argv) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert "has other words" in error
  assert "add */embed/words/* to config.train.init_exclude" in error


@pytest.mark.parametrize("mode", ["evaluate", "predict"])
def test_an_ensemble_of_vocabularies_is_refused(trained, capsys, mode):
  argv = ["--workdir", trained, "--mode", mode, "--ensemble", trained]
  assert main([str(x) for x in argv]) == 2
  assert "number words each" in capsys.readouterr().err.splitlines()[-1]


def test_the_pictures_show_words_and_wrong_tags(trained):
  with Image.open(trained / "pictures" / f"step_{STEPS}.png") as image:
    pixels = np.asarray(image)
  vermillion = (pixels == (213, 94, 0)).all(-1)
  scores = runs.read_metrics(trained)[-1]
  assert scores["accuracy"] < 1 and vermillion.any()


def test_a_mistake_in_the_data_ends_before_a_device_is_touched(tmp_path):
  write_data(tmp_path)
  with open(tmp_path / "val.tsv", "a") as file:
    file.write("\nAnn\tB-ORG\n")
  argv = runs.arguments(tmp_path / "work", *flags(tmp_path))
  status, output = runs.finish(runs.start(*argv))
  lines = output.strip().splitlines()
  number = (tmp_path / "val.tsv").read_text().count("\n")
  assert status == 2 and len(lines) == 1
  assert lines[0].startswith(f"error: {tmp_path / 'val.tsv'}:{number}: tag")


@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_eight_devices_are_one(data, tmp_path, strategy):
  """A step of one bucket, without what is random, on 8 devices and on 1."""
  config = config_lib.load_config(runs.CONFIG)
  quiet = {"model__word_dropout": 0, "model__embedding_dropout": 0}
  quiet |= {"optimizer__name": "sgd", "parallel__strategy": strategy}
  for flag in flags(data, **quiet):
    key, _, text = flag.removeprefix("--config.").partition("=")
    config_lib.override(config, key, text)
  config.data.buckets = ()
  cfg = config_lib.parse(config)
  source = pipeline.make_source(cfg, "train", tmp_path)
  normal = {"mode": "none", "mean": None, "std": None}
  (batch,) = pipeline.train_batches(
    source, normal, cfg=cfg, first_step=0, end_step=1
  )
  results = []
  for count in (1, 8):
    mesh = parallel.make_mesh(devices=jax.devices()[:count])
    compiled = program.compile_train_step(cfg, mesh)
    step = program.make_executor(cfg, mesh, compiled)
    state = workdir_lib.init_state(cfg, mesh)
    arrays = program.make_put(cfg, mesh)(batch)
    after, sums = step(state, arrays, program.make_rng(cfg, mesh))
    results.append(jax.device_get((after.params, after.batch_stats, sums.loss)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    *results,
  )
