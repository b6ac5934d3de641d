"""Oxford-IIIT pets: the animal, its outline, and what is around it.

pip install -e .[tf]
python -c "import tensorflow_datasets as tfds; tfds.builder('oxford_iiit_pet',
    file_format='array_record').download_and_prepare()"
python -m unet_jax.main --config configs/oxford_pets.py --workdir runs/pets

The trimaps hold 1 = pet, 2 = around it, 3 = border. As it is, the border counts
nowhere and class 1 is the pet; with `:class` the border is class 2 of three.
The last fifth of "train" is val. No score is given: it was not trained here.
"""

import ml_collections

from unet_jax.config import default_config


def get_config(border: str = "ignore") -> ml_collections.ConfigDict:
  """A U-Net on crops; `border` is "ignore" or "class"."""
  if border not in ("ignore", "class"):
    raise ValueError(f"{border!r}: give :ignore or :class")
  config = default_config()
  config.model.widths = (32, 64, 128, 256)
  config.data.source = "tfds"
  config.data.name = "oxford_iiit_pet"
  config.data.tfds_train = "train[:80%]"
  config.data.tfds_val = "train[80%:]"
  config.data.num_classes = 1 if border == "ignore" else 3
  config.data.mask_values = (2, 1) if border == "ignore" else (2, 1, 3)
  config.data.ignore_label = 3 if border == "ignore" else None
  config.data.channels = 3
  config.data.crop_size = (256,)
  config.data.pad_multiple = 64
  config.augment.scale = 0.25
  config.augment.turn = False
  config.augment.brightness = 0.2
  config.augment.contrast = 0.2
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 200
  config.optimizer.clip_norm = 1.0
  config.train.num_steps = 10000
  config.train.batch_size = 16
  config.train.eval_every = 1000
  config.train.checkpoint_every = 1000
  return config
