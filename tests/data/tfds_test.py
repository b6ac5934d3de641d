"""Prepared TFDS sets: our builders' and others', read without TensorFlow."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from unet_jax import config, main
from unet_jax.data import pipeline
from unet_jax.data.folder import FolderSource
from unet_jax.data.tfds import TfdsSource
from unet_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets", reason="extra [tfds]")

from unet_jax.data import tfds_builders  # noqa: E402

# TFDS leaves its progress bars and files to the garbage collector.
pytestmark = [
  pytest.mark.filterwarnings("ignore::ResourceWarning"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def make_config(data_dir, name, **fields):
  made = config.default_config()
  made.data.source = "tfds"
  made.data.dir = str(data_dir)
  made.data.name = name
  for key, value in fields.items():
    made.data[key] = value
  return config.parse(made)


def save(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)


def to_bytes(array, form):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, form)
  return buffer.getvalue()


def assert_same(source, other):
  assert len(source) == len(other)
  for i in range(len(source)):
    a, b = source[i], other[i]
    assert source.size(i) == a["label"].shape
    np.testing.assert_array_equal(source.image(i), a["image"])
    for key in ("image", "label", "weight"):
      np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize(
  "name, channels, num",
  [
    ("isbi2012", 1, 4),
    ("dsb2018", 3, 6),
    pytest.param("dsb2018", 3, 99, marks=pytest.mark.slow),
  ],
)
def test_real_sets_are_what_their_folders_are(
  data_root, tmp_path, name, channels, num
):
  """With the first `num` examples of each split."""
  folder = tmp_path / "folder"
  for split in (data_root / name).glob("*.txt"):
    stems = split.read_text().split()[:num]
    for kind in ("images", "masks", "instances"):
      (folder / kind).mkdir(parents=True, exist_ok=True)
      for stem in stems:
        shutil.copy(data_root / name / kind / f"{stem}.png", folder / kind)
    (folder / split.name).write_text("\n".join(stems))
  tfds_builders.prepare(name, str(folder), str(tmp_path))
  cfg = make_config(tmp_path, name, channels=channels)
  same = config.default_config()
  same.data.source, same.data.dir = "folder", str(folder)
  same.data.channels = channels
  same = config.parse(same)
  found = TfdsSource.list_splits(cfg, None)
  assert found == FolderSource.list_splits(same, tmp_path)
  assert_same(TfdsSource(cfg, "val", None), FolderSource(same, "val", tmp_path))
  val = TfdsSource(cfg, "val", None)
  stem = (folder / "val.txt").read_text().split()[1]
  stored = np.asarray(Image.open(folder / "instances" / f"{stem}.png"))
  np.testing.assert_array_equal(val.instances(1), stored)
  assert "tensorflow" not in sys.modules
  # As a user of TFDS reads them.
  skip = {"instances": tfds.decode.SkipDecoding()}
  builder = tfds.builder(name, data_dir=str(tmp_path))
  examples = builder.as_data_source("val", decoders=skip)
  names = (folder / "val.txt").read_text().split()
  for example, stem in zip(examples, names, strict=True):
    assert example["name"].decode() == stem
    for key, kind in (("mask", "masks"), ("instances", "instances")):
      mine = example[key]
      if key == "instances":
        mine = np.asarray(Image.open(io.BytesIO(mine)))
      stored = np.asarray(Image.open(folder / kind / f"{stem}.png"))
      np.testing.assert_array_equal(np.squeeze(mine), stored)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A folder of grey and colour files and the set made of it."""
  root = tmp_path_factory.mktemp("made")
  folder, rng = root / "folder", np.random.default_rng(0)
  for i in range(10):
    shape = (20 + i, 17) if i % 2 else (20 + i, 17, 3)
    suffix = "bmp" if i % 3 else "png"
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    save(folder / "images" / f"s{i}.{suffix}", image)
    mask = rng.integers(0, 2, (20 + i, 17), dtype=np.uint8) * 255
    save(folder / "masks" / f"s{i}.png", mask)
  tfds_builders.prepare("segmentation_folder/rgb", str(folder), str(root))
  return root


def source_of(made, split="train", **fields):
  fields = {"channels": 3, "mask_values": (0, 255), **fields}
  cfg = make_config(made, "segmentation_folder/rgb", **fields)
  return TfdsSource(cfg, split, None)


