"""The 16 published sets and further ones, each read from a miniature of its published layout by the real loader."""

import hashlib
import http.server
import io
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.datasets
from miniatures import WRITERS, red, without_checksums, write_all
from PIL import Image

from tgazsr_utils import runner
from tgazsr_utils.datasets import __main__ as datasets_command
from tgazsr_utils.datasets import loading as datasets
from tgazsr_utils.datasets import torchvision_sets
from tgazsr_utils.datasets.__main__ import main
from tgazsr_utils.datasets.files import decoded
from tgazsr_utils.datasets.layouts import list_datasets
from tgazsr_utils.datasets.loading import choose_datasets, load_dataset
from tgazsr_utils.datasets.published_sets import DATASETS, FURTHER, KNOWN, read_specs
from tgazsr_utils.measuring.measure import evaluate
from tgazsr_utils.runtime.fingerprints import data_key, fingerprint
from tgazsr_utils.runtime.weights import load_clip

# key -> images and classes as published, preprocessing, labels of the miniature, its prompts
EXPECTED = {
    "tinyImageNet": (
        10_000,
        200,
        "crop",
        [1, 0, 1, 0],
        ["This is a photo of a goldfish", "This is a photo of a king penguin"],
    ),
    "cifar10": (
        10_000,
        10,
        "resize",
        [1, 0, 1, 0],
        ["This is a photo of a airplane", "This is a photo of a automobile"],
    ),
    "cifar100": (
        10_000,
        100,
        "resize",
        [1, 0, 1, 0],
        ["This is a photo of a apple", "This is a photo of a aquarium fish"],
    ),
    "STL10": (8_000, 10, "resize", [1, 0, 1, 0], ["This is a photo of a airplane", "This is a photo of a bird"]),
    "SUN397": (
        108_754,
        397,
        "crop",
        [0, 0, 1, 1, 2, 2],
        [
            "This is a photo of a abbey",
            "This is a photo of a apartment building outdoor",
            "This is a photo of a bank vault",
        ],
    ),
    "Food101": (
        25_250,
        101,
        "crop",
        [0, 0, 1, 1],
        ["A photo of apple pie, a type of food.", "A photo of baby back ribs, a type of food."],
    ),
    "oxfordpet": (
        3_669,
        37,
        "crop",
        [0, 0, 1, 1],
        ["A photo of a abyssinian, a type of pet.", "A photo of a american bulldog, a type of pet."],
    ),
    "flowers102": (
        6_149,
        102,
        "crop",
        [1, 0, 1, 0],
        ["A photo of a pink primrose, a type of flower.", "A photo of a hard leaved pocket orchid, a type of flower."],
    ),
    "dtd": (
        1_880,
        47,
        "crop",
        [0, 0, 1, 1],
        ["A surface with a banded texture.", "A surface with a polka dotted texture."],
    ),
    "EuroSAT": (
        27_000,
        10,
        "crop",
        [label for label in range(10) for _ in range(2)],
        [
            f"A centered satellite photo of {name}."
            for name in (
                "annual crop land",
                "a forest",
                "brushland or shrubland",
                "a highway or a road",
                "industrial buildings",
                "pasture land",
                "permanent crop land",
                "residential buildings",
                "a river",
                "a sea or a lake",
            )
        ],
    ),
    "fgvc_aircraft": (
        3_333,
        100,
        "crop",
        [0, 0, 1, 1],
        ["A photo of a boeing 707-320, a type of aircraft.", "A photo of a a340-200, a type of aircraft."],
    ),
    "ImageNet": (50_000, 1000, "crop", [0, 0, 1, 1], ["This is a photo of a tench", "This is a photo of a goldfish"]),
    "Caltech101": (
        8_677,
        101,
        "crop",
        [0, 0, 1, 1],
        ["This is a photo of a faces easy", "This is a photo of a yin yang"],
    ),
    "Caltech256": (
        30_607,
        257,
        "crop",
        [0, 0, 1, 1, 2, 2, 3, 3],
        ["A photo of a ak47.", "A photo of a american flag.", "A photo of a airplanes.", "A photo of a clutter."],
    ),
    "StanfordCars": (
        8_041,
        196,
        "crop",
        [1, 0, 1, 0],
        ["A photo of a am general hummer suv.", "A photo of a ram c/v cargo van minivan."],
    ),
    "PCAM": (
        32_768,
        2,
        "crop",
        [1, 0, 1, 0],
        ["Tthis is a photo of healthy lymph node tissue.", "This is a photo of lymph node tumor tissue."],
    ),
    "ImageNet-V2": (
        10_000,
        1000,
        "crop",
        [0, 0, 1, 1, 2, 2],
        ["This is a photo of a tench", "This is a photo of a brambling", "This is a photo of a great white shark"],
    ),
    "ImageNet-R": (
        30_000,
        200,
        "crop",
        [0, 0, 1, 1],
        ["This is a photo of a goldfish", "This is a photo of a great white shark"],
    ),
    "ImageNet-A": (
        7_500,
        200,
        "crop",
        [0, 0, 1, 1],
        ["This is a photo of a stingray", "This is a photo of a goldfinch"],
    ),
    "ImageNet-Sketch": (
        50_889,
        1000,
        "crop",
        [0, 0, 1, 1],
        ["This is a photo of a tench", "This is a photo of a goldfish"],
    ),
}


