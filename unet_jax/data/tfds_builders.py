"""TFDS sets of ours: ISBI 2012, DSB2018, and any folder of images and masks.

`prepare` makes one as array_record, which `data.source=tfds` and
`tfds.data_source` read; no TensorFlow is needed. Importing this module
registers them with TFDS, so that with tensorflow, apache-beam and mlcroissant

  tfds build --imports=unet_jax.data.tfds_builders --file_format=array_record \
      --manual_dir=DIR isbi2012

does the same, and `tfds.load` has them as tf.data, which it keeps as tfrecord.
DIR is a folder as of `configs/folder.py`. Examples keep its order, so parts of
a split are blocks.
"""

import dataclasses
import io
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from unet_jax.data.folder import FolderSource
from unet_jax.errors import UserError
from unet_jax.schema import Config, DataConfig


@dataclasses.dataclass(kw_only=True)
class FolderConfig(tfds.core.BuilderConfig):
  """How images are stored: all alike, though the files may differ."""

  channels: int = 3
  dtype: type = np.uint8
  # Whether DIR/instances/STEM.png are stored too.
  instances: bool = False


class SegmentationFolder(tfds.core.GeneratorBasedBuilder):
  """DIR/images/STEM.EXT with DIR/masks/STEM.EXT, 8-bit ids as they are.

  Splits are those of train.txt, val.txt and test.txt; without them all is
  "train". Files are read as strictly as for training.
  """

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with images/ and masks/."
  BUILDER_CONFIGS = (
    FolderConfig(name="rgb"),
    FolderConfig(name="grey", channels=1),
    FolderConfig(name="grey16", channels=1, dtype=np.uint16),
  )
  # Of sets that have one form only.
  FORM = FolderConfig(name="")
  HOMEPAGE = CITATION = ""

  @property
  def _form(self) -> FolderConfig:
    return self.builder_config or self.FORM

  def _info(self) -> tfds.core.DatasetInfo:
    config, image = self._form, tfds.features.Image
    shape = (None, None, config.channels)
    features = {
      "name": tfds.features.Text(),
      "image": image(shape=shape, dtype=config.dtype, encoding_format="png"),
      "mask": image(shape=(None, None, 1), encoding_format="png"),
    }
    if config.instances:
      features["instances"] = image(
        shape=(None, None, 1), dtype=np.uint16, encoding_format="png"
      )
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(features),
      supervised_keys=("image", "mask"),
      homepage=self.HOMEPAGE,
      citation=self.CITATION,
      disable_shuffling=True,
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    root = pathlib.Path(dl_manager.manual_dir)
    data = DataConfig(
      dir=str(root),
      channels=self._form.channels,
      val_fraction=0.0,
      test_fraction=0.0,
    )
    # A folder without split files has all in train, which is noted nowhere.
    with tempfile.TemporaryDirectory() as noted:
      cfg, noted = Config(data=data), pathlib.Path(noted)
      splits = FolderSource.list_splits(cfg, noted)
      sources = {s: FolderSource(cfg, s, noted) for s in splits}
    return {s: self._generate_examples(x) for s, x in sources.items()}

  def _generate_examples(
    self, source: FolderSource
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, name in enumerate(source.names):
      yield i, self._example(source, i, name)

  def _example(
    self, source: FolderSource, index: int, name: str
  ) -> dict[str, Any]:
    source.check(index, read_label=False)
    dtype = self._form.dtype
    image = source.image(index) * np.iinfo(dtype).max
    ids = source.raw_ids(index)
    if image.min() < 0 or image.max() > np.iinfo(dtype).max:
      raise UserError(
        f"images/{name}: floats outside 0..1 have no place in a PNG;"
        " use data.source=folder"
      )
    if ids.min() < 0 or ids.max() > 255:
      raise UserError(
        f"masks/{name}: ids up to {ids.max()} do not fit 8 bits; save class ids"
      )
    example = {
      "name": name,
      "image": _png(np.round(image).astype(dtype)),
      "mask": _png(ids.astype(np.uint8)[..., None]),
    }
    if self._form.instances:
      instances = source.instances(index)
      if instances is None:
        raise UserError(f"instances/{name}.png: missing; add it")
      example["instances"] = _png(instances.astype(np.uint16)[..., None])
    return example


class Isbi2012(SegmentationFolder):
  """Membranes (0) and cell interiors (1) in electron microscopy, 512 x 512."""

  BUILDER_CONFIGS = ()
  FORM = FolderConfig(name="", channels=1, instances=True)
  HOMEPAGE = "https://imagej.net/events/isbi-2012-segmentation-challenge"
  CITATION = (
    "Arganda-Carreras et al. 2015, https://doi.org/10.3389/fnana.2015.00142;"
    " Cardona et al. 2010, https://doi.org/10.1371/journal.pbio.1000502"
  )


class Dsb2018(SegmentationFolder):
  """Nuclei (1) of the Data Science Bowl 2018, many modalities and sizes."""

  BUILDER_CONFIGS = ()
  FORM = FolderConfig(name="", instances=True)
  HOMEPAGE = "https://bbbc.broadinstitute.org/BBBC038"
  CITATION = "Caicedo et al. 2019, https://doi.org/10.1038/s41592-019-0612-7"


BUILDERS = {
  "isbi2012": Isbi2012,
  "dsb2018": Dsb2018,
  "segmentation_folder": SegmentationFolder,
}


def prepare(name: str, folder: str, data_dir: str) -> None:
  """Makes a folder a TFDS set in `data_dir`, without TensorFlow.

  Args:
    name: of BUILDERS, such as "isbi2012" or "segmentation_folder/grey".
    folder: with images/, masks/ and, where the set has them, instances/.
    data_dir: the `data.dir` of source="tfds".

  Raises:
    UserError: the name is unknown, or the folder cannot be read.
  """
  stem, _, config = name.partition("/")
  if stem not in BUILDERS:
    raise UserError(f"no builder {stem!r}; choose one of {list(BUILDERS)}")
  if not pathlib.Path(folder).is_dir():
    raise UserError(f"no folder {folder}; name the one with images/ and masks/")
  builder = BUILDERS[stem](
    data_dir=data_dir, config=config or None, file_format="array_record"
  )
  download = tfds.download.DownloadConfig(manual_dir=folder)
  builder.download_and_prepare(download_config=download)


def _png(array: np.ndarray) -> bytes:
  """uint8 [H, W, 3], or uint8 or uint16 [H, W, 1], without loss."""
  buffer = io.BytesIO()
  array = array[..., 0] if array.shape[-1] == 1 else array
  Image.fromarray(array).save(buffer, "PNG")
  return buffer.getvalue()
