"""Multiply-accumulates, counted in what JAX traced; nothing is computed."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def count_macs(function: Callable[..., Any], *args: Any) -> int:
  """Multiply-accumulates of `function(*args)`; args may be ShapeDtypeStructs.

  Convolutions and matrix products count, and nothing else does. Taps in the
  zeros of "same" padding count too, as is usual; those in the zeros between the
  inputs of a transposed convolution do not. A loop counts every turn (a `while`
  loop one), a branch the dearest way, a choice by platform its default.
  """
  return sum(map(eqn_macs, jax.make_jaxpr(function)(*args).jaxpr.eqns))


def eqn_macs(eqn: JaxprEqn) -> int:
  """`count_macs` of one equation and of what it wraps."""
  name, params = eqn.primitive.name, eqn.params
  if name == "conv_general_dilated":
    taps = math.prod(kernel_shape(eqn)[1:])
    return eqn.outvars[0].aval.size * taps // math.prod(params["lhs_dilation"])
  if name == "dot_general":
    (axes, _), _ = params["dimension_numbers"]
    summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)
    return eqn.outvars[0].aval.size * summed
  inner = [sum(map(eqn_macs, jaxpr.eqns)) for jaxpr in _inner_jaxprs(eqn)]
  if name == "cond":
    return max(inner)
  return sum(inner) * (params["length"] if name == "scan" else 1)


def kernel_shape(eqn: JaxprEqn) -> tuple[int, ...]:
  """Channels out, channels in (of one group), window of a convolution."""
  shape = eqn.invars[1].aval.shape
  return tuple(shape[i] for i in eqn.params["dimension_numbers"].rhs_spec)


def all_eqns(eqns: Iterable[JaxprEqn]) -> Iterator[JaxprEqn]:
  """The equations and, after each, those that it wraps."""
  for eqn in eqns:
    yield eqn
    for jaxpr in _inner_jaxprs(eqn):
      yield from all_eqns(jaxpr.eqns)


def _inner_jaxprs(eqn: JaxprEqn) -> list[Jaxpr]:
  leaves = jax.tree.leaves(
    list(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr)
  )
  inner = [x.jaxpr for x in leaves if isinstance(x, ClosedJaxpr)]
  inner += [x for x in leaves if isinstance(x, Jaxpr)]
  # The default comes last.
  return inner[-1:] if eqn.params.get("branches_platforms") else inner
