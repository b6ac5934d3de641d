"""Entities: against a brute-force reading, and hand-counted examples."""

import itertools
import math

import pytest

from unet_jax.objectives import spans


def read_slowly(tags):
  """Every stretch (start, end, type) that conlleval's two rules make one.

  Its endOfChunk and startOfChunk, case by case as in its source, asked for
  each pair of neighbours.
  """
  split = [(t[0], t[2:]) if t != "O" else ("O", "") for t in tags]
  padded = [("O", ""), *split, ("O", "")]
  pairs = list(itertools.pairwise(padded))

  def ends(before, now):
    (a, kind), (b, other) = before, now
    cases = [("B", "B"), ("B", "O"), ("I", "B"), ("I", "O")]
    cases += [("E", "E"), ("E", "I"), ("E", "O"), ("E", "B")]
    cases += [("S", x) for x in "BIESO"]
    cases += [("B", "S"), ("I", "S"), ("E", "S")]
    return (a, b) in cases or (a != "O" and kind != other)

  def starts(before, now):
    (a, kind), (b, other) = before, now
    cases = [("B", "B"), ("I", "B"), ("O", "B"), ("O", "I"), ("E", "B")]
    cases += [("E", "E"), ("E", "I"), ("O", "E"), ("O", "S"), ("B", "S")]
    cases += [("I", "S"), ("E", "S"), *[("S", x) for x in "BIES"]]
    return (a, b) in cases or (b != "O" and kind != other)

  found = set()
  for start, end in itertools.combinations(range(len(tags) + 1), 2):
    inside = pairs[start + 1 : end]
    whole = not any(ends(*pair) or starts(*pair) for pair in inside)
    kind = {kind for _, kind in split[start:end]}
    if (
      starts(*pairs[start])
      and ends(*pairs[end])
      and whole
      and len(kind) == 1
      and ("O", "") not in split[start:end]
    ):
      found.add((start, end, kind.pop()))
  return found


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_every_short_sequence_is_read_as_conlleval_does(length):
  tags = ["O", *(f"{p}-{t}" for p in "BIES" for t in ("PER", "LOC"))]
  if length == 4:
    tags = ["O", "B-X", "I-X", "B-Y", "I-Y"]
  for sequence in itertools.product(tags, repeat=length):
    assert spans.spans(sequence) == read_slowly(sequence), sequence


@pytest.mark.parametrize(
  ("tags", "expected"),
  [
    ("B-PER I-PER O B-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
    ("B-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
    # Without a B, or of another type: it begins all the same.
    ("O I-PER I-PER I-LOC", {(1, 3, "PER"), (3, 4, "LOC")}),
    ("B-A-B I-A-B", {(0, 2, "A-B")}),
    ("O O", set()),
  ],
)
def test_known_readings(tags, expected):
  assert spans.spans(tags.split()) == expected


def test_an_entity_counts_whole_or_not_at_all():
  truth = ["B-PER I-PER O B-LOC".split(), "B-PER O".split(), "O O".split()]
  found = ["B-PER I-PER O B-PER".split(), "B-PER I-PER".split(), "O O".split()]
  scores = spans.summarize(truth, found)
  # Of three true and three predicted entities one is the same.
  assert scores["entity_precision"] == scores["entity_recall"] == 1 / 3
  assert scores["entity_f1"] == 1 / 3
  assert scores["entity_f1_PER"] == 2 * 1 / (2 + 3)
  assert scores["entity_f1_LOC"] == 0
  assert scores["num_entities"] == 3


def test_nothing_to_find_has_no_score():
  assert math.isnan(spans.summarize([["O"]], [["O"]])["entity_f1"])
  assert spans.summarize([["O"]], [["B-X"]])["entity_f1"] == 0


@pytest.mark.parametrize(
  ("tags", "expected"),
  [
    (["O", "B-PER", "I-PER"], True),
    (["O", "S-X"], True),
    (["O"], False),
    (["NOUN", "B-X"], False),
    (["O", "B-"], False),
  ],
)
def test_which_tags_speak_of_entities(tags, expected):
  assert spans.are_entities(tags) is expected
