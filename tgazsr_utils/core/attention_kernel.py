"""Text-guided attention in one pass over the tokens: Triton kernels, forward and backward, behind ``attention``.

One program an image walks through the channels in blocks, each block with all patches at once: the norm of a channel
over the tokens (``reference``) is then known at once, that of a token (``cosine``) adds up, and scaling to [0,1] needs
only the scores, which stay in registers. A second text (complementary attention) shares the pass. Sums are in fp32
whatever the tokens' type. The operator is ``tgazsr::attention``, one node to autograd, autocast and torch.compile.
With TRITON_INTERPRET=1 the same kernels run on the CPU.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PATCHES, MAX_CHANNELS = 1024, 1280
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def _tile(pointer, b, p, d, P: tl.constexpr, D: tl.constexpr):
    """Patches by channels of image b in fp32, zeros outside."""
    inside = (p[:, None] < P) & (d[None, :] < D)
    return tl.load(pointer + (b * P + p[:, None]) * D + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _row(pointer, row, i, N: tl.constexpr, other):
    return tl.load(pointer + row * N + i, mask=i < N, other=other).to(tl.float32)


@triton.jit
def _range(score, p, P: tl.constexpr):
    """Least and greatest score, whether these are equal up to rounding, and a divisor that is never 0."""
    low = tl.min(tl.where(p < P, score, float("inf")), axis=0)
    high = tl.max(tl.where(p < P, score, float("-inf")), axis=0)
    constant = high - low <= 16 * _EPS * tl.maximum(tl.abs(low), tl.abs(high))
    return low, high, constant, tl.where(constant, 1.0, high - low)


@triton.jit
def _store_scaled(maps, scores, row, score, p, P: tl.constexpr):
    low, high, constant, spread = _range(score, p, P)
    tl.store(maps + row * P + p, tl.where(constant, 0.0, tl.div_rn(score - low, spread)), mask=p < P)
    tl.store(scores + row * P + p, score, mask=p < P)


@triton.jit
def _through_scaling(scores, slopes, row, p, P: tl.constexpr):
    """Scores, and the loss's gradient by them; those that share the least or greatest score share its part."""
    score, slope = _row(scores, row, p, P, 0.0), _row(slopes, row, p, P, 0.0)
    low, high, constant, spread = _range(score, p, P)
    map = (score - low) / spread
    least, most = (score == low) & (p < P), (score == high) & (p < P)
    by_low = tl.sum(slope * (map - 1), axis=0) / tl.sum(least.to(tl.float32), axis=0)
    by_high = -tl.sum(slope * map, axis=0) / tl.sum(most.to(tl.float32), axis=0)
    by_score = (slope + tl.where(least, by_low, 0.0) + tl.where(most, by_high, 0.0)) / spread
    return score, tl.where(p < P, tl.where(constant, 0.0, by_score), 0.0)