def test_any_folder_becomes_a_set(made, tmp_path):
  plain = config.default_config()
  plain.data.source, plain.data.dir = "folder", str(made / "folder")
  plain.data.channels, plain.data.mask_values = 3, (0, 255)
  plain.data.val_fraction = plain.data.test_fraction = 0.0
  cfg = config.parse(plain)
  assert_same(source_of(made), FolderSource(cfg, "train", tmp_path))


def test_16_bit_greys_keep_their_values(tmp_path):
  image = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800
  save(tmp_path / "folder" / "images" / "a.png", image)
  save(tmp_path / "folder" / "masks" / "a.png", np.eye(5, 7, dtype=np.uint8))
  name = "segmentation_folder/grey16"
  tfds_builders.prepare(name, str(tmp_path / "folder"), str(tmp_path))
  source = TfdsSource(make_config(tmp_path, name), "train", None)
  expected = image.astype(np.float32) / np.float32(65535)
  np.testing.assert_array_equal(source[0]["image"][..., 0], expected)


def test_sub_splits_are_blocks_in_order(made):
  whole = source_of(made)
  sizes = [whole.size(i) for i in range(10)]
  parts = {"train": "train[:60%]", "val": "train[60%:]", "test": "train[2:4]"}
  fields = {f"tfds_{k}": v for k, v in parts.items()}
  found = {s: source_of(made, s, **fields) for s in parts}
  read = {s: [x.size(i) for i in range(len(x))] for s, x in found.items()}
  assert read == {"train": sizes[:6], "val": sizes[6:], "test": sizes[2:4]}
  assert found["val"].names[0] == "val_000000"
  cfg = make_config(made, "segmentation_folder/rgb", **fields)
  assert TfdsSource.list_splits(cfg, None) == ["train", "val", "test"]
  cfg = make_config(made, "segmentation_folder/rgb")
  assert TfdsSource.list_splits(cfg, None) == ["train"]


def test_hosts_share_a_batch_and_threads_change_nothing(made):
  source = source_of(made)
  fields = {"channels": 3, "mask_values": (0, 255), "crop_size": (16,)}
  cfg = make_config(made, "segmentation_folder/rgb", **fields)
  normalization = {"mode": "none", "mean": None, "std": None}

  def batches(host, num_hosts):
    made = pipeline.train_batches(
      source,
      normalization,
      cfg=cfg,
      first_step=0,
      end_step=3,
      host=host,
      num_hosts=num_hosts,
    )
    return list(made)

  alone, shared = batches(0, 1), [batches(h, 2) for h in range(2)]
  for step, batch in enumerate(alone):
    for key, value in batch.items():
      parts = [own[step][key] for own in shared]
      np.testing.assert_array_equal(np.concatenate(parts), value)


def refused(call, *words):
  with pytest.raises(UserError) as error:
    call()
  assert "\n" not in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_what_is_not_there_is_said(made, tmp_path):
  refused(lambda: source_of(made, "val"), "tfds_val='val'", "has train:")
  refused(lambda: source_of(made, tfds_train=""), "tfds_train is empty")
  refused(lambda: source_of(made, tfds_train="train[:1%]"), "no example")
  refused(lambda: source_of(made, mask_feature="name"), "no mask 'name'")
  nothing = make_config(tmp_path, "pets")
  refused(lambda: TfdsSource(nothing, "train", None), "pets (nothing is there)")
  other = make_config(made, "segmentation_folder/rgb:2.0.0")
  refused(lambda: TfdsSource(other, "train", None), "there: 1.0.0")
  outside = make_config(tmp_path, "../pets")
  refused(lambda: TfdsSource(outside, "train", None), "give NAME")
  refused(lambda: source_of(made, mask_values=())[0], "label ids 255", "mask")
  refused(
    lambda: tfds_builders.prepare("cats", str(tmp_path), str(tmp_path)), "cats"
  )
  refused(lambda: make_config(made, ""), "data.name is empty")


def test_the_latest_version_is_taken(made, tmp_path):
  stored = made / "segmentation_folder" / "rgb" / "1.0.0"
  for version in ("1.9.0", "1.10.0"):
    (tmp_path / "a" / version).mkdir(parents=True)
    for path in stored.iterdir():
      (tmp_path / "a" / version / path.name).write_bytes(path.read_bytes())
  fields = {"channels": 3, "mask_values": (0, 255)}
  source = TfdsSource(make_config(tmp_path, "a", **fields), "train", None)
  assert "1.10.0" in source._where
  cfg = make_config(tmp_path, "a:1.9.0", **fields)
  assert "1.9.0" in TfdsSource(cfg, "train", None)._where


