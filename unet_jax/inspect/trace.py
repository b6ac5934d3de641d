"""The parts of a network and the wires between them, read from its trace.

Parts are the Modules that the U-Net and its decoder call: encoder_0, up_0,
skip_0, decoder_0, head. The model is traced, not run, with a mark on all that
enters and leaves a part. A wire is a path from a mark back to the marks before
it, so what is found is what the program does, whatever the config says.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from unet_jax import geometry
from unet_jax.inspect import cost
from unet_jax.models.skips import Context

INPUT = "input"


class Wire(NamedTuple):
  """What a part gets from a node: from the image, an encoder or a decoder."""

  source: str
  part: str
  role: str = "sides"  # The argument: also "up", "coarse"; "x" without a name.
  array: int = -1  # Of those that enter; -1: a wire to the next is missing.
  shape: tuple[int, ...] = ()  # [1, *S, C], as it enters.
  via: tuple[str, ...] = ()  # Parts on the way, such as up_0; the last first.
  cropped: bool = False
  live: bool = False  # What leaves has a gradient with respect to it.
  weights: int = 0  # Of the convolutions that read it first.
  macs: int = 0  # Likewise.


class Part(NamedTuple):
  """A Module of the network, and what it costs."""

  name: str
  module: type
  wires: tuple[Wire, ...]
  shape: tuple[int, ...]  # [1, *S, C] of what leaves it, the last of several.
  params: int
  macs: int
  # Bytes, as `model.dtype`, of what its innermost Modules (convolutions, norms)
  # put out, and of the joined tensor: about what training keeps of one example.
  activations: int
  # Window and output shape of the convolutions wider than 1.
  stages: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
  inside: frozenset[str]  # Names of Modules, functions and primitives.

  @property
  def kind(self) -> str:
    """The name without its numbers: encoder, up, skip, decoder, head, ..."""
    return self.name.split("_")[0]

  @property
  def place(self) -> list[int]:
    """The numbers in it; in those of nodes the level comes first."""
    return list(map(int, re.findall(r"\d+", self.name)))


class _Watch:
  """Calls a model; sees all of its Modules and marks the parts."""

  def __init__(self):
    self.modules: dict[str, type] = {}
    self.marks: list[tuple[str, str, jax.Array]] = []  # Part, role, array.
    self.kept: dict[str, dict[int, jax.Array]] = {}
    self.inside: dict[str, set[str]] = {}
    self._calls = 0

  def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    with nn.intercept_methods(self._intercept):
      model.apply(*args, **kwargs)

  def _intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    path = [name for name in context.module.path if name != "decoder"]
    if context.method_name != "__call__" or not path:
      return call(*args, **kwargs)
    name, is_part, marks = path[0], len(path) == 1, len(self.marks)
    args = self._mark(name, args) if is_part else args
    self._calls += 1
    calls = self._calls
    out = call(*args, **kwargs)
    is_skip = is_part and name.startswith("skip")
    entered = {id(x) for x in jax.tree.leaves(args)}
    new = {id(x): x for x in jax.tree.leaves(out) if id(x) not in entered}
    if is_skip or self._calls == calls:
      self.kept.setdefault(name, {}).update(new)
    if is_part and not (new or is_skip):  # Dropout that is off: no part.
      del self.marks[marks:]
      return out
    self.inside.setdefault(name, set()).add(type(context.module).__name__)
    if not is_part:
      return out
    self.modules[name] = type(context.module)
    return self._mark(name, out, leaves=True)

  def _mark(self, part: str, tree: Any, leaves: bool = False) -> Any:
    def mark(path: Any, x: Any) -> Any:
      if not isinstance(x, jax.Array):
        return x
      x = checkpoint_name(x, part)  # An equation: so its variable is new.
      keys = jax.tree_util.keystr(path, simple=True, separator=" ").split()
      role = next((key for key in keys if not key.isdigit()), "x")
      self.marks.append((part, "" if leaves else role, x))
      return x

    return jax.tree_util.tree_map_with_path(mark, tree)


class _Graph:
  """A jaxpr whose marked variables are known: (part, role), role "" leaves."""

  def __init__(self, jaxpr: Jaxpr, marks: dict[Var, tuple[str, str]]):
    self.marks = marks
    self.makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    self.eqns: dict[str, list[JaxprEqn]] = {n: [] for n, _ in marks.values()}
    part = INPUT
    for eqn in jaxpr.eqns:
      if eqn.outvars and eqn.outvars[0] in marks:
        name, role = marks[eqn.outvars[0]]
        part = name if role else INPUT
      else:
        self.eqns[part].append(eqn)

  def before(
    self, start: Iterable[Var], stops: Iterable[Var] = ()
  ) -> tuple[list[Var], set[str]]:
    """The nearest marks (or stops) with a gradient; primitives on the way."""
    found, through, seen = [], set(), set()
    stack, stops = list(start), {*self.marks, *stops}
    while stack:
      v = stack.pop()
      if isinstance(v, Literal) or v in seen:
        continue
      seen.add(v)
      if v in stops:
        found.append(v)
      elif v in self.makers:
        through.add(self.makers[v].primitive.name)
        if self.makers[v].primitive.name != "stop_gradient":
          stack.extend(self.makers[v].invars)
    return found, through

  def origins(
    self, v: Var, via: tuple[str, ...] = ()
  ) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The nodes that lead to a marked variable, and the parts on the way."""
    for u in self.before(self.makers[v].invars)[0]:
      name, role = self.marks[u]
      if name.startswith((INPUT, "encoder", "decoder")):
        yield name, via
      else:
        yield from self.origins(u, via if role else (*via, name))

  def wires(self, part: str) -> Iterator[Wire]:
    """What enters `part`; for a skip also whether its neighbour is missing."""
    marks = [
      (v, role) for v, (name, role) in self.marks.items() if name == part
    ]
    outs = [u for v, role in marks if not role for u in self.makers[v].invars]
    live, _ = self.before(outs)
    costly = [eqn for eqn in self.eqns[part] if cost.eqn_macs(eqn)]
    results = [v for eqn in costly for v in eqn.outvars]
    reads = [(e, self.before(e.invars[:1], results)[0]) for e in costly]
    sides = set()
    for i, (v, role) in enumerate(mark for mark in marks if mark[1]):
      _, through = self.before(self.makers[v].invars)
      first = [eqn for eqn, found in reads if v in found]
      weights = sum(eqn.invars[1].aval.size for eqn in first)
      facts = ("slice" in through, v in live, weights)
      for source, via in sorted(set(self.origins(v))):
        sides |= {source} if role == "sides" else set()
        macs = sum(map(cost.eqn_macs, first))
        yield Wire(source, part, role, i, v.aval.shape, via, *facts, macs)
    if part.startswith("skip"):
      _, level, *column = part.split("_")
      before = f"decoder_{level}_{int(column[0]) - 1}" if column else ""
      before = before if before in self.eqns else f"encoder_{level}"
      if before not in sides:
        yield Wire(before, part)


