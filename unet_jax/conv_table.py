"""The fastest form of a 3-wide convolution on CPU, by shape class.

Measured and written by benchmarks/conv_forms.py. A grid has a row for each of
the channels in, and a letter for each of the channels out:

  x  that of XLA
  i  a volume as slices, those of the kernel as channels in
  o  likewise, as channels out
  b  the gradient of the kernel block by block
"""

# log2 of the channels in, and of the channels out.
CHANNELS = (0, 4, 6, 8, 10)

# (what, spatial axes, log2 of the pixels of an example)
FORMS = {
  ("kernel", 2, 10): ("xxxxx", "xbxxx", "xbxbx", "bbxxx", "xxxxx"),
  ("kernel", 2, 12): ("xxxxx", "xbxxb", "bbbbb", "bbbbb", "xxbbx"),
  ("kernel", 2, 14): ("xxxxx", "xbxbb", "bbbbb", "xbbbb", "xxxbx"),
  ("kernel", 2, 16): ("xxxxx", "xbbbb", "xbbbb", "xxbbb", "xxxbx"),
  ("kernel", 2, 18): ("xxxxx", "xxbbb", "xxbbb", "xxbbb", "xxxbx"),
  ("kernel", 3, 9): ("xxxxx", "xxxxx", "xxxxx", "xxxxx", "xxxxx"),
  ("kernel", 3, 12): ("xxxxx", "xxbxx", "xxxxx", "xxxbx", "xxbxx"),
  ("kernel", 3, 15): ("xxbxx", "xxbbb", "xxbbx", "xxbbx", "xbbxx"),
  ("kernel", 3, 18): ("xbxxb", "xbbbb", "bbbbx", "xxbbx", "xbbxx"),
  ("value", 3, 9): ("xxxii", "xoiii", "xooii", "oooix", "oooxx"),
  ("value", 3, 12): ("xiiii", "ooiii", "oooii", "oooix", "oooxx"),
  ("value", 3, 15): ("xiiii", "ooiii", "ooiii", "oooix", "oooxx"),
  ("value", 3, 18): ("oiiii", "oiiii", "ooiii", "oooix", "oooxx"),
}
