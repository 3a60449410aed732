"""Miniatures of the published on-disk layouts of the 16 sets and further ones, for tests: a few classes, two images
each.

An image's colour tells its class: red is 40 + 50 times the label (modulo 200). Blue grows from left to right, so that a
crop differs from a squeeze. Parts to tune on are smaller than parts to test on.
"""

import json
import pickle
import sys
from pathlib import Path

import h5py
import numpy as np
import torchvision.datasets as tv
from PIL import Image
from scipy.io import savemat

SIDE = 72


def red(label: int) -> int:
    return 40 + 50 * (label % 4)


def pixels(label: int, side: int = SIDE) -> np.ndarray:
    image = np.zeros((side, side, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = red(label), 90, np.linspace(0, 250, side)
    return image


def jpeg(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label)).resize((SIDE + 20, SIDE)).save(path, quality=95)


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def folders(base: Path, names: list[str], pattern: str = "image_{:04d}.jpg") -> None:
    for label, name in enumerate(names):
        for i in (1, 2):
            jpeg(base / name / pattern.format(i), label)


def tiny_imagenet(root: Path) -> None:
    base, wnids = root / "tiny-imagenet-200", ["n01443537", "n02056570"]
    text(base / "wnids.txt", *reversed(wnids))
    text(
        base / "words.txt", "n01443537\tgoldfish, Carassius auratus", "n02056570\tking penguin, Aptenodytes patagonica"
    )
    for label, wnid in enumerate(wnids):
        for i in range(4):
            jpeg(base / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", label)
        text(base / "train" / wnid / f"{wnid}_boxes.txt", *(f"{wnid}_{i}.JPEG\t8\t8\t40\t40" for i in range(4)))
    for i, label in enumerate((1, 0, 1, 0)):
        jpeg(base / "val" / "images" / f"val_{i}.JPEG", label)
    text(base / "val" / "val_annotations.txt", *(f"val_{i}.JPEG\t{wnids[1 - i % 2]}\t0\t0\t63\t63" for i in range(4)))


def cifar(base: Path, label_key: str, names_key: str, names: list[str], files: list[str], meta: str) -> None:
    base.mkdir(parents=True)
    labels = [1, 0, 1, 0]
    data = np.stack([pixels(label, 32).transpose(2, 0, 1).reshape(-1) for label in labels])
    for name in files:
        rows = slice(None) if name.startswith("test") else [0, 2]
        (base / name).write_bytes(pickle.dumps({"data": data[rows], label_key: np.array(labels)[rows].tolist()}))
    (base / meta).write_bytes(pickle.dumps({names_key: names}))


def cifar10(root: Path) -> None:
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    cifar(
        root / "cifar-10-batches-py",
        "labels",
        "label_names",
        ["airplane", "automobile"],
        [*batches, "test_batch"],
        "batches.meta",
    )


def cifar100(root: Path) -> None:
    cifar(
        root / "cifar-100-python",
        "fine_labels",
        "fine_label_names",
        ["apple", "aquarium_fish"],
        ["train", "test"],
        "meta",
    )


def stl10(root: Path) -> None:
    base = root / "stl10_binary"
    base.mkdir()
    images = np.stack([pixels(label, 96).transpose(2, 1, 0) for label in (1, 0, 1, 0)])  # column by column
    for name, rows, labels in (("train", [0, 2], [2, 2]), ("test", slice(None), [2, 1, 2, 1])):  # labels from 1
        (base / f"{name}_X.bin").write_bytes(images[rows].tobytes())
        (base / f"{name}_y.bin").write_bytes(bytes(labels))
    (base / "unlabeled_X.bin").write_bytes(images[:1].tobytes())
    text(base / "class_names.txt", "airplane", "bird")


def sun397(root: Path) -> None:
    names = ["/a/abbey", "/a/apartment_building/outdoor", "/b/bank_vault"]
    text(root / "SUN397" / "ClassName.txt", *names)
    for label, name in enumerate(names):
        for i in (1, 2):
            jpeg(root / "SUN397" / name[1:] / f"sun_{label}{i}.jpg", label)


def food101(root: Path) -> None:
    names = ["apple_pie", "baby_back_ribs"]
    folders(root / "food-101" / "images", names, "{}.jpg")
    for split in ("train", "test"):
        path = root / "food-101" / "meta" / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        chosen = names if split == "test" else names[1:]
        path.write_text(json.dumps({name: [f"{name}/1", f"{name}/2"] if name in chosen else [] for name in names}))


def pets(root: Path) -> None:
    base, names = root / "oxford-iiit-pet", ["Abyssinian", "american_bulldog"]
    lines = [f"{name}_{i} {label + 1} {label + 1} 1" for label, name in enumerate(names) for i in (1, 2)]
    for label, name in enumerate(names):
        for i in (1, 2):
            jpeg(base / "images" / f"{name}_{i}.jpg", label)
    for split in ("trainval", "test"):
        text(base / "annotations" / f"{split}.txt", *(lines if split == "test" else [lines[0], *lines[2:]]))


def flowers(root: Path) -> None:
    base, labels = root / "flowers-102", [2, 1, 2, 1]
    for i, label in enumerate(labels, 1):
        jpeg(base / "jpg" / f"image_{i:05d}.jpg", label - 1)
    savemat(base / "imagelabels.mat", {"labels": np.array(labels)})
    savemat(base / "setid.mat", {"trnid": np.array([1, 3]), "valid": np.array([1, 2]), "tstid": np.array([1, 2, 3, 4])})


def dtd(root: Path) -> None:
    names = ["banded", "polka-dotted"]
    for label, name in enumerate(names):
        for i in (1, 2):
            jpeg(root / "dtd" / "dtd" / "images" / name / f"{name}_{i}.jpg", label)
    for split, numbers in (("train1", (2,)), ("test1", (1, 2))):
        lines = (f"{name}/{name}_{i}.jpg" for name in names for i in numbers)
        text(root / "dtd" / "dtd" / "labels" / f"{split}.txt", *lines)


def eurosat(root: Path) -> None:
    from tgazsr_utils.datasets.published_sets import DATASETS

    folders(root / "eurosat" / "2750", sorted(DATASETS["EuroSAT"].names), "Image_{}.jpg")


def aircraft(root: Path) -> None:
    base, names = root / "fgvc-aircraft-2013b" / "data", ["707-320", "A340-200"]
    text(base / "variants.txt", *names)
    lines = []
    for label, name in enumerate(names):
        for i in (1, 2):
            jpeg(base / "images" / f"00{label}{i}.jpg", label)
            lines.append(f"00{label}{i} {name}")
    text(base / "images_variant_test.txt", *lines)
    text(base / "images_variant_trainval.txt", *lines[2:])


def imagenet(root: Path) -> None:
    folders(root / "ImageNet" / "val", ["n01440764", "n01443537"], "ILSVRC2012_val_{:08d}.JPEG")


def imagenet_v2(root: Path) -> None:
    """Folders are numbers; in the order of their names "10" is before "2"."""
    folders(root / "imagenetv2-matched-frequency-format-val", ["0", "10", "2"], "{:04d}.jpeg")


def imagenet_r(root: Path) -> None:
    folders(root / "imagenet-r", ["n01443537", "n01484850"], "art_{}.jpg")
    text(root / "imagenet-r" / "README.txt", "n01443537 goldfish")


def imagenet_a(root: Path) -> None:
    folders(root / "imagenet-a", ["n01498041", "n01531178"], "0.000{}_fox squirrel.jpg")


def imagenet_sketch(root: Path) -> None:
    folders(root / "ImageNet-Sketch", ["n01440764", "n01443537"], "sketch_{}.JPEG")


def caltech101(root: Path) -> None:
    names = ["BACKGROUND_Google", "Faces_easy", "yin_yang"]
    folders(root / "caltech101" / "101_ObjectCategories", names)


def caltech256(root: Path) -> None:
    for label, name in enumerate(["001.ak47", "002.american-flag", "251.airplanes-101", "257.clutter"]):
        for i in (1, 2):
            jpeg(root / "caltech256" / "256_ObjectCategories" / name / f"{name[:3]}_{i:04d}.jpg", label)


def cars(root: Path) -> None:
    base = root / "stanford_cars"
    labels = [2, 1, 2, 1]
    rows = np.zeros(4, [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")])
    (base / "devkit").mkdir(parents=True)
    for i, label in enumerate(labels):
        jpeg(base / "cars_test" / f"{i:05d}.jpg", label - 1)
        jpeg(base / "cars_train" / f"{i:05d}.jpg", label - 1)
        rows[i] = (1, 1, 50, 50, label, f"{i:05d}.jpg")
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    savemat(base / "devkit" / "cars_train_annos.mat", {"annotations": rows[::2]})
    names = np.array(["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"], dtype=object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})


def pcam(root: Path) -> None:
    (root / "pcam").mkdir()
    for split, labels in (("train", (1, 1)), ("test", (1, 0, 1, 0))):
        stem = root / "pcam" / f"camelyonpatch_level_2_split_{split}"
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = np.stack([pixels(label, 96) for label in labels])
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = np.array(labels, np.uint8).reshape(-1, 1, 1, 1)


WRITERS = {
    "tinyImageNet": tiny_imagenet,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "STL10": stl10,
    "SUN397": sun397,
    "Food101": food101,
    "oxfordpet": pets,
    "flowers102": flowers,
    "dtd": dtd,
    "EuroSAT": eurosat,
    "fgvc_aircraft": aircraft,
    "ImageNet": imagenet,
    "Caltech101": caltech101,
    "Caltech256": caltech256,
    "StanfordCars": cars,
    "PCAM": pcam,
    "ImageNet-V2": imagenet_v2,
    "ImageNet-R": imagenet_r,
    "ImageNet-A": imagenet_a,
    "ImageNet-Sketch": imagenet_sketch,
}


def write_all(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for write in WRITERS.values():
        write(root)
    return root


def without_checksums(setattr=setattr) -> None:
    """Lets torchvision read files whose contents are not the published ones; nothing else about its reading changes."""
    for reader in (tv.CIFAR10, tv.CIFAR100, tv.STL10):
        for name in ("train_list", "test_list"):
            setattr(reader, name, [[file, None] for file, _ in getattr(reader, name)])
        if hasattr(reader, "meta"):
            setattr(reader, "meta", reader.meta | {"md5": None})
    setattr(tv.Flowers102, "_file_dict", {part: (file, None) for part, (file, _) in tv.Flowers102._file_dict.items()})


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
