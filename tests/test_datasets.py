import errno
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tgazsr_utils.datasets import files
from tgazsr_utils.datasets import loading as datasets
from tgazsr_utils.datasets.files import KeptAtFileSize, fit, resident
from tgazsr_utils.datasets.layouts import list_datasets
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.datasets.published_sets import clean_name
from tgazsr_utils.runtime.fingerprints import data_key, fingerprint


def test_class_folders_are_found_named_and_split(photo_root):
    assert list_datasets(photo_root) == ["animals", "tiny"]
    train, test = (load_dataset("animals", split, photo_root) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 4)
    assert train.class_names == test.class_names == ("green x", "red fox")
    assert train.prompts == ("This is a photo of a green x", "This is a photo of a red fox")
    assert test.labels.tolist() == [0, 0, 1, 1] and test.masks is None and test.world == "photographs"
    assert test.images[3].float().mean((1, 2)).tolist() == [200, 30, 30]


def test_the_split_is_seeded_and_disjoint(photo_root):
    for i in range(10):  # tell the images of one class apart
        folder = photo_root / "animals" / "images" / "017.red_Fox"
        Image.new("RGB", (60, 60), (20 * i, 0, 0)).save(folder / f"{i}.png")
    reds = lambda split, seed: (
        set(load_dataset("animals", split, photo_root, seed=seed).images[:, 0, 0, 0].tolist()) - {20}
    )
    assert not reds("train", 0) & reds("test", 0)
    assert reds("test", 0) == reds("test", 0)
    assert len({frozenset(reds("test", seed)) for seed in range(5)}) > 1


def test_a_fraction_of_one_is_all_in_both_parts(photo_root):
    (photo_root / "animals" / "images" / "single").mkdir()
    Image.new("RGB", (60, 60)).save(photo_root / "animals" / "images" / "single" / "one.png")
    for split in ("train", "test"):
        assert load_dataset("animals", split, photo_root, test_fraction=1).labels.bincount().tolist() == [10, 10, 1]


def test_tiny_imagenets_published_layout(photo_root):
    train, test = (load_dataset("tiny", split, photo_root) for split in ("train", "test"))
    assert train.class_names == ("goldfish", "pop bottle")  # by wnid; n03 has no images
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    assert abs(int(test.images[0, 0, 0, 0]) - 60) < 3 and abs(int(test.images[3, 0, 0, 0]) - 180) < 3


def test_boxes_go_through_the_same_crop_as_images(photo_root):
    train, test = (load_dataset("tiny", split, photo_root) for split in ("train", "test"))
    assert test.mask_kind == "box"
    # 64 -> resize 64 -> centre crop 56 takes 4 pixels off each side
    box = torch.zeros(56, 56, dtype=torch.bool)
    box[12:44, 4:36] = True  # 8..39 x 16..47 before
    assert torch.equal(train.masks[0], box)
    left = torch.zeros(56, 56, dtype=torch.bool)
    left[:, :28] = True
    assert torch.equal(test.masks[0], left)


