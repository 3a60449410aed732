"""The method, and only the method: models, attention, attacks, objectives, training steps, predictions."""

from tgazsr_utils.core import _torchvision  # noqa: F401  (before anything imports torchvision, as open_clip does)
