import gc
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Read once by PyTorch, here and in what tests start: there is a worker for each core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process that tests start compiles all modules for itself

import tgazsr_utils  # noqa: E402, F401  (says how threads wait, before PyTorch is here)

# isort: split
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torchvision does

from tgazsr_utils.core.libraries import open_clip  # noqa: E402

open_clip()  # mends torchvision's import before a test asks for it

# isort: split
import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from open_clip.transformer import VisionTransformer  # noqa: E402
from PIL import Image  # noqa: E402

from tgazsr_utils import FinetuneSettings, Step, load_clip, load_dataset  # noqa: E402
from tgazsr_utils.paths import ROOT  # noqa: E402
from tgazsr_utils.progress import HEADLESS  # noqa: E402

OPTIONS = []  # pytest's, once it has read them


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="all that the documents count, and what takes minutes")
    parser.addoption("--kills", type=int, help="how often the kill test kills (default: 2, or 25 with --long)")
    parser.addoption("--kills-seed", type=int, default=random.SystemRandom().randrange(10**6), help="when it does")


def pytest_configure(config):
    OPTIONS[:] = [config.option]
    config.addinivalue_line("markers", "long: runs with --long only; another test takes the same path with less work")


@pytest.hookimpl(trylast=True)  # after -k and the like
def pytest_collection_modifyitems(config, items):
    if not config.option.long:
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items[:] = for_two_workers(items)


def for_two_workers(items):
    """Each starts with one half of the tests: what takes minutes comes first in both, so that what ends last is short.

    Modules whose tests share a run stay together; all that looks at the smoke run is in the first half, so that no
    worker waits while the other makes it.
    """
    smoke = [item for item in items if "smoke" in item.fixturenames]
    long = [item for item in items if item.get_closest_marker("long") and item not in smoke]
    turns = {module: turn % 2 for turn, module in enumerate(dict.fromkeys(item.module for item in long))}
    first = [*smoke, *(item for item in long if turns[item.module])]
    second = [item for item in long if not turns[item.module]]
    rest = [item for item in items if item not in first and item not in second]
    middle = max(0, len(items) // 2 - len(first))
    return [*first, *rest[:middle], *second, *rest[middle:]]


def size(short, long):
    """``long`` where pytest was given --long, else ``short``: how much work a test does."""
    return long if OPTIONS[0].long else short


def only_long(*values):
    """Parameters that are tried with --long only."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


def train_settings(**changes):
    """Settings of a training that takes a second or two, but for ``changes``."""
    usual = {"Alpha": 0.08, "Beta": 0.05, "Distance_metric": "l2", "attention_variant": "reference", "seed": 0}
    usual |= {"epochs": 1, "batch_size": 8, "lr": 1e-3, "warmup_steps": 2}
    usual |= {"train_eps": 3, "train_stepsize": 3, "train_numsteps": 1}
    return FinetuneSettings(**usual | changes)


def check_same_training(one, other, start):
    """Checks that two ways to compute the same training of ``start`` agree.

    The first step agrees up to rounding. Later steps agree loosely: where rounding turns the sign of a gradient near
    zero, a training attack moves a pixel the other way. A wrong random start changes losses by 2 %.
    """
    columns = one.history.columns.drop(["seconds", "robust_batch_accuracy"])
    rows = [torch.tensor(result.history[columns].to_numpy()) for result in (one, other)]
    torch.testing.assert_close(rows[0][0], rows[1][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*rows, rtol=5e-3, atol=1e-3)
    clips = start, one.clip, other.clip
    before, first, second = (torch.cat([p.flatten() for p in clip.visual.parameters()]) for clip in clips)
    assert (first - second).norm() < 1e-2 * (first - before).norm()


def disagreements(one, other):
    """Number of images that one of two records counts as right and the other as wrong."""
    return (int(one.hits, 16) ^ int(other.hits, 16)).bit_count()


def tensors_alive():
    """Number of tensors that this process holds."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def document_paths():
    """What people read: README, docs, and what is said of the kept results."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("data/reference/*/README.md"))]


def documents():
    return "\n".join(path.read_text(encoding="utf-8") for path in document_paths())


def own_environment():
    """In which run_all.sh takes this Python's environment for the active one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path}


def run_all(*arguments, **environment):
    """run_all.sh, to its end."""
    command = ["bash", str(ROOT / "run_all.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=own_environment() | environment)


class Smoke(NamedTuple):
    """The whole workbook, as run_all.sh has run it in profile smoke."""

    folder: Path
    arguments: list[str]  # of run_all.sh
    log: str
    errors: str


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Run once in a session, by the worker that asks first; for many tests to look at.

    Its folder has a nasty name, a site has another kernel "python3", and the user a matplotlibrc for papers.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, outcome = shared / 'it\'s "odd" {run} {} {0 $(touch ran) `touch ran`; touch ran\\n', shared / "smoke.json"
    arguments = ["smoke", "-p", "output", str(folder)]
    with FileLock(shared / "smoke.lock"):
        if not outcome.exists():
            site, rc = shared / "site" / "kernels" / "python3", shared / "matplotlibrc"
            site.mkdir(parents=True)
            (site / "kernel.json").write_text('{"argv": ["false"], "display_name": "the site", "language": "python"}')
            rc.write_text("text.usetex: True\nbackend: tkagg\nsavefig.bbox: standard\nfont.size: 40\n")
            done = run_all(*arguments, JUPYTER_PATH=str(shared / "site"), MATPLOTLIBRC=str(rc))
            outcome.write_text(json.dumps([done.returncode, done.stdout, done.stderr]), encoding="utf-8")
    code, log, errors = json.loads(outcome.read_text(encoding="utf-8"))
    assert code == 0, errors
    return Smoke(folder, arguments, log, errors)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    """No test, nor what it starts, takes itself for part of a headless run because another has called the runner."""
    monkeypatch.delenv(HEADLESS, raising=False)


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


@pytest.fixture
def step(mini, shapes, generator):
    """A tuned model that differs from the original, and images that differ from the clean ones."""
    tuned = mini.frozen_copy()
    with torch.no_grad():
        for parameter in tuned.visual.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    tuned.visual.requires_grad_(True)
    images = shapes.images[:6].float() / 255
    adversarial = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return Step(tuned, mini, images, shapes.labels[:6], shapes.prompts, adversarial)
