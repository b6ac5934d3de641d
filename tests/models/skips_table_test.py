"""docs/skips.md against the networks: every cost, and every published count."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from tests.models.variants import SKIPS, count
from unet_jax.inspect import cost
from unet_jax.models import build_model
from unet_jax.models.skips import Context

DOC = pathlib.Path(__file__).parents[2] / "docs" / "skips.md"
WIDTHS = (64, 128, 256, 512, 1024)


def costs(size=256, **fields):
  """(parameters, MACs) of one image of one channel."""
  model = build_model(**{"num_classes": 2, **fields})
  x = jax.ShapeDtypeStruct((1, *(size,) * model.dims, 1), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  context = Context(partner=jnp.zeros(1, jnp.int32))

  def apply(variables, x):
    return model.apply(variables, x, context=context)

  return count(variables["params"]), cost.count_macs(apply, variables, x)


def table():
  """skip -> (parameters, GMAC) beside concat, as the page has them."""
  row = r"^\| `(\w+)` \|.*\| (-?[\d,]+) \| (-?[\d.]+) \|.*$"
  found = re.findall(row, DOC.read_text(), re.MULTILINE)
  return {k: (int(p.replace(",", "")), float(m)) for k, p, m in found}


def test_the_page_has_every_skip_with_its_cost():
  base = costs(widths=WIDTHS)
  assert base[0] == 31_042_434 and round(base[1] / 1e9, 3) == 48.096
  measured = {}
  for skip in SKIPS:
    params, macs = costs(widths=WIDTHS, skip=skip)
    giga = round((macs - base[1]) / 1e9, 3)
    measured[skip] = params - base[0], giga
  assert table() == measured


@pytest.mark.parametrize(
  ("giga", "fields"),
  [
    (150.4, {"preset": "unet2015", "size": 572}),
    (48.1, {"widths": WIDTHS, "norm": "none"}),
    (119.0, {"widths": WIDTHS, "norm": "none", "decoder": "nested"}),
    (197.8, {"preset": "unet3p"}),
  ],
)
def test_networks_cost_what_is_published(giga, fields):
  assert round(costs(**fields)[1] / 1e9, 1) == giga


def test_a_nested_network_of_the_2015_widths():
  fields = {"widths": WIDTHS, "norm": "none", "decoder": "nested"}
  assert round(costs(**fields)[0] / 1e6, 2) == 36.16


@pytest.mark.parametrize("level", range(4))
def test_every_levels_concatenation_costs_the_same(level):
  fields = {"widths": WIDTHS, "norm": "none"}
  off = {"skip_levels": tuple(k != level for k in range(4))}
  saved = costs(**fields)[1] - costs(**fields, **off)[1]
  assert round(saved / 1e9, 3) == 2.416
