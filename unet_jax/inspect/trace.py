"""The parts of a network and the wires between them, read from its trace.

Parts are the Modules that the U-Net and its decoder call: encoder_0, up_0,
skip_0, decoder_0, head. The model is traced, not run, with a mark on all that
enters and leaves a part. A wire is a path from a mark back to the marks before
it, so what is found is what the program does, whatever the config says.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

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
# Pixels of the probe of `receptive_fields`, times 2^depth: no two 3-wide
# convolutions a level see so far. Its brightness, and what is no rounding.
_PROBE, _BRIGHT, _ROUNDING = 36, 1e30, 1e-3


@dataclasses.dataclass(frozen=True)
class Port:
  """An array that enters a part.

  Attributes:
    role: the argument, such as "sides", "up" or "coarse".
    shape: [1, *S, C].
    sources: (part, which of its outputs) that it comes from.
    through: primitives on the way, such as "slice" and "reduce_window_max".
    live: whether what leaves the part has a gradient with respect to it.
    weights, macs: of the convolutions that read it first.
  """

  role: str
  shape: tuple[int, ...]
  sources: tuple[tuple[str, int], ...]
  through: frozenset[str]
  live: bool
  weights: int
  macs: int


@dataclasses.dataclass(frozen=True)
class Part:
  """A Module of the network, and what it costs.

  Attributes:
    name: the Module's.
    module: its class.
    ports: what enters it.
    shape: [1, *S, C] of what leaves it, the last where that are several.
    reads: for each array that leaves it, the indices of the ports it needs.
    params, macs: of all in it.
    activations: bytes of what its innermost Modules (convolutions, norms) put
      out, and of the joined tensor: about what training keeps of one example.
    stages: window and output shape of its convolutions wider than 1, in order.
    inside: names of the Modules, functions and primitives in it.
  """

  name: str
  module: type
  ports: tuple[Port, ...]
  shape: tuple[int, ...]
  reads: tuple[frozenset[int], ...]
  params: int
  macs: int
  activations: int
  stages: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
  inside: frozenset[str]

  @property
  def kind(self) -> str:
    """The name without its numbers: encoder, up, skip, decoder, head, ..."""
    return self.name.split("_")[0]

  @property
  def place(self) -> tuple[int, ...]:
    """The numbers in the name; of encoder, skip and decoder the level first."""
    return tuple(map(int, re.findall(r"\d+", self.name)))


class _Watch:
  """Calls a function of a model; sees all Modules, marks the parts."""

  def __init__(self):
    self.modules: dict[str, type] = {}
    self.marks: list[tuple[str, str, jax.Array]] = []  # Part, role, array.
    self.kept: dict[str, dict[int, jax.Array]] = {}
    self.inside: dict[str, set[str]] = {}
    self._calls = 0

  def __call__(
    self, function: Callable[..., Any], *args: Any, **kwargs: Any
  ) -> Any:
    with nn.intercept_methods(self._intercept):
      return function(*args, **kwargs)

  def _intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    path = [name for name in context.module.path if name != "decoder"]
    if context.method_name != "__call__" or not path:
      return call(*args, **kwargs)
    name, kind = path[0], type(context.module)
    if is_part := len(path) == 1:
      marks = len(self.marks)
      args = self._mark(name, args)
    self._calls += 1
    calls = self._calls
    out = call(*args, **kwargs)
    is_skip = is_part and name.startswith("skip")
    entered = {id(x) for x in jax.tree.leaves(args)}
    new = {id(x): x for x in jax.tree.leaves(out) if id(x) not in entered}
    if self._calls == calls or is_skip:
      self.kept.setdefault(name, {}).update(new)
    if is_part and not (new or is_skip):  # Dropout, which is off: no part.
      del self.marks[marks:]
      return out
    self.inside.setdefault(name, set()).add(kind.__name__)
    if not is_part:
      return out
    self.modules[name] = kind
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

  def before(
    self, variables: Iterable[Var], stops: Iterable[Var] = ()
  ) -> tuple[list[Var], frozenset[str]]:
    """The nearest marks (or stops) that lead here; primitives on the way."""
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
    return found, frozenset(through)

  def enters(self, part: str) -> list[Var]:
    """The marked variables that `part` is called with."""
    return [v for v, mark in self.marks.items() if mark[0] == part and mark[1]]

  def leaves(self, part: str) -> list[Var]:
    """The marked variables that `part` returns."""
    return [v for v, mark in self.marks.items() if mark == (part, "")]

  def reads(self, part: str) -> tuple[frozenset[int], ...]:
    """For each that leaves, which of those that enter it depends on."""
    enters = self.enters(part)
    found = [self.before(self.makers[v].invars)[0] for v in self.leaves(part)]
    return tuple(
      frozenset(i for i, v in enumerate(enters) if v in f) for f in found
    )

  def ports(self, part: str) -> tuple[Port, ...]:
    """What enters `part`."""
    costly = [eqn for eqn in self.eqns.get(part, ()) if cost.eqn_macs(eqn)]
    results = [v for eqn in costly for v in eqn.outvars]
    read_by = [self.before(e.invars[:1], results)[0] for e in costly]
    live = frozenset().union(*self.reads(part))
    ports = []
    for i, v in enumerate(self.enters(part)):
      found, through = self.before(self.makers[v].invars)
      parts = [self.marks[u][0] for u in found]
      sources = [
        (name, self.leaves(name).index(u))
        for name, u in zip(parts, found, strict=True)
      ]
      readers = [
        e for e, read in zip(costly, read_by, strict=True) if v in read
      ]
      port = Port(
        role=self.marks[v][1],
        shape=v.aval.shape,
        sources=tuple(sorted(sources)),
        through=through,
        live=i in live,
        weights=sum(e.invars[1].aval.size for e in readers),
        macs=sum(map(cost.eqn_macs, readers)),
      )
      ports.append(port)
    return tuple(ports)


def trace_parts(model: nn.Module, shape: tuple[int, ...]) -> list[Part]:
  """The parts of `model`, given one image [1, *S, C], in the order of calls."""
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  watch = _Watch()

  def marked(image: jax.Array, variables: Any) -> list[jax.Array]:
    # One image has no other to take features of: its own will do here.
    context = Context(partner=jnp.zeros(1, jnp.int32))
    watch(model.apply, variables, image, context=context)
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
  functions = {str(e.params["name"]) for e in inner if "name" in e.params}
  primitives = {e.primitive.name for e in inner}
  kept = watch.kept.get(name, {}).values()
  return Part(
    name=name,
    module=watch.modules[name],
    ports=graph.ports(name),
    shape=graph.leaves(name)[-1].aval.shape,
    reads=graph.reads(name),
    params=sum(x.size for x in jax.tree.leaves(params.get(name, {}))),
    macs=sum(map(cost.eqn_macs, eqns)),
    activations=sum(x.size * x.dtype.itemsize for x in kept),
    stages=tuple(x for x in stages if math.prod(x[0]) > 1),
    inside=frozenset(functions | primitives | watch.inside[name]),
  )


# --- Wires --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wire:
  """What a node gets from another; nodes are INPUT, encoder and decoder parts.

  Attributes:
    source: the node that it leaves.
    part: the part that it enters: an encoder, a skip or a head.
    port: where it enters; None where a wire to the next node is missing.
    via: the parts on the way, such as up_0, nearest to `part` first.
  """

  source: str
  part: Part
  port: Port | None
  via: tuple[Part, ...] = ()

  @property
  def role(self) -> str:
    """The port's; what is missing would come sideways."""
    return self.port.role if self.port else "sides"

  @property
  def live(self) -> bool:
    """Whether anything of it leaves `part`."""
    return self.port is not None and self.port.live


