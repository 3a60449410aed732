"""Import this before open_clip or torchvision: makes torchvision's pure-Python parts load beside a CPU-only torch.

A torchvision wheel built for CUDA fails to import beside a CPU torch, since its compiled operators are missing.
Nothing here uses those operators; their schemas are enough.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    _library = torch.library.Library("torchvision", "FRAGMENT")  # noqa: TOR901 (must outlive this module's import)
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
