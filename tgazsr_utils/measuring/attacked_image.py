"""One image before and after an attack: what the model answers, and where its attention goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.attention import Variant, text_guided_attention
from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.datasets.miniworld import ATTRIBUTES
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

    @property
    def flipped(self) -> bool:
        return self.before[0][0] != self.after[0][0]


@dataclass(frozen=True)
class Question:
    """What an image is asked: which of these labels?"""

    labels: tuple[str, ...]
    prompts: tuple[str, ...]

    @classmethod
    def of(cls, data: ImageSet, labels: Sequence[str] | None = None) -> "Question":
        """The classes of a set; or any labels, in the words of the set's prompts."""
        known = dict(zip(data.class_names, data.prompts))
        if labels is None:
            return cls(data.class_names, data.prompts)
        of_a_class = [prompt.rpartition(name) for name, prompt in known.items() if name in prompt]
        before, _, after = of_a_class[0] if of_a_class else ("This is a photo of a ", "", "")
        return cls(tuple(labels), tuple(known.get(label, f"{before}{label}{after}") for label in labels))


@torch.no_grad()
def attack_image(
    clip: Clip,
    data: ImageSet,
    image: int | Tensor,
    text: str,
    eps_255: float,
    steps: int,
    variant: Variant,
    question: Question | None = None,
) -> AttackedImage:
    """Attacks an image by PGD (linf, step eps/4) and measures the attention that ``text`` guides.

    ``image``: a row of ``data``, which the attack leads away from its class; or an image of one's own ``[3,H,W]`` in
    [0,1], measured without a mask, which it leads away from what it is seen as. So it does where the class is not among
    the labels of the ``question``, by default the classes of ``data``.
    """
    question = question or Question.of(data)
    prompts, guide = clip.encode_text(question.prompts), clip.encode_text([text])
    masks = labels = None
    if isinstance(image, int):
        _, _, pixels, label = next(data.batches([torch.tensor([image])], clip.device))
        if data.masks is not None:
            masks = data.masks[image][None].to(clip.device)
        if (prompt := data.prompts[int(label)]) in question.prompts:
            labels = torch.tensor([question.prompts.index(prompt)], device=clip.device)
    else:
        pixels = image[None].to(clip.device)
    labels = clip.logits(pixels, prompts).argmax(1) if labels is None else labels
    start, eps = torch.Generator(clip.device).manual_seed(0), eps_255 / 255
    adversarial = pgd(clip, pixels, labels, prompts, eps, eps / 4, steps, generator=start)
    tokens = clip.encode_image(torch.cat([pixels, adversarial]))
    maps = text_guided_attention(tokens, guide[0], variant, grid=clip.grid)
    shift = as_frame(attention_shift(maps[:1], maps[1:], masks)).iloc[0]
    answers = likeliest(clip.similarity(tokens.pooled, prompts), question.labels)
    shown = (part.cpu() for part in (pixels[0], adversarial[0], *maps))
    return AttackedImage(*shown, *answers, shift, question.labels[int(labels)])


def never_read(clip: Clip, data: ImageSet, labels: Sequence[str]) -> list[str]:
    """Words of ``labels`` that are in no caption a mini-CLIP has learnt from: what it says of them means nothing.

    Where its captions are not known, words that are in none of the set's prompts; of any other model none.
    """
    if clip.arch != "mini-clip":
        return []
    named = [value for values in ATTRIBUTES.values() for value in values] if data.world == "mini-world" else []
    read = set(" ".join([*named, *data.prompts, "object objects in the on a an"]).lower().split())
    known = lambda word: word in read or word.removesuffix("s") in read
    return list(dict.fromkeys(word for label in labels for word in label.split() if not known(word.lower())))


def likeliest(logits: Tensor, class_names: tuple[str, ...], n: int = 5) -> list[list[tuple[str, float]]]:
    """For each row of ``logits`` ``[B,C]``: the ``n`` likeliest classes and their probabilities, in falling order."""
    found = []
    for row in logits.softmax(1):
        top = row.topk(min(n, len(class_names)))
        found.append([(class_names[i], p) for i, p in zip(top.indices.tolist(), top.values.tolist())])
    return found
