"""Examples from a folder of images and masks, and its splits."""

import pathlib
from concurrent import futures

import numpy as np

from unet_jax.data import decode
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
    UserError: a folder, split or file is missing, double, or out of bounds.
  """

  def __init__(self, cfg: Config, split: str, split_dir: pathlib.Path):
    root = storage.to_path(cfg.data.dir)
    files = _list_files(root)
    self.names = _choose_stems(cfg, split, split_dir, files)
    self._instances = root / "instances"
    self._images = [_one(files, "images", s, root) for s in self.names]
    self._masks = [_one(files, "masks", s, root) for s in self.names]
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
    cfg, path = self._cfg, self._masks[index]
    ids = decode.read_mask(path, dims=self._dims, max_pixels=cfg.max_pixels)
    values = cfg.mask_values or tuple(range(max(cfg.num_classes, 2)))
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
      known = ", ".join(map(str, values))
      raise UserError(
        f"{path}: label ids {', '.join(listed[:5])}"
        f"{', ...' if len(listed) > 5 else ''} are none of"
        f" {known if cfg.mask_values else f'0..{values[-1]}'}; set"
        " config.data.ignore_label= (counts nowhere), config.data.mask_values="
        " (the id of each class, such as 0,255) or config.data.num_classes="
      )
    label[ignored] = 0
    return label, (~ignored).astype(np.float32)


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
      f"spacings from {both[0]} to {both[1]}: the network sees voxels, so bring"
      " the volumes to one spacing or raise config.augment.scale"
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
  if not names:
    folder, names = split_dir, _SPLITS
    # train.txt is written last: where it is, the split is complete.
    if not (split_dir / "train.txt").is_file():
      stems = sorted(files["images"].keys() | files["masks"].keys())
      for name, own in _seeded_split(cfg.data, stems, cfg.seed).items():
        text = "".join(f"{stem}\n" for stem in own)
        writers.write_atomically(split_dir / f"{name}.txt", text.encode())
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