def test_a_format_that_needs_tensorflow_is_refused(made, tmp_path):
  stored = made / "segmentation_folder" / "rgb" / "1.0.0"
  folder = tmp_path / "a" / "1.0.0"
  folder.mkdir(parents=True)
  for path in stored.glob("*.json"):
    text = path.read_text().replace("array_record", "tfrecord")
    (folder / path.name).write_text(text)
  cfg = make_config(tmp_path, "a")
  refused(lambda: TfdsSource(cfg, "train", None), "prepared as tfrecord")


def test_without_the_extra_one_line_says_so(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  cfg = make_config(tmp_path, "pets")
  refused(
    lambda: TfdsSource(cfg, "train", None), "pip install 'unet_jax[tfds]'"
  )


def test_other_sources_do_not_import_it():
  code = (
    "import sys, unet_jax.data.pipeline, unet_jax.train;"
    "assert 'tensorflow_datasets' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_training_and_checking_by_the_command_line(made, tmp_path):
  flags = [
    "--config.data.source=tfds",
    f"--config.data.dir={made}",
    "--config.data.name=segmentation_folder/rgb",
    "--config.data.mask_values=0,255",
    "--config.data.channels=3",
    "--config.data.tfds_train=train[:80%]",
    "--config.data.tfds_val=train[80%:]",
  ]
  common = ["--config", "tests/tiny.py", *flags]
  argv = [*common, "--workdir", str(tmp_path / "run")]
  argv += ["--config.train.num_steps=2", "--config.train.num_pictures=0"]
  argv += ["--config.optimizer.warmup_steps=0", "--config.data.pad_multiple=32"]
  assert main.main(argv) == 0
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  last = json.loads(lines[-1])
  assert last["split"] == "val" and last["num_images"] == 2
  argv = [*common, "--workdir", str(tmp_path / "check"), "--mode", "check_data"]
  assert main.main(argv) == 0
  report = json.loads((tmp_path / "check" / "data_report.json").read_text())
  assert report["splits"]["train"]["usable"] == 8
  assert "--config.data.mask_values=0,255" in report["proposal"]["line"]
  # The same example in two splits is a leak.
  argv = [*common, "--config.data.tfds_val=train[70%:]", "--mode", "check_data"]
  assert main.main([*argv, "--workdir", str(tmp_path / "leak")]) == 0
  report = json.loads((tmp_path / "leak" / "data_report.json").read_text())
  assert report["leaks"]["crossing"] == 1


# --- The layout of the Oxford pets --------------------------------------------


class Pets(tfds.core.GeneratorBasedBuilder):
  """Features and values of oxford_iiit_pet, from arrays."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    image = tfds.features.Image
    features = {
      "image": image(encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(names=["Abyssinian", "beagle"]),
      "file_name": tfds.features.Text(),
      "segmentation_mask": image(shape=(None, None, 1), use_colormap=True),
      "head_bbox": tfds.features.BBoxFeature(),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(10)}

  def _generate_examples(self, count):
    for i in range(count):
      image, trimap = draw_pet(i)
      yield (
        i,
        {
          "image": io.BytesIO(to_bytes(image, "JPEG")),
          "label": i % 2,
          "file_name": f"pet_{i}.jpg",
          "segmentation_mask": io.BytesIO(to_bytes(trimap, "PNG")),
          "head_bbox": tfds.features.BBox(0.0, 0.0, 0.0, 0.0),
        },
      )


def draw_pet(seed):
  """Image uint8 [H, W, 3] and trimap of 1 = pet, 2 = around, 3 = border."""
  size = 40 + seed, 50
  y, x = np.indices(size)
  radius = np.hypot(y - size[0] / 2, x - 25)
  trimap = np.where(radius < 10, 1, np.where(radius < 13, 3, 2))
  image = np.where(radius < 11, 200, 60 + seed)[..., None] + np.zeros(3)
  return image.astype(np.uint8), trimap.astype(np.uint8)


def read_pets(data_dir, name, border):
  made = config.load_config(f"configs/oxford_pets.py:{border}")
  made.data.dir, made.data.name = str(data_dir), name
  cfg = config.parse(made)
  return {s: TfdsSource(cfg, s, None) for s in ("train", "val")}


@pytest.mark.parametrize("border", ["ignore", "class"])
def test_the_border_of_a_pet(tmp_path, border):
  builder = Pets(data_dir=str(tmp_path), file_format="array_record")
  builder.download_and_prepare()
  sources = read_pets(tmp_path, "pets", border)
  assert [len(s) for s in sources.values()] == [8, 2]
  trimaps = {t.shape: t for t in (draw_pet(i)[1] for i in range(10))}
  for source in sources.values():
    for i in range(len(source)):
      example, trimap = source[i], trimaps[source.size(i)]
      expected = np.select([trimap == 1, trimap == 3], [1, 2])
      if border == "ignore":
        np.testing.assert_array_equal(example["weight"], trimap != 3)
        expected[trimap == 3] = 0
      else:
        assert example["weight"].all()
      np.testing.assert_array_equal(example["label"], expected)
      assert example["image"].shape == (*trimap.shape, 3)


def make_archives(root, names):
  """images.tar.gz and annotations.tar.gz, which are plain tar, as Oxford's."""
  stored = {"images": {}, "annotations": {}}
  for i, name in enumerate(names):
    image, trimap = draw_pet(i)
    stored["images"][f"images/{name}.jpg"] = to_bytes(image, "JPEG")
    path = f"annotations/trimaps/{name}.png"
    stored["annotations"][path] = to_bytes(trimap, "PNG")
  lines = "".join(f"{name} 1 1 1\n" for name in names).encode()
  for split in ("trainval", "test"):
    stored["annotations"][f"annotations/{split}.txt"] = lines
  for kind, files in stored.items():
    with tarfile.open(root / f"{kind}.tar.gz", "w") as archive:
      for path, data in files.items():
        entry = tarfile.TarInfo(path)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))


