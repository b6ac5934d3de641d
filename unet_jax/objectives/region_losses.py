"""Losses of regions and their borders; arguments as in `losses`."""

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.objectives import pixels

# One pixel on both sides of the Dice fraction, in units of `weight`.
DICE_SMOOTHING = 1.0

Array = jax.Array


def dice(
  logits: Array, label: Array, weight: Array, class_weights: Array
) -> Array:
  """Soft Dice loss over the foreground classes 1..K-1 (class 1 for K == 1).

  With p the probability and g the 0/1 truth of class k, sums over the pixels of
  one example, and e = DICE_SMOOTHING:

    D_k = (2 sum(weight p g) + e) / (sum(weight p) + sum(weight g) + e)
    loss = sum_k(class_weights[k] (1 - D_k)) / sum_k(class_weights[k])

  in [0, 1]. A class without truth has loss n / (n + 1) for n pixels predicted:
  0 if it is left alone, and a useful gradient if it is not, which a tiny e does
  not give. Foreground weights of 0 alone give loss 0.

  Reference: Drozdzal et al. 2016, https://arxiv.org/abs/1608.04117, without e.
  Milletari et al. 2016 (V-Net), https://arxiv.org/abs/1606.04797, section 3,
  squares p and g below the line.
  """
  probs, truth, weight = _foreground(logits, label, weight)
  axes = tuple(range(1, label.ndim))
  overlap = jnp.sum(weight * probs * truth, axis=axes)
  size = jnp.sum(weight * (probs + truth), axis=axes)
  score = (2 * overlap + DICE_SMOOTHING) / (size + DICE_SMOOTHING)
  return pixels.mean_over_classes(1 - score, class_weights)


def tversky(
  logits: Array,
  label: Array,
  weight: Array,
  class_weights: Array,
  *,
  tversky_alpha: float = 0.3,
  tversky_beta: float = 0.7,
) -> Array:
  """Dice with a price of its own for what is invented and what is missed.

  As in `dice`, with a, b = tversky_alpha, tversky_beta, e = DICE_SMOOTHING / 2:

    T_k = (TP + e) / (TP + a FP + b FN + e),  TP = sum(weight p g),
    FP = sum(weight p (1 - g)),  FN = sum(weight (1 - p) g)
    loss = sum_k(class_weights[k] (1 - T_k)) / sum_k(class_weights[k])

  a = b = 1/2 is `dice`; b > a finds more of a rare class.

  Reference: Salehi et al. 2017, https://arxiv.org/abs/1706.05721, equation 3,
  without e.
  """
  prices = tversky_alpha, tversky_beta
  gap = _tversky_gap(logits, label, weight, *prices)
  return pixels.mean_over_classes(gap, class_weights)


def focal_tversky(
  logits: Array,
  label: Array,
  weight: Array,
  class_weights: Array,
  *,
  tversky_alpha: float = 0.3,
  tversky_beta: float = 0.7,
  tversky_gamma: float = 4 / 3,
) -> Array:
  """`tversky` with (1 - T_k)^(1 / tversky_gamma) in the place of 1 - T_k.

  Reference: Abraham and Khan 2019, https://arxiv.org/abs/1810.07842, equation
  4; there alpha is the price of what is missed.
  """
  prices = tversky_alpha, tversky_beta
  gap = _tversky_gap(logits, label, weight, *prices)
  # The slope of a root at 0 is infinite; a perfect class asks for nothing.
  imperfect = gap != 0
  gap = jnp.where(imperfect, gap, 1) ** (1 / tversky_gamma)
  gap = jnp.where(imperfect, gap, 0)
  return pixels.mean_over_classes(gap, class_weights)


