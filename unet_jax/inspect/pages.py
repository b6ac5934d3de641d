"""Pages that are one file and open without a network, in one style."""

import pathlib
import string
from collections.abc import Mapping


def fill(template: pathlib.Path, parts: Mapping[str, str]) -> str:
  """A page from its template, whose $NAMES are `parts` and the one $style."""
  style = pathlib.Path(__file__).with_name("page.css").read_text().rstrip()
  return string.Template(template.read_text()).substitute(parts, style=style)
