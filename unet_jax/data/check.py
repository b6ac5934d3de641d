"""Reads every example of every split once, and keeps what a report needs."""

import dataclasses
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from unet_jax.config import Config
from unet_jax.data import leaks, pipeline
from unet_jax.data.source import RawSource, Source
from unet_jax.data.trivial import Baselines
from unet_jax.errors import UserError
from unet_jax.runtime import writers

# In the order in which they are read: predictors are fit on train.
SPLITS = ("train", "val", "test")
# Stands for the ids of pixels that count nowhere, where files are not seen.
IGNORED = -1
_BINS = 64
# More ids are no classes, and are only counted.
_MOST_IDS = 4096


@dataclasses.dataclass(frozen=True)
class Facts:
  """What is known of an example; of a part that cannot be read it is None.

  Attributes:
    split, name: which it is.
    problems: why training could not use it, a line each.
    size, channels: of the image as it is stored.
    low, high, mean, std: of its values, over all channels.
    histogram: counts [64] of equal bins from low to high.
    ids: pixels of each label id of the mask as it is stored.
    spacing: size of a voxel, if the source knows it.
    fingerprint: see `leaks`.
  """

  split: str
  name: str
  problems: tuple[str, ...] = ()
  size: tuple[int, ...] | None = None
  channels: int | None = None
  low: float | None = None
  high: float | None = None
  mean: float | None = None
  std: float | None = None
  histogram: np.ndarray | None = None
  ids: Mapping[int, int] | None = None
  spacing: tuple[float, ...] | None = None
  fingerprint: leaks.Fingerprint | None = None


@dataclasses.dataclass(frozen=True)
class Survey:
  """All that was read.

  Attributes:
    sources: by split.
    facts: of all examples, split after split, in the order of the sources.
    problems: why training would fail, (where, line); first those of no example.
    pairs: of indexes of `facts`.
    baselines: scores of trivial predictors on `scored`; empty if no example of
      train and of `scored` fits the config.
    scored: the split.
  """

  sources: Mapping[str, Source]
  facts: Sequence[Facts]
  problems: Sequence[tuple[str, str]]
  pairs: Sequence[leaks.Pair]
  baselines: Mapping[str, Mapping[str, Any]]
  scored: str

  def of(self, split: str) -> list[Facts]:
    """The facts of one split."""
    return [f for f in self.facts if f.split == split]


def survey(cfg: Config, split_dir: pathlib.Path) -> Survey:
  """Reads all splits on threads; shows progress; what is wrong is in it."""
  sources, problems = open_sources(cfg, split_dir)
  scored = cfg.eval.split
  sizes = [f for f in _sizes(sources.get("train", ())) if f]
  baselines = Baselines(cfg.num_labels, sizes, cfg.eval.foreground)
  facts, scores, num_learned = [], [], 0
  lock = threading.Lock()

  def use(split: str, example: Mapping[str, np.ndarray]) -> None:
    nonlocal num_learned
    arrays = example["image"], example["label"], example["weight"]
    if split == "train":
      baselines.add(*arrays)
      with lock:
        num_learned += 1
    if split == scored and split != "train" and num_learned:
      counts = baselines.score(*arrays)
      with lock:
        scores.append(counts)

  threads = max(cfg.data.num_threads, 8)
  for split, source in sources.items():
    facts += _read_all(source, split, use, threads)
  problems += [(f"{f.split}/{f.name}", x) for f in facts for x in f.problems]
  readable = [i for i, f in enumerate(facts) if f.fingerprint]
  pairs = leaks.find_pairs([facts[i].fingerprint for i in readable])
  pairs = [
    dataclasses.replace(p, first=readable[p.first], second=readable[p.second])
    for p in pairs
  ]
  summary = baselines.summarize(scores) if scores else {}
  return Survey(sources, facts, problems, pairs, summary, scored)


def open_sources(
  cfg: Config, split_dir: pathlib.Path
) -> tuple[dict[str, Source], list[tuple[str, str]]]:
  """The sources of all splits that there are, and what is wrong with others."""
  sources, problems = {}, []
  try:
    found = pipeline.list_splits(cfg, split_dir)
  except (UserError, OSError) as error:
    return {}, [("all splits", str(error))]
  # Training needs these two.
  wanted = {"train", cfg.eval.split, *found}
  for split in (s for s in SPLITS if s in wanted):
    try:
      sources[split] = pipeline.make_source(cfg, split, split_dir, lenient=True)
    except (UserError, OSError) as error:
      problems.append((split, str(error)))
  return sources, problems