@pytest.fixture
def root(tmp_path_factory, monkeypatch):
    without_checksums(monkeypatch.setattr)
    torchvision_sets.reader.cache_clear()
    return write_all(tmp_path_factory.mktemp("sets"))


def test_a_wordnet_id_is_named_whatever_was_imported_before():
    """In a process of its own: timm imports torchvision, which beside a PyTorch of another build must be mended."""
    code = "from tgazsr_utils.datasets.layouts import _raw_name; print(_raw_name('n01440764'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "tench\n", done.stderr


def test_there_are_sixteen_and_four_further_ones():
    assert list(KNOWN) == list(EXPECTED) == list(WRITERS) and len(DATASETS) == 16
    assert list(FURTHER) == ["ImageNet-V2", "ImageNet-R", "ImageNet-A", "ImageNet-Sketch"]


@pytest.mark.parametrize("key", EXPECTED)
def test_the_published_layout_is_read(key, root):
    images, classes, preprocess, labels, prompts = EXPECTED[key]
    spec = KNOWN[key]
    assert (spec.images, spec.classes, spec.preprocess) == (images, classes, preprocess)
    data = load_dataset(key, "test", root)
    assert data.labels.tolist() == labels
    assert list(data.prompts[: len(prompts)]) == prompts
    assert len(data.prompts) == (102 if key == "flowers102" else len(prompts))  # torchvision lists all flowers itself
    assert not data.published and data.images.shape[1:] == (3, 56, 56)
    shown = data.images.float().mean((2, 3))
    shift = 1 if key == "Caltech101" else 0  # the miniature's background folder comes first and is no class
    expected = torch.tensor([[red(label + shift), 90] for label in labels]).float()
    assert (shown[:, :2] - expected).abs().max() < 4  # each image is its label's, up to JPEG

    undecoded = load_dataset(key, "test", root, image_size=224, decode=False)
    source, chosen = undecoded.images.source, int(undecoded.images.chosen[-1])
    original = source.open(chosen).convert("RGB")
    _, (pixels,) = next(undecoded.images.read([torch.tensor([len(labels) - 1])]))
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), by_pil(original, preprocess, 224))


