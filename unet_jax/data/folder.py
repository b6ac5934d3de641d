"""Examples from a folder of images and masks, and its splits."""

import pathlib
import uuid
from concurrent import futures

import numpy as np

from unet_jax.config import DataConfig
from unet_jax.data import decode
from unet_jax.data.source import Source
from unet_jax.errors import UserError

SPLITS = ("train", "val", "test")


class FolderSource:
  """DIR/images/STEM.EXT with DIR/masks/STEM.EXT, listed in DIR/SPLIT.txt.

  DIR/instances/STEM.EXT (ids of objects, 0 = background) is read where it is
  there. Without any split file a seeded split is made in `split_dir`, and found
  there by the next run. Construction lists the folders and decodes nothing.

  Args:
    cfg: `dir`, `num_classes`, `channels`, `ignore_label`, `mask_values`, ...
    split: "train", "val" or "test".
    split_dir: where a seeded split is kept; never the data folder.
    dims: spatial axes of the images.
    seed: seed of a seeded split.

  Raises:
    UserError: a folder, split or file is missing, double, or out of bounds.
  """

  def __init__(
    self,
    cfg: DataConfig,
    split: str,
    split_dir: pathlib.Path,
    dims: int,
    seed: int,
  ):
    root = pathlib.Path(cfg.dir)
    files = {
      kind: _list_files(root / kind)
      for kind in ("images", "masks", "instances")
    }
    for kind in ("images", "masks"):
      if not files[kind]:
        raise UserError(
          f"no {kind} in {root / kind}; put STEM.EXT there, EXT one of"
          f" {', '.join(decode.SUFFIXES)}, or mend config.data.dir"
        )
    stems = sorted(files["images"].keys() | files["masks"].keys())
    self.names = _split_stems(cfg, split, pathlib.Path(split_dir), stems, seed)
    self._images = [_one(files, "images", s, root) for s in self.names]
    self._masks = [_one(files, "masks", s, root) for s in self.names]
    self._instances = [
      _one(files, "instances", s, root) if s in files["instances"] else None
      for s in self.names
    ]
    self._cfg = cfg
    self._dims = dims
    # Headers are read once: on a network disk opening a file is what costs.
    self._sizes: dict[int, tuple[int, ...]] = {}

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Reads one example, as `unet_jax.data.source` describes it."""
    image = decode.read_image(
      self._images[index],
      channels=self._cfg.channels,
      dims=self._dims,
      max_pixels=self._cfg.max_pixels,
    )
    label, weight = self._read_label(index)
    example = {"image": image, "label": label, "weight": weight}
    if self._instances[index]:
      ids = self._read_mask(self._instances[index])
      example["instances"] = ids.astype(np.int32)
    for array in example.values():
      if array.shape[: self._dims] != image.shape[: self._dims]:
        self._check_sizes(index)
    return example

  def size(self, index: int) -> tuple[int, ...]:
    """Spatial size of an image, from its header."""
    if index not in self._sizes:
      self._sizes[index] = decode.image_size(self._images[index], self._dims)
    return self._sizes[index]

  def check(self, index: int, *, read_label: bool) -> None:
    """Raises a UserError if sizes differ or, if asked, a label is no class."""
    self._check_sizes(index)
    if read_label:
      self._read_label(index)

  def _check_sizes(self, index: int) -> None:
    size = self.size(index)
    for path in (self._masks[index], self._instances[index]):
      if path and (other := decode.image_size(path, self._dims)) != size:
        raise UserError(
          f"{self._images[index]} is {_by(size)} but {path} is {_by(other)};"
          " give both the same size (nothing is resized here)"
        )

  def _read_mask(self, path: pathlib.Path) -> np.ndarray:
    return decode.read_mask(
      path, dims=self._dims, max_pixels=self._cfg.max_pixels
    )

  def _read_label(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Class ids int32 [*S] and weights float32 [*S] of one mask."""
    cfg, path = self._cfg, self._masks[index]
    ids = self._read_mask(path)
    values = cfg.mask_values or range(max(cfg.num_classes, 2))
    # File id -> class; entry 256 stands for every id that is no byte.
    lookup = np.full(257, -1, np.int32)
    lookup[list(values)] = range(len(values))
    label = lookup[np.where((ids < 0) | (ids > 255), 256, ids)]
    ignored = np.zeros(ids.shape, bool)
    if cfg.ignore_label is not None:
      ignored = ids == cfg.ignore_label
    unknown = (label < 0) & ~ignored
    if unknown.any():
      found, counts = np.unique(ids[unknown], return_counts=True)
      listed = [f"{i} ({n} pixels)" for i, n in zip(found, counts, strict=True)]
      raise UserError(
        f"{path}: label ids {', '.join(listed[:5])}"
        f"{', ...' if len(listed) > 5 else ''} are none of {_ids(values)}; set"
        " config.data.ignore_label= (counts nowhere), config.data.mask_values="
        " (the id of each class, such as 0,255) or config.data.num_classes="
      )
    label[ignored] = 0
    return label, (~ignored).astype(np.float32)


