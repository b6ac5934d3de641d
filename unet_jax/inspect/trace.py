"""The parts of a network and the wires between them, read from its trace.

Parts are the Modules that the U-Net and its decoder call: encoder_0, up_0,
skip_0, decoder_0, head. The model is traced, not run, with a mark on all that
enters and leaves a part. A wire is a path from a mark back to the marks before
it, so what is found is what the program does, whatever the config says.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class Port(NamedTuple):
  """An array that enters a part."""

  role: str  # The argument: "sides", "up", "coarse"; "x" without a name.
  shape: tuple[int, ...]  # [1, *S, C]
  # The nodes (INPUT, encoders, decoders) that it comes from, and the parts on
  # the way from each, the last one first.
  origins: tuple[tuple[str, tuple[str, ...]], ...]
  cropped: bool  # On the way.
  live: bool  # What leaves the part has a gradient with respect to it.
  weights: int  # Of the convolutions that read it first.
  macs: int  # Likewise.


class Part(NamedTuple):
  """A Module of the network, and what it costs."""

  name: str
  module: type
  ports: tuple[Port, ...]
  shape: tuple[int, ...]  # [1, *S, C] of what leaves it, the last of several.
  params: int
  macs: int
  # Bytes of what its innermost Modules (convolutions, norms) put out, and of
  # the joined tensor: about what training keeps of one example.
  activations: int
  # Window and output shape of the convolutions wider than 1.
  stages: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
  inside: frozenset[str]  # Names of Modules, functions and primitives.

  @property
  def kind(self) -> str:
    """The name without its numbers: encoder, up, skip, decoder, head, ..."""
    return self.name.split("_")[0]

  @property
  def place(self) -> tuple[int, ...]:
    """The numbers in it; in those of nodes the level comes first."""
    return tuple(map(int, re.findall(r"\d+", self.name)))


class _Watch:
  """Calls a model; sees all of its Modules and marks the parts."""

  def __init__(self):
    self.modules: dict[str, type] = {}
    self.marks: list[tuple[str, str, jax.Array]] = []  # Part, role, array.
    self.kept: dict[str, dict[int, jax.Array]] = {}
    self.inside: dict[str, set[str]] = {}
    self._calls = 0

  def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with nn.intercept_methods(self._intercept):
      return model.apply(*args, **kwargs)

  def _intercept(
    self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any
  ) -> Any:
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
    self.eqns: dict[str, list[JaxprEqn]] = {}  # Of each part.
    part = None
    for eqn in jaxpr.eqns:
      if eqn.outvars and eqn.outvars[0] in marks:
        name, role = marks[eqn.outvars[0]]
        part = name if role else None
      elif part:
        self.eqns.setdefault(part, []).append(eqn)

  def marked(self, part: str, leaves: bool) -> list[Var]:
    """The marked variables that enter or leave `part`."""
    marks = self.marks.items()
    return [v for v, (n, role) in marks if n == part and leaves == (not role)]

  def before(
    self, variables: Iterable[Var], stops: Iterable[Var] = ()
  ) -> tuple[list[Var], set[str]]:
    """The nearest marks (or stops) with a gradient; primitives on the way."""
    found, through, seen = [], set(), set()
    stack, stops = list(variables), {*self.marks, *stops}
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

  def ports(self, part: str) -> Iterator[Port]:
    """What enters `part`."""
    costly = [eqn for eqn in self.eqns.get(part, ()) if cost.eqn_macs(eqn)]
    results = [v for eqn in costly for v in eqn.outvars]
    reads = [(e, self.before(e.invars[:1], results)[0]) for e in costly]
    outs = self.marked(part, leaves=True)
    live, _ = self.before(u for v in outs for u in self.makers[v].invars)
    for v in self.marked(part, leaves=False):
      readers = [eqn for eqn, found in reads if v in found]
      yield Port(
        role=self.marks[v][1],
        shape=v.aval.shape,
        origins=tuple(sorted(set(self.origins(v)))),
        cropped="slice" in self.before(self.makers[v].invars)[1],
        live=v in live,
        weights=sum(eqn.invars[1].aval.size for eqn in readers),
        macs=sum(map(cost.eqn_macs, readers)),
      )


def trace_parts(model: nn.Module, shape: tuple[int, ...]) -> list[Part]:
  """The parts of `model`, given one image [1, *S, C], in the order of calls."""
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  watch = _Watch()

  def marked(image: jax.Array, variables: Any) -> list[jax.Array]:
    # One image has no other to take features of: its own will do here.
    context = Context(partner=jnp.zeros(1, jnp.int32))
    watch(model, variables, image, context=context)
    return [x for _, _, x in watch.marks]

  jaxpr = jax.make_jaxpr(marked)(image, variables).jaxpr
  names = [(part, role) for part, role, _ in watch.marks]
  marks = dict(zip(jaxpr.outvars, names, strict=True))
  graph = _Graph(jaxpr, {jaxpr.invars[0]: (INPUT, ""), **marks})
  params = variables["params"]
  params = {**params, **params.get("decoder", {})}
  return [_part(name, watch, graph, params) for name in watch.modules]


def _part(name: str, watch: _Watch, graph: _Graph, params: Any) -> Part:
  eqns = graph.eqns.get(name, [])
  inner = list(cost.all_eqns(eqns))
  convs = [e for e in inner if e.primitive.name == "conv_general_dilated"]
  stages = [(cost.kernel_shape(e)[2:], e.outvars[0].aval.shape) for e in convs]
  names = {x for e in inner for x in (e.primitive.name, e.params.get("name"))}
  kept = watch.kept.get(name, {}).values()
  return Part(
    name=name,
    module=watch.modules[name],
    ports=tuple(graph.ports(name)),
    shape=graph.marked(name, leaves=True)[-1].aval.shape,
    params=sum(x.size for x in jax.tree.leaves(params.get(name, {}))),
    macs=sum(map(cost.eqn_macs, eqns)),
    activations=sum(x.size * x.dtype.itemsize for x in kept),
    stages=tuple(x for x in stages if math.prod(x[0]) > 1),
    inside=frozenset(names | watch.inside[name]),
  )


class Wire(NamedTuple):
  """What a node gets from another."""

  source: str
  part: Part  # That it enters: an encoder, a skip or a head.
  port: Port | None  # None where a wire to the next node is missing.
  via: tuple[Part, ...] = ()  # On the way, such as up_0; the last one first.

  @property
  def role(self) -> str:
    """The port's; what is missing would come sideways."""
    return self.port.role if self.port else "sides"

  @property
  def live(self) -> bool:
    """Whether `part` makes anything of it."""
    return self.port is not None and self.port.live