def by_pil(original, preprocess, side):
    """Both ways of REFERENCE section 6, in PIL alone."""
    if preprocess == "resize":
        return np.asarray(original.resize((side, side), Image.Resampling.BILINEAR))
    shorter = {224: 256, 336: 384}[side]
    width, height = (shorter * original.width // min(original.size), shorter * original.height // min(original.size))
    resized = original.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


TRAIN = {"tinyImageNet": [0] * 4 + [1] * 4, "cifar10": [1] * 10, "oxfordpet": [0, 1, 1], "dtd": [0, 1]}
TRAIN |= {
    key: [1, 1] for key in ("cifar100", "STL10", "Food101", "flowers102", "fgvc_aircraft", "StanfordCars", "PCAM")
}


def test_a_prompt_of_ones_own_takes_names_not_whole_prompts(root):
    data = load_dataset("PCAM", "test", root, prompt="An image of {}.")
    assert data.class_names == ("healthy lymph node tissue", "lymph node tumor tissue")
    assert data.prompts[0] == "An image of healthy lymph node tissue." and not data.published


@pytest.mark.parametrize("key", KNOWN)
def test_parts_to_tune_on(key, root):
    if key in TRAIN:
        train = load_dataset(key, "train", root)
        assert train.labels.tolist() == TRAIN[key] and not train.published
        assert load_dataset(key, "train", root, decode=False).images.preprocess == EXPECTED[key][2]  # CIFAR: resized
        return
    with pytest.raises(ValueError, match=f"{key!r} in .* cannot be read: (it has no part|no train images)"):
        load_dataset(key, "train", root)


@pytest.mark.parametrize("preprocess, side", [("resize", 224), ("crop", 224), ("crop", 336)])
def test_preprocessing_is_pils_to_the_bit(preprocess, side):
    rng = np.random.default_rng(0)
    for shape in ((150, 91, 3), (91, 150, 3), (64, 64, 3)):
        original = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        np.testing.assert_array_equal(
            np.asarray(datasets.fit(original, side, preprocess)), by_pil(original, preprocess, side)
        )


def test_sets_that_are_badly_unpacked_are_refused(tmp_path, root):
    """What one class alone would be: an accuracy of 100 %."""
    for i in range(3):
        path = tmp_path / "ImageNet" / "val" / f"ILSVRC2012_val_{i:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(ValueError, match="'ImageNet' in .* no test images in class folders below"):
        load_dataset("ImageNet", "test", tmp_path)
    (tmp_path / "mine" / "only").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / "mine" / "only" / f"{i}.png")
    with pytest.raises(ValueError, match="'mine' in .* only one class, 'only'"):
        load_dataset("mine", "test", tmp_path, test_fraction=0.5)
    (root / "tiny-imagenet-200" / "wnids.txt").unlink()
    with pytest.raises(ValueError, match="'tinyImageNet' in .* missing: tiny-imagenet-200/wnids.txt"):
        load_dataset("tinyImageNet", "test", root)
    (root / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="'cifar10' in .* missing: cifar-10-batches-py/data_batch_3"):
        load_dataset("cifar10", "test", root)


def test_imagenets_own_parts(root):
    for wnid in ("n01440764", "n01443537"):
        for i in range(3):
            path = root / "ImageNet" / "train" / wnid / f"{wnid}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64)).save(path)
    (root / "ImageNet" / "test").mkdir()
    train, test = (load_dataset("ImageNet", split, root, test_fraction=0.2) for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 4)
    assert train.prompts == test.prompts == ("This is a photo of a tench", "This is a photo of a goldfish")


def test_what_counts_as_published(root, monkeypatch):
    monkeypatch.setitem(KNOWN, "dtd", replace(DATASETS["dtd"], images=4, classes=2))
    load = lambda **options: load_dataset("dtd", "test", root, **options).published
    assert load() and load(n=2) and load(preprocess="crop", prompt="A surface with a {} texture.")
    assert not load(preprocess="resize") and not load(prompt="{}") and not load_dataset("dtd", "train", root).published


def test_any_key_may_be_class_folders_instead(tmp_path):
    for name in ("AnnualCrop", "SeaLake"):
        (tmp_path / "EuroSAT" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (64, 64), (10 * i,) * 3).save(tmp_path / "EuroSAT" / name / f"{i}.png")
    data = load_dataset("EuroSAT", "test", tmp_path)
    assert len(data) == 10 and data.prompts[1] == "A centered satellite photo of a sea or a lake."
    train, test = (load_dataset("EuroSAT", split, tmp_path, test_fraction=0.2) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2)
    assert list_datasets(tmp_path) == ["EuroSAT"]
    other = load_dataset("EuroSAT", "test", tmp_path, prompt="Seen: {}", test_fraction=0.2)
    assert other.prompts[1] == "Seen: a sea or a lake" and fingerprint(other) != fingerprint(test)


