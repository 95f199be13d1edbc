"""The names of the criteria. Their functions are in `criteria`, which needs PyTorch; the command's help does not."""

METHODS = ("random", "magnitude", "taylor", "fisher", "mask", "movement")
