"""One image before and after an attack: what the model answers, and where its attention goes."""

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.attention import Variant, text_guided_attention
from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.measuring.attention_shift import as_frame, attention_shift


@dataclass(frozen=True)
class AttackedImage:
    """All on the CPU."""

    image: Tensor  # [3,H,W] in [0,1]
    adversarial: Tensor  # [3,H,W]
    clean_map: Tensor  # [h,w] in [0,1], guided by a text
    attacked_map: Tensor  # [h,w]
    before: list[tuple[str, float]]  # the five likeliest classes and their probabilities
    after: list[tuple[str, float]]
    shift: pd.Series  # attention_shift's measures
    label: str  # the class that the attack leads away from


@torch.no_grad()
def attack_image(
    clip: Clip,
    image: Tensor,
    label: int | None,
    data: ImageSet,
    text: str,
    eps_255: float,
    steps: int,
    variant: Variant,
    mask: Tensor | None = None,
) -> AttackedImage:
    """Attacks ``image`` ``[3,H,W]`` in [0,1] by PGD (linf, step eps/4) and measures the attention that ``text`` guides.

    The attack leads away from class ``label`` of ``data``, None: from what the image is seen as; ``mask`` ``[H,W]``, if
    there is one, is where the object is.
    """
    prompts, guide = clip.encode_text(data.prompts), clip.encode_text([text])
    pixels = image[None].to(clip.device)
    if label is None:
        label = int(clip.logits(pixels, prompts).argmax())
    start, eps = torch.Generator(clip.device).manual_seed(0), eps_255 / 255
    labels = torch.tensor([label], device=clip.device)
    adversarial = pgd(clip, pixels, labels, prompts, eps, eps / 4, steps, generator=start)
    tokens = clip.encode_image(torch.cat([pixels, adversarial]))
    maps = text_guided_attention(tokens, guide[0], variant, grid=clip.grid)
    masks = None if mask is None else mask[None].to(clip.device)
    before, after = likeliest(clip.similarity(tokens.pooled, prompts), data.class_names)
    return AttackedImage(
        image=image.cpu(),
        adversarial=adversarial[0].cpu(),
        clean_map=maps[0].cpu(),
        attacked_map=maps[1].cpu(),
        before=before,
        after=after,
        shift=as_frame(attention_shift(maps[:1], maps[1:], masks)).iloc[0],
        label=data.class_names[label],
    )


def likeliest(logits: Tensor, class_names: tuple[str, ...], n: int = 5) -> list[list[tuple[str, float]]]:
    """For each row of ``logits`` ``[B,C]``: the ``n`` likeliest classes and their probabilities, in falling order."""
    found = []
    for row in logits.softmax(1):
        top = row.topk(min(n, len(class_names)))
        found.append([(class_names[i], p) for i, p in zip(top.indices.tolist(), top.values.tolist())])
    return found
