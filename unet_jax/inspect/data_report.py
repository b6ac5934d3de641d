"""The page of `--mode check_data`: one file that opens without a network."""

import base64
import html
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unet_jax.config import Config
from unet_jax.data import check
from unet_jax.data.check import Facts, Survey
from unet_jax.errors import UserError
from unet_jax.inspect import pages, pictures

# Rows of a table, examples of a split and pairs that are drawn.
_ROWS, _DRAWN, _PAIRS = 200, 4, 6
_CELL, _SIGNAL = 256, 116
# Most labels that are told apart by colour.
_COLOURS = 64
_NONE = "<p>None.</p>"


def page(record: Mapping[str, Any], found: Survey, cfg: Config) -> str:
  """The HTML of a record of `check_data.make_record` and what it is made of."""
  splits, problems = record["splits"], record["problems"]
  sizes = ", ".join(f"{s} {d['examples']}" for s, d in splits.items())
  verdict = (
    f"Training would fail: {len(problems)} problem{'s' * (len(problems) > 1)}."
    if problems
    else "Nothing is wrong: training would start."
  )
  ids = _classes(record, cfg)
  line = record["proposal"]["line"]
  parts = {
    "lead": _escape(f"{record['data']}: {sizes or 'empty'}"),
    "verdict": _escape(verdict),
    "kind": "bad" if problems else "good",
    "problems": _problem_part(problems),
    "warnings": _items(record["warnings"]),
    "line": f"<pre>{_flags(line)}</pre>" if line else _NONE,
    "proposal": _proposal_part(record),
    "splits": _split_part(splits),
    "labels": _label_part(splits, ids, found),
    "trivial": _trivial_part(record["trivial"]),
    "leaks": _leak_part(record, found, ids),
    "histograms": _histogram_part(found, ids),
    "pictures": _picture_part(found, ids),
  }
  return pages.fill(pathlib.Path(__file__).with_name("data_report.html"), parts)


# --- Tables -------------------------------------------------------------------


def _table(
  caption: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]
) -> str:
  """Cells are texts and numbers; the first one of a row heads it."""
  if not rows:
    return _NONE
  kinds = [' class="number"' * isinstance(x, (int, float)) for x in rows[0]]
  head = "".join(
    f'<th scope="col"{kind}>{_escape(name)}</th>'
    for name, kind in zip(heads, kinds, strict=True)
  )
  lines = []
  for row in rows[:_ROWS]:
    cells = [f'<th scope="row">{_escape(_text(row[0]))}</th>']
    for value in row[1:]:
      text = _text(value)
      kind = ' class="long"' if len(text) > 40 else ""
      if isinstance(value, (int, float)):
        kind = ' class="number"'
      cells.append(f"<td{kind}>{_escape(text)}</td>")
    lines.append(f"<tr>{''.join(cells)}</tr>")
  caption = _escape(caption)
  more = len(rows) - _ROWS
  rest = f"<p>And {more} more, in data_report.json.</p>" if more > 0 else ""
  return (
    f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
    f"<table><caption><span>{caption}</span></caption><thead><tr>{head}</tr>"
    f"</thead><tbody>{''.join(lines)}</tbody></table></div>{rest}"
  )


def _problem_part(problems: Sequence[Mapping[str, str]]) -> str:
  rows = [[p["where"], p["message"]] for p in problems]
  return _table("What training would stop at", ["where", "what"], rows)


def _proposal_part(record: Mapping[str, Any]) -> str:
  rows = [
    [p["field"], _text(p["now"]), _text(p["value"]), p["why"]]
    for p in record["proposal"]["fields"]
  ]
  heads = ["field", "now", "proposed", "why"]
  return _table("Fields of the config", heads, rows)


def _split_part(splits: Mapping[str, Mapping[str, Any]]) -> str:
  rows = []
  for name, d in splits.items():
    sizes = list(d["sizes"])
    listed = ", ".join(sizes[:3]) + (f", ... ({len(sizes)})" * (len(sizes) > 3))
    spacing = list(d["spacing"])
    rows.append([name, d["examples"], d["usable"], listed])
    rows[-1] += [", ".join(map(str, sorted(d["channels"])))]
    rows[-1] += [d[k] for k in ("low", "high", "mean", "std")]
    rows[-1] += [", ".join(spacing[:3]) if spacing else None]
  heads = ["split", "examples", "usable", "sizes", "channels", "lowest"]
  heads += ["highest", "mean", "mean SD", "spacing"]
  return _table("What was read; bytes count from 0 to 1", heads, rows)


