"""Where images come from: the mini-world, the published sets, class folders.

``python -m tgazsr_utils.datasets`` lists, checks and fetches them.
"""

import tgazsr_utils.core  # noqa: F401  (before anything imports torchvision)
