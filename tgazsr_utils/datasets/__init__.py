"""Where images come from: the mini-world, the published sets (``python -m tgazsr_utils.datasets``), class folders."""
