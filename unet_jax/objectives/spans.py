"""Entities in sequences of tags, compared span by span.

A tag is "O", or a prefix, "-" and the entity's type: B begins an entity, I is
inside one, E ends one, S is one of a single token. Any sequence of these can be
read, well formed or not (BIO, also without B at most beginnings, and BIOES).
"""

import collections
import math
import re
from collections.abc import Iterable, Sequence

_PREFIXED = re.compile(r"([BIES])-(.+)")
# First token, one past the last, type.
Span = tuple[int, int, str]


def are_entities(tags: Iterable[str]) -> bool:
  """Whether a set of tags speaks of entities: "O" and prefixed ones alone."""
  others = set(tags) - {"O"}
  return bool(others) and all(map(_PREFIXED.fullmatch, others))


def spans(tags: Sequence[str]) -> set[Span]:
  """The entities of a sequence, by the rules of conlleval.

  An entity starts at B and S, and at any tag after "O", E or S or after another
  type; it ends before such a start, and before "O".

  Reference: Tjong Kim Sang & Buchholz 2000, CoNLL-2000 shared task, conlleval.
  """
  found, start, before, kind = set(), 0, "O", ""
  for i, tag in enumerate([*tags, "O"]):
    match = _PREFIXED.fullmatch(tag)
    prefix, type_ = match.groups() if match else ("O", "")
    new = prefix in "BS" or before in "OES" or type_ != kind
    if before != "O" and (new or prefix == "O"):
      found.add((start, i, kind))
    if new:
      start = i
    before, kind = prefix, type_
  return found


def summarize(
  truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]
) -> dict[str, float | int]:
  """Scores over sentences; an entity is right if both ends and type are.

  With t, p and c the entities of the truth, of the prediction and of both:
  precision = c / p, recall = c / t, f1 = 2 c / (t + p); NaN over nothing.

  Returns:
    entity_f1, entity_precision, entity_recall: over all types.
    entity_f1_TYPE: of each type in truth or prediction.
    num_entities: t.
  """
  counts: dict[str, collections.Counter[str]] = {
    name: collections.Counter() for name in ("truth", "predicted", "both")
  }
  for pair in zip(truth, predicted, strict=True):
    true, found = map(spans, pair)
    for name, own in zip(counts, (true, found, true & found), strict=True):
      counts[name].update(kind for *_, kind in own)
  t, p, c = (counter.total() for counter in counts.values())
  types = sorted(counts["truth"].keys() | counts["predicted"].keys())
  return {
    "entity_f1": _ratio(2 * c, t + p),
    "entity_precision": _ratio(c, p),
    "entity_recall": _ratio(c, t),
    **{
      f"entity_f1_{x}": _ratio(
        2 * counts["both"][x], counts["truth"][x] + counts["predicted"][x]
      )
      for x in types
    },
    "num_entities": t,
  }


def _ratio(top: int, bottom: int) -> float:
  return top / bottom if bottom else math.nan