def test_which_of_the_published_sets_are_there(root, tmp_path, capsys):
    assert list_datasets(root) == list(KNOWN)
    for wanted in ("published", None):  # further sets are measured where they are named only
        assert choose_datasets(wanted, root) == list(DATASETS)
        assert "named only: ImageNet-V2, ImageNet-R, ImageNet-A, ImageNet-Sketch" in capsys.readouterr().out
    assert choose_datasets(["ImageNet-R", "dtd"], root) == ["ImageNet-R", "dtd"]
    for key in ("dtd", "PCAM"):
        WRITERS[key](tmp_path)
    (tmp_path / "mine" / "class").mkdir(parents=True)
    (tmp_path / "flowers-102").mkdir()  # half unpacked
    assert choose_datasets("published", tmp_path) == ["dtd", "PCAM"]
    printed = capsys.readouterr().out
    assert "2 of 16 published sets are there; missing: tinyImageNet" in printed
    assert "'flowers102' in" in printed and "missing: flowers-102/imagelabels.mat" in printed
    (tmp_path / "flowers-102").rmdir()
    assert choose_datasets(None, tmp_path) == ["dtd", "PCAM"]
    assert "left out: image set 'mine' in" in capsys.readouterr().out
    assert choose_datasets(["mine"], tmp_path) == ["mine"]  # what is named is not left out
    with pytest.raises(ValueError, match="has no image set to use"):
        choose_datasets("published", tmp_path / "mine")
    assert "left out: image set 'class'" not in capsys.readouterr().out


def test_a_large_set_is_read_as_it_is_needed_with_the_same_outcome(root, monkeypatch):
    kept = load_dataset("SUN397", "test", root)
    monkeypatch.setattr(datasets, "KEEP_DECODED", 0)
    lazy = load_dataset("SUN397", "test", root)
    assert not isinstance(lazy.images, torch.Tensor) and isinstance(kept.images, torch.Tensor)
    for a, b in zip(kept.batches(4), lazy.batches(4), strict=True):
        assert a.number == b.number and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:]))
    chunks = [torch.tensor([i]) for i in (5, 0, 3, 2, 1, 4, 0, 1)]  # enough to read ahead
    for a, b in zip(kept.batches(chunks, skip=2), lazy.batches(chunks, skip=2), strict=True):
        assert a.number == b.number and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:]))
    pcam = load_dataset("PCAM", "test", root)
    kept_in = next((root / "pcam").glob("*test*_x.h5"))
    for change in (lambda: os.utime(kept_in, ns=(0, 2**62)), lambda: os.truncate(kept_in, kept_in.stat().st_size - 1)):
        before = data_key(load_dataset("PCAM", "test", root))
        change()
        assert data_key(load_dataset("PCAM", "test", root)) != before
    assert fingerprint(load_dataset("PCAM", "test", root)) != fingerprint(pcam)
    some = lazy.subset(3)
    assert some.labels.tolist() == [0, 1, 2] and some.available == 6 and len(decoded(some).images) == 3


@pytest.mark.parametrize("large", [False, True])
def test_damaged_images_stop_the_run_or_are_left_out(large, root, monkeypatch, capfd):
    monkeypatch.setattr(datasets, "KEEP_DECODED", 0 if large else 2**28)
    broken = root / "food-101" / "images" / "apple_pie" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    read = lambda **options: list(load_dataset("Food101", "test", root, **options).batches(2))
    with pytest.raises(ValueError, match=r"apple_pie/2\.jpg cannot be read.*leave_out goes on") as error:
        read()
    assert "\n" not in str(error.value)
    batches = read(on_bad_image="leave_out")
    assert sum(len(b.rows) for b in batches) == 3 and torch.cat([b.labels for b in batches]).tolist() == [0, 1, 1]
    assert "left out: image" in capfd.readouterr().err
    clip = load_clip("mini-clip", "mini", "cpu")
    for n in (None, 4):
        record = evaluate(clip, load_dataset("Food101", "test", root, n, on_bad_image="leave_out"), None, method="CLIP")
        assert (record.n, record.left_out, record.available) == (3, 1, 4)


def test_lists_that_are_missing_or_damaged_are_named(root):
    (root / "oxford-iiit-pet" / "annotations" / "test.txt").unlink()
    with pytest.raises(ValueError, match="'oxfordpet' in .* missing: oxford-iiit-pet/annotations/test.txt"):
        load_dataset("oxfordpet", "test", root)
    (root / "food-101" / "meta" / "test.json").write_text("{")
    with pytest.raises(ValueError, match="'Food101' in .* cannot be read: "):
        load_dataset("Food101", "test", root)
    (root / "dtd" / "dtd" / "images" / "banded" / "banded_1.jpg").unlink()
    with pytest.raises(ValueError, match="banded_1.jpg cannot be read: .*No such file"):
        load_dataset("dtd", "test", root)
    with pytest.raises(ValueError, match="'SUN397' in .* it has no part to train on"):
        load_dataset("SUN397", "train", root)


