"""The method and only the method: models, attention, attacks, objectives, training steps, predictions."""

from tgazsr_utils.core import frontier  # noqa: F401  (registers its methods)
