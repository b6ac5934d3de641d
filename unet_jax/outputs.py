"""What predictions leave on disk, beside masks and overlays."""

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from unet_jax import polygons
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.inspect import pictures
from unet_jax.objectives import uncertainty
from unet_jax.runtime import writers


def mask_values(cfg: Config, mask: np.ndarray) -> np.ndarray:
  """The values of a mask's file, uint8."""
  if cfg.predict.mask_values == "scaled":
    return (mask.astype(np.int32) * 255 // (cfg.num_labels - 1)).astype(
      np.uint8
    )
  return mask


def mask_picture(cfg: Config, mask: np.ndarray) -> np.ndarray | Image.Image:
  """A mask uint8 [H, W] as `predict.mask_values` asks for it."""
  colors = pictures.class_colors(cfg.num_labels)
  if cfg.predict.mask_values == "colors":
    return colors[mask]
  if cfg.predict.mask_values == "palette":
    picture = Image.frombytes("P", mask.shape[::-1], mask.tobytes())
    picture.putpalette(colors.ravel().tolist())
    return picture
  return mask_values(cfg, mask)


def regions(cfg: Config, name: str, mask: np.ndarray) -> dict[str, Any]:
  """Instances and polygons, where asked for, by the end of their file's name.

  Raises:
    UserError: more regions than a file can number.
  """
  found: dict[str, Any] = {}
  if not (cfg.predict.instances or cfg.predict.polygons):
    return found
  numbered = polygons.instances(mask)
  if cfg.predict.instances:
    found["instances"] = polygons.as_uint16(numbered, name)
  if cfg.predict.polygons:
    found["polygons.geojson"] = polygons.geojson(mask, numbered)
  return found


def uncertainty_map(cfg: Config, samples: np.ndarray) -> np.ndarray:
  """`predict.uncertainty` of probabilities [N, *S, K], as a share of 0..1."""
  if cfg.predict.uncertainty == "mutual_information":
    value = uncertainty.mutual_information(samples)
  else:
    value = uncertainty.entropy(samples.mean(0))
  return value / uncertainty.highest(cfg.num_labels)


def uncertainty_picture(
  cfg: Config, unsure: np.ndarray, highest: float
) -> np.ndarray:
  """An uncertainty map as greys: 255 is the most that there is.

  Of mutual information, mostly a few percent of that, it is `highest`, the
  image's own largest, `uncertainty_highest` of its `row`.
  """
  own = cfg.predict.uncertainty == "mutual_information" and highest
  return np.round(255 * unsure / (own or 1)).astype(np.uint8)


def save(path: pathlib.Path, value: Any) -> None:
  """Writes bytes, a picture [H, W] or an array of other rank to `path`.

  `path` has no suffix, but for bytes.
  """
  if isinstance(value, bytes):
    writers.write_atomically(path, value)
  elif value.ndim == 2 and value.dtype != np.float32:
    save_png(path.with_name(f"{path.name}.png"), value)
  else:
    save_npy(path.with_name(f"{path.name}.npy"), value)


def save_png(path: pathlib.Path, array: np.ndarray) -> None:
  """A grey PNG of 8 or 16 bits."""
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, "PNG")
  writers.write_atomically(path, buffer.getvalue())


def save_npy(path: pathlib.Path, array: np.ndarray) -> None:
  """An array as numpy saves it."""
  buffer = io.BytesIO()
  np.save(buffer, array)
  writers.write_atomically(path, buffer.getvalue())


# --- One row an image ---------------------------------------------------------


def row(
  cfg: Config, name: str, mask: np.ndarray, unsure: np.ndarray | None
) -> dict[str, Any]:
  """What predictions.csv says of an image, or of a part of it."""
  counts = np.bincount(mask.ravel(), minlength=cfg.num_labels)
  found = {"name": name, "pixels": int(mask.size)}
  if unsure is not None:
    found["uncertainty"] = float(unsure.mean(dtype=np.float64))
    found["uncertainty_highest"] = float(unsure.max())
  found |= {f"pixels_class_{k}": int(n) for k, n in enumerate(counts)}
  return found


def merge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """The row of an image from those of its parts."""
  total = sum(r["pixels"] for r in rows)
  merged = dict(rows[0])
  for key in merged:
    if key.startswith("pixels"):
      merged[key] = sum(r[key] for r in rows)
  if "uncertainty" in merged:
    weighted = sum(r["uncertainty"] * r["pixels"] for r in rows)
    merged["uncertainty"] = weighted / total
    merged["uncertainty_highest"] = max(r["uncertainty_highest"] for r in rows)
  return merged


def write_rows(output: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """predictions.json and predictions.csv."""
  workdir_lib.write_json(output / "predictions.json", {"images": rows})
  text = io.StringIO()
  table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
  table.writeheader()
  table.writerows(rows)
  writers.write_atomically(output / "predictions.csv", text.getvalue().encode())
