"""Whatever images and folders a user has: read right, or said in one line. Each kind with several of its members."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image, features

from tgazsr_utils.core.libraries import torchvision
from tgazsr_utils.datasets.__main__ import main
from tgazsr_utils.datasets.class_folders import PARTS
from tgazsr_utils.datasets.decoding import read_as_published, read_rgb
from tgazsr_utils.datasets.files import fit
from tgazsr_utils.datasets.loading import load_dataset

RAMP = np.tile(np.linspace(0, 65535, 96).astype(np.uint16), (64, 1))  # greys from black to white
SEEN = np.tile(np.linspace(0, 255, 96), (64, 1))  # as 8 bits


def put(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (64, 64), (90, 120, 30))).save(path, **options)


def put_classes(folder, classes=("cat", "dog"), count=3, suffix="png"):
    for name in classes:
        for i in range(count):
            put(folder / name / f"{i}.{suffix}")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype, scale", [(np.uint16, 1), (np.int32, 1), (np.float32, 65535)])
def test_deep_greys_keep_their_range(tmp_path, suffix, dtype, scale):
    if suffix == "png" and dtype != np.uint16:
        suffix = "tiff"  # PNG has no such greys
    put(tmp_path / f"x.{suffix}", Image.fromarray((RAMP / scale).astype(dtype)))
    pixels = np.asarray(read_rgb(tmp_path / f"x.{suffix}"))
    assert pixels.shape == (64, 96, 3) and np.abs(pixels[..., 0] - SEEN).max() <= 1


@pytest.mark.parametrize(
    "values, kind",
    [
        (np.float32([[0, 300]]), "floating-point"),
        (np.float32([[-1, 1]]), "floating-point"),
        (np.int32([[0, 2**30]]), "32-bit"),
        (np.int32([[0, 200]]), "32-bit"),
        (np.int32([[-5, 900]]), "32-bit"),
    ],
)
def test_greys_of_unknown_range_are_refused_by_name(tmp_path, values, kind):
    put(tmp_path / "s" / "a" / "x.tif", Image.fromarray(values.repeat(40, 0).repeat(20, 1)))
    put_classes(tmp_path / "s", ["b"])
    with pytest.raises(ValueError, match=f"x.tif cannot be read: its {kind} greys run from"):
        load_dataset("s", "train", tmp_path)


def tiff(path, packed, bits, *more, order="<", photometric=1, samples=1, side=96):
    """A file of one strip; ``more``: further tags, (number, value)."""
    tags = [(256, 3, side), (257, 3, side), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, samples)]
    tags += [(258, 3, bits), (278, 3, side), (279, 4, len(packed)), *((number, 3, value) for number, value in more)]
    code = {3: "HH", 4: "I"}
    value = lambda kind, value: struct.pack(order + code[kind], *([value, 0] if kind == 3 else [value]))
    entries = b"".join(struct.pack(f"{order}HHI", tag, kind, 1) + value(kind, v) for tag, kind, v in sorted(tags))
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(packed))
    path.write_bytes(start + packed + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


def of_bits(values, bits):
    """Integers as rows of bits, the highest first."""
    return np.packbits((values[..., None] >> np.arange(bits)[::-1] & 1).reshape(len(values), -1), axis=1).tobytes()


def ramp(most):
    return np.tile(np.linspace(0, most, 96).round().astype(np.int64), (96, 1))


DEPTHS = {  # -> what Pillow reads or refuses: bytes of a ramp, bits, further tags, and other fields
    "1 bit": (of_bits(ramp(1), 1), 1, (), {}),
    "2 bits, white is zero": (of_bits(3 - ramp(3), 2), 2, (), {"photometric": 0}),
    "4 bits": (of_bits(ramp(15), 4), 4, (), {}),
    "8 bits, white is zero": (of_bits(255 - ramp(255), 8), 8, (), {"photometric": 0}),
    "10 bits": (of_bits(ramp(1023), 10), 10, (), {}),
    "12 bits": (of_bits(ramp(4095), 12), 12, (), {}),
    "12 bits, big endian": (of_bits(ramp(4095), 12), 12, (), {"order": ">"}),
    "14 bits": (of_bits(ramp(16383), 14), 14, (), {}),
    "16 bits": (ramp(65535).astype("<u2").tobytes(), 16, (), {}),
    "16 bits, big endian": (ramp(65535).astype(">u2").tobytes(), 16, (), {"order": ">"}),
    "16 bits, white is zero": ((65535 - ramp(65535)).astype("<u2").tobytes(), 16, (), {"photometric": 0}),
    "12 of 16 bits, as stated": (ramp(4095).astype("<u2").tobytes(), 16, [(281, 4095)], {}),
    "16 bits, signed": (ramp(32767).astype("<i2").tobytes(), 16, [(339, 2)], {}),
    "8 bits, signed": (ramp(127).astype("<i1").tobytes(), 8, [(339, 2)], {}),
    "32 bits": (ramp(2**32 - 1).astype("<u4").tobytes(), 32, (), {}),
    "floats": ((ramp(95) / 95).astype("<f4").tobytes(), 32, [(339, 3)], {}),
    "floats, white is zero": ((1 - ramp(95) / 95).astype("<f4").tobytes(), 32, [(339, 3)], {"photometric": 0}),
    "half floats": ((ramp(95) / 95).astype("<f2").tobytes(), 16, [(339, 3)], {}),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_a_tiff_of_any_depth_is_read_right_or_refused(tmp_path, name):
    packed, bits, tags, other = DEPTHS[name]
    tiff(tmp_path / "x.tif", packed, bits, *tags, **other)
    try:
        pixels = np.asarray(read_rgb(tmp_path / "x.tif"))[..., 0].astype(int)
    except (ValueError, OSError) as error:
        assert bits in (10, 12, 14, 32) or "signed" in name or name == "half floats"
        assert "\n" not in str(error)
    else:
        assert np.abs(pixels - ramp(255)).max() <= 255 / (2 ** min(bits, 8) - 1) / 2 + 1


@pytest.mark.parametrize("length", [5999, 6000])
@pytest.mark.parametrize("thin", [1, 2, 7])
def test_a_thin_image_is_cropped_as_it_would_be_whole(thin, length):
    values = np.random.default_rng(0).integers(0, 256, (length, thin, 3), dtype=np.uint8)
    for image in (Image.fromarray(values), Image.fromarray(values.transpose(1, 0, 2).copy())):
        resized = torchvision().transforms.functional.resize(image, 64)
        expected = torchvision().transforms.functional.center_crop(resized, [56, 56])
        found = fit(image, 56, "crop")
        difference = np.abs(np.asarray(found, int) - np.asarray(expected, int))
        assert found.size == (56, 56) and difference.mean() < 5  # of noise: half a pixel


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 32, 64))
    put(tmp_path / "x.png", image.convert(mode))
    pixels = np.asarray(read_rgb(tmp_path / "x.png"))
    assert (pixels[:, 40:] == 255).all() and (pixels[:, :20, 0] < 30).all()
    assert not (np.asarray(read_as_published(tmp_path / "x.png"))[:, 40:] == 255).all()


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_images_are_upright_whatever_their_tag(tmp_path, tag, suffix):
    """As the eight values of the tag are defined: where the top left corner of the stored image is seen."""
    stored, exif = np.zeros((40, 60, 3), np.uint8), Image.Exif()
    stored[:20, :30] = 220
    exif[0x112] = tag
    put(tmp_path / f"x.{suffix}", Image.fromarray(stored), exif=exif)
    seen = np.asarray(read_rgb(tmp_path / f"x.{suffix}")).mean(2)
    assert seen.shape == ((40, 60) if tag < 5 else (60, 40))
    top, left = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1), 5: (1, 1), 6: (1, 0), 7: (0, 0), 8: (0, 1)}[tag]
    corner = seen[3 if top else -4, 3 if left else -4]
    assert corner > 150 and seen.mean() < 80
    if suffix != "tif":  # which Pillow itself turns
        assert read_as_published(tmp_path / f"x.{suffix}").size == (60, 40)  # published sets lie as stored


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "jp2", "ppm", "pgm", "JPEG", "tga", "qoi", "ico"])
def test_every_suffix_that_pillow_reads_is_taken(tmp_path, suffix):
    codec = {"avif": "avif", "jp2": "jpg_2000"}.get(suffix)  # which a Pillow may be built without, unlike the others
    if codec and not features.check(codec):
        pytest.skip(f"this Pillow was built without {codec}")
    if Image.registered_extensions()[f".{suffix.lower()}"] not in Image.SAVE:
        pytest.skip(f"this Pillow reads {suffix} and does not write it")
    put_classes(tmp_path / "s", ["cat", "dog"])
    put_classes(tmp_path / "s", ["owl"], suffix=suffix)
    data = load_dataset("s", "train", tmp_path)
    assert data.class_names == ("cat", "dog", "owl") and (data.labels == 2).sum() == 2


def test_images_deeper_in_their_class_are_taken_and_the_rest_is_named(tmp_path, capsys):
    put_classes(tmp_path / "s", ["cat", "dog"])
    put(tmp_path / "s" / "cat" / "more" / "x.png")
    put(tmp_path / "s" / "owl" / "barn" / "2024" / "x.png")
    (tmp_path / "s" / "empty").mkdir()
    (tmp_path / "s" / "cat" / "notes.txt").write_text("none")
    for litter in (".DS_Store", "Thumbs.db", "._x.png", "@eaDir/x.png", "__MACOSX/x.png"):
        path = tmp_path / "s" / "dog" / litter
        path.parent.mkdir(exist_ok=True)
        path.write_text("none")
    put(tmp_path / "s" / "__MACOSX" / "x.png")
    train, test = (load_dataset("s", part, tmp_path) for part in ("train", "test"))
    assert train.class_names == ("cat", "dog", "owl") and len(train) + len(test) == 8
    told = capsys.readouterr().err
    assert "s: left out: class folder empty has no images" in told and "notes.txt" in told
    assert not any(name in told for name in ("DS_Store", "Thumbs", "MACOSX", "eaDir", "._x"))
    assert main(["check", "--all", "--root", str(tmp_path)]) == 0
    out, told = capsys.readouterr()
    assert "3 classes" in out and "notes.txt" in told and "class folder empty" in told


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Testing", "val", "VALID", "validation", "dev"])
def test_parts_by_their_usual_names_in_any_case(tmp_path, train, test):
    put_classes(tmp_path / "s" / train, count=4)
    put_classes(tmp_path / "s" / test, count=2)
    assert [len(load_dataset("s", part, tmp_path)) for part in ("train", "test")] == [8, 4]


@pytest.mark.parametrize(
    "train, test",
    [
        *[("training_set", "test_set"), ("Train_Set", "Val_Set"), ("trainset", "testset"), ("img-train", "img-val")],
        *[
            ("TrainImages", "TestImages"),
            ("train2017", "val2017"),
            ("data_train", "data_holdout"),
            ("trainval", "test"),
        ],
        *[("train_images", "evaluation images"), ("Training Images", "Testing Images"), ("trainval", "eval.split")],
    ],
)
def test_parts_by_the_words_in_their_names(tmp_path, train, test):
    put_classes(tmp_path / "s" / train, count=4)
    put_classes(tmp_path / "s" / test, count=2)
    assert [len(load_dataset("s", part, tmp_path)) for part in ("train", "test")] == [8, 4]


@pytest.mark.parametrize("classes", [("train", "bus", "tram"), ("training shoes", "test tubes"), ("valley", "devil")])
def test_classes_that_only_sound_like_parts_are_classes(tmp_path, classes):
    put_classes(tmp_path / "s", classes)
    assert load_dataset("s", "train", tmp_path).class_names == tuple(sorted(classes))


@pytest.mark.parametrize("where", ["", "images"])
def test_a_part_without_labels_is_passed_over_and_named(tmp_path, where, capsys):
    put_classes(tmp_path / "s" / "train", count=4)
    put_classes(tmp_path / "s" / "val", count=2)
    put(tmp_path / "s" / "test" / where / "x.png")
    put(tmp_path / "s" / "extra" / "cat" / "x.png")
    data = load_dataset("s", "test", tmp_path)
    assert len(data) == 4 and data.class_names == ("cat", "dog")
    told = capsys.readouterr().err
    assert "left out: test has no class folders of the names in the part to train on" in told
    assert "left out: folder extra is no part" in told


def test_a_missing_part_is_named_with_the_names_that_are_read(tmp_path):
    put_classes(tmp_path / "s" / "val")
    put_classes(tmp_path / "s" / "test")
    with pytest.raises(ValueError, match="test, val and no part to train on; words for one are train, training"):
        load_dataset("s", "train", tmp_path)
    assert len(load_dataset("s", "test", tmp_path)) == 6
    assert set(PARTS) == {"train", "test"}


FORMS = {  # folders to train on, folders to test on -> classes
    "another form": (["caf\u00e9", "eau"], ["cafe\u0301", "eau"], ("caf\u00e9", "eau")),
    "another case": (["Cat", "dog"], ["cat", "DOG"], ("cat", "dog")),
    "both": (["\u00c9t\u00e9", "hiver"], ["e\u0301te\u0301", "Hiver"], ("hiver", "\u00e9t\u00e9")),
    "told apart by a part": (["US", "us"], ["US", "us"], ("us (US)", "us (us)")),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_class_may_be_spelt_in_another_form_in_each_part(tmp_path, name):
    train, test, names = FORMS[name]
    put_classes(tmp_path / "s" / "train", train)
    put_classes(tmp_path / "s" / "test", test)
    for part in ("train", "test"):
        data = load_dataset("s", part, tmp_path)
        assert data.class_names == names and data.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_classes_of_either_part_are_one_choice(tmp_path, capsys):
    put_classes(tmp_path / "s" / "train", ["cat", "dog", "owl"])
    put_classes(tmp_path / "s" / "test", ["cat", "owl", "yak"])
    (tmp_path / "s" / "test" / "dog").mkdir()
    train, test = (load_dataset("s", part, tmp_path) for part in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog", "owl", "yak")
    assert test.labels.tolist() == [0] * 3 + [2] * 3 + [3] * 3
    told = capsys.readouterr().err
    assert "class yak has no images to train on" in told and "class dog has no images to test on" in told


@pytest.mark.parametrize(
    "folders, names",
    [
        (("n02085620-Chihuahua", "n02085782-Japanese_spaniel"), ("chihuahua", "japanese spaniel")),
        (("n02085620-Chihuahua", "n02109961_Eskimo_dog"), ("chihuahua", "eskimo dog")),
        (("001.Black_footed_Albatross", "017.Cardinal"), ("black footed albatross", "cardinal")),  # as of 200
        (("0_cat", "1_dog", "2_owl"), ("cat", "dog", "owl")),
        (("1-cat", "2-dog", "10-owl"), ("1 cat", "10 owl", "2 dog")),  # what counts so far is not known
        (("01 cat", "02 dog", "owl"), ("01 cat", "02 dog", "owl")),  # not of every class
        (("10_rupees", "20_rupees", "100_rupees"), ("100 rupees", "10 rupees", "20 rupees")),
        (("1_euro", "2_euro"), ("1 euro", "2 euro")),
        (("2007 Ford", "2008 Fiat"), ("2007 ford", "2008 fiat")),
        (("7up", "9lives"), ("7up", "9lives")),
        (("0", "1", "2"), ("0", "1", "2")),
        (("000_", "001_"), ("000", "001")),
        (("001.n02085620-Chihuahua", "002.n02085782-pug"), ("chihuahua", "pug")),
        (("n02012849", "n03126707"), ("crane (n02012849)", "crane (n03126707)")),
        (("red_fox", "red-fox"), ("red fox (red-fox)", "red fox (red_fox)")),
    ],
)
def test_class_names_lose_identifiers_and_are_told_apart(tmp_path, folders, names, capsys):
    put_classes(tmp_path / "s" / "Images", folders)
    data = load_dataset("s", "test", tmp_path)
    assert data.class_names == names
    same = names[0].startswith(names[1].split(" (")[0]) if "(" in names[0] else False
    assert ("classes that cannot be told apart, as they have one prompt" in capsys.readouterr().err) == same


def test_published_sets_keep_their_prompts_and_tell_which_are_the_same(tmp_path, capsys):
    put_classes(tmp_path / "ImageNet" / "val", ["n02012849", "n03126707", "n01440764"], suffix="JPEG")
    data = load_dataset("ImageNet", "test", tmp_path)
    assert data.prompts[1:] == ("This is a photo of a crane",) * 2 and len(set(data.class_names)) == 3
    assert "have one prompt: This is a photo of a crane" in capsys.readouterr().err


@pytest.mark.parametrize("val, below", [("val", ""), ("val", "images"), ("val_", "")])
@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("folder", ["tiny-imagenet-200", "tinyImageNet"])
def test_tiny_imagenet_with_val_sorted_into_class_folders(tmp_path, val, below, boxes, folder, capsys):
    base, wnids = tmp_path / folder, ("n01443537", "n02056570")
    base.mkdir()
    (base / "wnids.txt").write_text("\n".join(wnids))
    (base / "words.txt").write_text("n01443537\tgoldfish\nn02056570\tking penguin\n")
    for wnid in wnids:
        for i in range(2):
            put(base / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
            put(base / val / wnid / below / f"val_{wnid}{i}.JPEG")
        lines = "".join(f"{wnid}_{i}.JPEG\t0\t0\t9\t9\n" for i in range(2))
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text(lines) if boxes else None
    train, test = (load_dataset("tinyImageNet", part, tmp_path) for part in ("train", "test"))
    assert test.labels.tolist() == train.labels.tolist() == [0, 0, 1, 1] and test.masks is None
    assert (train.masks is not None) == boxes and test.class_names == ("goldfish", "king penguin")
    assert main(["list", "tinyImageNet", "--root", str(tmp_path)]) == 0
    assert " yes " in capsys.readouterr().out


def test_in_the_mini_world_prompts_apply_and_what_cannot_is_refused():
    data = load_dataset("shapes", "test", n=4, prompt="An oil painting of a {}")
    assert data.prompts[0] == "An oil painting of a circle" and data.class_names[0] == "circle"
    for changes in ({"preprocess": "crop"}, {"test_fraction": 0.5}):
        with pytest.raises(ValueError, match="is for image files; the mini-world .* has none"):
            load_dataset("shapes", "test", n=4, **changes)


def test_list_says_what_is_wrong_with_an_archive_one_level_off(tmp_path, capsys):
    put(tmp_path / "dtd" / "images" / "banded" / "x.jpg")
    assert main(["list", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert " incomplete " in out and "this is missing: dtd/dtd/labels/test1.txt" in out


def test_published_sets_stay_as_published(tmp_path):
    """Neither turned nor put on white: numbers are compared with those of others."""
    exif = Image.Exif()
    exif[0x112] = 6
    for wnid in ("n01440764", "n01443537"):
        put(tmp_path / "ImageNet" / "val" / wnid / "x.JPEG", Image.new("RGB", (90, 60)), exif=exif)
    data = load_dataset("ImageNet", "test", tmp_path, decode=False)
    assert data.images.source.open(0).size == (90, 60)
    assert torch.equal(load_dataset("ImageNet", "test", tmp_path).labels, torch.tensor([0, 1]))