def lovasz(
  logits: Array, label: Array, weight: Array, class_weights: Array
) -> Array:
  """Lovasz-softmax: the convex closure of 1 - IoU of each class.

  With m_i = 1 - p_i where pixel i has class k, p_i elsewhere, in falling order,
  and J_i the weighted 1 - IoU of class k where the first i pixels are wrong:

    loss_k = sum_i m_i (J_i - J_{i-1}),  J_i = 1 - I_i / U_i,
    I_i = sum_{j>i} w_j g_j,  U_i = sum_j w_j g_j + sum_{j<=i} w_j (1 - g_j)
    loss = sum_k(class_weights[k] loss_k) / sum_k(class_weights[k])

  over the classes k = 0..K-1 that the example has; K == 1 knows class 1 alone.
  Each example is sorted for itself. Where all p are 0 or 1: exactly 1 - IoU.

  Reference: Berman et al. 2018, https://arxiv.org/abs/1705.08790, equations 8,
  9 and algorithm 1 (classes="present", per_image=True, w = 1).
  """
  logits, label, weight = pixels.mask(logits, label, weight)
  single = logits.shape[-1] == 1
  probs = jax.nn.sigmoid(logits) if single else jax.nn.softmax(logits)
  ids = [1] if single else range(logits.shape[-1])
  losses, factors = [], []
  for k, p in zip(ids, jnp.moveaxis(probs, -1, 0), strict=True):
    truth = label == k
    losses.append(_lovasz(jnp.where(truth, 1 - p, p), truth, weight))
    size = jnp.sum(jnp.where(truth, weight, 0), tuple(range(1, label.ndim)))
    factors.append(jnp.where(size == 0, 0, class_weights[k]))
  return pixels.mean(jnp.stack(losses, -1), jnp.stack(factors, -1))


def lovasz_hinge(
  logits: Array, label: Array, weight: Array, class_weights: Array
) -> Array:
  """Lovasz hinge of class 1 by one logit z: K must be 1.

  `lovasz` with m_i = 1 - z_i where the label is 1, 1 + z_i elsewhere, and
  max(m_i, 0) in the sum. An example without class 1 has J_i = 1, so its loss is
  that of its worst pixel. More logits are a ValueError.

  Reference: Berman et al. 2018, https://arxiv.org/abs/1705.08790, equation 7;
  Yu and Blaschko 2015, https://arxiv.org/abs/1512.07797.
  """
  if logits.shape[-1] != 1:
    raise ValueError(
      f"lovasz_hinge takes one logit, got {logits.shape[-1]}; use lovasz"
    )
  logits, label, weight = pixels.mask(logits, label, weight)
  z, truth = logits[..., 0], label == 1
  loss = _lovasz(1 + jnp.where(truth, -z, z), truth, weight, rectify=True)
  return pixels.mean_over_classes(loss[:, None], class_weights)


def boundary(
  logits: Array, label: Array, weight: Array, class_weights: Array
) -> Array:
  """Probability times signed distance to the border of each foreground class.

  With D the exact Euclidean distance in pixels and p the probability of k:

    phi_k = D(nearest pixel of k) outside k, 1 - D(nearest pixel not of k) in k
    loss_k = sum(weight p phi_k) / sum(weight)
    loss = sum_k(class_weights[k] loss_k) / sum_k(class_weights[k])

  below 0 where the class is found. Pixels of weight 0 are neither in nor out;
  phi is 0 in an example that lacks either. Distances are those of the labels
  that arrive here, so after augmentation. It says nothing where p is far from
  the border of what is right: add it to `dice` or `cross_entropy`.

  Reference: Kervadec et al. 2019, https://arxiv.org/abs/1812.07032, equations 5
  and 6, and the authors' one_hot2dist for the 1.
  """
  counted = weight > 0
  probs, truth, weight = _foreground(logits, label, weight)
  maps = [
    signed_distance(truth[..., k] > 0, counted, probs.dtype)
    for k in range(truth.shape[-1])
  ]
  axes = tuple(range(1, label.ndim))
  total = jnp.sum(weight * probs * jnp.stack(maps, -1), axis=axes)
  norm = jnp.sum(weight, axis=axes)
  loss = total / jnp.where(norm == 0, 1, norm)
  return pixels.mean_over_classes(loss, class_weights)


def signed_distance(inside: Array, counted: Array, dtype: jnp.dtype) -> Array:
  """`phi` of `boundary`: bool [B, *S] twice -> [B, *S], exact."""
  to_inside = _squared_distance(inside & counted, dtype)
  to_outside = _squared_distance(~inside & counted, dtype)
  far = _far(inside.shape)
  has_border = jnp.maximum(to_inside, to_outside) < far
  phi = jnp.where(inside, 1 - jnp.sqrt(to_outside), jnp.sqrt(to_inside))
  return jnp.where(has_border, phi, 0)