def test_preprocessing_is_pils_bilinear_resize_and_centre_crop(photo_root):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (90, 140, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (photo_root / "one" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(photo_root / "one" / name / "image.png")
    loaded, _ = load_dataset("one", "train", photo_root).images
    resized = Image.fromarray(pixels).resize((int(64 * 140 / 90), 64), Image.Resampling.BILINEAR)
    left = round((resized.width - 56) / 2)
    expected = np.asarray(resized.crop((left, 4, left + 56, 60)))
    np.testing.assert_array_equal(loaded.permute(1, 2, 0).numpy(), expected)
    squashed, _ = load_dataset("one", "train", photo_root, preprocess="resize").images
    expected = np.asarray(Image.fromarray(pixels).resize((56, 56), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(squashed.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    "name, cleaned",
    [
        ("red_Fox", "red fox"),
        ("n02085620-Chihuahua", "chihuahua"),
        ("art/deco-x", "art deco x"),
        ("707-320", "707 320"),
        ("24_hours", "24 hours"),
    ],
)
def test_names_are_cleaned(name, cleaned):
    assert clean_name(name) == cleaned


def test_folders_that_come_with_a_split_keep_it(tmp_path):
    for part, grey in (("train", 10), ("test", 200)):
        for name in ("a", "b"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            Image.new("RGB", (60, 60), (grey,) * 3).save(tmp_path / "set" / part / name / "1.png")
    (tmp_path / "set" / "train" / "empty").mkdir()
    train, test = (load_dataset("set", split, tmp_path) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "b")
    assert set(train.images.flatten().tolist()) == {10} and set(test.images.flatten().tolist()) == {200}


def test_bad_input_is_named(photo_root):
    with pytest.raises(ValueError, match="'triangles' is unknown; there are: shapes, letters"):
        load_dataset("triangles", "test")
    with pytest.raises(ValueError, match="'nowhere' is not a folder"):
        load_dataset("animals", "test", "nowhere")
    with pytest.raises(ValueError, match="'plants' in .* not there; there are: animals, tiny"):
        load_dataset("plants", "test", photo_root)
    broken = photo_root / "animals" / "images" / "017.red_Fox" / "3.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"3\.png cannot be read") as error:
        load_dataset("animals", "train", photo_root)
        load_dataset("animals", "test", photo_root)
    assert "\n" not in str(error.value)


def test_a_subset_is_seeded_and_even_over_classes(shapes):
    subset = shapes.subset(25, seed=1)
    counts = subset.labels.bincount(minlength=10)
    assert len(subset) == 25 and counts.min() == 2 and counts.max() == 3
    assert fingerprint(subset) == fingerprint(shapes.subset(25, seed=1)) != fingerprint(shapes.subset(25, seed=2))
    assert len(subset.masks) == 25 and len(shapes.subset(None)) == len(shapes)


def photographs(folder, sizes):
    """Class folders with noisy images of these (width, height), two classes."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "test").mkdir(exist_ok=True)
        for i, (width, height) in enumerate(sizes):
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / name / f"{i}.png")


@pytest.mark.parametrize("preprocess", ["resize", "crop"])
@pytest.mark.parametrize("size", [(32, 32), (40, 64)])
def test_images_kept_at_their_own_size_are_fitted_as_by_pil_within_one_grey_level(
    tmp_path, monkeypatch, preprocess, size
):
    photographs(tmp_path / "pets", [size] * 5)
    (tmp_path / "pets" / "test").rmdir()
    options = {"image_size": 56, "preprocess": preprocess, "test_fraction": 0.2, "decode": False}
    read = load_dataset("pets", "train", tmp_path, **options)
    kept = resident(read, torch.device("cpu"))
    assert isinstance(kept.images, KeptAtFileSize) and tuple(kept.images.images.shape[1:]) == (3, size[1], size[0])
    rows = [torch.tensor([5, 0]), torch.tensor([7])]
    for ours, pil in zip(kept.batches(rows), read.batches(rows)):
        assert torch.equal(ours.rows, pil.rows) and torch.equal(ours.labels, pil.labels)
        assert ours.images.shape == pil.images.shape == (len(ours.rows), 3, 56, 56)
        assert 255 * (ours.images - pil.images).abs().max() <= 1.001
        fitted = (
            fit(kept.images.images[ours.rows].float(), 56, preprocess).round() / 255
        )  # as CUDA computes, which has no uint8 resizing
        assert 255 * (fitted - pil.images).abs().max() <= 1.001


def test_what_is_not_kept_in_memory(tmp_path, monkeypatch, photo_root):
    cpu, options = torch.device("cpu"), {"image_size": 56, "decode": False}
    mixed = load_dataset("animals", "train", photo_root, **options)  # of many sizes
    assert resident(mixed, cpu) is mixed
    large = load_dataset("tiny", "train", photo_root, **options)  # 64 pixels to 56: no smaller than fitted
    assert resident(large, cpu) is large
    small = load_dataset("tiny", "train", photo_root, **options | {"image_size": 112})
    assert resident(small, cpu).images.images.shape == (6, 3, 64, 64)
    monkeypatch.setattr(files, "KEEP_RESIDENT", 6 * 3 * 64 * 64 - 1)
    assert resident(small, cpu) is small
    (broken,) = photo_root.glob("tiny/train/n02/images/n02_1.JPEG")
    monkeypatch.undo()
    broken.write_bytes(broken.read_bytes()[:200])
    leaving_out = load_dataset(
        "tiny", "train", photo_root, **options | {"image_size": 112, "on_bad_image": "leave_out"}
    )
    assert resident(leaving_out, cpu) is leaving_out  # batches are without the image, as they are elsewhere
    with pytest.raises(ValueError, match="n02_1.JPEG cannot be read"):
        resident(load_dataset("tiny", "train", photo_root, **options | {"image_size": 112}), cpu)


def decoders():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("end", ["all", "early", "error", "interrupt"])
def test_no_thread_outlives_reading(photo_root, end):
    data = load_dataset("animals", "train", photo_root, decode=False)
    try:
        for _ in data.batches(2):
            assert decoders()
            if end == "early":
                break
            if end != "all":
                raise KeyboardInterrupt if end == "interrupt" else RuntimeError
    except (KeyboardInterrupt, RuntimeError):
        pass
    assert not decoders()


def test_no_more_than_a_few_chunks_are_read_ahead(photo_root, monkeypatch):
    data = load_dataset("animals", "train", photo_root, decode=False)
    asked, submit = [], files.ThreadPoolExecutor.submit
    monkeypatch.setattr(files.ThreadPoolExecutor, "submit", lambda *a: asked.append(a[2]) or submit(*a))
    batches = data.batches(2)
    next(batches)
    assert len(asked) == 2 * (1 + files.CHUNKS_AHEAD) < len(data)
    batches.close()
    assert not decoders()


def test_images_are_read_without_other_processes_or_shared_memory(photo_root):
    """A container may have next to no /dev/shm, and a notebook's cells cannot be imported by a process of their own."""
    code = f"""
import sys, tgazsr_utils, torch
import multiprocessing.context, _posixshmem, _multiprocessing
def refuse(*arguments, **options): raise AssertionError("another process, or shared memory")
multiprocessing.context.BaseContext.Process = multiprocessing.process.BaseProcess.start = refuse
_posixshmem.shm_open = torch.Tensor.share_memory_ = torch.UntypedStorage._new_shared = refuse
from tgazsr_utils.datasets.loading import load_dataset
data = load_dataset("animals", "train", {str(photo_root)!r}, decode=False)
assert sum(len(batch.rows) for batch in data.batches([torch.arange(16)] * 64)) == 16 * 64
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in Path(datasets.__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "multiprocessing" not in source and "DataLoader" not in source, path


@pytest.fixture
def large(photo_root, tmp_path, monkeypatch):
    """Loads what is too large to be kept in memory."""
    monkeypatch.setattr(datasets, "KEEP_DECODED", 0)
    keep = tmp_path / "store" / "decoded"
    return lambda **options: load_dataset("animals", "test", photo_root, **{"keep": keep} | options), keep


def test_a_large_set_is_decoded_once_for_all_that_read_it(large, monkeypatch, capfd):
    load, keep = large
    plain, calls, inner = load(keep=None), [], files.Files._decode
    expected = list(plain.batches(3))
    monkeypatch.setattr(files.Files, "_decode", lambda self, *a: calls.append(a[0]) or inner(self, *a))
    data = load()
    assert re.search(
        rf"animals: as they are first read, {len(data)} images .* decoded in {keep} \(0.0 GB\)", capfd.readouterr().out
    )
    assert fingerprint(data) == fingerprint(plain) and not keep.exists()
    for again in (lambda: data, lambda: data, load):  # the last as another notebook has it
        for one, other in zip(expected, again().batches(3), strict=True):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other))
    assert sorted(calls) == list(range(len(data))) and len(list(keep.glob("*.uint8"))) == 1
    assert "kept decoded" not in capfd.readouterr().out
    assert len(list(data.subset(2).batches(2))) == 1 and len(list(load(preprocess="resize").batches(3))) == len(
        expected
    )
    assert len(list(keep.glob("*.uint8"))) == 2  # other pixels, another file
    for path in keep.iterdir():
        path.unlink()
    assert len(list(load().batches(3))) == len(expected)


def test_a_file_that_changes_under_its_name_and_size_is_decoded_anew(large):
    load, _ = large
    reader = load().images.files
    path = Path(reader.source.where[int(reader.chosen[0])])
    pad = lambda: path.write_bytes(path.read_bytes().ljust(50_000, b"\0"))  # bytes that no decoder reads
    pad()
    first = next(load().batches(1)).images
    Image.fromarray(255 - np.asarray(Image.open(path).convert("RGB"))).save(path)
    pad()
    assert path.stat().st_size == 50_000 and not torch.equal(next(load().batches(1)).images, first)


def test_a_record_of_a_large_set_is_of_its_files_as_they_are(large):
    load, _ = large
    first = load()
    path = Path(first.images.files.source.where[int(first.images.files.chosen[0])])
    assert data_key(load()) == data_key(first) and data_key(load(keep=None)) == data_key(first)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert data_key(load()) != data_key(first) and data_key(load(keep=None)) != data_key(first)
    assert fingerprint(load()) == fingerprint(first)  # which is compared between machines


def test_first_images_do_not_wait_for_others_and_what_is_decoded_stays(large, monkeypatch):
    (load, keep), whole = large, {"test_fraction": 1}
    expected, calls, inner = list(load(keep=None, **whole).batches(1)), [], files.Files._decode
    monkeypatch.setattr(files, "CHUNKS_AHEAD", 0)
    monkeypatch.setattr(files.Files, "_decode", lambda self, *a: calls.append(a[0]) or inner(self, *a))
    pieces = load(**whole).batches(1)
    for _ in range(2):
        next(pieces)
    pieces.close()  # as Ctrl-C does
    assert len(calls) <= 3 < len(expected)
    part = list(load(**whole).batches([torch.tensor([4, 1])]))  # one is there, the other is not
    assert torch.equal(part[0].images, torch.cat([expected[4].images, expected[1].images]))
    again = list(load(**whole).batches(1))
    assert all(torch.equal(one.images, other.images) for one, other in zip(expected, again, strict=True))
    assert len(calls) <= len(expected) + 3
    (path,) = keep.iterdir()
    with open(path, "r+b") as file:  # as after a power cut: images that were not said to be there
        file.write(bytes(path.stat().st_size))
    assert all(
        torch.equal(one.images, other.images) for one, other in zip(expected, load(**whole).batches(1), strict=True)
    )


def test_what_the_system_writes_in_part_is_written_to_its_end(large, monkeypatch):
    class Short(io.FileIO):
        def write(self, data):
            data = memoryview(data).cast("B")
            return super().write(data[: max(1, len(data) // 2)])

    def opened(path, mode, buffering=-1):
        if mode != "r+b":
            return open(path, mode)
        return Short(path, mode) if buffering == 0 else io.BufferedRandom(Short(path, mode))

    monkeypatch.setattr(files, "open", opened, raising=False)
    load, keep = large
    expected = list(load(keep=None).batches(3))
    for _ in range(2):  # as decoded, and as kept
        kept = list(load().batches(3))
        assert all(torch.equal(one.images, other.images) for one, other in zip(expected, kept, strict=True))
    (path,) = keep.iterdir()
    assert path.read_bytes()[-len(load()) :] == len(load()) * b"\1"


@pytest.mark.parametrize("why", ["no room", "unreadable", "full disk", "deleted", "no folder"])
def test_what_cannot_be_kept_decoded_is_read_as_it_is_needed(why, large, monkeypatch, capfd):
    load, keep = large
    left = len(load(keep=None))
    if why == "no room":
        monkeypatch.setattr(files, "FREE", 2**62)
    elif why == "unreadable":
        reader = load().images.files
        Path(reader.source.where[int(reader.chosen[0])]).write_bytes(b"not an image")
        left -= 1
    elif why == "full disk":

        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", full)
    elif why == "no folder":
        keep.parent.mkdir(parents=True)
        keep.write_text("a file")
    data = load(on_bad_image="leave_out")
    for _ in range(2):
        found = 0
        for batch in data.batches(3):
            found += len(batch.rows)
            if why == "deleted":
                shutil.rmtree(keep, ignore_errors=True)
        assert found == left
    said = [line for line in capfd.readouterr().err.splitlines() if "cannot be kept in " in line]
    reason = {"no room": " GB are free", "full disk": "No space left", "deleted": "No such file", "no folder": "exists"}
    assert len(said) == (0 if why == "unreadable" else 2) and all(reason[why] in line for line in said)