def prepare_oxford(tmp_path, monkeypatch, names):
  """By TFDS's own builder, its downloads taken from archives here."""
  make_archives(tmp_path, names)

  def download_and_extract(self, urls):
    found = {k: tmp_path / url.rpartition("/")[2] for k, url in urls.items()}
    if has_tensorflow:
      return self.extract(found)
    for kind, path in found.items():  # TFDS unpacks by TensorFlow.
      with tarfile.open(path) as archive:
        archive.extractall(tmp_path / kind, filter="data")
    return {kind: tmp_path / kind for kind in found}

  has_tensorflow = importlib.util.find_spec("tensorflow") is not None
  manager = tfds.download.DownloadManager
  monkeypatch.setattr(manager, "download_and_extract", download_and_extract)
  cls = tfds.builder_cls("oxford_iiit_pet")
  builder = cls(data_dir=str(tmp_path / "tfds"), file_format="array_record")
  builder.download_and_prepare()
  return read_pets(tmp_path / "tfds", "oxford_iiit_pet", "ignore")


def test_the_builder_of_tfds_itself(tmp_path, monkeypatch):
  names = [f"Bengal_{i}" for i in range(10)]
  sources = prepare_oxford(tmp_path, monkeypatch, names)
  assert [len(s) for s in sources.values()] == [8, 2]
  label = sources["train"][0]["label"]
  trimap = next(
    t for t in (draw_pet(i)[1] for i in range(10)) if t.shape == label.shape
  )
  np.testing.assert_array_equal(label, trimap == 1)


def test_the_builder_of_tfds_and_its_corrupt_samples(tmp_path, monkeypatch):
  """TFDS encodes these anew, by TensorFlow."""
  if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("no tensorflow; pip install 'unet_jax[tf]'")
  names = ["beagle_116", *(f"Bengal_{i}" for i in range(9))]
  sources = prepare_oxford(tmp_path, monkeypatch, names)
  assert sum(map(len, sources.values())) == 10
  for source in sources.values():
    for i in range(len(source)):
      assert source[i]["image"].shape[-1] == 3


def test_our_builders_by_tfds_load(data_root, tmp_path):
  """TFDS reads array_record by data_source alone, so load prepares its own."""
  if importlib.util.find_spec("tensorflow") is None:
    pytest.skip("no tensorflow; pip install 'unet_jax[tf]'")
  folder = data_root / "isbi2012"
  manual = tfds.download.DownloadConfig(manual_dir=str(folder))
  examples = tfds.load(
    "isbi2012",
    split="val",
    data_dir=str(tmp_path),
    download_and_prepare_kwargs={"download_config": manual},
  )
  names = []
  for example in examples.as_numpy_iterator():
    names.append(example["name"].decode())
    for key, kind in (("image", "images"), ("mask", "masks")):
      stored = np.asarray(Image.open(folder / kind / f"{names[-1]}.png"))
      np.testing.assert_array_equal(example[key][..., 0], stored)
    path = folder / "instances" / f"{names[-1]}.png"
    stored = np.asarray(Image.open(path))
    np.testing.assert_array_equal(example["instances"][..., 0], stored)
  assert names == (folder / "val.txt").read_text().split()
