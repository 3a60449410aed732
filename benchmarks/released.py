"""The released training step as it is described (the workbook's REFERENCE: three wasteful habits), for comparison only.

It re-encodes every prompt inside each attack step and differentiates all weights there, text encoder included; it
passes the adversarial image twice; it builds a graph through the frozen model. The loss is that of TGA-ZSR.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tgazsr_utils.core.attention import attention_distance, resize, text_guided_attention
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.settings import FinetuneSettings


def released_step(
    clip: Clip, original: Clip, images: Tensor, labels: Tensor, prompts: Tensor, settings: FinetuneSettings
) -> Tensor:
    """Attack, loss and backward for one batch; ``prompts``: tokens ``[C,77]``. All weights of both need gradients."""
    eps, step_size = settings.train_eps / 255, settings.train_stepsize / 255
    adversarial = (images + eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    for _ in range(settings.train_numsteps):
        adversarial.requires_grad_(True)
        text = clip.model.encode_text(prompts, normalize=True)
        loss = F.cross_entropy(clip.similarity(clip.encode_image(adversarial).pooled, text), labels, reduction="sum")
        loss.backward()
        moved = adversarial.detach() + step_size * adversarial.grad.sign()
        adversarial = torch.clamp(moved, images - eps, images + eps).clamp(0, 1)
    with torch.no_grad():
        text = clip.model.encode_text(prompts, normalize=True)
    clip.zero_grad(set_to_none=True)

    maps = [
        resize(text_guided_attention(model.encode_image(x), text[labels], backend="torch"), settings.distance_size)
        for model, x in ((clip, adversarial), (clip, images), (original, images))
    ]
    distance = lambda a: attention_distance(a, maps[2], "l2", size=None).mean()
    logits = clip.similarity(clip.encode_image(adversarial).pooled, text)
    loss = F.cross_entropy(logits, labels) + settings.Alpha * distance(maps[0]) + settings.Beta * distance(maps[1])
    loss.backward()
    return loss