def test_the_command_lists_and_checks(root, capsys):
    assert main(["list", "--root", str(root)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" yes ") == 20 and "108754" in printed and "not among the 16, and measured" in printed
    assert main(["check", "--all", "--root", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "20 of 20 sets are readable; not there: none" in printed
    assert "dtd: usable, but not the published set: 4 images, 2 classes instead of 1,880 and 47" in printed
    assert "A surface with a polka dotted texture." in printed
    jpg = root / "dtd" / "dtd" / "images" / "banded" / "banded_1.jpg"
    jpg.write_bytes(b"")
    assert main(["check", "dtd", "cifar10", "--root", str(root)]) == 1
    out, err = capsys.readouterr()
    assert "1 of 2 sets are readable" in out and "banded_1.jpg cannot be read" in err and "check failed for dtd" in err
    assert main(["check", "mnist", "--root", str(root)]) == 2
    assert "set 'mnist' is unknown; there are: tinyImageNet" in capsys.readouterr().err


def test_the_command_checks_all_of_ones_own_folders(tmp_path, capsys):
    for name in ("ant", "bee"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (64, 64)).save(tmp_path / "mine" / name / f"{i}.png")
    assert main(["check", "--all", "--root", str(tmp_path)]) == 0
    assert "mine: 10 images, 2 classes" in (printed := capsys.readouterr().out) and "10 of 10 images decoded" in printed
    for i in range(5):  # whichever part it is in
        whole = (tmp_path / "mine" / "bee" / f"{i}.png").read_bytes()
        (tmp_path / "mine" / "bee" / f"{i}.png").write_bytes(b"broken")
        assert main(["check", "--all", "--root", str(tmp_path)]) == 1
        assert f"{i}.png cannot be read" in capsys.readouterr().err
        (tmp_path / "mine" / "bee" / f"{i}.png").write_bytes(whole)


def test_the_command_says_where_to_get_what_is_missing(tmp_path, capsys):
    assert main(["check", "--root", str(tmp_path)]) == 1
    assert main(["fetch", "ImageNet", "StanfordCars", "ImageNet-R", "--root", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "source: https://github.com/hendrycks/imagenet-r" in out and "unpack imagenet-r.tar" in out
    assert "ILSVRC2012_img_val.tar" in out and "cars_test_annos_withlabels.mat" in out
    assert "fetch failed for ImageNet, StanfordCars, ImageNet-R" in err


def test_a_further_set_may_lie_one_level_down_as_its_archive_has_it(tmp_path):
    WRITERS["ImageNet-Sketch"](tmp_path)
    (tmp_path / "ImageNet-Sketch").rename(tmp_path / "sketch")
    assert list_datasets(tmp_path) == ["sketch"]  # such a name says too little
    (tmp_path / "ImageNet-Sketch").mkdir()
    (tmp_path / "sketch").rename(tmp_path / "ImageNet-Sketch" / "sketch")
    assert list_datasets(tmp_path) == ["ImageNet-Sketch"]
    data = load_dataset("ImageNet-Sketch", "test", tmp_path)
    assert len(data) == 4 and data.prompts == tuple(EXPECTED["ImageNet-Sketch"][4])


@pytest.fixture
def server(root, monkeypatch):
    """DTD's archive on loopback, where torchvision is told to look; ``server.cut`` ends transfers half way."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(root / "dtd" / "dtd", "dtd")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(archive.getvalue())))
            self.end_headers()
            self.wfile.write(archive.getvalue()[: len(archive.getvalue()) // (2 if self.server.cut else 1)])

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as instance:
        instance.cut, instance.asked = False, 0
        threading.Thread(target=instance.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            torchvision.datasets.DTD, "_URL", f"http://127.0.0.1:{instance.server_port}/dtd-r1.0.1.tar.gz"
        )
        monkeypatch.setattr(torchvision.datasets.DTD, "_MD5", hashlib.md5(archive.getvalue()).hexdigest())
        yield instance
        instance.shutdown()


def test_fetching_ends_whole_or_not_at_all(server, tmp_path, capsys):
    server.cut = True
    assert main(["fetch", "ImageNet", "dtd", "--root", str(tmp_path)]) == 1  # neither stops the other
    out, _ = capsys.readouterr()
    assert "dtd: failed:" in out and "source: https://www.robots.ox.ac.uk/~vgg/data/dtd/" in out
    assert main(["check", "dtd", "--root", str(tmp_path)]) == 1
    server.cut = False
    assert main(["fetch", "dtd", "--root", str(tmp_path)]) == 0
    assert main(["check", "dtd", "--root", str(tmp_path)]) == 0
    assert not list((tmp_path / ".fetching").iterdir())
    asked = server.asked
    assert main(["fetch", "dtd", "--root", str(tmp_path)]) == 0 and server.asked == asked
    assert "there already" in capsys.readouterr().out


def test_a_killed_unpacking_is_done_again_from_the_archive(server, tmp_path):
    assert main(["fetch", "dtd", "--root", str(tmp_path / "other")]) == 0
    base = tmp_path / "sets" / ".fetching" / "dtd" / "dtd"
    (base / "dtd" / "images" / "banded").mkdir(parents=True)  # what a kill leaves: the archive and half its contents
    (base / "dtd" / "images" / "banded" / "banded_1.jpg").write_bytes(b"half")
    urllib.request.urlretrieve(torchvision.datasets.DTD._URL, base / "dtd-r1.0.1.tar.gz")
    asked = server.asked
    assert main(["fetch", "dtd", "--root", str(tmp_path / "sets")]) == 0
    assert server.asked == asked
    assert len(load_dataset("dtd", "test", tmp_path / "sets")) == 4


@pytest.fixture
def silence(monkeypatch):
    """All servers are silent."""
    monkeypatch.setattr(datasets_command, "_PATIENCE", 0.2)
    monkeypatch.setattr(urllib.request, "_opener", None)  # else it keeps the proxies of the worker's first download
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name in ("https_proxy", "http_proxy"):  # torchvision tries the one for what fails with the other
            monkeypatch.setenv(name, f"http://127.0.0.1:{silent.getsockname()[1]}")
        yield


@pytest.mark.parametrize("key", ["cifar10", "PCAM"])
def test_a_silent_server_is_not_waited_for(key, tmp_path, silence, capsys):
    assert main(["fetch", key, "--root", str(tmp_path)]) == 1
    assert re.search(r"failed: .*timed out.*\n +source: .*\n +by hand: ", capsys.readouterr().out)


def test_a_profile_says_what_it_fetches_and_stops_before_anything_where_it_cannot(tmp_path, silence, capsys):
    (tmp_path / "sets" / "STL-10" / "ship").mkdir(parents=True)  # a set of which something is there
    out = tmp_path / "out"
    given = {"data_root": tmp_path / "sets", "output": out, "device": "cpu"}
    assert runner.main(["quick", *(word for item in given.items() for word in ("-p", *map(str, item)))]) == 2
    said, error = capsys.readouterr()
    assert said.startswith("quick: ") and re.search(r"weights \(0.6 GB, .* 41 PFLOP: 35 minutes at", said)
    assert re.search(r"to download into .*: tinyImageNet 0.24 GB, cifar10 0.17 GB, cifar100 .*; 2.4 GB in all\n$", said)
    assert "STL10" not in said and not out.exists()
    by_hand = "source: http.*; by hand: in .*, unpack what is offered there; looked for: tiny-imagenet-200/.*"
    assert re.fullmatch(f"error: image set 'tinyImageNet' cannot be fetched: .*timed out.*; {by_hand}\n", error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would take")
def test_a_profile_for_a_gpu_does_not_spend_days_on_a_cpu(tmp_path, silence, capsys):
    """Unless it is told to; with several processes as with one."""
    for several in ([], ["-p", "processes", "2"]):
        assert runner.main(["quick", "-p", "data_root", str(tmp_path), *several]) == 2
        said, error = capsys.readouterr()
        assert error.startswith("error: device 'cuda' cannot be used: ") and error.endswith(
            "-p device cpu does without)\n"
        )
        assert not said and error.count("\n") == 1
    with pytest.raises(ValueError, match="device 'cuda' cannot be used: there is none that works"):
        load_clip("mini-clip", "mini", "cuda", waiting=True)


def test_a_bad_parameter_is_refused_before_anything_is_fetched(tmp_path, silence, capsys):
    given = ["-p", "data_root", str(tmp_path), "-p", "methods", "[TGA]"]
    assert runner.main(["quick", *given]) == 2
    said, error = capsys.readouterr()
    assert "method 'TGA' is unknown" in error and "to download" not in said


def test_what_is_not_there_is_fetched_once(server, tmp_path, capsys):
    for said in (f"to download into {tmp_path}: dtd 0.63 GB; 0.6 GB in all\ndtd: fetched\n", ""):
        datasets_command.fetch_missing(["dtd", "mine", "."], tmp_path)
        assert capsys.readouterr().out.endswith(said) and bool(said) == (server.asked > 0)
        server.asked = 0
    assert len(load_dataset("dtd", "test", tmp_path)) == 4
    datasets_command.fetch_missing(["shapes"], None)


def test_sample_photographs_come_with_a_library(tmp_path, monkeypatch):
    root = tmp_path / "samples"
    root.mkdir()
    datasets_command.fetch_missing(["."], root)  # somebody's own folder
    assert not list(tmp_path.rglob("*.*"))
    monkeypatch.setattr(datasets_command, "SAMPLES_ROOT", str(root))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "skimage", None)
        with pytest.raises(ValueError, match="'samples' cannot be fetched: scikit-image, .*: pip install scikit-image"):
            datasets_command.fetch_missing(["."], root)
    for _ in range(2):
        datasets_command.fetch_missing(["."], root)
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]
    train, test = (load_dataset(".", split, root, test_fraction=1) for split in ("train", "test"))
    assert len(test) == 8 and list(test.class_names) == list(datasets_command.SAMPLES)
    assert torch.equal(train.images, test.images) and test.masks is None and not test.left_out


DAMAGE = {
    "title: Textures": ("", r"sets.yaml: dtd.title = .*: Field required"),
    "images: 3": ("images: many", r"sets.yaml: dtd.images = 'many': .*integer"),
    "classes: 2": ("classes: 2\n  colour: red", r"sets.yaml: dtd.colour = 'red': "),
    "prompt: 'A {}'": ("prompt: A photo", r"sets.yaml: dtd.prompt = 'A photo': "),
    "'^7': B": ("'(': B", r"sets.yaml: dtd.name_edits.*: .*regular expression"),
    "split: test": ("split: [test", r"sets.yaml is not YAML: "),
}


@pytest.mark.parametrize("good", DAMAGE)
def test_a_damaged_entry_is_refused_in_one_line(good, tmp_path):
    entry = "dtd:\n  title: Textures\n  split: test\n  images: 3\n  classes: 2\n  needs: [a/b]\n  prompt: 'A {}'\n"
    entry += "  name_edits: {'^7': B}\n  gigabytes: 1\n  source: a\n  licence: b\n"
    path = tmp_path / "sets.yaml"
    path.write_text(entry)
    assert read_specs(path)["dtd"].class_name("7_x") == "b x"
    bad, message = DAMAGE[good]
    path.write_text(entry.replace(good, bad))
    with pytest.raises(ValueError, match=message) as error:
        read_specs(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [key for key, spec in DATASETS.items() if spec.torchvision and not spec.folders])
def test_torchvisions_classes_keep_their_lists_where_we_read_them(key, root):
    """And each label there is that of the image which the class itself gives for the index."""
    spec = DATASETS[key]
    data = torchvision_sets.reader(spec.torchvision, root, tuple(spec.test.items()))
    for name in filter(None, torchvision_sets.ATTRIBUTES[spec.torchvision]):
        assert hasattr(data, name), f"torchvision {torchvision.__version__}: {type(data).__name__} has no {name}"
    lists = torchvision_sets.read_lists(spec.torchvision, root, spec.test)
    assert lists.labels == [data[i][1] for i in range(len(data))]
    assert lists.files is None or [Image.open(file).size for file in lists.files] == [image.size for image, _ in data]


def test_a_torchvision_that_keeps_its_lists_elsewhere_is_named(root, monkeypatch):
    moved = torchvision_sets.Attributes("_labels", files="_pictures")
    monkeypatch.setitem(torchvision_sets.ATTRIBUTES, "DTD", moved)
    with pytest.raises(ValueError, match=r"'dtd' in .* torchvision \S+'s DTD has no '_pictures'"):
        load_dataset("dtd", "test", root)


@pytest.mark.parametrize("key", ["cifar10", "PCAM", "dtd"])
def test_threads_read_what_one_at_a_time_reads(key, root):
    data = load_dataset(key, "test", root, decode=False)
    alone = [data.images._decode(row, False).image for row in range(4)]
    for rows, images in data.images.read([torch.arange(4).repeat(8)] * 12):
        assert rows.tolist() == [0, 1, 2, 3] * 8 and torch.equal(images, torch.stack(alone * 8))
