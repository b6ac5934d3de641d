"""Examples from a folder of images and masks, and its splits."""

import pathlib
from collections.abc import Sequence
from concurrent import futures
from typing import NoReturn

import numpy as np

from unet_jax.data import decode, labels
from unet_jax.data.source import Source
from unet_jax.errors import UserError
from unet_jax.runtime import storage, writers
from unet_jax.schema import Config, DataConfig

_SPLITS = ("train", "val", "test")
# Spacings that differ by more than this factor deserve a hint.
_OTHER_SPACING = 1.25
# Files of "images" and of "masks", by stem.
_Files = dict[str, dict[str, list[pathlib.Path]]]


class FolderSource:
  """DIR/images/STEM.EXT with DIR/masks/STEM.EXT, listed in DIR/SPLIT.txt.

  DIR/instances/STEM.png may number the objects (of volumes .npy or NIfTI).

  Without any split file a seeded split is made in `split_dir`, and found there
  by the next run. Construction lists the folders and decodes nothing.

  Raises:
    UserError: a folder, split or file is missing, double, or out of bounds; of
      a file with `lenient` not before it is read.
  """

  def __init__(
    self,
    cfg: Config,
    split: str,
    split_dir: pathlib.Path,
    *,
    lenient: bool = False,
  ):
    root = storage.to_path(cfg.data.dir)
    files, find = _list_files(root), _find if lenient else _one
    self.names = _choose_stems(cfg, split, split_dir, files)
    self._instances = root / "instances"
    self._images = [find(files, "images", s, root) for s in self.names]
    self._masks = [find(files, "masks", s, root) for s in self.names]
    self._cfg = cfg.data
    self._dims = cfg.model.dims
    # Headers are read once: on a network disk opening a file is what costs.
    self._sizes: dict[int, tuple[int, ...]] = {}
    self._spacings: dict[int, tuple[float, ...] | None] = {}

  @staticmethod
  def list_splits(cfg: Config, split_dir: pathlib.Path) -> list[str]:
    """The splits that hold a stem."""
    files = _list_files(storage.to_path(cfg.data.dir))
    splits = _read_splits(cfg, split_dir, files)
    return [split for split, stems in splits.items() if stems]

  @staticmethod
  def list_stems(cfg: Config) -> list[str]:
    """The stems of all images, in a split or not."""
    return list(_list_files(storage.to_path(cfg.data.dir))["images"])

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    image = self.image(index)
    label, weight = self._read_label(index)
    path = self._masks[index]
    self._check_sizes(index, image.shape[:-1], label.shape, path)
    return {"image": image, "label": label, "weight": weight}

  def image(self, index: int) -> np.ndarray:
    return decode.read_image(
      self._images[index],
      channels=self._cfg.channels,
      dims=self._dims,
      max_pixels=self._cfg.max_pixels,
    )

  def instances(self, index: int) -> np.ndarray | None:
    suffixes = (".png",) if self._dims == 2 else (".npy", ".nii.gz", ".nii")
    paths = [self._instances / f"{self.names[index]}{s}" for s in suffixes]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
      return None
    decode.check_same_place(self._images[index], path)
    most = self._cfg.max_pixels
    ids = decode.read_mask(path, dims=self._dims, max_pixels=most)
    self._check_sizes(index, self.size(index), ids.shape, path)
    return ids.astype(np.int32)

  def raw_image(self, index: int) -> np.ndarray:
    return decode.read_image(
      self._images[index],
      channels=None,
      dims=self._dims,
      max_pixels=self._cfg.max_pixels,
    )

  def raw_ids(self, index: int) -> np.ndarray:
    path, most = self._masks[index], self._cfg.max_pixels
    return decode.read_mask(path, dims=self._dims, max_pixels=most)

  def convert(
    self, index: int, image: np.ndarray, ids: np.ndarray
  ) -> dict[str, np.ndarray]:
    name, path = str(self._images[index]), self._masks[index]
    image = decode.to_channels(image, self._cfg.channels, name)
    label, weight = labels.to_classes(ids, self._cfg, str(path))
    self._check_sizes(index, image.shape[:-1], label.shape, path)
    return {"image": image, "label": label, "weight": weight}

  def size(self, index: int) -> tuple[int, ...]:
    if index not in self._sizes:
      self._sizes[index] = decode.image_size(self._images[index], self._dims)
    return self._sizes[index]

  def path(self, index: int) -> pathlib.Path:
    return self._images[index]

  def spacing(self, index: int) -> tuple[float, ...] | None:
    if index not in self._spacings:
      self._spacings[index] = decode.spacing(self._images[index])
    return self._spacings[index]

  def check(self, index: int, *, read_label: bool) -> None:
    decode.check_same_place(self._images[index], self._masks[index])
    path = self._masks[index]
    size = decode.image_size(path, self._dims)
    self._check_sizes(index, self.size(index), size, path)
    if read_label:
      self._read_label(index)

  def _check_sizes(
    self,
    index: int,
    image: tuple[int, ...],
    mask: tuple[int, ...],
    path: pathlib.Path,
  ) -> None:
    if image != mask:
      sizes = [" x ".join(map(str, size)) for size in (image, mask)]
      raise UserError(
        f"{self._images[index]} is {sizes[0]} but {path} is"
        f" {sizes[1]}; give both the same size (nothing is resized here)"
      )

  def _read_label(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Class ids int32 [*S] and weights float32 [*S] of one mask."""
    path = str(self._masks[index])
    return labels.to_classes(self.raw_ids(index), self._cfg, path)


def check_source(source: Source, check_masks: int) -> None:
  """Looks at the data before training: every size, and the ids of many masks.

  The ids of `check_masks` masks are read, evenly spaced over the source; of all
  others only the headers.

  Raises:
    UserError: the first example, by index, whose files do not fit together.
  """
  last = len(source) - 1
  num_read = min(check_masks, len(source))
  read = set(np.linspace(0, last, num_read).round().astype(int).tolist())
  check = lambda i: source.check(i, read_label=i in read)
  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(check, range(len(source))))  # Raises the first error.
  _hint_at_spacings([source.spacing(i) for i in range(len(source))])


def _hint_at_spacings(spacings: list[tuple[float, ...] | None]) -> None:
  known = [s for s in spacings if s is not None]
  low, high = (f(known or [[1.0]], axis=0) for f in (np.min, np.max))
  if (high > _OTHER_SPACING * low).any():
    both = [" x ".join(f"{x:.3g}" for x in spacing) for spacing in (low, high)]
    writers.log(
      f"spacings from {both[0]} to {both[1]}: the network sees voxels, so give"
      " config.data.spacing, or raise config.augment.scale"
    )


# --- Files --------------------------------------------------------------------


def _list_files(root: pathlib.Path) -> _Files:
  files: _Files = {"images": {}, "masks": {}}
  for kind, by_stem in files.items():
    folder = root / kind
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
      if decode.suffix_of(path) in decode.SUFFIXES and path.name[0] != ".":
        by_stem.setdefault(decode.stem_of(path), []).append(path)
    if not by_stem:
      raise UserError(
        f"no {kind} in {folder}; put STEM.EXT there, EXT one of"
        f" {', '.join(decode.SUFFIXES)}, or mend config.data.dir"
      )
  return files


def _one(
  files: _Files, kind: str, stem: str, root: pathlib.Path
) -> pathlib.Path:
  """The only file of `stem` in DIR/kind."""
  found = files[kind].get(stem, [])
  if not found:
    others = [
      str(p) for by_stem in files.values() for p in by_stem.get(stem, [])
    ]
    origin = f"of {others[0]}" if others else "listed in the split"
    raise UserError(
      f"{root / kind / stem}.*: missing, though {origin}; add it (one of"
      f" {', '.join(decode.SUFFIXES)}) or drop the stem"
    )
  if len(found) > 1:
    raise UserError(
      f"{found[0]} and {found[1]} share the stem {stem!r}; keep one"
    )
  if not storage.resolve(found[0]).is_relative_to(storage.resolve(root)):
    raise UserError(
      f"{found[0]}: is a link out of {root}; copy the file, or name the folder"
      " that holds it in config.data.dir"
    )
  return found[0]


class _Missing:
  """In the place of a path: whoever looks at the file is told why not."""

  def __init__(self, error: UserError):
    self._error = error

  def __getattr__(self, name: str) -> NoReturn:
    raise self._error

  def __str__(self) -> str:
    return str(self._error)


def _find(
  files: _Files, kind: str, stem: str, root: pathlib.Path
) -> pathlib.Path | _Missing:
  """As `_one`, but an error is raised only where the file is used."""
  try:
    return _one(files, kind, stem, root)
  except UserError as error:
    return _Missing(error)


# --- Splits -------------------------------------------------------------------


def _choose_stems(
  cfg: Config, split: str, split_dir: pathlib.Path, files: _Files
) -> list[str]:
  splits, root = _read_splits(cfg, split_dir, files), cfg.data.dir
  if split not in splits:
    names = ", ".join(f"{s}.txt" for s in splits)
    raise UserError(
      f"{root} has {names} but no {split}.txt; add it, or remove all of them"
      " for a seeded split"
    )
  if not splits[split]:
    raise UserError(
      f"the {split} split of {root} is empty; list stems in"
      f" {root}/{split}.txt (a seeded split needs 3 images, and"
      " config.data.val_fraction and test_fraction above 0)"
    )
  return splits[split]


def _read_splits(
  cfg: Config, split_dir: pathlib.Path, files: _Files
) -> dict[str, list[str]]:
  """Stems by split: given by the data folder, or kept in `split_dir`."""
  folder = storage.to_path(cfg.data.dir)
  names = [s for s in _SPLITS if (folder / f"{s}.txt").is_file()]
  if not names or cfg.data.num_folds:
    # train.txt is written last: where it is, the split is complete.
    if not (split_dir / "train.txt").is_file():
      if names:
        made = _read_lists(folder, names)
      else:
        stems = sorted(files["images"].keys() | files["masks"].keys())
        made = _seeded_split(cfg.data, stems, cfg.seed)
      if cfg.data.num_folds:
        made = _fold(cfg.data, made, cfg.seed)
      for name, own in made.items():
        text = "".join(f"{stem}\n" for stem in own)
        writers.write_atomically(split_dir / f"{name}.txt", text.encode())
    folder, names = split_dir, _SPLITS
  return _read_lists(folder, names)


def _read_lists(
  folder: pathlib.Path, names: Sequence[str]
) -> dict[str, list[str]]:
  paths = {name: folder / f"{name}.txt" for name in names}
  splits = {name: _read_stems(path) for name, path in paths.items()}
  owners = {}
  for name, stems in splits.items():
    for stem in stems:
      if stem in owners:
        raise UserError(
          f"{paths[name]}: {stem!r} is listed twice, first in {owners[stem]};"
          " an example belongs to one split, once"
        )
      owners[stem] = paths[name]
  return splits


def _fold(
  cfg: DataConfig, splits: dict[str, list[str]], seed: int
) -> dict[str, list[str]]:
  """One fold of train and val together; every stem is val in just one."""
  pool = sorted({*splits.get("train", ()), *splits.get("val", ())})
  if len(pool) < cfg.num_folds:
    raise UserError(
      f"config.data.num_folds={cfg.num_folds}: only {len(pool)} images to train"
      f" on; nearest: {max(len(pool), 2)}"
    )
  order = np.random.default_rng(seed).permutation(pool).tolist()
  val = set(order[cfg.fold :: cfg.num_folds])
  return {
    "test": splits.get("test", []),
    "val": sorted(val),
    "train": sorted(set(pool) - val),
  }


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


def _read_stems(path: pathlib.Path) -> list[str]:
  try:
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
  except (OSError, ValueError) as error:
    raise UserError(
      f"cannot read {path}: {error}; give one stem a line"
    ) from error
  stems = [line.strip() for line in lines if line.strip()]
  for stem in stems:
    if "/" in stem or "\\" in stem or stem in (".", ".."):
      raise UserError(
        f"{path}: {stem!r} is a path; list bare stems of the files in images/"
      )
  return stems
