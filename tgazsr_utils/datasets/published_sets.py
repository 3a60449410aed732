"""The 16 published test sets (four of them also to tune on): what they hold, where they come from, how they are shown."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Preprocess = Literal["resize", "crop"]  # both sides to S; or the shorter side to 256/224 S, then the centre S x S
DEFAULT_ROOT = "data/sets"  # where published sets are looked for
DEFAULT_PROMPT = "This is a photo of a {}"


def clean_name(name: str) -> str:
    """A class name as prompts have it: lower case, ``_ - /`` to spaces, without a leading "017." or "017_"."""
    return re.sub(r"[_\-/]", " ", re.sub(r"^\d{3}[._]", "", name)).strip().lower()


def _aircraft(name: str) -> str:
    return clean_name(f"Boeing {name}" if name.startswith("7") else name)


def _scene(name: str) -> str:
    return clean_name(re.sub(r"^/?[a-z]/", "", name))  # "/a/abbey"; torchvision may have taken "/a/" off already


def _without_101(name: str) -> str:
    return clean_name(re.sub(r"-101$", "", name))


def _without_year(name: str) -> str:
    return clean_name(re.sub(r"\s*\b\d{4}$", "", name))


_LAND_USE = {
    "AnnualCrop": "annual crop land",
    "Forest": "a forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "a highway or a road",
    "Industrial": "industrial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings",
    "River": "a river",
    "SeaLake": "a sea or a lake",
}
_TISSUE = {"0": "healthy lymph node tissue", "1": "lymph node tumor tissue"}


@dataclass(frozen=True)
class DatasetSpec:
    """One published set; ``images`` and ``classes`` count the split it is tested on."""

    title: str
    split: str
    images: int
    classes: int
    needs: tuple[str, ...]  # files and folders below the data root, in the published layout
    torchvision: str | None  # its class in torchvision.datasets, which fetches it and, without ``folders``, reads it
    test: Mapping[str, Any] = field(default_factory=dict)  # that class's arguments for the test part
    train: Mapping[str, Any] | None = None  # and for a part to tune on, if there is one
    folders: str | None = None  # where the published layout is class folders, which are then read as such
    train_folders: str | None = None  # and those to tune on
    preprocess: Preprocess = "crop"  # of the test part; training images are always cropped
    prompt: str = DEFAULT_PROMPT
    name: Callable[[str], str] | Mapping[str, str] = clean_name  # raw class name -> name in the prompt
    gigabytes: float = 0.0  # to download
    source: str = ""
    licence: str = ""
    by_hand: str = ""  # which file goes where, when nothing can be downloaded by program

    @property
    def folder(self) -> str:
        return self.needs[0].split("/")[0]

    def class_name(self, raw: str) -> str:
        return self.name(raw) if callable(self.name) else self.name.get(raw, clean_name(raw))


_RESEARCH = "non-commercial research"

DATASETS: dict[str, DatasetSpec] = {
    "tinyImageNet": DatasetSpec(
        "Tiny-ImageNet",
        "val",
        10_000,
        200,
        (
            "tiny-imagenet-200/wnids.txt",
            "tiny-imagenet-200/words.txt",
            "tiny-imagenet-200/val/val_annotations.txt",
            "tiny-imagenet-200/val/images",
            "tiny-imagenet-200/train",
        ),
        None,
        gigabytes=0.24,
        source="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        licence=_RESEARCH,
    ),
    "cifar10": DatasetSpec(
        "CIFAR-10",
        "test",
        10_000,
        10,
        tuple(
            f"cifar-10-batches-py/{name}"
            for name in ("test_batch", "batches.meta", *(f"data_batch_{i}" for i in range(1, 6)))
        ),
        "CIFAR10",
        {"train": False},
        {"train": True},
        preprocess="resize",
        gigabytes=0.17,
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated",
    ),
    "cifar100": DatasetSpec(
        "CIFAR-100",
        "test",
        10_000,
        100,
        tuple(f"cifar-100-python/{name}" for name in ("test", "train", "meta")),
        "CIFAR100",
        {"train": False},
        {"train": True},
        preprocess="resize",
        gigabytes=0.17,
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated",
    ),
    "STL10": DatasetSpec(
        "STL-10",
        "test",
        8_000,
        10,
        tuple(
            f"stl10_binary/{name}"
            for name in ("test_X.bin", "test_y.bin", "class_names.txt", "train_X.bin", "train_y.bin", "unlabeled_X.bin")
        ),
        "STL10",
        {"split": "test"},
        {"split": "train"},
        preprocess="resize",
        gigabytes=2.64,
        source="https://cs.stanford.edu/~acoates/stl10/",
        licence="none stated; images from ImageNet",
    ),
    "SUN397": DatasetSpec(
        "SUN397",
        "all",
        108_754,
        397,
        ("SUN397/ClassName.txt",),
        "SUN397",
        name=_scene,
        gigabytes=37.0,
        source="https://vision.princeton.edu/projects/2010/SUN/",
        licence=_RESEARCH,
        by_hand="unpack SUN397.tar.gz in the data root, which gives SUN397/ClassName.txt and SUN397/a/abbey/...",
    ),
    "Food101": DatasetSpec(
        "Food-101",
        "test",
        25_250,
        101,
        ("food-101/meta/test.json", "food-101/images"),
        "Food101",
        {"split": "test"},
        {"split": "train"},
        prompt="A photo of {}, a type of food.",
        gigabytes=5.0,
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        licence=_RESEARCH,
    ),
    "oxfordpet": DatasetSpec(
        "Oxford-IIIT Pets",
        "test",
        3_669,
        37,
        ("oxford-iiit-pet/annotations/test.txt", "oxford-iiit-pet/images"),
        "OxfordIIITPet",
        {"split": "test"},
        {"split": "trainval"},
        prompt="A photo of a {}, a type of pet.",
        gigabytes=0.8,
        source="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        licence="CC BY-SA 4.0",
    ),
    "flowers102": DatasetSpec(
        "Oxford Flowers-102",
        "test",
        6_149,
        102,
        ("flowers-102/imagelabels.mat", "flowers-102/setid.mat", "flowers-102/jpg"),
        "Flowers102",
        {"split": "test"},
        {"split": "train"},
        prompt="A photo of a {}, a type of flower.",
        gigabytes=0.35,
        source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        licence="none stated",
    ),
    "dtd": DatasetSpec(
        "Describable Textures",
        "test, partition 1",
        1_880,
        47,
        ("dtd/dtd/labels/test1.txt", "dtd/dtd/images"),
        "DTD",
        {"split": "test", "partition": 1},
        {"split": "train", "partition": 1},
        prompt="A surface with a {} texture.",
        gigabytes=0.63,
        source="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        licence="research",
    ),
    "EuroSAT": DatasetSpec(
        "EuroSAT",
        "all",
        27_000,
        10,
        ("eurosat/2750",),
        "EuroSAT",
        folders="eurosat/2750",
        prompt="A centered satellite photo of {}.",
        name=_LAND_USE,
        gigabytes=0.09,
        source="https://github.com/phelber/eurosat",
        licence="MIT",
    ),
    "fgvc_aircraft": DatasetSpec(
        "FGVC-Aircraft",
        "test, variants",
        3_333,
        100,
        (
            "fgvc-aircraft-2013b/data/images_variant_test.txt",
            "fgvc-aircraft-2013b/data/variants.txt",
            "fgvc-aircraft-2013b/data/images",
        ),
        "FGVCAircraft",
        {"split": "test", "annotation_level": "variant"},
        {"split": "trainval", "annotation_level": "variant"},
        prompt="A photo of a {}, a type of aircraft.",
        name=_aircraft,
        gigabytes=2.75,
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        licence=_RESEARCH,
    ),
    "ImageNet": DatasetSpec(
        "ImageNet",
        "val",
        50_000,
        1000,
        ("ImageNet/val",),
        None,
        folders="ImageNet/val",
        train_folders="ImageNet/train",
        gigabytes=6.3,
        source="https://image-net.org/download (asks for registration)",
        licence=_RESEARCH,
        by_hand="unpack ILSVRC2012_img_val.tar and sort its images into ImageNet/val/<wnid>/*.JPEG "
        "(1000 folders such as n01440764); to tune on it, ILSVRC2012_img_train.tar into ImageNet/train/<wnid>/",
    ),
    "Caltech101": DatasetSpec(
        "Caltech-101",
        "all, no background",
        8_677,
        101,
        ("caltech101/101_ObjectCategories",),
        "Caltech101",
        folders="caltech101/101_ObjectCategories",
        gigabytes=0.14,
        source="https://data.caltech.edu/records/mzrjq-6wc02",
        licence="CC BY 4.0",
        by_hand="unpack caltech-101.zip, then 101_ObjectCategories.tar.gz from it into caltech101/",
    ),
    "Caltech256": DatasetSpec(
        "Caltech-256",
        "all",
        30_607,
        257,
        ("caltech256/256_ObjectCategories",),
        "Caltech256",
        folders="caltech256/256_ObjectCategories",
        prompt="A photo of a {}.",
        name=_without_101,
        gigabytes=1.2,
        source="https://data.caltech.edu/records/nyy15-4j048",
        licence="CC BY 4.0",
        by_hand="unpack 256_ObjectCategories.tar into caltech256/",
    ),
    "StanfordCars": DatasetSpec(
        "Stanford Cars",
        "test",
        8_041,
        196,
        (
            "stanford_cars/cars_test_annos_withlabels.mat",
            "stanford_cars/devkit/cars_meta.mat",
            "stanford_cars/cars_test",
        ),
        "StanfordCars",
        {"split": "test"},
        {"split": "train"},
        prompt="A photo of a {}.",
        name=_without_year,
        gigabytes=1.0,
        source="the original address is dead; copies are kept by others",
        licence=_RESEARCH,
        by_hand="unpack cars_test.tgz to stanford_cars/cars_test/ and car_devkit.tgz to stanford_cars/devkit/, "
        "and put cars_test_annos_withlabels.mat into stanford_cars/",
    ),
    "PCAM": DatasetSpec(
        "PatchCamelyon",
        "test",
        32_768,
        2,
        ("pcam/camelyonpatch_level_2_split_test_x.h5", "pcam/camelyonpatch_level_2_split_test_y.h5"),
        "PCAM",
        {"split": "test"},
        {"split": "train"},
        prompt="This is a photo of {}.",
        name=_TISSUE,
        gigabytes=0.8,
        source="https://github.com/basveeling/pcam (the drive's quota may refuse)",
        licence="CC0",
        by_hand="unpack camelyonpatch_level_2_split_test_x.h5.gz and ..._y.h5.gz into pcam/",
    ),
}
