"""The report of a made-up study whose numbers are known."""

import base64
import csv
import html
import html.parser
import io
import itertools
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from unet_jax.errors import UserError
from unet_jax.studies import report, statistics

NASTY = '<b>a|b</b> & "c"'
SEEDS, IMAGES = 3, 12
SHIFT = {"baseline": 0.0, "skip=none": -0.05, NASTY: 0.001}


def make_scores():
  rng = np.random.default_rng(0)
  image = rng.normal(0.8, 0.05, IMAGES)
  return {
    arm: image + shift + rng.normal(0, 0.004, (SEEDS, IMAGES))
    for arm, shift in SHIFT.items()
  }


def make_record(arm, seed, scores, **fields):
  name = re.sub(r"\W", "_", arm)
  scored = [float(x) for x in scores]
  rows = [
    {
      "name": f"image <{j}>",
      "dice": score,
      "dice_class_1": None if score is None else score - 0.1,
      "foreground_pixels": 10 * j,
    }
    for j, score in enumerate([*scored, None])  # The last has no foreground.
  ]
  return {
    "id": f"{name}-s{seed}",
    "arm": arm,
    "seed": seed,
    "baseline": arm == "baseline",
    "status": "done",
    "reason": None,
    "overrides": {"model.skip": arm},
    "config_hash": f"{name}{seed}",
    "params": 1000 + 500 * len(arm),
    "macs": 10**6 * len(arm),
    "metrics": {"dice": float(np.mean(scores)) + 0.01},
    "split": "test",
    "step": 24,
    "per_image": rows,
    "curve": [
      [8, None if seed == 1 else 0.5],
      [16, 0.7],
      [24, 0.8 - 0.01 * seed],
    ],
    "seconds": 12.0 + seed,
    "memory_bytes": None,
    "git": "abc",
    "device": "cpu x 1",
    **fields,
  }


def make_study(folder, num_seeds=SEEDS, **fields):
  """Three arms, one more run that failed, pictures of seed 0."""
  records = [
    make_record(arm, seed, scores[seed], **fields)
    for seed in range(num_seeds)
    for arm, scores in make_scores().items()
  ]
  failed = records[1] | {"id": "skip_none-s9", "status": "failed", "seed": 9}
  empty = {"metrics": {}, "per_image": [], "curve": []}
  records.append(failed | empty | {"reason": "out of <memory>"})
  write(folder / "results.jsonl", records)
  for record in records[: len(SHIFT)]:
    make_pictures(folder / "runs" / record["id"], (20, 30))
  return records


def make_pictures(run, size):
  """What the runner keeps of two images, signals or volumes."""
  run.mkdir(parents=True, exist_ok=True)
  label = np.zeros(size, np.uint8)
  label[4:12] = 1
  arrays = {}
  for k in range(2):
    noise = np.random.default_rng(k).random((*size, 1), np.float32)
    arrays[f"name_{k}"] = np.array(f"image <{k}>")
    arrays[f"image_{k}"] = noise + label[..., None]
    arrays[f"label_{k}"] = label
    arrays[f"weight_{k}"] = np.ones(size, bool)
    arrays[f"prediction_{k}"] = np.roll(label, 2 + k, 0)
  np.savez_compressed(run / "difficult.npz", **arrays)


def write(path, records):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("study")
  make_study(folder)
  report.run([folder], folder, 0.01)
  return folder


def read_csv(folder):
  rows = csv.DictReader(io.StringIO((folder / "report.csv").read_text()))
  return {row["arm"]: row for row in rows}


def test_the_numbers_of_the_csv(made):
  rows, scores = read_csv(made), make_scores()
  assert list(rows) == list(SHIFT)
  for arm, row in rows.items():
    assert float(row["dice_mean"]) == pytest.approx(scores[arm].mean())
    by_seed = scores[arm].mean(1)
    assert float(row["dice_sd_seeds"]) == pytest.approx(by_seed.std(ddof=1))
    assert float(row["dice_pooled"]) == pytest.approx(by_seed.mean() + 0.01)
    assert (row["dice_num_seeds"], row["dice_num_images"]) == ("3", "12")
    assert float(row["seconds"]) == 13 and row["split"] == "test"
  base, other = rows["baseline"], rows["skip=none"]
  assert base["p"] == base["difference_mean"] == ""
  assert other["runs_without_result"] == "1"
  difference = scores["skip=none"] - scores["baseline"]
  variance, dof = statistics.variance_of_mean(difference)
  half = stats.t.ppf(0.975, dof) * math.sqrt(variance)
  ends = difference.mean() - half, difference.mean() + half
  got = [float(other[f"difference_{k}"]) for k in ("mean", "low", "high")]
  assert got == pytest.approx([difference.mean(), *ends])
  p = 2 * stats.t.sf(abs(difference.mean()) / math.sqrt(variance), dof)
  assert float(other["p"]) == pytest.approx(p)
  assert float(other["p_holm"]) == pytest.approx(2 * p)
  assert other["verdict"] == "worse"
  assert rows[NASTY]["verdict"] == "equivalent within +-0.01"