def read_stored(
  source: Source | RawSource, index: int
) -> tuple[np.ndarray, np.ndarray]:
  """Image float32 [*S, c] and label ids int [*S] as they are stored.

  IGNORED stands for pixels of weight 0 where the source does not tell ids.

  Raises:
    UserError: the example cannot be read.
  """
  if hasattr(source, "raw_ids"):
    return source.raw_image(index), source.raw_ids(index)
  example = source[index]
  ids = np.where(example["weight"] > 0, example["label"], IGNORED)
  return example["image"], ids


def _sizes(source: Source | Sequence) -> list[tuple[int, ...] | None]:
  def size(index: int) -> tuple[int, ...] | None:
    try:
      return source.size(index)
    except (UserError, OSError):  # It will be reported when it is read.
      return None

  with futures.ThreadPoolExecutor(8) as pool:
    return list(pool.map(size, range(len(source))))


def _read_all(
  source: Source,
  split: str,
  use: Callable[[str, Mapping[str, np.ndarray]], None],
  num_threads: int,
) -> list[Facts]:
  """The facts of a split, in order; examples without a problem are used."""

  def read(index: int) -> Facts:
    facts, example = _read(source, split, index)
    if example is not None:
      use(split, example)
    return facts

  with futures.ThreadPoolExecutor(num_threads) as pool:
    jobs = [pool.submit(read, i) for i in range(len(source))]
    try:
      what = f"checking {split}, example"
      return [job.result() for job in writers.track(jobs, what)]
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _read(
  source: Source, split: str, index: int
) -> tuple[Facts, dict[str, np.ndarray] | None]:
  """The facts of an example and, if nothing is wrong with it, the example."""
  problems: list[str] = []

  def attempt(read: Callable, *arguments: Any) -> Any:
    try:
      return read(*arguments)
    except (UserError, OSError) as error:
      problems.append(" ".join(str(error).split()))
      return None

  if hasattr(source, "raw_ids"):
    image = attempt(source.raw_image, index)
    ids = attempt(source.raw_ids, index)
    example = None
    if image is not None and ids is not None:
      example = attempt(source.convert, index, image, ids)
    if example is not None:  # As training looks at it, beside.
      before = len(problems)
      attempt(lambda: source.check(index, read_label=False))
      example = example if len(problems) == before else None
  else:
    example = attempt(source.__getitem__, index)
    image = ids = None
    if example is not None:
      image = example["image"]
      ids = np.where(example["weight"] > 0, example["label"], IGNORED)
  more = {}
  if image is not None:
    more |= _describe(image)
  if ids is not None:
    more["ids"] = _count(ids)
  if image is not None and hasattr(source, "spacing"):
    more["spacing"] = attempt(source.spacing, index)
  name = source.names[index]
  return Facts(split, name, tuple(problems), **more), example


def _describe(image: np.ndarray) -> dict[str, Any]:
  low, high = float(image.min()), float(image.max())
  # A range of its own: of float images nothing is known before all are read.
  ends = (low, high) if low < high else (low, low + 1)
  return {
    "size": image.shape[:-1],
    "channels": image.shape[-1],
    "low": low,
    "high": high,
    "mean": float(image.mean(dtype=np.float64)),
    "std": float(image.std(dtype=np.float64)),
    "histogram": np.histogram(image, _BINS, ends)[0],
    "fingerprint": leaks.fingerprint(image),
  }


def _count(ids: np.ndarray) -> dict[int, int]:
  """Pixels of each id; of the most frequent ones if there are too many."""
  if 0 <= ids.min() and ids.max() < _MOST_IDS:  # Much faster than sorting.
    counts = np.bincount(ids.ravel())
    found = np.flatnonzero(counts)
    return dict(zip(found.tolist(), counts[found].tolist(), strict=True))
  found, counts = np.unique(ids, return_counts=True)
  most = np.sort(np.argsort(-counts, kind="stable")[:_MOST_IDS])
  return dict(zip(found[most].tolist(), counts[most].tolist(), strict=True))
