"""What an attack does to attention, image by image."""

from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from tgazsr_utils.core.attention import Variant, attention_distance, text_guided_attention
from tgazsr_utils.core.evaluation import predictor
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
    frame: (
        pd.DataFrame
    )  # attention_shift's measures, label, predictions and their probabilities, clean_correct, flipped

    def typical_flips(self, n: int) -> tuple[list[int], str]:
        """Rows of ``n`` images whose attention moves (l2) as far as the median, among those that flip; how they were
        chosen. Among all images where none flips."""
        flipped = self.frame[self.frame.flipped]
        among = flipped if len(flipped) else self.frame
        away = (among.l2 - among.l2.median()).abs().sort_values(kind="stable")
        of_all = (
            f"the {len(flipped)} of {len(self.frame)} images that flip" if len(flipped) else "all images: none flips"
        )
        rows = away.index[:n].tolist()
        return rows, f"shown: {len(rows)} whose shift is nearest the median among {of_all}"


@torch.no_grad()
def attention_under_attack(
    clip: Clip, data: ImageSet, attack: AttackSettings, variant: Variant = "reference", seed: int = 0
) -> AttentionUnderAttack:
    """Attacks every image and measures how far the attention guided by its true class moves (``attention_shift``).

    ``flipped``: right when clean, wrong when attacked.
    """
    text, parts = clip.encode_text(data.prompts), []
    batches = data.batches(batch_that_fits(clip), clip.device)
    for batch, attacked, *_ in map(predictor(clip, data, attack, seed=seed), batches):
        tokens = clip.encode_image(batch.images), clip.encode_image(attacked)
        maps = [text_guided_attention(t, text[batch.labels], variant, grid=clip.grid) for t in tokens]
        answers = [tensor for t in tokens for tensor in clip.similarity(t.pooled, text).float().softmax(1).max(1)]
        parts.append([t.cpu() for t in (batch.rows, batch.images, attacked, *maps, *answers)])
    rows, images, attacked, clean_maps, attacked_maps, *answers = map(torch.cat, zip(*parts))
    frame = as_frame(attention_shift(clean_maps, attacked_maps, None if data.masks is None else data.masks[rows]))
    frame["label"] = data.labels[rows].numpy()
    names = ("clean_probability", "clean_prediction", "attacked_probability", "attacked_prediction")
    frame[[*names]] = pd.DataFrame(dict(zip(names, (answer.numpy() for answer in answers))))
    frame["clean_correct"] = frame.clean_prediction == frame.label
    frame["flipped"] = frame.clean_correct & (frame.attacked_prediction != frame.label)
    return AttentionUnderAttack(images, attacked, clean_maps, attacked_maps, frame)


def as_frame(measures: dict[str, Tensor]) -> pd.DataFrame:
    """One row an image, a column a measure."""
    return pd.DataFrame({name: values.float().cpu().numpy() for name, values in measures.items()})


@torch.no_grad()
def attention_shift(clean: Tensor, adv: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """How far attention moved, measures ``[B]`` of maps ``[B,h,w]`` on the patch grid.

    Measures: ``l2`` and ``cosine`` (similarity) of the maps as given; ``iou_top20``: overlap of the fifths of the area
    with most attention; ``centre_move``: distance of the centres of mass, in patches; with ``mask`` ``[B,H,W]`` (bool,
    any size that is at least the grid's) also ``energy_clean`` and ``energy_adv``: the share of attention inside it,
    in [0,1], and ``energy_uniform``, the mask's share of the area, which attention spread evenly would reach.
    """
    measures = {
        "l2": attention_distance(clean, adv, "l2", size=None),
        "cosine": 1 - attention_distance(clean, adv, "cos", size=None),
        "iou_top20": _top_iou(clean, adv, fraction=0.2),
        "centre_move": torch.linalg.vector_norm(centre_of_mass(clean) - centre_of_mass(adv), dim=1),
    }
    if mask is not None:
        share = F.adaptive_avg_pool2d(mask[:, None].to(clean.dtype), (clean.shape[-2], clean.shape[-1]))[:, 0]
        measures["energy_clean"] = energy_inside(clean, share)
        measures["energy_adv"] = energy_inside(adv, share)
        measures["energy_uniform"] = share.mean((1, 2))
    return measures


def _top_iou(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    k = max(1, round(fraction * a[0].numel()))
    top = [torch.zeros_like(m.flatten(1)).scatter_(1, m.flatten(1).topk(k, dim=1).indices, 1) for m in (a, b)]
    both = (top[0] * top[1]).sum(1)
    return both / (2 * k - both)


def centre_of_mass(maps: Tensor) -> Tensor:
    """(row, column) ``[B,2]`` of each map's centre of mass, in patches; the middle for an all-zero map."""
    rows, columns = (torch.arange(n, dtype=maps.dtype, device=maps.device) for n in maps.shape[-2:])
    total = maps.sum((1, 2))
    middle = torch.stack([rows.mean(), columns.mean()])
    moments = torch.stack([(maps.sum(2) * rows).sum(1), (maps.sum(1) * columns).sum(1)], dim=1)
    return torch.where(total[:, None] > 0, moments / total.clamp(min=1e-12)[:, None], middle)


def energy_inside(maps: Tensor, share: Tensor) -> Tensor:
    """The part ``[B]`` of each map's sum that lies inside; ``share`` ``[B,h,w]``: how much of each patch is inside."""
    return (maps * share).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-12)
