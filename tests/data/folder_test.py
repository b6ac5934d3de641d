"""Folders on disk: what reads, what splits, and every way to be wrong."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from unet_jax.data import decode
from unet_jax.data.folder import FolderSource, check_source
from unet_jax.data.normalize import fit_normalization
from unet_jax.errors import UserError
from unet_jax.schema import Config, DataConfig, ModelConfig


def write(root, stem, *, image=None, mask=None, suffix="png"):
  rng = np.random.default_rng(len(stem))
  image = rng.integers(0, 256, (6, 5)) if image is None else image
  mask = rng.integers(0, 2, (6, 5)) if mask is None else mask
  for kind, array in (("images", image), ("masks", mask)):
    (root / kind).mkdir(exist_ok=True)
    path = root / kind / f"{stem}.{suffix}"
    if suffix == "npy":
      np.save(path, array)
    else:
      Image.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
  folder = tmp_path / "data"
  folder.mkdir()
  for i in range(20):
    write(folder, f"im{i:02d}")
  return folder


def make_config(root, *, seed=0, dims=2, **fields):
  data = dataclasses.replace(DataConfig(), dir=str(root), **fields)
  return Config(seed=seed, model=ModelConfig(dims=dims), data=data)


def make(root, split="train", *, work="work", **fields):
  return FolderSource(make_config(root, **fields), split, root.parent / work)


def list_splits(root, **fields):
  cfg = make_config(root, **fields)
  return FolderSource.list_splits(cfg, root.parent / "work")


def refused(call, *words):
  with pytest.raises(UserError) as error:
    call()
  assert "\n" not in str(error.value)
  for word in words:
    assert str(word) in str(error.value)


def test_examples_are_the_files(root):
  image = np.arange(30).reshape(6, 5) * 8
  mask = np.arange(30).reshape(6, 5) % 3
  write(root, "x.y", image=image, mask=mask)
  (root / "images" / ".hidden.png").write_bytes(b"")
  (root / "train.txt").write_text("\ufeffim03\r\n\nx.y\r\n", encoding="utf-8")
  source = make(root, num_classes=3)
  assert source.names == ["im03", "x.y"] and len(source) == 2
  example = source[1]
  np.testing.assert_allclose(example["image"][..., 0], image / 255, rtol=1e-6)
  np.testing.assert_array_equal(example["label"], mask)
  assert (example["weight"] == 1).all()
  kinds = {k: a.dtype.name for k, a in example.items()}
  assert kinds == {"image": "float32", "label": "int32", "weight": "float32"}
  assert source.size(1) == (6, 5)


def test_objects_are_read_where_they_are(root):
  ids = np.arange(30, dtype=np.uint16).reshape(6, 5) * 2000
  (root / "instances").mkdir()
  Image.fromarray(ids).save(root / "instances" / "im03.png")
  Image.fromarray(ids[:, :4]).save(root / "instances" / "im04.png")
  (root / "train.txt").write_text("im02\nim03\nim04\n")
  source = make(root)
  assert source.instances(0) is None
  got = source.instances(1)
  assert got.dtype == np.int32
  np.testing.assert_array_equal(got, ids)
  refused(lambda: source.instances(2), "instances/im04.png is 6 x 4")


def test_images_are_read_without_their_masks(root, monkeypatch):
  source = make(root)
  images = [source[i]["image"] for i in range(len(source))]

  def read_mask(*_, **__):
    raise AssertionError("read a mask")

  monkeypatch.setattr(decode, "read_mask", read_mask)
  for i, image in enumerate(images):
    np.testing.assert_array_equal(source.image(i), image)
  fitted = fit_normalization(source, "dataset")
  np.testing.assert_allclose(fitted["mean"], np.mean(images), rtol=1e-6)


@pytest.mark.parametrize("dims", [1, 3])
def test_npy_of_other_ranks(tmp_path, dims):
  rng = np.random.default_rng(0)
  root, size = tmp_path / "data", (7, 6, 5)[:dims]
  root.mkdir()
  image, mask = rng.normal(size=(*size, 2)), rng.integers(0, 2, size)
  write(root, "a", image=image, mask=mask, suffix="npy")
  source = make(root, dims=dims, channels=2)
  check_source(source, 1)
  np.testing.assert_array_equal(source[0]["image"], image.astype(np.float32))
  np.testing.assert_array_equal(source[0]["label"], mask)


def test_seeded_split_is_kept_and_stays_out_of_the_data(root):
  work = root.parent / "deep" / "work"
  before = sorted(root.rglob("*"))
  read = lambda: {
    s: make(root, s, work=work).names for s in ("val", "train", "test")
  }
  splits = read()
  assert [len(splits[s]) for s in ("train", "val", "test")] == [14, 3, 3]
  everything = sorted(s for names in splits.values() for s in names)
  assert everything == [f"im{i:02d}" for i in range(20)]
  assert sorted(root.rglob("*")) == before
  assert sorted(p.name for p in work.iterdir()) == [
    "test.txt",
    "train.txt",
    "val.txt",
  ]
  # Another seed splits anew; the same seed alike; more files change nothing.
  other = make(root, "val", work="other", seed=1)
  same = make(root, "val", work="same")
  assert other.names != splits["val"] == same.names
  write(root, "im99")
  assert read() == splits


@pytest.mark.parametrize("num", [1, 2, 3, 4, 7])
def test_small_folders_split(tmp_path, num):
  root = tmp_path / "data"
  root.mkdir()
  for i in range(num):
    write(root, f"im{i}")
  counts = {"val": 1, "test": 1} if num >= 3 else {}
  assert len(make(root).names) == num - sum(counts.values())
  for split in ("val", "test"):
    if split in counts:
      assert len(make(root, split).names) == 1
    else:
      refused(
        lambda s=split: make(root, s), f"{split}.txt", "empty", "3 images"
      )
  assert list_splits(root) == ["train", *counts]


def test_given_splits_are_never_completed(root):
  (root / "train.txt").write_text("im00\n")
  (root / "val.txt").write_text("")
  refused(lambda: make(root, "test"), "train.txt, val.txt", "no test.txt")
  refused(lambda: make(root, "val"), root / "val.txt", "empty")
  assert list_splits(root) == ["train"]
  assert not (root.parent / "work").exists()


def test_a_split_of_no_share_is_refused_and_not_listed(root):
  assert list_splits(root, test_fraction=0.0) == ["train", "val"]
  refused(lambda: make(root, "test"), "test_fraction above 0")


def test_splits_share_no_stem(root):
  (root / "train.txt").write_text("im00\nim01\n")
  (root / "val.txt").write_text("im02\n")
  (root / "test.txt").write_text("im03\nim01\n")
  words = ("'im01'", root / "train.txt", root / "test.txt")
  for split in ("train", "val", "test"):
    refused(lambda s=split: make(root, s), *words)
  refused(lambda: list_splits(root), *words)


@pytest.mark.parametrize(
  "stem", ["../secret", "/etc/passwd", "a/b", "a\\b", ".."]
)
def test_stems_are_not_paths(root, stem):
  (root / "train.txt").write_text(f"im00\n{stem}\n")
  refused(lambda: make(root), root / "train.txt", "is a path")


def test_files_that_are_missing_double_or_elsewhere(root, tmp_path):
  (root / "masks" / "im03.png").rename(tmp_path / "secret.png")
  refused(lambda: make(root), root / "masks" / "im03", "images/im03.png")
  (root / "masks" / "im03.png").symlink_to(tmp_path / "secret.png")
  refused(
    lambda: [make(root, s) for s in ("train", "val", "test")],
    root / "masks" / "im03.png",
    "link",
  )
  (root / "masks" / "im03.png").unlink()
  (root / "masks" / "im03.png").symlink_to(root / "masks" / "im04.png")
  for split in ("train", "val", "test"):
    make(root, split)  # A link inside the folder does no harm.
  write(root, "im03", suffix="bmp")
  (root / "train.txt").write_text("im03\n")
  refused(lambda: make(root), "im03.bmp", "im03.png", "stem")
  (root / "train.txt").write_text("im77\n")
  refused(lambda: make(root), "im77", "listed in the split")
  (root / "train.txt").write_text("im00\nim01\nim00\n")
  refused(lambda: make(root), "'im00' is listed twice")


def test_missing_and_empty_folders(tmp_path):
  refused(lambda: make(tmp_path / "none"), tmp_path / "none" / "images")
  (tmp_path / "images").mkdir()
  refused(lambda: make(tmp_path), "no images in")


def test_label_ids(root):
  mask = np.zeros((6, 5), np.uint8)
  mask[0], mask[1, :2] = 255, 7
  write(root, "odd", mask=mask)
  (root / "train.txt").write_text("odd\n")
  refused(
    lambda: make(root, num_classes=3)[0],
    root / "masks" / "odd.png",
    "7 (2 pixels)",
    "255 (5 pixels)",
    "0..2",
    "ignore_label",
    "mask_values",
  )
  refused(lambda: make(root, ignore_label=255)[0], "7 (2 pixels)")
  example = make(root, num_classes=8, ignore_label=255)[0]
  np.testing.assert_array_equal(example["weight"], mask != 255)
  np.testing.assert_array_equal(example["label"], np.where(mask == 7, 7, 0))
  looked_up = make(root, num_classes=3, mask_values=(255, 7, 0))[0]["label"]
  want = np.select([mask == 255, mask == 7], [0, 1], 2)
  np.testing.assert_array_equal(looked_up, want)
  refused(lambda: make(root, mask_values=(0, 255))[0], "7 (2", "0, 255")


def test_ids_that_would_wrap_are_refused(tmp_path):
  for bad in (-1, 256, 65536, 2**40):
    root = tmp_path / str(bad)
    root.mkdir()
    mask = np.zeros((4, 3), np.int64)
    mask[2, 1] = bad
    write(root, "a", image=np.zeros((4, 3)), mask=mask, suffix="npy")
    refused(lambda r=root, b=bad: make(r)[0], f"{bad} (1 pixels)")


def test_check_source_finds_sizes_by_header_and_ids_by_choice(root):
  for split in ("train", "val", "test"):
    check_source(make(root, split), 500)
  stems = [f"im{i:02d}" for i in range(20)]
  (root / "train.txt").write_text("\n".join(stems))
  write(root, "im19", mask=np.full((6, 5), 9))
  source = make(root)
  check_source(source, 0)
  refused(lambda: check_source(source, 2), root / "masks" / "im19.png", "9 (30")
  write(root, "im07", mask=np.zeros((5, 6)))
  # The last one has seen the image's old size.
  source._sizes[7] = (5, 6)
  for call in (
    lambda: check_source(make(root), 0),
    lambda: make(root)[7],
    lambda: source[7],
  ):
    refused(
      call,
      root / "images" / "im07.png",
      "6 x 5",
      root / "masks" / "im07.png",
      "5 x 6",
    )


def test_image_turned_by_exif_does_not_fit_its_mask(root):
  exif = Image.Exif()
  exif[274] = 6
  turned = Image.fromarray(np.zeros((6, 5), np.uint8))
  turned.save(root / "images" / "im00.png", exif=exif)
  (root / "train.txt").write_text("im00\n")
  refused(lambda: check_source(make(root), 0), "5 x 6", "6 x 5")


@pytest.mark.parametrize(
  ("name", "channels"), [("isbi2012", 3), ("dsb2018", 1), ("dsb2018", 3)]
)
def test_real_data_reads(data_root, tmp_path, name, channels):
  split = "val" if name == "isbi2012" else "test"
  source = make(data_root / name, split, work=tmp_path, channels=channels)
  check_source(source, 3)
  modes = set()
  for i in range(len(source)):
    example = source[i]
    assert example["image"].shape == (*source.size(i), channels)
    assert 0 <= example["image"].min() < example["image"].max() <= 1
    path = data_root / name / "images" / f"{source.names[i]}.png"
    with Image.open(path) as picture:
      modes.add(picture.mode)
    with Image.open(data_root / name / "instances" / path.name) as picture:
      # The instances are objects of class 1.
      inside = example["label"][np.asarray(picture) > 0]
    assert inside.size and inside.mean() > 0.99
  assert modes == ({"L"} if name == "isbi2012" else {"L", "RGB"})
  assert not list(tmp_path.iterdir())


def test_every_image_is_val_in_one_fold(root):
  """And the same images are test in all, kept with the run."""
  stems, tests, vals = {f"im{i:02d}" for i in range(20)}, set(), []
  for fold in range(4):
    fields = {"num_folds": 4, "fold": fold, "work": f"work_{fold}"}
    splits = {s: make(root, s, **fields).names for s in ("test", "train")}
    val = make(root, "val", **fields).names
    assert set(splits["train"]) | set(val) | set(splits["test"]) == stems
    assert not set(splits["train"]) & set(val)
    tests.add(tuple(splits["test"]))
    vals += val
    assert make(root, "val", **fields).names == val
  assert len(tests) == 1 and len(vals) == len(set(vals)) == 17


def test_folds_of_given_splits(root):
  for name, stems in (("train", range(9)), ("val", range(9, 12))):
    lines = "".join(f"im{i:02d}\n" for i in stems)
    (root / f"{name}.txt").write_text(lines)
  (root / "test.txt").write_text("im15\nim16\n")
  vals = []
  for fold in range(3):
    fields = {"num_folds": 3, "fold": fold, "work": f"work_{fold}"}
    assert make(root, "test", **fields).names == ["im15", "im16"]
    assert len(make(root, "train", **fields).names) == 8
    vals += make(root, "val", **fields).names
  assert sorted(vals) == [f"im{i:02d}" for i in range(12)]
  fields = {"num_folds": 13, "work": "many"}
  refused(lambda: make(root, "val", **fields), "num_folds=13", "nearest: 12")
