"""Examples of a prepared TensorFlow Datasets set, without TensorFlow."""

import pathlib
import re
from typing import Any

import numpy as np

from unet_jax.data import decode, labels
from unet_jax.errors import UserError
from unet_jax.runtime import storage
from unet_jax.schema import Config

_SPLITS = ("train", "val", "test")


class TfdsSource:
  """A split of DIR/NAME[/CONFIG]/VERSION, prepared as array_record.

  Images and masks are decoded as strictly as those of a folder, from the bytes
  that the set holds: TFDS's own decoding gives other channels than it says.
  Construction reads no example; names are places in the split.

  Raises:
    UserError: the set is not there, or has no such split or feature.
  """

  def __init__(
    self,
    cfg: Config,
    split: str,
    split_dir: pathlib.Path | None,
    *,
    lenient: bool = False,
  ):
    del split_dir, lenient  # Each example is read when it is needed.
    tfds, builder = _open(cfg)
    self._cfg = cfg.data
    self._image, self._mask, pictures = _find_features(tfds, builder, cfg)
    self._pictures = pictures
    text = getattr(cfg.data, f"tfds_{split}")
    if not text:
      raise UserError(
        f"config.data.tfds_{split} is empty; name a split of {cfg.data.name},"
        " such as 'train[80%:]'"
      )
    # By our own decoder, or not at all.
    decoders = dict.fromkeys(pictures, tfds.decode.SkipDecoding())
    try:
      if not builder.info.splits[text].num_examples:
        raise ValueError("no example is in it")
      self._examples = builder.as_data_source(text, decoders=decoders)
    except (ValueError, KeyError, AssertionError) as error:
      reason = " ".join(str(error).split()).rstrip(".")
      raise UserError(
        f"config.data.tfds_{split}={text!r}: {reason}; {cfg.data.name} has"
        f" {', '.join(builder.info.splits)}: take one or a part, such as"
        " 'train[80%:]'"
      ) from error
    self.names = [f"{split}_{i:06d}" for i in range(len(self._examples))]
    self._where = f"{builder.data_path}, {text}"
    self._sizes: dict[int, tuple[int, ...]] = {}

  @staticmethod
  def list_splits(cfg: Config, split_dir: pathlib.Path | None) -> list[str]:
    """The splits that are named; the default names only if the set has them."""
    del split_dir
    _, builder = _open(cfg)
    there = [*builder.info.splits]
    usual = type(cfg.data)()
    named = {s: getattr(cfg.data, f"tfds_{s}") for s in _SPLITS}
    return [
      s
      for s, text in named.items()
      if text in there or text not in ("", getattr(usual, f"tfds_{s}"))
    ]

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    example = self._read(index)
    return self.convert(
      index,
      self._decode_image(index, example),
      self._decode_ids(index, example),
    )

  def image(self, index: int) -> np.ndarray:
    return decode.to_channels(
      self.raw_image(index), self._cfg.channels, self._name(index)
    )

  def raw_image(self, index: int) -> np.ndarray:
    return self._decode_image(index, self._read(index))

  def raw_ids(self, index: int) -> np.ndarray:
    return self._decode_ids(index, self._read(index))

  def convert(
    self, index: int, image: np.ndarray, ids: np.ndarray
  ) -> dict[str, np.ndarray]:
    name = self._name(index)
    label, weight = labels.to_classes(ids, self._cfg, name)
    self._check_sizes(index, image.shape[:-1], label.shape)
    image = decode.to_channels(image, self._cfg.channels, name)
    return {"image": image, "label": label, "weight": weight}

  def size(self, index: int) -> tuple[int, ...]:
    if index not in self._sizes:
      self._sizes[index] = self._size(index, self._read(index), self._image)
    return self._sizes[index]

  def instances(self, index: int) -> np.ndarray | None:
    """Ids of objects int32 [H, W], if the set has such a feature."""
    if "instances" not in self._pictures:
      return None
    ids = self._decode_ids(index, self._read(index), "instances")
    return ids.astype(np.int32)

  def path(self, index: int) -> None:
    """Examples have no files of their own."""

  def spacing(self, index: int) -> None:
    """Pictures have none."""

  def check(self, index: int, *, read_label: bool) -> None:
    example = self._read(index)
    sizes = [self._size(index, example, k) for k in (self._image, self._mask)]
    self._sizes[index] = sizes[0]
    self._check_sizes(index, *sizes)
    if read_label:
      ids = self._decode_ids(index, example)
      labels.to_classes(ids, self._cfg, self._name(index))

  def _read(self, index: int) -> dict[str, bytes]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    return self._examples[index]

  def _name(self, index: int, feature: str | None = None) -> str:
    return f"{self._where}, example {index}, {feature or self._mask}"

  def _file(
    self, index: int, example: dict[str, bytes], feature: str
  ) -> decode.InMemory:
    return decode.InMemory(self._name(index, feature), example[feature])

  def _size(
    self, index: int, example: dict[str, bytes], feature: str
  ) -> tuple[int, ...]:
    return decode.image_size(self._file(index, example, feature), 2)

  def _decode_image(self, index: int, example: dict[str, bytes]) -> np.ndarray:
    file, most = self._file(index, example, self._image), self._cfg.max_pixels
    return decode.read_image(file, channels=None, dims=2, max_pixels=most)

  def _decode_ids(
    self, index: int, example: dict[str, bytes], feature: str = ""
  ) -> np.ndarray:
    file = self._file(index, example, feature or self._mask)
    return decode.read_mask(file, dims=2, max_pixels=self._cfg.max_pixels)

  def _check_sizes(
    self, index: int, image: tuple[int, ...], mask: tuple[int, ...]
  ) -> None:
    if image != mask:
      raise UserError(
        f"{self._name(index)}: is {mask[0]} x {mask[1]} but the image is"
        f" {image[0]} x {image[1]}; mend the set (nothing is resized here)"
      )


