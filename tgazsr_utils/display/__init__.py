"""What people look at: figures and the explorer's panels."""

import tgazsr_utils.core  # noqa: F401  (before anything imports torchvision)