def test_the_numbers_of_the_markdown(made):
  text, scores = (made / "report.md").read_text(), make_scores()
  for arm in SHIFT:
    name = arm.replace("|", "\\|").replace("<", "\\<").replace(">", "\\>")
    assert f"| {name} | " in text
    assert f"{scores[arm].mean():.4f}" in text
  change = (scores["skip=none"] - scores["baseline"]).mean()
  assert f"skip=none: worse, \N{MINUS SIGN}{-change:.4f}" in text
  assert "out of \\<memory\\>" in text
  assert "12 of 13 images" in text and "false alarms there" in text
  by_class = (
    f"| skip=none | class 1 | 12 | {scores['skip=none'].mean() - 0.1:.4f}"
  )
  assert by_class in text


class Reader(html.parser.HTMLParser):
  """Tags with their attributes, and all text."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.texts = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.texts.append(data)

  def all(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_is_whole_and_escaped(made):
  text = (made / "report.html").read_text()
  page = Reader(text)
  assert "http" not in text and "<b>" not in text and "image <" not in text
  assert "url(" not in text and "@import" not in text
  assert "<section hidden>\n<h2>On shifted images" in text
  assert NASTY in page.texts and "out of <memory>" in page.texts
  images = page.all("img")
  assert len(images) == 2 * (2 + 2 * len(SHIFT))
  for image in images:
    kind, data = image["src"].split(",")
    assert kind == "data:image/webp;base64" and image["alt"]
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
      assert picture.width == int(image["width"])
  levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
  assert levels[0] == 1 and levels.count(1) == 1
  assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
  tables = page.all("table")
  assert len(tables) == len(page.all("caption")) == 6
  assert all("scope" in th for th in page.all("th"))
  assert len(page.all("button")) == sum(
    th["scope"] == "col" for th in page.all("th")
  )
  charts = page.all("svg")
  assert len(charts) == 1 + 2 + len(SHIFT) == len(page.all("desc"))
  assert all(svg["role"] == "img" for svg in charts)


def test_as_many_pictures_as_asked_for(made, tmp_path):
  for number in (0, 1):
    report.run([made], tmp_path, 0.01, num_pictures=number)
    page = Reader((tmp_path / "report.html").read_text())
    assert len(page.all("img")) == number * (2 + 2 * len(SHIFT))


@pytest.mark.parametrize(
  ("size", "images", "said"),
  [((20,), 1, "prediction, Dice"), ((20, 8, 9), 4, "of 0..7, axis 1")],
)
def test_signals_and_volumes_have_pictures(tmp_path, size, images, said):
  write(
    tmp_path / "results.jsonl",
    [make_record("a", 0, make_scores()["baseline"][0])],
  )
  make_pictures(tmp_path / "runs" / "a-s0", size)
  report.run([tmp_path], tmp_path, 0.01)
  text = (tmp_path / "report.html").read_text()
  assert len(Reader(text).all("img")) == 2 * images and said in text


def test_one_seed_is_said_and_has_no_interval(tmp_path):
  make_study(tmp_path, num_seeds=1)
  report.run([tmp_path], tmp_path, 0.01)
  for name in ("report.md", "report.html"):
    text = (tmp_path / name).read_text()
    assert "can say nothing about seeds" in text
    assert "another may turn it round" in text
  row = read_csv(tmp_path)["skip=none"]
  assert row["verdict"] == "one seed: unknown"
  assert row["p"] == row["difference_low"] == row["dice_low"] == ""


def test_a_study_without_a_test_split_says_so(made, tmp_path):
  make_study(tmp_path, split="val")
  report.run([tmp_path], tmp_path, 0.01)
  assert "There was no test split" in (tmp_path / "report.html").read_text()
  assert "There was no test split" not in (made / "report.html").read_text()


def test_the_bootstrap_stands_beside_with_its_coverage(made, tmp_path):
  make_study(tmp_path)
  report.run([tmp_path], tmp_path, 0.01, bootstrap=True)
  row, scores = read_csv(tmp_path)["skip=none"], make_scores()
  change = scores["skip=none"] - scores["baseline"]
  by_name = sorted(range(IMAGES), key=lambda j: f"image <{j}>")
  for name, array in (("dice", scores["skip=none"]), ("difference", change)):
    array = array[:, by_name]
    got = [float(row[f"{name}_bootstrap_{end}"]) for end in ("low", "high")]
    assert got == pytest.approx(statistics.bootstrap(array))
  text = (tmp_path / "report.md").read_text()
  assert "79% at 3 seeds, 85% at 5 seeds, 92% at 10 seeds" in text
  assert "| bootstrap from | bootstrap to |" in text
  assert "bootstrap" not in (made / "report.md").read_text()


@pytest.mark.parametrize(
  ("seeds", "least"), [(2, "0.5"), (5, "0.0625"), (6, None)]
)
def test_sign_flips_are_named_where_they_cannot_tell(tmp_path, seeds, least):
  rng = np.random.default_rng(1)
  records = [
    make_record(arm, seed, rng.normal(0.8, 0.01, IMAGES))
    for arm in ("baseline", "other")
    for seed in range(seeds)
  ]
  write(tmp_path / "results.jsonl", records)
  report.run([tmp_path], tmp_path, 0.01)
  text = (tmp_path / "report.md").read_text()
  assert ("flips the signs" in text) == (least is not None)
  if least:
    assert f"of {seeds} seeds cannot go below p = {least}," in text


def test_groups_have_their_own_baselines_and_shifted_its_own_table(tmp_path):
  rng, records, scores = np.random.default_rng(2), [], {}
  for group in ("easy", "hard"):
    for kind in ("none", "concat"):
      arm = f"{group},{kind}"
      scores[arm] = rng.normal(0.5, 0.1, (SEEDS, IMAGES))
      for seed in range(SEEDS):
        record = make_record(arm, seed, scores[arm][seed])
        other = make_record(arm, seed, scores[arm][seed] - 0.25)
        records.append(
          record
          | {"group": group, "baseline": kind == "concat"}
          | {"shifted": {"metrics": {}, "per_image": other["per_image"]}}
        )
  write(tmp_path / "results.jsonl", records)
  report.run([tmp_path], tmp_path, 0.01)
  rows = read_csv(tmp_path)
  assert list(rows) == ["easy,concat", "easy,none", "hard,concat", "hard,none"]
  for group in ("easy", "hard"):
    change = scores[f"{group},none"] - scores[f"{group},concat"]
    got = float(rows[f"{group},none"]["difference_mean"])
    assert got == pytest.approx(change.mean())
    assert rows[f"{group},concat"]["difference_mean"] == ""
  text = (tmp_path / "report.md").read_text()
  mean = scores["hard,none"].mean()
  assert f"| hard,none | 3 | 12 | {mean:.4f} | {mean - 0.25:.4f} |" in text
  page = (tmp_path / "report.html").read_text()
  assert "baseline: its group" in page
  # A part that few studies ask for is there for those alone.
  assert "<section>\n<h2>On shifted images" in page
  assert "<section hidden>\n<h2>Skip probes" in page
  lost = [r for r in records if r["arm"] != "hard,concat"]
  write(tmp_path / "results.jsonl", lost)
  report.run([tmp_path], tmp_path, 0.01)
  assert "no differences of hard,none" in (tmp_path / "report.md").read_text()


def test_objects_are_shown_by_size(tmp_path):
  """Arms find small, medium and large ones differently."""
  share = {"baseline": (0.2, 0.5, 0.9), "other": (0.4, 0.5, 0.8)}
  records = []
  for arm, found in share.items():
    for seed in range(SEEDS):
      record = make_record(arm, seed, np.full(IMAGES, 0.7))
      for row in record["per_image"]:
        row |= {
          "object_pixels": [10, 10, 50, 90],
          "object_found": [0.0, 0, 0, 0],
        }
        row["object_found"] = [found[0] - 0.1, found[0] + 0.1, *found[1:]]
      records.append(record)
  write(tmp_path / "results.jsonl", records)
  report.run([tmp_path], tmp_path, 0.01)
  text = (tmp_path / "report.md").read_text()
  assert "Share of an object that is found" in text
  line = next(x for x in text.splitlines() if "| other | small, up to 10" in x)
  cells = [cell.strip() for cell in line.split("|")[1:-1]]
  assert cells[2:4] == ["13", "0.4000"] and cells[6] == "+0.2000"
  line = next(x for x in text.splitlines() if "| other | large, above 50" in x)
  assert "\N{MINUS SIGN}0.1000" in line


def test_two_folders_are_one_study(made, tmp_path):
  """An arm's seeds lie in both; the baseline lacks one of them."""
  records = make_study(tmp_path / "whole")
  first = [r for r in records if r["seed"] == 0]
  second = [r for r in records if r["seed"] != 0]
  lost = next(r for r in second if r["arm"] == "baseline")
  again = first[0] | {"metrics": {"dice": 0.5}}
  write(tmp_path / "a" / "results.jsonl", [again, *first])
  write(
    tmp_path / "b" / "results-0-of-2.jsonl", [r for r in second if r != lost]
  )
  report.run([tmp_path / "a", tmp_path / "b"], tmp_path / "out", 0.01)
  got, whole = read_csv(tmp_path / "out"), read_csv(made)
  assert got["skip=none"]["dice_mean"] == whole["skip=none"]["dice_mean"]
  assert got["skip=none"]["difference_num_seeds"] == "2"
  scores = make_scores()
  change = (scores["skip=none"] - scores["baseline"])[[0, 2]].mean()
  assert float(got["skip=none"]["difference_mean"]) == pytest.approx(change)
  assert "nothing for this" in (tmp_path / "out" / "report.html").read_text()


