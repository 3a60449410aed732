"""Numbers one can trust: records, tables, checks of the attack, ablations."""

import tgazsr_utils.core  # noqa: F401  (before anything imports torchvision)
