"""Image sets as people have them on disk: archives one level off, damaged copies, links, names of any kind.

What ``list`` says and what loading does must agree, and each line must be true.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from miniatures import WRITERS, folders, jpeg, without_checksums
from PIL import Image
from test_reading import put, put_classes

from tgazsr_utils.datasets import torchvision_sets
from tgazsr_utils.datasets.__main__ import fetch_set, list_sets, main
from tgazsr_utils.datasets.layouts import existing_root, list_datasets
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.datasets.published_sets import FURTHER, KNOWN

BY_NAME = ("tinyImageNet", "ImageNet", *FURTHER)  # of any other name they are sets of one's own


@pytest.fixture(autouse=True)
def any_contents(monkeypatch):
    without_checksums(monkeypatch.setattr)
    torchvision_sets.reader.cache_clear()


def move(root, name, *to):
    """Moves the folder ``name`` in ``root``, perhaps to below itself; to ``root``: what it holds."""
    aside, to = (root / name).rename(root / "aside"), root.joinpath(*to)
    if to == root:
        for path in aside.iterdir():
            path.rename(root / path.name)
        aside.rmdir()
    else:
        to.parent.mkdir(exist_ok=True)
        aside.rename(to)
    return root


MOVES = {
    "inside itself": lambda root, name: move(root, name, name, name),
    "in a wrapper": lambda root, name: move(root, name, "all", name),
    "in a wrapper beside others": lambda root, name: move(put(root / "x" / "a.png") or root, name, "all", name),
    "without its folder": lambda root, name: move(root, name),
    "its folder as the root": lambda root, name: root / name,
    "in another writing": lambda root, name: move(root, name, name.upper().replace("-", "_")),
}


@pytest.mark.parametrize("how", MOVES)
@pytest.mark.parametrize("key", WRITERS)
def test_a_set_one_level_off_is_read_as_in_its_published_place(key, how, tmp_path):
    WRITERS[key](tmp_path)
    published = load_dataset(key, "test", tmp_path)
    root = MOVES[how](tmp_path, KNOWN[key].folder)
    torchvision_sets.reader.cache_clear()
    sets, problems = list_sets(existing_root(root), [key])
    if key in BY_NAME and how == "without its folder":
        assert sets.there[key] == "no" and key not in list_datasets(root)
        with pytest.raises(ValueError, match="not there"):
            load_dataset(key, "test", root)
        return
    data = load_dataset(key, "test", root)
    assert sets.there[key] == "yes" and not problems
    assert torch.equal(data.labels, published.labels) and torch.equal(data.images, published.images)
    assert data.prompts == published.prompts
    assert key in list_datasets(root) and not {"all", "aside", "images", "val"} & {*list_datasets(root)}
    assert fetch_set(key, existing_root(root)) == "there already"


def said(root, capsys, *action):
    """(exit status, what was printed) of the command, without a traceback."""
    status = main([*action, "--root", str(root)])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out + err


@pytest.mark.parametrize(
    "key", ["Food101", "dtd", "PCAM", "SUN397", "StanfordCars", "tinyImageNet", "cifar10", "STL10"]
)
def test_half_a_set_is_incomplete_whatever_its_folder_is_called(key, tmp_path, capsys):
    """And never read as class folders."""
    WRITERS[key](tmp_path)
    spec = KNOWN[key]
    lost = move(tmp_path, spec.folder, spec.folder.upper()) / spec.needs[0].replace(spec.folder, spec.folder.upper(), 1)
    lost.unlink()
    status, printed = said(tmp_path, capsys, "list", key)
    assert " incomplete " in printed and f"missing: {lost.relative_to(tmp_path)}" in printed
    status, printed = said(tmp_path, capsys, "check")
    assert status == 1 and f"missing: {lost.relative_to(tmp_path)}" in printed and "0 of 1 sets" in printed


@pytest.mark.parametrize("folder", ["CIFAR10", "CIFAR-10", "cifar-10", "Cifar_10", "cifar-10-batches-py"])
def test_class_folders_of_a_published_set_under_any_writing_of_its_name(folder, tmp_path):
    put_classes(tmp_path / folder, ["airplane", "bird"])
    assert list_datasets(tmp_path) == ["cifar10"] and len(load_dataset("cifar10", "test", tmp_path)) == 6


def test_folders_differing_in_case_are_both_read(tmp_path):
    WRITERS["dtd"](tmp_path)
    put_classes(tmp_path / "DTD", ["a", "b"])
    assert list_datasets(tmp_path) == ["dtd", "DTD"]
    assert [len(load_dataset(key, "test", tmp_path)) for key in ("dtd", "DTD")] == [4, 2]


@pytest.mark.parametrize("folder", ["EuroSAT_RGB", "2750", "eurosat/EuroSAT_RGB", "ILSVRC2012_img_val", "imagenet/val"])
def test_folders_that_archives_unpack_to(folder, tmp_path):
    key = "ImageNet" if "val" in folder else "EuroSAT"
    folders(tmp_path / folder, ["n01440764", "n01443537"] if key == "ImageNet" else ["AnnualCrop", "SeaLake"])
    assert list_datasets(tmp_path) == [key] and len(load_dataset(key, "test", tmp_path)) == 4


def test_images_a_level_too_deep_are_named_at_once(tmp_path, capsys):
    WRITERS["StanfordCars"](tmp_path)
    move(tmp_path / "stanford_cars", "cars_test", "cars_test", "cars_test")
    for action in ("list", "check"):
        printed = said(tmp_path, capsys, action, "StanfordCars")[1]
        assert "none of the 4 images of its lists is there, such as" in printed and "cars_test/00000.jpg" in printed
    move(tmp_path / "stanford_cars", "cars_test/cars_test", "cars_test_").joinpath("cars_test").rmdir()
    (tmp_path / "stanford_cars" / "cars_test_").rename(tmp_path / "stanford_cars" / "cars_test")
    (tmp_path / "stanford_cars" / "cars_test" / "00003.jpg").unlink()
    printed = said(tmp_path, capsys, "list", "StanfordCars")[1]
    assert " incomplete " in printed and "lacks 1 images, such as" in printed
    assert said(tmp_path, capsys, "check")[0] == 1


def test_sets_of_ones_own_one_level_too_deep_are_named_as_what_they_may_be(tmp_path, capsys):
    for name in ("cats", "dogs"):
        put_classes(tmp_path / "mine" / name, ["young", "old"])
    hint = f"cats, dogs are image sets: give data_root {tmp_path / 'mine'}"
    assert hint in "".join(said(tmp_path, capsys, "check", "mine")[1:])
    put(tmp_path / "mine" / "cats" / "a.png")  # an image of its own: a class
    assert "give data_root" not in "".join(said(tmp_path, capsys, "check", "mine")[1:])


def test_imagenets_images_without_folders_are_refused_in_a_line_that_says_so(tmp_path, capsys):
    for i in range(3):
        jpeg(tmp_path / "ImageNet" / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", 0)
    assert "3 images or links to nothing lie in no class folder" in said(tmp_path, capsys, "check")[1]


def test_links_in_a_circle_and_pipes_are_passed_over_and_links_to_nothing_are_named(tmp_path):
    """In a process of its own, which a circle or a pipe would not let end."""
    put_classes(tmp_path / "mine", ["cat", "dog"])
    put(tmp_path / "elsewhere.x" / "x.png")
    for name, other in (("cat", "dog"), ("dog", "cat")):
        (tmp_path / "mine" / name / "in").mkdir()
        (tmp_path / "mine" / name / "in" / other).symlink_to(f"../../{other}/in")
    (tmp_path / "mine" / "cat" / "up").symlink_to("..")
    (tmp_path / "mine" / "self").symlink_to(".")
    (tmp_path / "back").symlink_to(tmp_path)
    (tmp_path / "mine" / "dog" / "more").symlink_to(tmp_path / "elsewhere.x")
    (tmp_path / "mine" / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "mine" / "dog" / "pipe.png")
    check = [sys.executable, "-m", "tgazsr_utils.datasets", "check", "--all", "mine", "--root", tmp_path]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0 and "mine: 7 images, 2 classes" in done.stdout
    assert "1 images or links to nothing lie in no class folder, such as gone" in done.stderr
    assert "dog/pipe.png" in done.stderr and "back" not in list_datasets(tmp_path)
    for name in ("x.png", "loop.png"):
        (tmp_path / "mine" / "cat" / name).symlink_to(name.replace("x", "y"))
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 1 and "7 of 9 images decoded" in done.stdout
    assert "x.png cannot be read: [Errno 2] No such file" in done.stderr and "loop.png cannot be read:" in done.stderr


def test_names_that_are_no_utf8(tmp_path, capsys):
    base = os.fsencode(tmp_path) + b"/m\xfcll"
    for name in (b"caf\xe9", b"dog"):
        put_classes(tmp_path / os.fsdecode(base), [os.fsdecode(name)])
    with open(base + b"/dog/na\xefve.png", "wb"):
        pass
    (key,) = list_datasets(tmp_path)
    status, printed = said(tmp_path, capsys, "check", "--all")
    assert status == 1 and "This is a photo of a café" in printed and "naïve.png cannot be read" in printed
    assert load_dataset(key, "train", tmp_path, on_bad_image="leave_out").class_names == ("café", "dog")


def test_every_damaged_image_is_counted_and_every_odd_one_read(tmp_path, capsys):
    put_classes(tmp_path / "mine", ["cat", "dog"])
    whole = (tmp_path / "mine" / "cat" / "0.png").read_bytes()
    bad = {
        "half.png": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html>",
        "nothing.ppm": b"P6 0 0 255\n",
        "huge.pgm": b"P5 99999 99999 255\n",
        "header.webp": b"RIFF\0\0\0\0WEBP",
        "zeros.bmp": b"BM" + bytes(99),
    }
    for name, content in bad.items():
        (tmp_path / "mine" / "cat" / name).write_bytes(content)
    put(tmp_path / "mine" / "cat" / "cmyk.jpg", Image.new("CMYK", (64, 64)))
    put(tmp_path / "mine" / "cat" / "deep.png", Image.fromarray(np.zeros((64, 64), np.uint16)))
    put(tmp_path / "mine" / "cat" / "dot.png", Image.new("1", (1, 1)))
    status, printed = said(tmp_path, capsys, "check", "--all")
    assert status == 1 and "9 of 16 images decoded" in printed
    assert all(f"{name} cannot be read" in printed for name in bad)


def test_check_reads_the_part_to_tune_on_too(tmp_path, capsys):
    WRITERS["tinyImageNet"](tmp_path)
    train = tmp_path / "tiny-imagenet-200" / "train" / "n01443537"
    status, printed = said(tmp_path, capsys, "check", "--all")
    assert status == 0 and "and 8 images to tune on" in printed and "12 of 12 images decoded" in printed
    image = train / "images" / "n01443537_3.JPEG"
    image.write_bytes(image.read_bytes()[:300])
    status, printed = said(tmp_path, capsys, "check", "--all")
    assert status == 1 and "11 of 12 images decoded" in printed
    (train / "n01443537_boxes.txt").write_text("")
    status, printed = said(tmp_path, capsys, "list", "tinyImageNet")
    assert " incomplete " in printed and said(tmp_path, capsys, "check")[0] == 1


def test_a_lost_class_of_tiny_imagenet_is_named(tmp_path, capsys):
    WRITERS["tinyImageNet"](tmp_path)
    base = tmp_path / "tiny-imagenet-200"
    with (base / "wnids.txt").open("a") as file:
        file.write("n09999999\n")
    assert "1 classes of wnids.txt have no folder in train, such as n09999999" in said(tmp_path, capsys, "check")[1]
