"""The image encoder in fewer, larger and compiled products: open_clip's own modules, weights and names."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneProduct(nn.MultiheadAttention):
    """Self-attention of ``[B,N,D]`` whose queries, keys and values are one product, and that keeps no weights."""

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        B, N, D = query.shape
        parts = F.linear(query, self.in_proj_weight, self.in_proj_bias).view(B, N, 3, self.num_heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()  # each [B,heads,N,D/heads]
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)), None


class PatchProduct(nn.Conv2d):
    """A convolution whose step is its kernel's size, as a product of patches: ``[B,3,H,W]`` to ``[B,D,H/p,W/p]``."""

    run: Callable | None = None

    def forward(self, pixels: Tensor) -> Tensor:
        arguments = pixels, self.weight, self.bias
        return self.run(_product, *arguments) if self.run else _product(*arguments)


def _product(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    height, width = weight.shape[2:]
    patches = pixels.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)


class Blocks(nn.ModuleList):
    """A transformer's blocks; while there is ``run``, such as ``run_compiled``, each is run by it: all by one graph."""

    run: Callable | None = None

    def __iter__(self) -> Iterator[Any]:
        blocks = super().__iter__()
        return (functools.partial(self.run, _call, block) for block in blocks) if self.run else blocks


def _call(block: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return block(x, **options)


def with_larger_products(visual: Any) -> None:
    """Makes an open_clip ViT compute so; what is not as expected (attention of another kind) stays as it is."""
    for module in visual.modules():
        if type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim and module.batch_first:
            module.__class__ = OneProduct
    conv = visual.conv1
    if type(conv) is nn.Conv2d and conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.groups == 1:
        conv.__class__ = PatchProduct
    if type(visual.transformer.resblocks) is nn.ModuleList:
        visual.transformer.resblocks.__class__ = Blocks


def run_compiled(function: Callable, *arguments: Any, each_size: bool = False, **options: Any) -> Any:
    """``function`` of these arguments, compiled once for all models (weights are inputs) and batches of all sizes.

    ``each_size``: once for each, as is needed where weights are tuned: how a gradient's sum over the batch is split,
    and so its last bits, would depend on the size that happened to be compiled first.
    """
    mark = torch._dynamo.mark_static if each_size else torch._dynamo.maybe_mark_dynamic
    for argument in arguments:
        if type(argument) is Tensor and argument.dim():
            mark(argument, 0)
    return _compile(function)(*arguments, **options)


@functools.cache
def _compile(function: Callable) -> Callable:
    return torch.compile(function)
