"""Times whole predictions against PyTorch's, side by side: a JSON object a row.

  python benchmarks/predicting.py [NAME ...] [--steps N]

In turns, see turns.py. From images in host memory to masks in host memory,
through the same plan of padding and tiles; only the network is PyTorch's. The
network is that of configs/synthetic.py.
"""

import turns

WIDTHS = (16, 32, 64, 128)
# name -> how many images, their smallest and largest side
CASES = {
  "predict_512": (1, 512, 512),
  "predict_4096": (1, 4096, 4096),
  "predict_folder_100": (100, 64, 256),
}


def make_apply(who):
  """float32 [B, *S, 1] -> (mask, probabilities), ours or PyTorch's."""
  import numpy as np

  if who == "ours":
    import jax

    from unet_jax import ensemble
    from unet_jax.models import build_model

    model = build_model(num_classes=1, widths=WIDTHS)
    x = np.zeros((1, 64, 64, 1), np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    group = ensemble.Group(model, variables, 1)
    return ensemble.make_apply([group], dropout_samples=0, seed=0, each=False)
  import peers

  run = peers.make_network({"widths": WIDTHS, "up": "transpose"}, 2, who)

  def apply(batch):
    logits = run(np.moveaxis(batch, -1, 1))
    probability = 1 / (1 + np.exp(-logits))
    mask = (logits[:, 0] > 0).astype(np.uint8)
    return mask, np.moveaxis(probability, 1, -1)[None]

  return apply


def make(name, who):
  """All images of a case, one after another, as a function."""
  import dataclasses

  import numpy as np

  from unet_jax import tiles
  from unet_jax.data import windows
  from unet_jax.schema import Config, DataConfig, ModelConfig

  count, low, high = CASES[name]
  rng = np.random.default_rng(0)
  cfg = dataclasses.replace(
    Config(model=ModelConfig(widths=WIDTHS)),
    data=DataConfig(pad_multiple=64),  # A few shapes, for both.
  )
  need, apply = tiles.needs([cfg.model]), make_apply(who)
  images = [
    rng.normal(size=(*rng.integers(low, high + 1, 2), 1)).astype(np.float32)
    for _ in range(count)
  ]

  def call():
    for image in images:
      plan = tiles.plan(cfg, image.shape[:-1], need)
      picture = windows.of_array(image)
      tiles.whole(tiles.stream(picture, plan, apply, {"mode": "none"}))

  return call


if __name__ == "__main__":
  turns.main(make, CASES, doc=__doc__)
