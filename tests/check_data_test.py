"""`--mode check_data`: each fault gives its line, and the report is written."""

import html.parser
import json
import re
import shutil
import subprocess
import types

import numpy as np
import pytest
from PIL import Image

from tests.data.leaks_test import picture
from unet_jax import check_data, config, main
from unet_jax.data import check, leaks
from unet_jax.inspect import data_report

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
BAD_NAME = "<script>alert(1)<"


def to_bytes(image):
  low, high = image.min(), image.max()
  return ((image - low) / (high - low) * 255).astype(np.uint8)[..., 0]


def write(root, stem, image, mask):
  for kind, array in (("images", image), ("masks", mask)):
    (root / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(
      root / kind / f"{stem}.png"
    )


def fill(root, **splits):
  """Independent pictures; foreground is what is bright."""
  seed = 0
  for split, stems in splits.items():
    for stem in stems:
      image = to_bytes(picture(seed, (64, 64)))
      write(root, stem, image, image > 140)
      seed += 1
    text = "".join(f"{stem}\n" for stem in stems)
    (root / f"{split}.txt").write_text(text)
  return root


@pytest.fixture
def root(tmp_path):
  return fill(
    tmp_path / "data",
    train=[f"t{i}" for i in range(6)],
    val=["v0", "v1"],
    test=["e0", "e1"],
  )


def check_data_of(root, *flags, name="work"):
  """(exit status, what data_report.json holds, the page)."""
  work = root.parent / name
  status = main.main(
    [
      *("--config", "configs/folder.py", "--mode", "check_data"),
      *("--workdir", str(work), f"--config.data.dir={root}"),
      *flags,
    ]
  )
  report = json.loads((work / "data_report.json").read_text())
  return status, report, (work / "data_report.html").read_text()


def test_good_data(root, capsys):
  before = sorted(root.rglob("*"))
  status, report, page = check_data_of(root)
  assert status == 0 and report["status"] == "ok" and not report["problems"]
  assert sorted(root.rglob("*")) == before
  masks = {
    s: np.stack(
      [
        np.asarray(Image.open(root / "masks" / f"{x}.png"))
        for x in (root / f"{s}.txt").read_text().split()
      ]
    )
    for s in ("train", "val", "test")
  }
  for split, own in masks.items():
    described = report["splits"][split]
    assert described["examples"] == described["usable"] == len(own)
    assert described["labels"]["1"]["pixels"] == own.sum()
    assert described["labels"]["1"]["share"] == own.mean()
    assert described["low"] == 0 and described["high"] == 1
    assert described["sizes"] == {"64 x 64": len(own)}
  share = masks["train"].mean()
  weights = [0.5 / (1 - share), 0.5 / share]
  np.testing.assert_allclose(report["class_weights"], weights, atol=6e-4)
  accuracy = report["trivial"]["scores"]["majority class"]["pixel_accuracy"]
  assert accuracy == pytest.approx(1 - masks["val"].mean())
  assert "done: 10 examples" in capsys.readouterr().err
  assert "Nothing is wrong" in page


def corrupt(path):
  path.write_bytes(path.read_bytes()[:60])


FAULTS = {
  "truncated image": (
    lambda root: corrupt(root / "images" / "t1.png"),
    "train/t1",
    "images/t1.png: not a readable png",
  ),
  "truncated mask": (
    lambda root: corrupt(root / "masks" / "v0.png"),
    "val/v0",
    "masks/v0.png: not a readable png",
  ),
  "other size": (
    lambda root: write(root, "t2", np.zeros((64, 64)), np.zeros((64, 32))),
    "train/t2",
    "64 x 64 but",
  ),
  "label id": (
    lambda root: write(root, "e0", np.eye(64), 7 * np.eye(64)),
    "test/e0",
    "label ids 7 (64 pixels)",
  ),
  "no mask": (
    lambda root: (root / "masks" / "t3.png").unlink(),
    "train/t3",
    "missing, though of",
  ),
  "no image": (
    lambda root: (root / "images" / "t4.png").unlink(),
    "train/t4",
    "missing, though of",
  ),
  "colours": (
    lambda root: write(
      root,
      "t5",
      np.eye(64),
      np.stack([np.eye(64)] * 2 + [np.zeros((64, 64))], -1),
    ),
    "train/t5",
    "holds colours",
  ),
}


def test_each_kind_of_bad_file_gives_its_line(root, capsys):
  """All at once: none hides another, and the report is there."""
  for break_it, _, _ in FAULTS.values():
    break_it(root)
  status, report, page = check_data_of(root)
  assert status == 2
  found = {p["where"]: p["message"] for p in report["problems"]}
  assert len(report["problems"]) == len(FAULTS)
  for _, where, words in FAULTS.values():
    assert words in found[where], where
    assert where in page
  assert report["splits"]["train"]["usable"] == 1
  lines = capsys.readouterr().err.strip().splitlines()
  errors = [x for x in lines if x.startswith("error: ")]
  assert len(errors) == 1
  assert f"and {len(FAULTS) - 1} more problems; see" in errors[0]
  assert "data_report.html" in errors[0]


def test_what_only_a_later_mask_shows_is_found(root):
  """Training looks at `check_masks` of them; here all are read."""
  write(root, "t4", np.eye(64), 9 * np.eye(64))
  status, report, _ = check_data_of(root, "--config.data.check_masks=1")
  assert status == 2 and report["problems"][0]["where"] == "train/t4"


def test_a_config_wrong_about_labels_gets_the_right_line(root):
  for i in range(6):
    mask = np.zeros((64, 64))
    mask[:20], mask[20:40], mask[0, 0] = 10, 20, 255
    write(root, f"t{i}", to_bytes(picture(i, (64, 64))), mask)
  for stem in ("v0", "v1", "e0", "e1"):
    path = root / "masks" / f"{stem}.png"
    Image.fromarray(10 * np.asarray(Image.open(path), np.uint8)).save(path)
  status, report, page = check_data_of(root, "--config.data.num_classes=2")
  assert status == 2 and len(report["problems"]) == 10
  assert report["splits"]["train"]["labels"]["20"]["pixels"] == 6 * 20 * 64
  assert "no example of train" in re.sub(r"\s+", " ", page)
  flags = report["proposal"]["line"].split()
  assert "--config.data.num_classes=3" in flags
  assert "--config.data.mask_values=0,10,20" in flags
  assert "--config.data.ignore_label=255" in flags
  # With the line it is right, and asks for nothing else.
  status, again, _ = check_data_of(root, *flags, name="again")
  assert status == 0 and not again["problems"]
  assert again["proposal"]["line"] == report["proposal"]["line"]
  assert set(again["trivial"]["scores"]) == {
    "majority class",
    "threshold",
    "location prior",
  }


@pytest.mark.parametrize(
  "ids, wanted",
  [
    ({0, 1}, (1, (), None)),
    ({0, 255}, (1, (0, 255), None)),
    ({0, 1, 255}, (1, (), 255)),
    ({0, 1, 2, 3}, (4, (), None)),
    ({1, 2, 3}, (3, (1, 2, 3), None)),
    ({5}, (1, (0, 5), None)),
    ({0}, (1, (), None)),
    (set(range(100)), None),
    ({0, 300}, None),
  ],
)
def test_what_label_ids_are_taken_for(ids, wanted):
  cfg = config.parse(config.load_config("configs/synthetic.py"))
  facts = [check.Facts("train", "a", ids=dict.fromkeys(ids, 5))]
  proposals = {
    p.field: p.value for p in check_data.proposal.propose(cfg, facts)
  }
  names = ("num_classes", "mask_values", "ignore_label")
  found = tuple(proposals.get(f"data.{k}") for k in names)
  assert found == (wanted or (None, None, None))


@pytest.mark.parametrize("missing, there", [("val", "train"), ("train", "val")])
def test_a_split_that_training_needs_is_missing(root, missing, there):
  (root / f"{missing}.txt").unlink()
  number = len((root / f"{there}.txt").read_text().split())
  status, report, _ = check_data_of(root)
  assert status == 2
  assert report["problems"][0]["where"] == missing
  assert report["splits"][there]["usable"] == number


def test_masks_of_another_encoding_are_no_ignored_label(root):
  path = root / "masks" / "t4.png"
  Image.fromarray(255 * np.asarray(Image.open(path), np.uint8)).save(path)
  status, report, _ = check_data_of(root)
  assert status == 2
  assert "--config.data.ignore_label=none" in report["proposal"]["line"]
  said = "1 masks hold 0 and 255 where others hold 0 and 1"
  assert any(x.startswith(said) for x in report["warnings"])


def test_images_of_no_split_are_named(root):
  (root / "test.txt").write_text("e1\n")
  status, report, _ = check_data_of(root)
  assert status == 0
  assert "1 images are in no split: e0" in report["warnings"]


def test_an_empty_folder_has_a_report_too(tmp_path):
  (tmp_path / "data").mkdir()
  status, report, page = check_data_of(tmp_path / "data")
  assert status == 2 and "no images in" in report["problems"][0]["message"]
  assert "Training would fail" in page


def test_leaks_across_splits_and_the_split_that_heals_them(root):
  whole, n = to_bytes(picture(77, (256, 768))), 256
  tiles = {"t0": whole[:, :n], "v0": whole[:, n:-n], "e0": whole[:, -n:]}
  for stem, tile in tiles.items():
    write(root, stem, tile, tile > 128)
  shutil.copy(root / "images" / "t1.png", root / "images" / "v1.png")
  status, report, page = check_data_of(root)
  assert status == 0
  crossing = {
    (p["first"], p["second"], p["kind"])
    for p in report["leaks"]["pairs"]
    if p["crosses"]
  }
  assert crossing == {
    ("train/t0", "val/v0", "adjacent"),
    ("val/v0", "test/e0", "adjacent"),
    ("train/t1", "val/v1", "identical"),
  }
  said = " ".join(report["warnings"])
  assert "2 pairs of adjacent images cross the splits" in said
  assert "1 pair of identical images cross" in said
  assert "identical images have different labels: val/v1" in said
  folder = root.parent / "work" / "proposed_split"
  assert str(folder) in page
  new = {s: (folder / f"{s}.txt").read_text().split() for s in ("train", "val")}
  new["test"] = (folder / "test.txt").read_text().split()
  stems = [stem for own in new.values() for stem in own]
  assert sorted(stems) == sorted(e["name"] for e in report["examples"])
  where = {stem: split for split, stems in new.items() for stem in stems}
  assert where["t0"] == where["v0"] == where["e0"]
  assert where["t1"] == where["v1"]
  for split in new:
    shutil.copy(folder / f"{split}.txt", root)
  _, healed, _ = check_data_of(root, name="healed")
  assert healed["leaks"]["crossing"] == 0


def test_groups_go_where_their_split_has_room():
  facts = [
    check.Facts(split, str(i))
    for i, split in enumerate(["train"] * 6 + ["val"] * 3)
  ]
  pairs = [
    leaks.Pair("similar", a, b, 1.0) for a, b in ((0, 6), (6, 7), (1, 8))
  ]
  found = check.Survey({}, facts, [], pairs, {}, "val")
  new = check_data.propose_splits(found, listed=True)
  # val had three in the mixed groups: the group of three goes there.
  assert new["val"] == ["0", "6", "7"]
  assert new["train"] == ["1", "2", "3", "4", "5", "8"]
  assert check_data.propose_splits(found, listed=False) == {}


def test_seeded_splits_stay_out_of_the_data_folder(root):
  for split in ("train", "val", "test"):
    (root / f"{split}.txt").unlink()
  before = sorted(root.rglob("*"))
  status, _, _ = check_data_of(root)
  assert status == 0 and sorted(root.rglob("*")) == before
  assert (root.parent / "work" / "split" / "val.txt").is_file()
  assert (
    main.main(
      [
        *("--config", "configs/folder.py", "--mode", "check_data"),
        *("--workdir", str(root), f"--config.data.dir={root}"),
      ]
    )
    == 2
  )


@pytest.mark.parametrize("dims", ["1", "2", "3"])
def test_synthetic_cells_of_all_axes(tmp_path, dims):
  size = {"1": 64, "2": 32, "3": 16}[dims]
  argv = [
    *("--config", f"configs/synthetic.py:{dims}", "--mode", "check_data"),
    *("--workdir", str(tmp_path), f"--config.data.synthetic_size={size}"),
    *("--config.data.synthetic_train=9", "--config.data.synthetic_val=3"),
    *("--config.data.synthetic_test=3", "--config.data.crop_size=8"),
  ]
  assert main.main(argv) == 0
  report = json.loads((tmp_path / "data_report.json").read_text())
  assert [d["usable"] for d in report["splits"].values()] == [9, 3, 3]
  assert not report["leaks"]["crossing"]


def test_what_a_source_says_of_spacing_is_kept():
  class Volumes:
    names = ("a", "b")

    def __len__(self):
      return 2

    def __getitem__(self, index):
      size = (4, 4, 4)
      return {
        "image": np.random.default_rng(index).normal(size=(*size, 1)),
        "label": np.zeros(size, int),
        "weight": np.ones(size),
      }

    def spacing(self, index):
      return (1.0, 2.0, 2.0 + index)

  facts = check._read_all(Volumes(), "train", lambda *_: None, 2)
  assert [f.spacing for f in facts] == [(1, 2, 2), (1, 2, 3)]
  assert facts[0].ids == {0: 64} and facts[0].size == (4, 4, 4)


def test_sentences_are_shown_as_words():
  sentence = types.SimpleNamespace(forms=("<script>", "b"), tags=("X", "<i>"))
  source = types.SimpleNamespace(sentences=[None, sentence])
  facts = [check.Facts("val", str(i)) for i in range(2)]
  found = check.Survey({"val": source}, facts, [], [], {}, "val")
  (text,) = data_report._draw(found, 1, [])
  assert "&lt;script&gt;<sub>X</sub> b<sub>&lt;i&gt;</sub>" in text
  assert "val/1" in text and "<script>" not in text


class Reader(html.parser.HTMLParser):
  """Tags, and what is loaded from elsewhere."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.loaded = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.loaded += [v for k, v in attrs if k in ("src", "href") and v[0] != "#"]


def test_the_page_is_alone_and_names_are_escaped(tmp_path):
  root = fill(tmp_path / "data", train=[BAD_NAME, "t1", "t2"], val=["v0", "v1"])
  shutil.copy(root / "masks" / "v0.png", root / "masks" / f"{BAD_NAME}.png")
  write(root, "v1", np.eye(64), 200 * np.eye(64))
  (root / "masks" / "t1.png").unlink()
  (root / "masks" / "t1.png").write_bytes(b"<script>alert(2)</script>")
  status, report, page = check_data_of(root)
  assert status == 2 and f"train/{BAD_NAME}" in str(report)
  reader = Reader(page)
  assert reader.tags.count("script") == 1
  assert "&lt;script&gt;alert(1)&lt;" in page and "<script>alert" not in page
  assert reader.tags.count("img") >= 4
  assert all(x.startswith("data:") for x in reader.loaded)


@pytest.mark.slow
def test_the_page_fits_a_phone(root, tmp_path):
  browser = next((b for b in BROWSERS if shutil.which(b)), None)
  if browser is None:
    pytest.skip("no Chromium")
  (root / "masks" / "t3.png").unlink()
  _, _, page = check_data_of(root)
  script = (
    "<script>document.title = document.documentElement.scrollWidth;</script>"
  )
  path = tmp_path / "page.html"
  path.write_text(page.replace("</body>", script + "</body>"))
  done = subprocess.run(
    [
      *(browser, "--headless", "--no-sandbox", "--dump-dom"),
      *("--window-size=500,900", path.as_uri()),
    ],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert int(re.search("<title>(.*?)</title>", done.stdout)[1]) <= 500
