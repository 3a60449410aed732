"""Methods published since: as in ``core.objectives``, one short function each; and models between two others.

x' is the attacked image, f0 the original model, t a class's text, z = f / ||f||.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from tgazsr_utils.core.attacks import AttackLoss
from tgazsr_utils.core.attention import text_guided_attention
from tgazsr_utils.core.models import Clip, ImageTokens
from tgazsr_utils.core.objectives import (
    Step,
    Term,
    attention_regularised,
    contrastive,
    cosines,
    embedding_attack,
    objective,
    original_pooled,
)
from tgazsr_utils.core.settings import ObjectiveSettings


@objective("Sim-CLIP", attack=embedding_attack)
def sim_clip(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """-mean cos(f(x'), f0(x)); the attack is FARE's; no labels (Hossain & Imteaj 2024).

    As released the loss's other term has no gradient, so that this is all that trains.
    """
    target = step.cached_original("pooled", original_pooled)
    return [Term("L_sim", 1.0, -F.cosine_similarity(step.adversarial_tokens.pooled, target).mean())]


_UCAT_WEIGHT = 1e5 / (1 + math.exp(2 / 0.07))  # exp(softplus(s)) is 1 + exp(s)


@objective("UCAT", batch_size=256)
def ucat(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """CE(f, x') + lambda * mean KL(Dir(a(f, x')) || Dir(a(f0, x))) (ICML 2026).

    a = 1e-6 + exp((cos + 1) / 0.07) for each class, lambda = 1e5 / exp(softplus(2 / 0.07)). a reaches 1e12: float64.
    """
    evidence = lambda pooled: 1e-6 + torch.exp((cosines(pooled, step.text, torch.float64) + 1) / 0.07)
    sides = step.adversarial_tokens.pooled, step.cached_original("pooled", original_pooled)
    # To validate arguments would wait for the device.
    divergence = kl_divergence(*(Dirichlet(evidence(pooled), validate_args=False) for pooled in sides)).mean()
    return [
        Term("CE", 1.0, step.cross_entropy(step.adversarial_tokens)),
        Term("L_Dir", _UCAT_WEIGHT, divergence.float()),
    ]


def soft_label_attack(step: Step) -> AttackLoss:
    """AGFT's own loss, summed over the batch."""
    text = step.text
    p = (72 * cosines(step.cached_original("pooled", original_pooled), text)).softmax(1)
    return lambda tokens: -(p * (180 * cosines(tokens.pooled, text)).log_softmax(1)).sum()


@objective("AGFT", attack=soft_label_attack, lr=4e-4, batch_size=256)
def agft(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """-mean sum_c p_c log softmax(180 cos(f(x'), t))_c, p = softmax(72 cos(f0(x), t)) (CVPR 2026).

    No labels; the attack maximises the same. Its paper tunes on ImageNet.
    """
    return [Term("L_soft", 1.0, soft_label_attack(step)(step.adversarial_tokens) / len(step.images))]


def _described_cross_entropy(clip: Clip, tokens: ImageTokens, described: Tensor, labels: Tensor) -> Tensor:
    """Mean over images and over n texts a class, ``[C,n,D]``, the i-th of all classes together."""
    logits = clip.similarity(tokens.pooled, described.flatten(0, 1)).unflatten(1, described.shape[:2])  # [B,C,n]
    return F.cross_entropy(logits, labels[:, None].expand(-1, described.shape[1]))


def described_attack(step: Step) -> AttackLoss:
    """The batch's summed cross-entropy, a mean over the classes' descriptions."""
    clip, described, labels = step.clip, step.described, step.labels
    return lambda tokens: len(labels) * _described_cross_entropy(clip, tokens, described, labels)


@objective("SAFT", attack=described_attack, reads=("descriptions",))
def saft(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """TGA-ZSR with n descriptions of a class in place of its prompt (TMLR 2026, n = 5).

        1/n sum_i CE(logits(f, x', t_i), y) + Alpha * L_AR + Beta * L_AMC,   of attention to 1/n sum_i t_iy

    CE and the attack's are means over the n texts; attention is that of the mean over them before min-max, which is
    attention to the mean of their embeddings, in whose length it is linear.
    """
    step.encode_both()
    variant, backend = settings.attention_variant, settings.attention_backend
    attend = lambda step, side: text_guided_attention(
        step.tokens(side), step.described[step.labels].mean(1), variant, grid=step.clip.grid, backend=backend
    )
    classify = lambda step, tokens: _described_cross_entropy(step.clip, tokens, step.described, step.labels)
    return attention_regularised(step, settings, attend, cached=f"described-{variant}", classify=classify)


def caption_attack(step: Step) -> AttackLoss:
    """The symmetric in-batch contrastive loss of images and captions, times the batch."""
    clip, text = step.clip, step.caption_text
    return lambda tokens: len(text) * contrastive(clip.similarity(tokens.pooled, text))


@objective("AdvFLYP", attack=caption_attack, whole_batch=True, reads=("captions",), batch_size=256)
def adv_flyp(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """InfoNCE(x', captions) + mean(||z' - z0'|| + ||z' - z||) + mean(KL(p' || p0') + KL(p' || p)) (CVPR Findings 2026).

    InfoNCE is symmetric in the batch and halved; z0' = z(f0, x'), p = softmax of the logits of the batch's captions. An
    image without a caption has the prompt of its class for one.
    """
    step.encode_both()
    sides = step.adversarial_tokens, step.clean_tokens, step.original_adversarial_tokens
    attacked, clean, original = [step.clip.similarity(tokens.pooled, step.caption_text) for tokens in sides]
    z, z_clean, z_original = (F.normalize(tokens.pooled.float(), dim=-1) for tokens in sides)
    of, to = attacked.double().log_softmax(1), lambda logits: logits.double().log_softmax(1)
    divergence = lambda logits: F.kl_div(to(logits), of, reduction="batchmean", log_target=True).float()
    away = lambda other: torch.linalg.vector_norm(z - other, dim=1).mean()
    loss = contrastive(attacked)
    return [
        Term("L_con", 1.0, loss),
        # The norm would make a gradient of full size of a rounding, while f is f0.
        Term("L_original", 1.0, 0 * loss if step.untouched else away(z_original)),
        Term("L_clean", 1.0, away(z_clean)),
        Term("KL_original", 1.0, divergence(original)),
        Term("KL_clean", 1.0, divergence(clean)),
    ]


@torch.no_grad()
def interpolated(original: Clip, tuned: Clip, w: float) -> Clip:
    """A model whose image encoder has the weights (1 - w) theta0 + w theta: 0 is the original one, 1 the tuned one."""
    between = tuned.frozen_copy()
    for value, start in zip(between.visual.parameters(), original.visual.parameters()):
        value.copy_(torch.lerp(start.float(), value.float(), w))
    between.training_record = tuned.training_record | {"interpolated": w}
    return between
