"""Asks finished studies the questions of the literature: a Markdown table.

python docs/questions.py RUNS

RUNS holds the folders of `configs/ablations` as docs/studies.md names them.
Each question is one difference of two arms, on the same seeds and images, by
the model of `studies.statistics`; p is corrected for all that are asked here
(Holm). What is not run is left out.
"""

import argparse
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from unet_jax.studies import analysis, statistics

MARGIN = 0.01


class Question(NamedTuple):
  """A claim: `first` less `second` is what is expected.

  Attributes:
    text: what is claimed.
    study: folder of RUNS.
    first, second: arms.
    expected: verdicts that confirm it.
    split: "" for the study's own, or "shifted".
  """

  text: str
  study: str
  first: str
  second: str
  expected: tuple[str, ...]
  split: str = ""


_SAME = (f"equivalent within +-{MARGIN:g}",)
_MORE, _LESS = (statistics.BETTER,), (statistics.WORSE,)


def _texture(similarity: float, arm: str) -> str:
  return f"synthetic_texture={similarity},{arm}"


QUESTIONS = (
  Question(
    "Q1: thin membranes need skips",
    *("controls_isbi2012", "concat", "skip=none", _MORE),
  ),
  Question(
    "Q1, nuclei: round blobs need them less",
    *("controls_dsb2018", "concat", "skip=none", _SAME),
  ),
  Question(
    "Q9: it is the information, not the capacity (membranes)",
    *("controls_isbi2012", "skip=zeros", "skip=none", _SAME),
  ),
  Question(
    "Q9 on nuclei",
    *("controls_dsb2018", "skip=zeros", "skip=none", _SAME),
  ),
  Question(
    "Q2, synthetic: plain blobs do not need skips",
    *("texture_synthetic", _texture(0.0, "none"), _texture(0.0, "concat")),
    _SAME,
  ),
  *(
    Question(
      f"Q5, in domain, hardest texture: {arm} is better than none",
      *("texture_synthetic", _texture(0.7, arm), _texture(0.7, "none"), _MORE),
    )
    for arm in ("concat", "attn_oktay", "nested")
  ),
  *(
    Question(
      f"Q5, shifted, hardest texture: {arm} is worse than none",
      *("texture_synthetic", _texture(0.7, arm), _texture(0.7, "none"), _LESS),
      "shifted",
    )
    for arm in ("concat", "attn_oktay", "nested")
  ),
)


def difference(
  records: list[dict[str, Any]], question: Question
) -> np.ndarray | None:
  """Scores of the first arm less the second's [seeds, images], if there."""
  runs: dict[str, list[dict[str, Any]]] = {}
  for record in records:
    if record["status"] == "done":
      found = record[question.split] if question.split else record
      one = {"seed": record["seed"], "per_image": found["per_image"]}
      runs.setdefault(record["arm"], []).append(one)
  arms = [runs.get(name) for name in (question.first, question.second)]
  if None in arms:
    return None
  scores = analysis.scores_of(dict(zip("ab", arms, strict=True)), "dice")
  first, second = analysis.shared_by(scores["a"], scores["b"])
  return first - second if first.size else None


def verdict(question: Question, found: statistics.Difference) -> str:
  """What the difference says of the claim."""
  if found.verdict in question.expected:
    return "confirmed"
  unclear = (statistics.UNCLEAR, statistics.UNKNOWN)
  return "undecided" if found.verdict in unclear else "contradicted"


def main() -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("runs", type=pathlib.Path, metavar="RUNS")
  runs = parser.parse_args().runs
  asked, differences = {}, {}
  for question in QUESTIONS:
    if (runs / question.study / "results.jsonl").exists():
      array = difference(analysis.read([runs / question.study]), question)
      if array is not None:
        name = question.text
        asked[name], differences[name] = question, array
  if not asked:
    sys.exit(f"error: no study that is asked of in {runs}; run one first")
  head = ("claim", "difference of Dice", "from", "to", "seeds", "images")
  head += ("p (Holm)", "at this size")
  lines = [head, ("---",) * len(head)]
  for name, d in statistics.judge(differences, MARGIN).items():
    e, q = d.estimate, asked[name]
    ends = [f"{x:+.4f}" for x in (e.mean, e.low, e.high)]
    said = f"**{verdict(q, d)}** ({d.verdict.replace('+-', '±')})"
    p = f"{d.p_holm:.2g}"
    lines.append((name, *ends, str(e.num_seeds), str(e.num_images), p, said))
  print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
  main()