def _label_part(
  splits: Mapping[str, Mapping[str, Any]], ids: Sequence[int], found: Survey
) -> str:
  tags = [getattr(source, "tags", ()) for source in found.sources.values()]
  names = dict(enumerate(tags[0])) if tags else {}
  rows = [
    [
      f"{_label(i)} {names.get(i, '')}",
      split,
      own["pixels"],
      f"{own['share']:.2%}",
      own["examples"],
    ]
    for split, d in splits.items()
    for i, own in d["labels"].items()
  ]
  heads = ["label id", "split", "pixels", "share", "examples with it"]
  table = _table("Label ids as the masks hold them", heads, rows)
  return _balance(splits, ids) + table


def _trivial_part(trivial: Mapping[str, Any]) -> str:
  more = "dice_per_image", "pixel_accuracy"
  rows = [
    [name, *(s[k] for k in ("dice", "iou", *more)), s["predicts"]]
    for name, s in trivial["scores"].items()
  ]
  if not rows:
    return (
      "<p>Not known: no example of train and of"
      f" {_escape(trivial['split'])} (another split) fits the config.</p>"
    )
  heads = ["predictor", "dice", "iou", *more, "predicts"]
  return _table(f"Fit on train, scored on {trivial['split']}", heads, rows)


# --- Charts -------------------------------------------------------------------


def _balance(
  splits: Mapping[str, Mapping[str, Any]], ids: Sequence[int]
) -> str:
  """A bar a split, cut by the shares of the labels, and the colours."""
  width, bar, left = 440, 26, 56
  items, colors = [], _colors(ids)
  for row, (split, d) in enumerate(splits.items()):
    x, y = float(left), 4 + row * (bar + 6)
    items.append(f'<text x="0" y="{y + 18}" text-anchor="start">{split}</text>')
    for i, own in d["labels"].items():
      w = own["share"] * (width - left)
      words = f"{split}, label {_label(i)}: {own['share']:.2%}"
      items.append(
        f'<rect class="part" x="{x:.2f}" y="{y}" width="{w:.2f}"'
        f' height="{bar}" fill="{colors.get(i, "#808080")}">'
        f"<title>{words}</title></rect>"
      )
      x += w
  if not ids:
    return ""
  chips = "".join(
    f'<span class="key"><span class="chip" style="background:{color}"></span>'
    f" {_label(i)}</span>"
    for i, color in list(colors.items())[:24]
  )
  height = 4 + len(splits) * (bar + 6)
  return (
    f"{_svg(width, height, 'Share of each label', items)}"
    f'<p class="legend">Label {chips}</p>'
  )


def _histogram_part(found: Survey, ids: Sequence[int]) -> str:
  charts = []
  for split in found.sources:
    images = [f for f in found.of(split) if f.histogram is not None]
    if images:
      counts, low, high = _pool(images)
      charts.append(_bars(counts, low, high, f"Values of {split}", "pixels"))
  for split in found.sources:
    shares = [1 - _share(f, ids[0]) for f in found.of(split) if f.ids and ids]
    if shares:
      counts, _ = np.histogram(shares, 20, (0, 1))
      title = f"Share of {split} that is not label {_label(ids[0])}"
      charts.append(_bars(counts, 0, 1, title, "examples"))
  return f'<div class="charts">{"".join(charts)}</div>' if charts else _NONE


def _pool(images: Sequence[Facts]) -> tuple[np.ndarray, float, float]:
  """One histogram of all, each bin counted where its centre lies."""
  low, high = min(f.low for f in images), max(f.high for f in images)
  high = high if low < high else low + 1
  bins = len(images[0].histogram)
  total = np.zeros(bins)
  for f in images:
    width = (f.high - f.low if f.low < f.high else 1) / bins
    centres = f.low + width * (np.arange(bins) + 0.5)
    place = ((centres - low) / (high - low) * bins).astype(int)
    np.add.at(total, np.clip(place, 0, bins - 1), f.histogram)
  return total, low, high