def check_source(
  source: Source, check_masks: int, *, num_threads: int = 8
) -> None:
  """Looks at the data before training: every size, and the ids of many masks.

  Args:
    source: any source.
    check_masks: masks whose ids are read, evenly spaced over the source; for
      all others the headers are compared.
    num_threads: threads that read.

  Raises:
    UserError: the first example, by index, whose files do not fit together.
  """
  last = len(source) - 1
  num_read = min(check_masks, len(source))
  read = set(np.linspace(0, last, num_read).round().astype(int).tolist())
  with futures.ThreadPoolExecutor(num_threads) as pool:
    check = lambda i: source.check(i, read_label=i in read)
    for _ in pool.map(check, range(len(source))):
      pass


def _by(size: tuple[int, ...]) -> str:
  return " x ".join(map(str, size))


def _ids(values: range | tuple[int, ...]) -> str:
  if isinstance(values, range):
    return f"0..{values[-1]}"
  return ", ".join(map(str, values))


# --- Files --------------------------------------------------------------------


def _list_files(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Stem -> its files, of every readable kind."""
  files = {}
  if folder.is_dir():
    for path in sorted(folder.iterdir()):
      if path.suffix.lower() in decode.SUFFIXES and path.name[0] != ".":
        files.setdefault(path.stem, []).append(path)
  return files


def _one(
  files: dict[str, dict[str, list[pathlib.Path]]],
  kind: str,
  stem: str,
  root: pathlib.Path,
) -> pathlib.Path:
  """The only file of `stem` in DIR/kind."""
  found = files[kind].get(stem, [])
  if not found:
    others = [str(p) for k in files for p in files[k].get(stem, [])]
    origin = f"of {others[0]}" if others else "listed in the split"
    raise UserError(
      f"{root / kind / stem}.*: missing, though {origin}; add it (one of"
      f" {', '.join(decode.SUFFIXES)}) or drop the stem"
    )
  if len(found) > 1:
    raise UserError(
      f"{found[0]} and {found[1]} share the stem {stem!r}; keep one"
    )
  if not found[0].resolve().is_relative_to(root.resolve()):
    raise UserError(
      f"{found[0]}: is a link out of {root}; copy the file, or name the folder"
      " that holds it in config.data.dir"
    )
  return found[0]


# --- Splits -------------------------------------------------------------------


def _split_stems(
  cfg: DataConfig,
  split: str,
  split_dir: pathlib.Path,
  stems: list[str],
  seed: int,
) -> list[str]:
  """Stems of a split: given by the data folder, or kept in `split_dir`."""
  root = pathlib.Path(cfg.dir)
  given = [s for s in SPLITS if (root / f"{s}.txt").is_file()]
  if given and split not in given:
    names = ", ".join(f"{s}.txt" for s in given)
    raise UserError(
      f"{root} has {names} but no {split}.txt; add it, or remove all of them"
      " for a seeded split"
    )
  if not given:
    # train.txt is written last: where it is, the split is complete.
    if not (split_dir / "train.txt").is_file():
      _write_splits(_seeded_split(cfg, stems, seed), split_dir)
  path = (root if given else split_dir) / f"{split}.txt"
  chosen = _read_stems(path)
  if not chosen:
    remedy = "" if given else f" or raise config.data.{split}_fraction"
    raise UserError(f"{path}: the split is empty; add stems{remedy}")
  return chosen


def _seeded_split(
  cfg: DataConfig, stems: list[str], seed: int
) -> dict[str, list[str]]:
  """Shares of the shuffled stems; no share is empty if there are three."""
  num = len(stems)

  def share(fraction: float, most: int) -> int:
    least = 1 if fraction > 0 and num >= 3 else 0
    return min(max(int(fraction * num), least), most)

  num_test = share(cfg.test_fraction, max(num - 2, 0))
  num_val = share(cfg.val_fraction, max(num - num_test - 1, 0))
  order = np.random.default_rng(seed).permutation(stems).tolist()
  return {
    "test": sorted(order[:num_test]),
    "val": sorted(order[num_test : num_test + num_val]),
    "train": sorted(order[num_test + num_val :]),
  }


def _write_splits(
  splits: dict[str, list[str]], split_dir: pathlib.Path
) -> None:
  """Writes each file at once, since hosts may do so at the same time."""
  try:
    split_dir.mkdir(parents=True, exist_ok=True)
    for name, stems in splits.items():
      temporary = split_dir / f"{name}.{uuid.uuid4().hex}.tmp"
      temporary.write_text("".join(f"{s}\n" for s in stems), encoding="utf-8")
      temporary.replace(split_dir / f"{name}.txt")
  except OSError as error:
    raise UserError(
      f"cannot write the split to {split_dir}: {error}; free space or choose"
      " another --workdir"
    ) from error


def _read_stems(path: pathlib.Path) -> list[str]:
  try:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
  except (OSError, ValueError) as error:
    raise UserError(
      f"cannot read {path}: {error}; give one stem a line"
    ) from error
  stems = [line.strip() for line in lines if line.strip()]
  seen = set()
  for stem in stems:
    if "/" in stem or "\\" in stem or stem in (".", ".."):
      raise UserError(
        f"{path}: {stem!r} is a path; list bare stems of the files in images/"
      )
    if stem in seen:
      raise UserError(f"{path}: {stem!r} is listed twice; keep one")
    seen.add(stem)
  return stems