def trace_parts(model: nn.Module, shape: tuple[int, ...]) -> list[Part]:
  """The parts of `model`, given one image [1, *S, C], in the order of calls."""
  model = model.clone(conv="xla")  # One equation a convolution.
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  watch = _Watch()

  def marked(image: jax.Array, variables: Any) -> list[jax.Array]:
    # One image has no other to take features of: its own will do here.
    context = Context(partner=jnp.zeros(1, jnp.int32))
    watch(model, variables, image, context=context)
    return [x for _, _, x in watch.marks]

  jaxpr = jax.make_jaxpr(marked)(image, variables).jaxpr
  marks = {jaxpr.invars[0]: (INPUT, "")}
  for v, (part, role, _) in zip(jaxpr.outvars, watch.marks, strict=True):
    marks[v] = (part, role)
  graph, params = _Graph(jaxpr, marks), variables["params"]
  params = {**params, **params.get("decoder", {})}
  itemsize = jnp.dtype(model.dtype).itemsize
  return [_part(name, watch, graph, params, itemsize) for name in watch.modules]


def _part(
  name: str, watch: _Watch, graph: _Graph, params: Any, itemsize: int
) -> Part:
  eqns = list(cost.all_eqns(graph.eqns[name]))
  convs = [e for e in eqns if e.primitive.name == "conv_general_dilated"]
  stages = [(cost.kernel_shape(e)[2:], e.outvars[0].aval.shape) for e in convs]
  names = {x for e in eqns for x in (e.primitive.name, e.params.get("name"))}
  leaves = [v for v, mark in graph.marks.items() if mark == (name, "")]
  kept = watch.kept.get(name, {}).values()
  return Part(
    name=name,
    module=watch.modules[name],
    wires=tuple(graph.wires(name)),
    shape=leaves[-1].aval.shape,
    params=sum(x.size for x in jax.tree.leaves(params.get(name, {}))),
    macs=sum(map(cost.eqn_macs, graph.eqns[name])),
    activations=sum(x.size for x in kept) * itemsize,
    stages=tuple(x for x in stages if math.prod(x[0]) > 1),
    inside=frozenset(names | watch.inside[name]),
  )


