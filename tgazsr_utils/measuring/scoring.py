"""What a model is worth, in one call, for those who keep their results themselves."""

from collections.abc import Sequence
from typing import Any

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.measuring.measure import evaluate
from tgazsr_utils.measuring.records import Record


def score(clip: Clip, sets: Sequence[ImageSet], attack: AttackSettings | None = None, **options: Any) -> list[Record]:
    """Of each set a record on clean images and one under ``attack``; ``options``: see ``evaluate``.

    ``leaderboard`` takes them. Nothing is stored and the attack is not checked, as ``Bench.measure`` does.
    """
    return [evaluate(clip, data, kind, **options) for data in sets for kind in dict.fromkeys((None, attack))]
