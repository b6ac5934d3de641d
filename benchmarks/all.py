"""Runs the timing scripts: rows as they come, then the tables of the README.

  python benchmarks/all.py [--data DIR]

DIR as in input_pipeline.py. Nothing else should run meanwhile.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
VERSUS = ("ours", "PyTorch", "PyTorch / ours", "with huge pages too")
# script -> the heads of its table
TABLES = {
  "startup": ("start", "seconds"),
  "train_step": ("training step", *VERSUS),
  "inference": ("forward pass", *VERSUS),
  "predicting": ("prediction, host to host", *VERSUS),
  "input_pipeline": (
    "input",
    "step",
    "waits for data",
    "augmentation",
    "pipeline alone",
  ),
}
# What the names of the rows stand for.
LABELS = {
  "help": "`--help`",
  "first_start": "to the demo's first step, nothing compiled yet",
  "second_start": "to the demo's first step, again",
  "seed": "`seed`, 2 images of 256 x 256",
  "unet2015": "`unet2015`, one tile of 572 x 572",
  "volume": "3D, widths 16 to 128, one volume of 64 x 64 x 64",
  "infer_seed": "`seed`, one image of 512 x 512",
  "infer_unet2015": "`unet2015`, one tile of 572 x 572",
  "infer_volume": "3D, widths 16 to 128, one volume of 64 x 64 x 64",
  "predict_512": "widths 16 to 128, one image of 512 x 512",
  "predict_4096": "the same, one image of 4096 x 4096 in tiles",
  "predict_folder_100": "the same, 100 images of 64 to 256 pixels a side",
  "dsb2018": "DSB2018, `configs/folder.py`",
  "isbi2012": "ISBI 2012, `configs/isbi2012.py`",
  "synthetic": "synthetic, `configs/synthetic.py`",
}


def run(script, arguments):
  """The rows of a script, each printed as it comes."""
  command = [sys.executable, str(HERE / f"{script}.py"), *arguments]
  rows = []
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      print(line, end="", flush=True)
      rows.append(json.loads(line))
  if process.returncode:
    sys.exit(f"{script}.py failed")
  return rows


def cells(row):
  """A row of JSON as a row of its table."""
  label = LABELS[row["name"]]
  if "skipped" in row:
    return label, "not measured", "", "", ""
  if "wait_share" in row:
    return (
      label,
      f"{row['ours_seconds']:.3f} s",
      f"{row['wait_share']:.1%}",
      f"{row['augment_share']:.1%}",
      f"{row['examples_per_second']} examples/s",
    )
  if "ratio" in row:
    times = (f"{row[k]:.2f} s" for k in ("ours_seconds", "peer_seconds"))
    ratios = (f"{row[k]:.2f}" for k in ("ratio", "ratio_huge_pages"))
    return label, *times, *ratios
  return label, f"{row['ours_seconds']:.1f}"


def table(head, rows):
  """A table in Markdown."""
  lines = [head, ["---"] * len(head), *map(cells, rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data")
  flags = parser.parse_args()
  data = ["--data", flags.data] if flags.data else []
  rows = {
    script: run(script, data if script == "input_pipeline" else [])
    for script in TABLES
  }
  versions = ", ".join(
    f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch")
  )
  print(f"\n{len(os.sched_getaffinity(0))} cores, {versions}")
  for script, head in TABLES.items():
    print(f"\n{table(head, rows[script])}")


if __name__ == "__main__":
  main()
