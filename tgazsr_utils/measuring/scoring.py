"""What a model is worth, in one call, for those who keep their results themselves."""

from collections.abc import Sequence

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.settings import AttackSettings, Protocol
from tgazsr_utils.measuring.measure import evaluate
from tgazsr_utils.measuring.records import Record


def score(
    clip: Clip,
    sets: Sequence[ImageSet],
    attack: AttackSettings | None = None,
    protocol: Protocol = "last",
    *,
    method: str = "CLIP",
    seed: int = 0,
) -> list[Record]:
    """Of each set a record on clean images, and one under ``attack``; see ``evaluate``. ``leaderboard`` takes them.

    Nothing is stored and the attack is not checked, which ``Bench.measure`` does.
    """
    kinds = (None,) if attack is None else (None, attack)
    return [evaluate(clip, data, kind, protocol, method=method, seed=seed) for data in sets for kind in kinds]