def _most_pooled(model: nn.Module) -> tuple[str, ...]:
  """`pool_axes` of a network of one axis: that which is pooled most."""
  along = [
    tuple("0" if str(axis) in entry else "" for entry in model.pool_axes)
    for axis in range(model.dims)
  ]
  return max(along, key=lambda entries: entries.count("0"))


# Pixels of the probe, times 2^depth: far more than two 3-wide convolutions a
# level see. Its brightness; a relative change that is no rounding.
_PROBE, _BRIGHT, _ROUNDING = 36, 1e30, 1e-3


def receptive_fields(model: nn.Module) -> dict[str, float]:
  """Input pixels that an output pixel of each node depends on, along an axis.

  Of axes that are pooled less than others, the one that is pooled most.

  Measured: the same network with one spatial axis, two channels, positive
  weights and no norm is run on a grey image and again with each pixel in turn
  made bright; what changes, depends on it. What sees both ends of an image far
  larger than convolutions reach, sees all of it: infinity. (Group and instance
  norm always do, and are left out for that.)
  """
  depth = len(model.widths) - 1
  widths, most = (2,) * (depth + 1), _most_pooled(model)
  model = model.clone(dims=1, widths=widths, norm="none", bottleneck_heads=1)
  # Coarse rounding hides a small change; ids are not bright.
  model = model.clone(pool_axes=most, dtype="float32", embedding="none")
  size = geometry.nearest_legal(_PROBE * 2**depth, depth, model.padding)[1]
  grey, rng = jnp.ones((1, size, 1)), np.random.default_rng(0)

  def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    kind = path[-1].key
    if kind != "kernel":
      return jnp.full(leaf.shape, kind == "scale", leaf.dtype)
    # Sums of about 1, so that no gate is saturated.
    weights = rng.uniform(0.5, 1.5, leaf.shape) / math.prod(leaf.shape[:-1])
    return jnp.asarray(weights, leaf.dtype)

  variables = jax.eval_shape(model.init, jax.random.key(0), grey)
  variables = jax.tree_util.tree_map_with_path(fill, variables)

  def run(image: jax.Array) -> dict[str, jax.Array]:
    watch, pair = _Watch(), jnp.concatenate([image[None], grey])
    watch(model, variables, pair, context=Context(partner=jnp.array([1, 0])))
    nodes = ("encoder", "decoder", "head")
    marks = [mark for mark in watch.marks if mark[0].startswith(nodes)]
    return {part: x[0] for part, role, x in marks if not role}

  @jax.jit
  def depends() -> dict[str, jax.Array]:
    # The last is left grey; in one batch with the others it is rounded alike.
    images = 1 + _BRIGHT * jnp.eye(size + 1, size)[..., None]
    return {
      # Where it overflows, it depends too.
      part: jnp.any(~(abs(x[:-1] - x[-1:]) <= _ROUNDING * abs(x[-1:])), -1)
      for part, x in jax.vmap(run)(images).items()
    }

  fields = {}
  with jax.default_matmul_precision("highest"):
    for part, on in jax.tree.map(np.asarray, depends()).items():
      last = size - 1 - on[::-1].argmax(0)  # Inputs by outputs.
      extent = int((last - on.argmax(0)).max()) + 1
      fields[part] = math.inf if extent == size else extent
  return fields
