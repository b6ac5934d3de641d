"""Multiply-accumulates, counted in what JAX traced; nothing is computed."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def count_macs(function: Callable[..., Any], *args: Any) -> int:
  """Multiply-accumulates of `function(*args)`; args may be ShapeDtypeStructs.

  Convolutions and matrix products count and nothing else does: no bias, norm,
  activation, pooling or interpolation by shifts. A convolution multiplies every
  tap with every output, the taps that lie in the zeros of "same" padding too,
  as is usual; XLA's cost analysis leaves those out, and has two operations a
  multiply-accumulate. A transposed convolution is not charged for the zeros
  between its inputs. A loop counts every turn; of branches the dearest counts,
  of a `while` loop one turn.
  """
  return jaxpr_macs(jax.make_jaxpr(function)(*args).jaxpr)


def jaxpr_macs(jaxpr: Jaxpr) -> int:
  """`count_macs` of what is already traced."""
  return sum(eqn_macs(eqn) for eqn in jaxpr.eqns)


def eqn_macs(eqn: JaxprEqn) -> int:
  """`count_macs` of one equation."""
  if eqn.primitive.name == "conv_general_dilated":
    _, in_channels, *window = kernel_shape(eqn)
    taps = in_channels * math.prod(window)
    zeros = math.prod(eqn.params["lhs_dilation"])
    return eqn.outvars[0].aval.size * taps // zeros
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
  inner = [jaxpr_macs(jaxpr) for jaxpr in inner_jaxprs(eqn)]
  if eqn.primitive.name == "cond":
    return max(inner)
  turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
  return turns * sum(inner)


def kernel_shape(eqn: JaxprEqn) -> tuple[int, ...]:
  """Channels out, channels in (of a group), window of a convolution."""
  shape = eqn.invars[1].aval.shape
  return tuple(shape[i] for i in eqn.params["dimension_numbers"].rhs_spec)


def inner_jaxprs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
  """What a call, a loop or a custom derivative wraps."""
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, Jaxpr):
        yield item


def all_eqns(eqns: Iterable[JaxprEqn]) -> Iterator[JaxprEqn]:
  """The equations and, after each, those that it wraps."""
  for eqn in eqns:
    yield eqn
    for jaxpr in inner_jaxprs(eqn):
      yield from all_eqns(jaxpr.eqns)