def find_wires(parts: Sequence[Part]) -> list[Wire]:
  """All wires between nodes, with those to the next node that are missing.

  Inside a node, from a skip to its convolutions, there is none.
  """
  by_name = {part.name: part for part in parts}

  def follow(
    port: Port, via: tuple[Part, ...] = ()
  ) -> Iterator[tuple[str, tuple[Part, ...]]]:
    for name, output in port.sources:
      if name == INPUT or by_name[name].kind in ("encoder", "decoder"):
        yield name, via
      else:
        part = by_name[name]
        for k in sorted(part.reads[output]):
          yield from follow(part.ports[k], (*via, part))

  wires = []
  for part in parts:
    if part.kind in ("encoder", "skip", "head"):
      for port in part.ports:
        for source, via in dict.fromkeys(follow(port)):
          wires.append(Wire(source, part, port, via))
    if part.kind == "skip":
      source = _previous(part, by_name)
      sent = {(w.source, w.part.name) for w in wires if w.role == "sides"}
      if (source, part.name) not in sent:
        wires.append(Wire(source, part, None))
  return wires


def _previous(skip: Part, names: Container[str]) -> str:
  """The node before that of `skip`, in the same level."""
  level, *column = skip.place
  before = f"decoder_{level}_{column[0] - 1}" if column else ""
  return before if before in names else f"encoder_{level}"


