"""What a source of examples offers; the pipeline knows nothing else of it."""

import pathlib
from typing import Protocol

import numpy as np


class Source(Protocol):
  """Examples of one split by index, safe to read from many threads.

  An example is a dict of arrays over the spatial axes *S (1 to 3):
    image: float32 [*S, C]; files of 8 and 16 bits are scaled to [0, 1]. Of
      tokens int32 [T, 1 + M], ids of the word and of its characters.
    label: int32 [*S], class ids 0..L-1, L = max(num_classes, 2).
    weight: float32 [*S], 0 where the label counts nowhere, else 1.
  A source may add others; nothing here reads them.
  """

  # One name an example, unique in the split: the stem of its files.
  names: list[str]

  def __len__(self) -> int:
    """Number of examples."""

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Reads one example."""

  def image(self, index: int) -> np.ndarray:
    """Reads the image of an example alone."""

  def size(self, index: int) -> tuple[int, ...]:
    """Spatial size of an example, found without decoding it."""

  def instances(self, index: int) -> np.ndarray | None:
    """Reads the ids of the objects, int32 [*S], 0 = none; None if unknown."""

  def path(self, index: int) -> pathlib.Path | None:
    """The file of the image, None if there is none."""

  def spacing(self, index: int) -> tuple[float, ...] | None:
    """Size of a pixel along each axis, None if unknown."""

  def check(self, index: int, *, read_label: bool) -> None:
    """Raises a UserError if the example's files do not fit together.

    Looks at headers only, unless `read_label` asks for the label ids too.
    """


class RawSource(Source, Protocol):
  """A source that also says what its files hold, whatever the config says.

  `--mode check_data` asks for it, to report and propose what a config that does
  not fit would hide. Its constructor takes `lenient`: files that are missing
  are errors when they are read.
  """

  def raw_image(self, index: int) -> np.ndarray:
    """The image float32 [*S, c] with the channels of the file."""

  def raw_ids(self, index: int) -> np.ndarray:
    """The label ids of the file, int [*S]."""

  def convert(
    self, index: int, image: np.ndarray, ids: np.ndarray
  ) -> dict[str, np.ndarray]:
    """The example of both, as `source[index]` gives it."""
