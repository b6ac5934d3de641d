"""docs/questions.py against differences that are known."""

import json
import pathlib
import runpy
import sys

import numpy as np
import pytest

SCRIPT = str(pathlib.Path(__file__).parents[1] / "docs" / "questions.py")


def write(folder, scores, shifted=None):
  """results.jsonl of arms with scores [seeds, images]."""
  folder.mkdir(parents=True)
  rows = lambda xs: [{"name": str(j), "dice": x} for j, x in enumerate(xs)]
  records = [
    {
      **{"id": f"{arm}-s{i}", "arm": arm, "seed": i, "status": "done"},
      **{"split": "test", "params": 1, "macs": 1, "per_image": rows(one)},
      "shifted": {"per_image": rows((shifted or scores)[arm][i])},
    }
    for arm, array in scores.items()
    for i, one in enumerate(np.asarray(array).tolist())
  ]
  lines = [json.dumps(record) for record in records]
  (folder / "results.jsonl").write_text("\n".join(lines) + "\n")


def ask(runs, monkeypatch, capsys):
  """The table's cells by claim."""
  monkeypatch.setattr(sys, "argv", [SCRIPT, str(runs)])
  runpy.run_path(SCRIPT, run_name="__main__")
  lines = capsys.readouterr().out.splitlines()[2:]
  cells = [line.strip("| ").split(" | ") for line in lines]
  return {first: rest for first, *rest in cells}


def test_claims_are_confirmed_contradicted_or_left_open(
  tmp_path, monkeypatch, capsys
):
  rng = np.random.default_rng(0)
  image = 0.8 + 0.05 * rng.normal(size=12)
  noisy = lambda by, sd: image + by + sd * rng.normal(size=(5, 12))
  scores = {
    "concat": noisy(0.1, 0.003),
    "skip=none": noisy(0, 0.003),
    "skip=zeros": noisy(0, 0.2),
  }
  write(tmp_path / "controls_isbi2012", scores)
  # In domain none is behind, shifted it is ahead of one arm alone.
  hard = {f"synthetic_texture=0.7,{k}": v for k, v in scores.items()}
  hard["synthetic_texture=0.7,none"] = hard.pop(
    "synthetic_texture=0.7,skip=none"
  )
  turned = dict(hard)
  turned["synthetic_texture=0.7,concat"] = noisy(-0.1, 0.003)
  write(tmp_path / "texture_synthetic", hard, turned)
  found = ask(tmp_path, monkeypatch, capsys)
  assert len(found) == 4
  membranes = found["Q1: thin membranes need skips"]
  assert abs(float(membranes[0]) - 0.1) < 0.003
  assert membranes[3:5] == ["5", "12"] and "**confirmed**" in membranes[-1]
  control = found["Q9: it is the information, not the capacity (membranes)"]
  assert "**undecided**" in control[-1]
  texture = "hardest texture: concat is"
  for claim in (f"in domain, {texture} better", f"shifted, {texture} worse"):
    (cells,) = (v for k, v in found.items() if claim in k)
    assert "**confirmed**" in cells[-1]


def test_a_claim_the_other_way_round_is_contradicted(
  tmp_path, monkeypatch, capsys
):
  rng = np.random.default_rng(1)
  image = 0.8 + 0.05 * rng.normal(size=12)
  close = lambda by: image + by + 0.002 * rng.normal(size=(5, 12))
  scores = {"concat": close(0), "skip=none": close(0.05)}
  write(tmp_path / "controls_isbi2012", scores)
  (cells,) = ask(tmp_path, monkeypatch, capsys).values()
  assert "**contradicted**" in cells[-1] and float(cells[0]) < 0


def test_nothing_to_ask_is_one_line(tmp_path, monkeypatch, capsys):
  with pytest.raises(SystemExit, match="no study that is asked of"):
    ask(tmp_path, monkeypatch, capsys)