@triton.jit
def _forward(
    pooled,
    patches,
    text,
    maps,
    scores,
    norms,
    P: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    score = tl.zeros([BLOCK_P], tl.float32)
    other = tl.zeros([BLOCK_P], tl.float32)  # for the second text
    square = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = _tile(patches, b, p, d, P, D)
        if COSINE:
            square += tl.sum(x * x, axis=1)
        else:
            c = _row(pooled, b, d, D, 0.0)
            x = x / tl.sqrt(tl.maximum(c * c + tl.sum(x * x, axis=0), _TINY))[None, :]
        score += tl.sum(x * _row(text, b * T, d, D, 0.0)[None, :], axis=1)
        if T == 2:
            other += tl.sum(x * _row(text, b * T + 1, d, D, 0.0)[None, :], axis=1)
    if COSINE:
        norm = tl.maximum(tl.sqrt(square), 1e-12)
        tl.store(norms + b * P + p, norm, mask=p < P)
        score, other = score / norm, other / norm
    _store_scaled(maps, scores, b * T, score, p, P)
    if T == 2:
        _store_scaled(maps, scores, b * T + 1, other, p, P)


@triton.jit
def _backward(
    pooled,
    patches,
    text,
    scores,
    norms,
    slopes,
    d_pooled,
    d_patches,
    d_text,
    P: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = _tile(patches, b, p, d, P, D)
    c = _row(pooled, b, d, D, 0.0)
    channel = c * c + tl.sum(x * x, axis=0)
    channel_norm = tl.sqrt(tl.maximum(channel, _TINY))
    d_x = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    by_norm = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(T):
        score, by_score = _through_scaling(scores, slopes, b * T + k, p, P)
        t = _row(text, b * T + k, d, D, 0.0)
        if COSINE:
            norm = _row(norms, b, p, P, 1.0)
            by_score = by_score / norm
            d_t = tl.sum(by_score[:, None] * x, axis=0)
            d_x += by_score[:, None] * (t[None, :] - (score / norm)[:, None] * x)
        else:
            d_t = tl.sum(by_score[:, None] * x, axis=0) / channel_norm
            d_x += by_score[:, None] * (t / channel_norm)[None, :]
            by_norm -= tl.where(channel > _TINY, d_t * t / (channel_norm * channel_norm), 0.0)
        tl.store(d_text + (b * T + k) * D + d, d_t, mask=d < D)
    if not COSINE:
        d_x += by_norm[None, :] * x
    tl.store(d_pooled + b * D + d, by_norm * c, mask=d < D)
    tl.store(d_patches + (b * P + p[:, None]) * D + d[None, :], d_x, mask=(p[:, None] < P) & (d[None, :] < D))


def _meta(patches: Tensor, text: Tensor, variant: str) -> dict:
    """All patches at once, and as many channels as keep a tile at 16,384 values."""
    (_, P, D), T = patches.shape, text.shape[1]
    block = triton.next_power_of_2(P)
    width = max(16, min(triton.next_power_of_2(D), 16384 // block))
    return {"P": P, "D": D, "T": T, "COSINE": variant == "cosine", "BLOCK_P": block, "BLOCK_D": width, "num_warps": 8}


def _on(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of its arguments."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


@torch.library.custom_op("tgazsr::attention", mutates_args=())
def attention(pooled: Tensor, patches: Tensor, text: Tensor, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Maps ``[B,T,P]`` in [0,1], fp32, of T = 1 or 2 texts; and the scores ``[B,T,P]`` and norms that the backward
    needs.

    ``pooled`` ``[B,D]``, ``patches`` ``[B,P,D]``, ``text`` ``[B,T,D]``, each in fp32, fp16 or bf16; P up to 1024, D up
    to 1280. ``variant``: "reference" or "cosine", see ``attention.text_guided_attention``.
    """
    B, P, D = patches.shape
    if P > MAX_PATCHES or D > MAX_CHANNELS or text.shape[1] not in (1, 2):
        raise ValueError(f"{P} patches, {D} channels, {text.shape[1]} texts; at most {MAX_PATCHES}, {MAX_CHANNELS}, 2")
    maps, scores = (torch.empty(B, text.shape[1], P, dtype=torch.float32, device=patches.device) for _ in range(2))
    norms = maps.new_zeros(B, P)  # of the tokens, for "cosine" alone
    if B:
        inputs = [x.contiguous() for x in (pooled, patches, text)]
        with _on(patches):
            _forward[(B,)](*inputs, maps, scores, norms, **_meta(patches, text, variant))
    return maps, scores, norms


@attention.register_fake
def _(pooled, patches, text, variant):
    maps = patches.new_empty(text.shape[0], text.shape[1], patches.shape[1], dtype=torch.float32)
    return maps, torch.empty_like(maps), maps.new_empty(patches.shape[:2])


@torch.library.custom_op("tgazsr::attention_backward", mutates_args=())
def attention_backward(
    pooled: Tensor, patches: Tensor, text: Tensor, scores: Tensor, norms: Tensor, slopes: Tensor, variant: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pooled, patches and text from ``slopes`` ``[B,T,P]``, those of the maps."""
    inputs = [x.contiguous() for x in (pooled, patches, text, scores, norms, slopes)]
    outputs = torch.empty_like(inputs[0]), torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
    if len(patches):
        meta = _meta(patches, text, variant)
        with _on(patches):
            _backward[(len(patches), triton.cdiv(meta["D"], meta["BLOCK_D"]))](*inputs, *outputs, **meta)
    return outputs


@attention_backward.register_fake
def _(pooled, patches, text, scores, norms, slopes, variant):
    return tuple(x.new_empty(x.shape) for x in (pooled, patches, text))


def _keep(ctx, inputs, output):
    *tokens_and_text, ctx.variant = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tokens_and_text, *output[1:])


def _differentiate(ctx, slopes, *_):
    return *attention_backward(*ctx.saved_tensors, slopes, ctx.variant), None


attention.register_autograd(_differentiate, setup_context=_keep)
