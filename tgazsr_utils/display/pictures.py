"""Images and maps over them as pixels to draw: arrays ``[H,W,3]`` in [0,1]."""

import matplotlib
import numpy as np
from torch import Tensor

from tgazsr_utils.core.attention import resize


def pixels(image: Tensor) -> np.ndarray:
    """Of an image ``[3,H,W]`` in [0,1]."""
    return image.permute(1, 2, 0).float().cpu().numpy()


def coloured(image: Tensor, values: Tensor, colours: str = "viridis", opacity: float = 0.65) -> np.ndarray:
    """A map ``[h,w]`` in [0,1] in the colours of a colormap, over the image ``[3,H,W]`` in grey."""
    heat = resize(values[None].float(), tuple(image.shape[1:]))[0].cpu().numpy()
    grey = image.float().mean(0).cpu().numpy()[..., None]
    return (1 - opacity) * grey + opacity * matplotlib.colormaps[colours](heat)[..., :3]