def test_what_cannot_be_reported_is_an_error_that_says_where(tmp_path):
  with pytest.raises(UserError, match=r"has no results\.jsonl"):
    report.run([tmp_path], tmp_path, 0.01)
  records = make_study(tmp_path / "a")
  lines = (tmp_path / "a" / "results.jsonl").read_text().splitlines(True)
  broken = tmp_path / "b" / "results.jsonl"
  broken.parent.mkdir()
  broken.write_text("".join([lines[0], '{"id": "x\n', *lines[1:]]))
  with pytest.raises(UserError, match=r"b/results\.jsonl, line 2"):
    report.run([tmp_path / "b"], tmp_path, 0.01)
  write(broken, [records[0], {"id": "x", "status": "done"}])
  with pytest.raises(UserError, match=r"b/results\.jsonl, line 2: no 'arm'"):
    report.run([tmp_path / "b"], tmp_path, 0.01)
  write(broken, [records[0] | {"config_hash": "other"}])
  with pytest.raises(UserError, match=r"another config than in .*/a"):
    report.run([tmp_path / "a", tmp_path / "b"], tmp_path, 0.01)
  write(broken, [records[-1]])
  with pytest.raises(UserError, match="no run is done"):
    report.run([tmp_path / "b"], tmp_path, 0.01)
  write(broken, [records[0], records[1] | {"split": "val"}])
  with pytest.raises(UserError, match="several splits, test, val"):
    report.run([tmp_path / "b"], tmp_path, 0.01)