def _far(shape: tuple[int, ...]) -> float:
  """More than any squared distance in [B, *S]."""
  return float(sum(n**2 for n in shape[1:]) + 1)


def _squared_distance(inside: Array, dtype: jnp.dtype) -> Array:
  """To the nearest pixel that is inside; at least `_far` where none is.

  Along the first axis by two passes, then for each other axis
  min_j (f_j + (i - j)^2), over all j.

  Reference: Felzenszwalb and Huttenlocher 2012, Distance transforms of sampled
  functions, https://doi.org/10.4086/toc.2012.v008a019, equation 2.
  """
  n, far = inside.shape[1], _far(inside.shape)
  at = jax.lax.broadcasted_iota(dtype, inside.shape, 1)
  before = jax.lax.cummax(jnp.where(inside, at, -far), 1)
  after = jax.lax.cummin(jnp.where(inside, at, far + n), 1, reverse=True)
  squares = jnp.minimum(at - before, after - at) ** 2
  for axis in range(2, inside.ndim):
    n = inside.shape[axis]
    apart = (np.arange(n)[:, None] - np.arange(n)) ** 2
    apart = apart.reshape((1,) * (inside.ndim - 1) + (n, n)).astype(dtype)
    rows = jnp.moveaxis(squares, axis, -1)[..., None, :]
    squares = jnp.moveaxis(jnp.min(rows + apart, -1), -1, axis)
  return squares


def _foreground(
  logits: Array, label: Array, weight: Array
) -> tuple[Array, Array, Array]:
  """Probability and 0/1 truth [B, *S, F], and the weight [B, *S, 1]."""
  logits, label, weight = pixels.mask(logits, label, weight)
  if logits.shape[-1] == 1:
    probs = jax.nn.sigmoid(logits)
  else:
    probs = jax.nn.softmax(logits)[..., 1:]
  num_labels = probs.shape[-1] + 1
  truth = jax.nn.one_hot(label, num_labels, dtype=probs.dtype)[..., 1:]
  return probs, truth, weight[..., None]


def _tversky_gap(
  logits: Array, label: Array, weight: Array, alpha: float, beta: float
) -> Array:
  """1 - T_k of each foreground class, [B, F]."""
  probs, truth, weight = _foreground(logits, label, weight)
  axes = tuple(range(1, label.ndim))
  total = lambda x: jnp.sum(weight * x, axis=axes)
  both, e = total(probs * truth), DICE_SMOOTHING / 2
  wrong = alpha * total(probs * (1 - truth)) + beta * total((1 - probs) * truth)
  return wrong / (both + wrong + e)


def _lovasz(
  errors: Array, truth: Array, weight: Array, *, rectify: bool = False
) -> Array:
  """sum_i m_i (J_i - J_{i-1}) [B] of errors m, truth g and weights [B, *S]."""
  errors, truth, weight = (
    x.reshape(x.shape[0], -1) for x in (errors, truth, weight)
  )
  own, others = jnp.where(truth, weight, 0), jnp.where(truth, 0, weight)
  # What has weight 0 comes last, wherever its error would put it.
  keys = jnp.where(weight > 0, errors, -jnp.inf)
  own, others, places = pixels.sort_descending(keys, own, others)
  # The differences of J written out: those of rounded J would be noise.
  left = jax.lax.cumsum(own, 1, reverse=True)
  wrong = jnp.cumsum(others, axis=1)
  union = jnp.sum(own, axis=1, keepdims=True) + wrong
  before = union - others
  seen = lambda x: jnp.where(x == 0, 1, x)
  slope = own / seen(union) + left * others / seen(before * union)
  first = jnp.where((before == 0) & (others > 0), 1.0, 0.0)
  slope = pixels.unsort(jnp.where(before == 0, first, slope), places)
  errors = jax.nn.relu(errors) if rectify else errors
  return jnp.sum(errors * slope, axis=1)
