"""What an attack does to attention, image by image."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from tgazsr_utils.core.attention import Variant, attention_shift, text_guided_attention
from tgazsr_utils.core.evaluation import predictions
from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.measuring.measure import batch_that_fits


@dataclass(frozen=True)
class AttentionUnderAttack:
    """What an attack did to each image of a set: pixels and maps on the CPU, and a row of measures an image."""

    images: Tensor  # [N,3,H,W] in [0,1]
    adversarial: Tensor  # [N,3,H,W]
    clean_maps: Tensor  # [N,h,w], guided by the true class
    attacked_maps: Tensor  # [N,h,w]
    frame: pd.DataFrame  # attention_shift's measures, label, predictions, clean_correct, flipped

    def panels(
        self, rows: list[int], class_names: Sequence[str]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[str, str]]]:
        """What ``plots.attention_panels`` shows of these rows: images, maps, attacked images, maps, captions."""
        guesses = zip(self.frame.clean_prediction[rows], self.frame.attacked_prediction[rows])
        captions = [(f"seen as {class_names[a]}", f"seen as {class_names[b]}") for a, b in guesses]
        return self.images[rows], self.clean_maps[rows], self.adversarial[rows], self.attacked_maps[rows], captions


@torch.no_grad()
def attention_under_attack(
    clip: Clip, data: ImageSet, attack: AttackSettings, variant: Variant = "reference", seed: int = 0
) -> AttentionUnderAttack:
    """Attacks every image and measures how far the attention guided by its true class moves
    (``core.attention.attention_shift``).

    ``flipped``: right when clean, wrong when attacked.
    """
    text = clip.encode_text(data.prompts)
    parts = []
    for batch, attacked, _ in predictions(clip, data, attack, batch_that_fits(clip), seed=seed):
        tokens = clip.encode_image(batch.images), clip.encode_image(attacked)
        maps = [text_guided_attention(t, text[batch.labels], variant, grid=clip.grid) for t in tokens]
        guesses = [clip.similarity(t.pooled, text).argmax(1) for t in tokens]
        parts.append([t.cpu() for t in (batch.rows, batch.images, attacked, *maps, *guesses)])
    rows, images, attacked, clean_maps, attacked_maps, clean_guess, attacked_guess = map(torch.cat, zip(*parts))
    frame = as_frame(attention_shift(clean_maps, attacked_maps, None if data.masks is None else data.masks[rows]))
    frame["label"], frame["clean_prediction"] = data.labels[rows].numpy(), clean_guess.numpy()
    frame["attacked_prediction"] = attacked_guess.numpy()
    frame["clean_correct"] = frame.clean_prediction == frame.label
    frame["flipped"] = frame.clean_correct & (frame.attacked_prediction != frame.label)
    return AttentionUnderAttack(images, attacked, clean_maps, attacked_maps, frame)


def as_frame(measures: dict[str, Tensor]) -> pd.DataFrame:
    """One row an image, a column a measure."""
    return pd.DataFrame({name: values.float().cpu().numpy() for name, values in measures.items()})
