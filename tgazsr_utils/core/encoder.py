"""The image encoder in fewer and larger products: open_clip's own modules, weights and names; other shapes of sums."""

from typing import Any

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

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = self.kernel_size
        patches = pixels.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def with_larger_products(visual: nn.Module) -> None:
    """Makes an open_clip ViT compute so; what is not as expected (attention of another kind) stays as it is."""
    for module in visual.modules():
        if type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim and module.batch_first:
            module.__class__ = OneProduct
    conv = visual.conv1
    if type(conv) is nn.Conv2d and conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.groups == 1:
        conv.__class__ = PatchProduct
