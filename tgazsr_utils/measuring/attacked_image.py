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
    clip: Clip, data: ImageSet, image: int | Tensor, text: str, eps_255: float, steps: int, variant: Variant
) -> AttackedImage:
    """Attacks an image by PGD (linf, step eps/4) and measures the attention that ``text`` guides.

    ``image``: a row of ``data``, which the attack leads away from its class; or an image of one's own ``[3,H,W]`` in
    [0,1], led away from what it is seen as among the classes of ``data``, and measured without a mask.
    """
    prompts, guide = clip.encode_text(data.prompts), clip.encode_text([text])
    masks = None
    if isinstance(image, int):
        _, _, pixels, labels = next(data.batches([torch.tensor([image])], clip.device))
        if data.masks is not None:
            masks = data.masks[image][None].to(clip.device)
    else:
        pixels = image[None].to(clip.device)
        labels = clip.logits(pixels, prompts).argmax(1)
    start, eps = torch.Generator(clip.device).manual_seed(0), eps_255 / 255
    adversarial = pgd(clip, pixels, labels, prompts, eps, eps / 4, steps, generator=start)
    tokens = clip.encode_image(torch.cat([pixels, adversarial]))
    maps = text_guided_attention(tokens, guide[0], variant, grid=clip.grid)
    shift = as_frame(attention_shift(maps[:1], maps[1:], masks)).iloc[0]
    answers = likeliest(clip.similarity(tokens.pooled, prompts), data.class_names)
    shown = (part.cpu() for part in (pixels[0], adversarial[0], *maps))
    return AttackedImage(*shown, *answers, shift, data.class_names[int(labels)])


def likeliest(logits: Tensor, class_names: tuple[str, ...], n: int = 5) -> list[list[tuple[str, float]]]:
    """For each row of ``logits`` ``[B,C]``: the ``n`` likeliest classes and their probabilities, in falling order."""
    found = []
    for row in logits.softmax(1):
        top = row.topk(min(n, len(class_names)))
        found.append([(class_names[i], p) for i, p in zip(top.indices.tolist(), top.values.tolist())])
    return found