# In a frame as wide as a phone: what a person would see and do. All of it is
# done in the frame's load event, which the browser waits for.
HARNESS = """<iframe width="390" height="844"></iframe><pre></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, found = {};
  found.images = [...page.images].map((image) => image.naturalWidth);
  found.width = page.documentElement.scrollWidth;
  found.requests = frame.contentWindow.performance
    .getEntriesByType("resource").map((entry) => entry.name)
    .filter((name) => !name.startsWith("data:"));
  const table = page.querySelector("table");
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[2]
    .textContent);
  const head = table.tHead.rows[0].cells[2], button = head.firstChild;
  button.focus();
  found.focus = page.activeElement === button;
  found.before = column();
  for (const name of ["up", "down"]) {
    button.click();
    found[name] = [head.getAttribute("aria-sort"), ...column()];
  }
  found.status = page.querySelector("[role=status]").textContent;
  document.querySelector("pre").textContent = JSON.stringify(found);
};
frame.srcdoc = PAGE;
</script>"""
BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"


@pytest.mark.skipif(
  not any(map(shutil.which, BROWSERS)), reason="no Chromium to open it in"
)
def test_a_browser_sorts_the_tables_and_shows_the_pictures(made, tmp_path):
  page = json.dumps((made / "report.html").read_text()).replace("</", "<\\/")
  (tmp_path / "frame.html").write_text(HARNESS.replace("PAGE", page))
  done = subprocess.run(
    [
      next(filter(None, map(shutil.which, BROWSERS))),
      *("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
      *("--virtual-time-budget=20000", f"--user-data-dir={tmp_path}/profile"),
      (tmp_path / "frame.html").as_uri(),
    ],
    capture_output=True,
    text=True,
    timeout=120,
  )
  found = re.findall(r"<pre>(.*)</pre>", done.stdout)
  assert found and found[-1], done.stderr[-2000:]
  got = json.loads(html.unescape(found[-1]))
  assert len(got["images"]) == 16 and min(got["images"]) > 0
  assert got["width"] <= 390 and got["requests"] == [] and got["focus"]
  means = [f"{x.mean():.4f}" for x in make_scores().values()]
  assert got["before"] == means
  assert got["up"] == ["ascending", *sorted(means)]
  assert got["down"] == ["descending", *sorted(means, reverse=True)]
  assert got["status"] == "Sorted by Dice, descending"
