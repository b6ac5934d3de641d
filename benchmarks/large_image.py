"""Peak memory of predicting one large TIFF: from tiles, to tiles.

`python benchmarks/large_image.py [SIDE] [WIDTHS]` makes an untrained network
and a picture of SIDE x SIDE pixels (10000), predicts it in a process of its
own, and prints a JSON line: seconds, and the most memory that it held.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import tifffile

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "synthetic.py"
LIMIT_MB = 1536


def main(argv):
  """Runs it all in a temporary folder; 1 if it took more than the limit."""
  side = int(argv[1]) if len(argv) > 1 else 10_000
  widths = argv[2] if len(argv) > 2 else "16,32,64,128"
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    train = ["--config", CONFIG, "--workdir", folder / "run"]
    train += [f"--config.model.widths={widths}", "--config.train.num_steps=1"]
    train += ["--config.optimizer.warmup_steps=0"]
    train += ["--config.train.num_pictures=0"]
    run(
      *train, "--config.data.synthetic_train=8", "--config.train.batch_size=4"
    )
    write_picture(folder / "large.tif", side)
    predict = ["--mode", "predict", "--workdir", folder / "run"]
    predict += ["--input", folder / "large.tif", "--output", folder / "out"]
    # Large at any side: what is measured does not depend on it.
    predict += ["--config.predict.whole_pixels=1000000"]
    start = time.monotonic()
    peak = run(*predict)
    seconds = time.monotonic() - start
    with tifffile.TiffFile(folder / "out" / "large_mask.tif") as file:
      page = file.pages[0]
      done = page.is_tiled and page.shape == (side, side)
  row = {
    "name": "predict_large_tiff",
    "side": side,
    "widths": widths,
    "ours_seconds": round(seconds, 1),
    "peak_rss_mb": round(peak),
    "limit_mb": LIMIT_MB,
  }
  print(json.dumps(row))
  return 0 if done and peak <= LIMIT_MB else 1


def run(*argv):
  """Runs the program; the most megabytes that were resident."""
  command = [sys.executable, "-m", "unet_jax.main", *map(str, argv)]
  child = subprocess.Popen(command)
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  if child.returncode:
    raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
  return usage.ru_maxrss / 1024


def write_picture(path, side, tile=512):
  """Smooth noise, tile by tile: 16-bit, tiled, compressed."""
  rng = np.random.default_rng(0)
  count = -(-side // tile)

  def parts():
    for _ in range(count * count):
      coarse = rng.integers(0, 65535, (tile // 8, tile // 8), dtype=np.uint16)
      yield np.kron(coarse, np.ones((8, 8), np.uint16))

  tifffile.imwrite(
    path,
    parts(),
    shape=(side, side),
    dtype=np.uint16,
    tile=(tile, tile),
    photometric="minisblack",
    compression="zlib",
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv))