def _bars(
  counts: np.ndarray, low: float, high: float, title: str, what: str
) -> str:
  width, top, bottom = 440, 26, 150
  step, most = width / len(counts), max(float(counts.max()), 1)
  items = [f'<text x="0" y="16">{_escape(title)}</text>']
  for i, count in enumerate(counts):
    h = (bottom - top) * float(count) / most
    a, b = (low + (high - low) * k / len(counts) for k in (i, i + 1))
    items.append(
      f'<rect class="bar" x="{i * step:.2f}" y="{bottom - h:.2f}"'
      f' width="{step * 0.9:.2f}" height="{h:.2f}"><title>{a:.4g} to {b:.4g}:'
      f" {count:.0f} {what}</title></rect>"
    )
  items.append(
    f'<line class="axis" x1="0" y1="{bottom}" x2="{width}" y2="{bottom}"/>'
  )
  for value, anchor in ((low, "start"), ((low + high) / 2, "middle")):
    items.append(_tick(value, low, high, width, bottom, anchor))
  items.append(_tick(high, low, high, width, bottom, "end"))
  words = f"{title}, from {low:.4g} to {high:.4g}"
  return _svg(width, bottom + 22, words, items)


def _tick(
  value: float, low: float, high: float, width: int, y: int, anchor: str
) -> str:
  x = width * (value - low) / (high - low)
  return (
    f'<text class="note" x="{x:.1f}" y="{y + 16}" text-anchor="{anchor}">'
    f"{value:.4g}</text>"
  )


def _svg(width: int, height: int, title: str, items: Sequence[str]) -> str:
  return (
    f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    f' role="img" aria-label="{_escape(title)}">{"".join(items)}</svg>'
  )


# --- Pictures -----------------------------------------------------------------


def _classes(record: Mapping[str, Any], cfg: Config) -> list[int]:
  """Label ids in the order of their colours; the first one stays clear."""
  fields = {p["field"]: p["value"] for p in record["proposal"]["fields"]}
  values = fields.get("data.mask_values") or cfg.data.mask_values
  ignored = fields.get("data.ignore_label", cfg.data.ignore_label)
  ids = [i for i in record["labels"] if i not in (ignored, check.IGNORED)]
  return sorted(ids, key=lambda i: [*values, i].index(i) if values else i)


def _colors(ids: Sequence[int]) -> dict[int, str]:
  colors = pictures.class_colors(min(len(ids), _COLOURS))
  return {
    i: f"#{r:02x}{g:02x}{b:02x}"
    for i, (r, g, b) in zip(ids, colors.tolist(), strict=False)
  }


def _leak_part(
  record: Mapping[str, Any], found: Survey, ids: Sequence[int]
) -> str:
  pairs = sorted(record["leaks"]["pairs"], key=lambda p: not p["crosses"])
  words = {True: "yes", False: "no"}
  rows = [
    [p["first"], p["second"], p["kind"], p["correlation"], words[p["crosses"]]]
    for p in pairs
  ]
  heads = ["first", "second", "kind", "correlation", "crosses the splits"]
  table = _table("Pairs of images that belong together", heads, rows)
  advice = ""
  if folder := record["leaks"].get("proposed_split"):
    advice = (
      f"<p>A split that keeps them together is in <code>{_escape(folder)}"
      "</code>: copy train.txt, val.txt and test.txt from there into"
      f" <code>{_escape(str(record['data']))}</code> (and start a new run)."
      "</p>"
    )
  drawn = []
  crossing = [p for p in found.pairs if _splits(p, found) == 2]
  for pair in (crossing or found.pairs)[:_PAIRS]:
    both = [_draw(found, i, ids)[0] for i in (pair.first, pair.second)]
    title = f"<h3>{_escape(pair.kind)}</h3>"
    drawn.append(f'<div class="pair">{title}{"".join(both)}</div>')
  return advice + table + f'<div class="pairs">{"".join(drawn)}</div>'


def _splits(pair: Any, found: Survey) -> int:
  return len({found.facts[i].split for i in (pair.first, pair.second)})