def _open(cfg: Config) -> tuple[Any, Any]:
  """The library, and the builder of the set that `data.name` means."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(
      f"config.data.source='tfds': {error}; pip install 'unet_jax[tfds]'"
    ) from error
  root = cfg.data.dir or tfds.core.constants.DATA_DIR
  folder = _find_version(storage.to_path(root), cfg.data.name)
  builder = tfds.builder_from_directory(str(folder))
  form = builder.info.file_format
  if form is None or not form.value == "array_record":
    found = form.value if form else "no known format"
    raise UserError(
      f"{folder}: is prepared as {found}, which needs TensorFlow to read;"
      " prepare it with file_format='array_record'"
    )
  return tfds, builder


def _find_version(root: pathlib.Path, text: str) -> pathlib.Path:
  """DIR/NAME/VERSION: the one that is named, or the latest."""
  name, _, version = text.partition(":")
  parts = pathlib.PurePosixPath(name).parts
  if ".." in parts or name.startswith("/"):
    raise UserError(f"config.data.name={text!r}: give NAME[/CONFIG][:VERSION]")
  folder = root / name
  found = {
    p.name: p
    for p in (folder.iterdir() if folder.is_dir() else ())
    if re.fullmatch(r"\d+\.\d+\.\d+", p.name)
    and (p / "dataset_info.json").is_file()
  }
  if version in found:
    return found[version]
  if found and not version:
    latest = max(found, key=lambda x: tuple(map(int, x.split("."))))
    return found[latest]
  there = f"there: {', '.join(sorted(found))}" if found else "nothing is there"
  raise UserError(
    f"no prepared set {folder}{f'/{version}' if version else ''} ({there});"
    " prepare it (README, Your own images), or name its folder by"
    " config.data.dir"
  )


def _find_features(
  tfds: Any, builder: Any, cfg: Config
) -> tuple[str, str, list[str]]:
  """The features of the image and of the mask, and all that are images."""
  features = builder.info.features
  pictures = [
    k for k, v in features.items() if isinstance(v, tfds.features.Image)
  ]
  image = cfg.data.image_feature or "image"
  others = [k for k in pictures if k != image]
  # Ours may have instances too.
  mask = cfg.data.mask_feature or (
    others[0] if len(others) == 1 else "mask" * ("mask" in others)
  )
  for name, field in ((image, "image_feature"), (mask, "mask_feature")):
    if name not in pictures:
      raise UserError(
        f"{builder.data_path}: no {field.split('_')[0]} {name!r}; set"
        f" config.data.{field}= to one of its images:"
        f" {', '.join(pictures) or 'there are none'}"
      )
  return image, mask, pictures