# --- Receptive fields ---------------------------------------------------------


def receptive_fields(model: nn.Module) -> dict[str, float]:
  """Input pixels an axis that an output pixel of each part depends on.

  Measured, not computed from kernel sizes: the same network with one spatial
  axis, few channels, positive weights and no norm is run on a grey image and
  again with each pixel in turn made bright; what changes depends on it. A part
  that sees both ends of an image far larger than any stack of convolutions
  reaches, sees all of it: infinity. (Group and instance norm see all of it in
  every network, and are left out for that.)
  """
  depth = len(model.widths) - 1
  shadow = model.clone(
    dims=1, widths=(2,) * (depth + 1), norm="none", bottleneck_heads=1
  )
  size = geometry.nearest_legal(_PROBE * 2**depth, depth, model.padding)[1]
  grey = jnp.ones((1, size, 1))
  shapes = jax.eval_shape(shadow.init, jax.random.key(0), grey)
  rng = np.random.default_rng(0)

  def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    kind = path[-1].key
    if kind == "kernel":  # Sums of about 1, so that no gate is saturated.
      weights = rng.uniform(0.5, 1.5, leaf.shape) / math.prod(leaf.shape[:-1])
      return jnp.asarray(weights, leaf.dtype)
    return jnp.full(leaf.shape, kind == "scale", leaf.dtype)

  variables = jax.tree_util.tree_map_with_path(fill, shapes)

  def run(image: jax.Array) -> dict[str, jax.Array]:
    watch, pair = _Watch(), jnp.concatenate([image, grey])
    other = Context(partner=jnp.array([1, 0]))
    watch(shadow.apply, variables, pair, context=other)
    kinds = ("encoder", "decoder", "head")
    return {
      part: x[0]
      for part, role, x in watch.marks
      if not role and part.startswith(kinds)
    }

  @jax.jit
  def depends() -> dict[str, jax.Array]:
    base = run(grey)
    bright = grey + _BRIGHT * jnp.eye(size)[:, None, :, None]
    changed = jax.vmap(run)(bright)

    def differs(x: jax.Array, y: jax.Array) -> jax.Array:
      same = jnp.abs(x - y[None]) <= _ROUNDING * jnp.abs(y)[None]
      return jnp.any(~same, -1)  # Also where x overflows.

    return jax.tree.map(differs, changed, base)

  return {part: _extent(np.asarray(x)) for part, x in depends().items()}


def _extent(depends: np.ndarray) -> float:
  """Largest distance of inputs [n, :] that one output [:, m] depends on."""
  first = depends.argmax(0)
  last = len(depends) - 1 - depends[::-1].argmax(0)
  extent = int((last - first).max()) + 1
  return math.inf if extent == len(depends) else extent
