"""Temporary."""

CHANNELS = (0, 4, 6, 8, 10)
FORMS = {
  ("kernel", 2, 10): ("xxxxx", "xbxxx", "xbxxx", "bbxxx", "xxxxx"),
  ("kernel", 2, 12): ("xxxxx", "xbxbx", "bbbbb", "bbxbb", "bbxxx"),
  ("kernel", 2, 14): ("xxxxx", "bbxbb", "bbxbb", "bxbbb", "bxxxx"),
  ("kernel", 2, 16): ("xxxxx", "bbbbb", "bbbbb", "bbbbb", "xxxxx"),
  ("kernel", 2, 18): ("xxxxx", "xxbbb", "xxxxx", "xxxxx", "xxxxx"),
  ("kernel", 3, 9): ("xxxxx", "xxxxx", "xxxxx", "xxxxx", "xxxxx"),
  ("kernel", 3, 12): ("xxxxx", "xxxxx", "xxxxx", "xxxxx", "xxxxx"),
  ("kernel", 3, 15): ("xxbxx", "xbbbb", "xbbbb", "xxxxx", "xxxxx"),
  ("kernel", 3, 18): ("xbbxx", "xbbbb", "xxxxx", "xxxxx", "xxxxx"),
  ("value", 3, 9): ("xxxii", "xoiii", "xooio", "oooix", "oooxx"),
  ("value", 3, 12): ("iiiii", "ooooo", "ooooo", "ooooo", "ooooo"),
  ("value", 3, 15): ("iiiii", "ooooo", "ooooo", "ooooo", "ooooo"),
  ("value", 3, 18): ("iiiii", "ooooo", "ooooo", "ooooo", "ooooo"),
}