def find_wires(parts: Sequence[Part]) -> list[Wire]:
  """All wires between nodes, with those to the next node that are missing.

  Inside a node, from a skip to its convolutions, there is none.
  """
  by_name, wires = {part.name: part for part in parts}, []
  for part in parts:
    if part.kind in ("encoder", "skip", "head"):
      for port in part.ports:
        for source, via in port.origins:
          wires.append(Wire(source, part, port, tuple(by_name[p] for p in via)))
    if part.kind == "skip":
      level, *column = part.place
      before = f"decoder_{level}_{column[0] - 1}" if column else ""
      before = before if before in by_name else f"encoder_{level}"
      found = [w.source for w in wires if w.part is part and w.role == "sides"]
      if before not in found:
        wires.append(Wire(before, part, None))
  return wires


# --- Receptive fields ---------------------------------------------------------

# Pixels of the probe, times 2^depth: far more than two 3-wide convolutions a
# level see. Its brightness; a relative change that is no rounding.
_PROBE, _BRIGHT, _ROUNDING = 36, 1e30, 1e-3


def receptive_fields(model: nn.Module) -> dict[str, float]:
  """Input pixels an axis that an output pixel of each node depends on.

  Measured: the same network with one spatial axis, two channels, positive
  weights and no norm is run on a grey image and again with each pixel in turn
  made bright; what changes, depends on it. What sees both ends of an image far
  larger than convolutions reach, sees all of it: infinity. (Group and instance
  norm always do, and are left out for that.)
  """
  depth = len(model.widths) - 1
  shadow = model.clone(
    dims=1, widths=(2,) * (depth + 1), norm="none", bottleneck_heads=1
  )
  size = geometry.nearest_legal(_PROBE * 2**depth, depth, model.padding)[1]
  grey, rng = jnp.ones((1, size, 1)), np.random.default_rng(0)

  def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    kind = path[-1].key
    if kind != "kernel":
      return jnp.full(leaf.shape, kind == "scale", leaf.dtype)
    # Sums of about 1, so that no gate is saturated.
    weights = rng.uniform(0.5, 1.5, leaf.shape) / math.prod(leaf.shape[:-1])
    return jnp.asarray(weights, leaf.dtype)

  variables = jax.eval_shape(shadow.init, jax.random.key(0), grey)
  variables = jax.tree_util.tree_map_with_path(fill, variables)

  def run(image: jax.Array) -> dict[str, jax.Array]:
    watch, pair = _Watch(), jnp.concatenate([image[None], grey])
    context = Context(partner=jnp.array([1, 0]))
    watch(shadow, variables, pair, context=context)
    kinds = ("encoder", "decoder", "head")
    marks = [mark for mark in watch.marks if mark[0].startswith(kinds)]
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

  with jax.default_matmul_precision("highest"):
    found = depends()
  return {part: _extent(np.asarray(x)) for part, x in found.items()}


def _extent(depends: np.ndarray) -> float:
  """Largest distance of inputs [n, :] that one output [:, m] depends on."""
  first, last = depends.argmax(0), len(depends) - 1 - depends[::-1].argmax(0)
  extent = int((last - first).max()) + 1
  return math.inf if extent == len(depends) else extent
