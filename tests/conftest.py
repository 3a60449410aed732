import os
import random

import tgazsr_utils  # noqa: F401, I001  (before PyTorch and open_clip: it says how threads wait, and mends torchvision's import)
import pytest
import torch
from open_clip.transformer import VisionTransformer
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

from tgazsr_utils.datasets.loading import load_dataset  # noqa: E402
from tgazsr_utils.durable.weights import load_clip  # noqa: E402


@pytest.fixture(scope="session")
def mini():
    """The shipped mini-CLIP. Tests must not change it."""
    return load_clip("mini-clip", "mini", "cpu")


@pytest.fixture(scope="session")
def shapes():
    return load_dataset("shapes", "test", n=40)


@pytest.fixture
def photo_root(tmp_path):
    """Two image sets in miniature: class folders of odd names and sizes, and Tiny-ImageNet's published layout."""
    colours = {"017.red_Fox": (200, 30, 30), "002_green-x": (20, 160, 40)}
    for name, colour in colours.items():
        folder = tmp_path / "animals" / "images" / name
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (70 + i, 90), colour).save(folder / f"{i}.png")
    tiny = tmp_path / "tiny"
    (tiny / "val" / "images").mkdir(parents=True)
    (tiny / "wnids.txt").write_text("n02\nn01\nn03\n")
    (tiny / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tpop bottle, soda bottle\nn03\tabsent\n")
    lines = []
    for wnid, grey in (("n01", 60), ("n02", 180)):
        images = tiny / "train" / wnid / "images"
        images.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (64, 64), (grey,) * 3).save(images / f"{wnid}_{i}.JPEG")
        boxes = "".join(f"{wnid}_{i}.JPEG\t8\t16\t39\t47\n" for i in range(3))
        (tiny / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
        for i in range(2):
            Image.new("RGB", (64, 64), (grey,) * 3).save(tiny / "val" / "images" / f"val_{wnid}_{i}.JPEG")
            lines.append(f"val_{wnid}_{i}.JPEG\t{wnid}\t0\t0\t31\t63\n")
    (tiny / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def passes(monkeypatch):
    """Grows by (images, are the last weights tuned?) with each pass through an image encoder."""
    seen, forward = [], VisionTransformer.forward
    note = lambda self, x: seen.append((len(x), self.proj.requires_grad)) or forward(self, x)
    monkeypatch.setattr(VisionTransformer, "forward", note)
    return seen


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=25, help="how often the kill test kills")
    parser.addoption("--kills-seed", type=int, default=random.SystemRandom().randrange(10**6), help="when it does")
