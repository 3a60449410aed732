"""Runs that survive: weights, checkpoints, whole files, several processes, names of what a result depends on."""

import tgazsr_utils.core  # noqa: F401  (before anything imports torchvision)