def _picture_part(found: Survey, ids: Sequence[int]) -> str:
  """Of each split from the least to the most foreground, evenly."""
  parts = []
  clear = ids[0] if ids else 0
  for split in found.sources:
    own = [
      i
      for i, f in enumerate(found.facts)
      if f.split == split and f.size and f.ids
    ]
    own.sort(key=lambda i: -_share(found.facts[i], clear))
    chosen = np.unique(np.linspace(0, len(own) - 1, _DRAWN).round().astype(int))
    figures = [_draw(found, own[k], ids) for k in chosen if own]
    pairs = "".join(f'<div class="pair">{"".join(x)}</div>' for x in figures)
    parts.append(f'<h3>{split}</h3><div class="pairs">{pairs}</div>')
  return "".join(parts) or _NONE


def _sentence(name: str, sentence: Any) -> str:
  """The words of a sentence of tokens, each with its tag."""
  words = " ".join(
    f"{_escape(form)}<sub>{_escape(tag)}</sub>"
    for form, tag in zip(sentence.forms, sentence.tags, strict=True)
  )
  return f'<p><span class="lead">{_escape(name)}</span><br>{words}</p>'


def _share(facts: Facts, label_id: int) -> float:
  return facts.ids.get(label_id, 0) / sum(facts.ids.values())


def _draw(found: Survey, index: int, ids: Sequence[int]) -> list[str]:
  """Image and overlay of an example, as figures; it is read again."""
  facts = found.facts[index]
  first = next(i for i, f in enumerate(found.facts) if f.split == facts.split)
  name, source = f"{facts.split}/{facts.name}", found.sources[facts.split]
  if hasattr(source, "sentences"):
    return [_sentence(name, source.sentences[index - first])]
  try:
    image, stored = check.read_stored(source, index - first)
  except (UserError, OSError) as error:
    return [f"<p>{_escape(str(error))}</p>"]
  if image.shape[:-1] != stored.shape:
    stored = np.full(image.shape[:-1], ids[0] if ids else 0)
  label = np.zeros(stored.shape, np.int32)
  for place, i in enumerate(ids[:_COLOURS]):
    label[stored == i] = place
  row = {"image": image, "label": label, "prediction": label}
  row["weight"] = np.ones(label.shape, np.float32)
  num_labels = max(len(ids), 2)
  cells, note = pictures.cells(row, num_labels)
  if len(cells) == 1:  # Of a signal curve and truth, not twice the truth.
    cells = [cells[0].crop((0, 0, cells[0].width, _SIGNAL))]
  kinds = [name, " ".join(["labels", note])]
  return [
    _figure(cell, kind, name)
    for cell, kind in zip(cells[:2], kinds, strict=False)
  ]


def _figure(image: Image.Image, caption: str, name: str) -> str:
  buffer = io.BytesIO()
  image.save(buffer, "PNG", optimize=True)
  data = base64.b64encode(buffer.getvalue()).decode()
  wide = ' class="wide"' if image.width > _CELL else ""
  return (
    f'<figure{wide}><img src="data:image/png;base64,{data}"'
    f' width="{image.width}" height="{image.height}"'
    f' alt="{_escape(f"{name}: {caption}")}">'
    f"<figcaption>{_escape(caption)}</figcaption></figure>"
  )


# --- Texts --------------------------------------------------------------------


def _flags(line: str) -> str:
  """A line is cut between flags alone."""
  return " ".join(f"<span>{_escape(x)}</span>" for x in line.split(" "))


def _items(texts: Sequence[str]) -> str:
  items = "".join(f"<li>{_escape(text)}</li>" for text in texts)
  return f"<ul>{items}</ul>" if items else _NONE


def _label(label_id: int) -> str:
  return "ignored" if label_id == check.IGNORED else str(label_id)


def _text(value: Any) -> str:
  if value is None or value == () or value != value:
    return "\N{EN DASH}"
  if isinstance(value, (tuple, list)):
    return ", ".join(map(_text, value))
  if isinstance(value, int):
    return f"{value:,}"
  if isinstance(value, float):
    short = f"{value:.4f}" if math.fabs(value) < 1e4 else f"{value:.4g}"
    return short.replace("-", "\N{MINUS SIGN}")
  return str(value)


def _escape(text: str) -> str:
  return html.escape(text)
