"""Damaged files, a full disk, a folder that cannot be written: named in one line, and never a wrong number."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import size, train_settings
from miniatures import tiny_imagenet
from PIL import Image
from safetensors.torch import save_file

from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.files import decoded
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.measuring import measure as evaluation
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.measure import Measurement, answer, evaluate, pixel_sums
from tgazsr_utils.measuring.recorded_sweep import recorded_sweep
from tgazsr_utils.measuring.records import RecordStore
from tgazsr_utils.measuring.tables import leaderboard
from tgazsr_utils.parameters import SettingsError
from tgazsr_utils.paths import DATA, ROOT
from tgazsr_utils.profiles import load_profile
from tgazsr_utils.runner import load_manifest
from tgazsr_utils.runtime import weights
from tgazsr_utils.runtime.checkpoints import Checkpoints
from tgazsr_utils.runtime.files import DamagedFile, load_tensors, save_tensors
from tgazsr_utils.runtime.finetuning import finetune
from tgazsr_utils.runtime.fingerprints import fingerprint
from tgazsr_utils.runtime.weights import SHIPPED, load_clip

SETTINGS = train_settings(epochs=4)
ATTACK = AttackSettings(test_eps=3, test_stepsize=1, test_numsteps=2)
FLIPS = size(15, 60)  # single bits, at random places


def flipped(content, chance):
    where = chance.randrange(len(content))
    return content[:where] + bytes([content[where] ^ (1 << chance.randrange(8))]) + content[where + 1 :]


DAMAGES = {
    "empty": lambda content, chance: b"",
    "truncated": lambda content, chance: content[: len(content) // 2],
    "flipped": flipped,
    "foreign": lambda content, chance: b"PK\x03\x04 something else altogether " * 20,
}
damages = pytest.mark.parametrize("damage", list(DAMAGES))


def harm(path, damage, seed=0):
    path.write_bytes(DAMAGES[damage](path.read_bytes(), random.Random(seed)))


def one_line(error):
    assert "\n" not in str(error.value), str(error.value)


@pytest.fixture(scope="module")
def train_set():
    return load_dataset("shapes", "train", n=16)


@pytest.fixture(scope="module")
def undisturbed(mini, train_set, tmp_path_factory):
    return fingerprint(finetune(mini, train_set, "TeCoA", SETTINGS, tmp_path_factory.mktemp("whole")).clip)


def stopped_at(steps, clip, data, folder, **changes):
    seen = iter(range(1, 1000))
    with pytest.raises(KeyboardInterrupt):
        finetune(clip, data, "TeCoA", SETTINGS.model_copy(update=changes), folder, stop=lambda: next(seen) == steps)
    return sorted(folder.glob("*.ckpt"))


@pytest.mark.parametrize("damage", [*DAMAGES, "of another run"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(mini, train_set, undisturbed, tmp_path, capsys, damage):
    before, last = stopped_at(5, mini, train_set, tmp_path)
    assert before.name.endswith(".step4.ckpt") and last.name.endswith(".step5.ckpt")
    if damage == "of another run":
        (other,) = stopped_at(1, mini, train_set, tmp_path / "other", seed=1)
        other.rename(last)
    else:
        harm(last, damage)
    tuned = finetune(mini, train_set, "TeCoA", SETTINGS, tmp_path)
    said = capsys.readouterr().out
    assert f"{last.name} is damaged (" in said and f"going on from {before.name}" in said
    assert fingerprint(tuned.clip) == undisturbed and len(tuned.history) == 8
    assert not list(tmp_path.glob("*.ckpt*"))


def test_a_damaged_checkpoint_is_none_of_the_last_two(tmp_path):
    module, kept = torch.nn.Linear(2, 2), Checkpoints(tmp_path / "run")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in (200, 400):
        kept.save({"step": step}, module, optimizer)
    harm(tmp_path / "run.step400.ckpt", "flipped")
    assert kept.load(module, optimizer) == {"step": 200} and kept.newest().name == "run.step200.ckpt"
    for step in (210, 220):
        kept.save({"step": step}, module, optimizer)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["run.step210.ckpt", "run.step220.ckpt"]
    assert kept.description().endswith("run.step220.ckpt")
    kept.remove()
    assert not list(tmp_path.iterdir())


@damages
def test_without_another_checkpoint_the_run_stops(mini, train_set, undisturbed, tmp_path, damage):
    (only,) = stopped_at(1, mini, train_set, tmp_path)
    harm(only, damage)
    with pytest.raises(
        ValueError, match=f"checkpoint .*{only.name} is damaged .*; remove it to train from the start"
    ) as error:
        finetune(mini, train_set, "TeCoA", SETTINGS, tmp_path)
    one_line(error)
    only.unlink()
    assert fingerprint(finetune(mini, train_set, "TeCoA", SETTINGS, tmp_path).clip) == undisturbed


def test_every_flipped_bit_of_our_tensors_is_found(tmp_path):
    """Checkpoints, tuned weights, what the original model makes of images, unfinished measurements."""
    path, chance = tmp_path / "a.safetensors", random.Random(0)
    save_tensors(path, {"values": torch.rand(40), "more": torch.arange(9)}, run="a", step=3)
    whole = path.read_bytes()
    for _ in range(size(200, 1000)):
        path.write_bytes(flipped(whole, chance))
        with pytest.raises(DamagedFile, match="a.safetensors is damaged") as error:
            load_tensors(path, run="a")
        one_line(error)
    path.write_bytes(whole)
    assert load_tensors(path, run="a")[1] == {"step": 3}
    with pytest.raises(DamagedFile, match="not that of b"):
        load_tensors(path, run="b")


@damages
def test_damaged_weights_stop_the_run(mini, train_set, tmp_path, damage):
    tuned = finetune(mini, train_set, "TeCoA", SETTINGS, tmp_path)
    harm(tuned.weights, damage)
    for load in (
        lambda: load_clip("mini-clip", tuned.weights, "cpu"),
        lambda: finetune(mini, train_set, "TeCoA", SETTINGS, tmp_path),
    ):
        with pytest.raises(ValueError, match=tuned.weights.name) as error:
            load()
        one_line(error)


def test_what_is_there_but_cannot_be_opened_is_not_taken_for_missing(mini, train_set, tmp_path):
    """Else a training would start over without a word."""
    _, last = stopped_at(5, mini, train_set, tmp_path)
    last.unlink()
    last.mkdir()
    with pytest.raises(OSError, match=f"directory: .*{last.name}"):
        finetune(mini, train_set, "TeCoA", SETTINGS, tmp_path)
    if os.geteuid() != 0:  # root may open every file
        last.rmdir()
        (before,) = tmp_path.glob("*.ckpt")
        before.chmod(0)
        with pytest.raises(PermissionError, match=before.name):
            finetune(mini, train_set, "TeCoA", SETTINGS, tmp_path)


LISTS = {
    "words.txt": ("n01443537\tgoldfish\n", "words.txt has no name for n02056570"),
    "val/val_annotations.txt": (
        "val_0.JPEG\tn02056570\t0\t0\t63\nval_1",
        "val_annotations.txt, line 1, 'val_0.JPEG.* is not 2 texts and 4 numbers",
    ),
    "val/val_annotations.txt ": (
        "val_0.JPEG\tn02056570\t0\t0\t63\t63\n",
        "val_annotations.txt lists 1 images, .*images holds 4; has the list been cut",
    ),
    "val/val_annotations.txt  ": (
        "val_0.JPEG\tn02056571\t0\t0\t63\t63\n",
        "val_annotations.txt has 'n02056571', which wnids.txt has not",
    ),
    "train/n01443537/n01443537_boxes.txt": (
        "n01443537_0.JPEG\t8\t8\t40\tx",
        "n01443537_boxes.txt, line 1, .* is not 1 texts and 4 numbers",
    ),
}


@pytest.mark.parametrize("name", list(LISTS))
def test_a_damaged_list_of_images_is_named(tmp_path, name):
    tiny_imagenet(tmp_path)
    content, message = LISTS[name]
    (tmp_path / "tiny-imagenet-200" / name.strip()).write_text(content)
    with pytest.raises(ValueError, match=f"image set 'tinyImageNet' .*{message}") as error:
        load_dataset("tinyImageNet", "train" if "train" in name else "test", tmp_path)
    one_line(error)


@damages
def test_a_damaged_table_of_a_sweep_is_named(tmp_path, damage):
    table = tmp_path / "tables" / "ablation_alpha_beta.csv"
    table.parent.mkdir()
    shutil.copy(ROOT / "data" / "reference" / "mini" / "tables" / table.name, table)
    assert len(recorded_sweep(tmp_path, "mini-world")[0]) > 1
    if damage == "flipped":
        table.write_text(table.read_text().replace("Beta", "Bera", 1))
    elif damage == "truncated":
        table.write_bytes(table.read_bytes()[:100])
    else:
        harm(table, damage)
    with pytest.raises(ValueError, match="ablation_alpha_beta.csv is damaged .*; run notebook 03 again") as error:
        recorded_sweep(tmp_path, "mini-world")
    one_line(error)


@pytest.mark.parametrize("name", list(SHIPPED))
def test_flipped_bits_of_the_shipped_weights_are_found(name, tmp_path, monkeypatch):
    whole, path, chance = SHIPPED[name].read_bytes(), tmp_path / SHIPPED[name].name, random.Random(0)
    monkeypatch.setitem(SHIPPED, name, path)
    monkeypatch.setitem(weights._DIGESTS, path, weights._DIGESTS[DATA / path.name])
    path.write_bytes(whole)
    load_clip("mini-clip", name, "cpu")
    for _ in range(5):
        path.write_bytes(flipped(whole, chance))
        with pytest.raises(ValueError, match="damaged|cannot be loaded") as error:
            load_clip("mini-clip", name, "cpu")
        one_line(error)


def test_weights_of_others_have_no_digest_and_are_taken(mini, tmp_path):
    save_file({name: value.clone() for name, value in mini.model.state_dict().items()}, tmp_path / "plain.safetensors")
    assert fingerprint(load_clip("mini-clip", tmp_path / "plain.safetensors", "cpu")) == fingerprint(mini)


@pytest.fixture(scope="module")
def record(mini):
    return evaluate(mini, load_dataset("shapes", "test", n=12), None, method="CLIP")


@damages
def test_a_damaged_record_is_named_and_measured_again_once_removed(record, tmp_path, damage):
    store = RecordStore(tmp_path)
    store.add(record)
    (path,) = tmp_path.glob("*.json")
    harm(path, damage)
    with pytest.raises(DamagedFile, match=f"record .*{path.name} is damaged .*; remove it to measure again") as error:
        store.get(record.key)
    one_line(error)
    path.unlink()
    assert store.get(record.key) is None


def test_no_flipped_bit_makes_another_record(record, tmp_path):
    store, chance = RecordStore(tmp_path), random.Random(0)
    store.add(record)
    (path,) = tmp_path.glob("*.json")
    whole, found = path.read_bytes(), 0
    for _ in range(flips := size(400, 2000)):
        path.write_bytes(flipped(whole, chance))
        try:
            assert store.get(record.key) == record  # a tab in place of a blank
        except DamagedFile:
            found += 1
    assert found > 0.75 * flips
    path.write_bytes(whole)
    path.rename(tmp_path / "abc.json")
    with pytest.raises(DamagedFile, match="abc.json is damaged .it is that of"):
        store.get("abc")


@damages
def test_damaged_unfinished_predictions_are_measured_anew(mini, tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr(evaluation, "batch_that_fits", lambda clip: 4)
    monkeypatch.setattr(evaluation, "SAVE_EVERY", 0.0)
    m, kept = Measurement(mini, load_dataset("letters", "test", n=12), ATTACK), tmp_path / "key_0.safetensors"
    ((whole, _),) = answer([m], range(12), [kept])
    assert list(tmp_path.iterdir()) == [kept]
    harm(kept, damage)
    ((again, _),) = answer([m], range(12), [kept])
    assert all(torch.equal(a, b) for a, b in zip(again, whole))
    assert f"{kept.name} is damaged" in capsys.readouterr().out


@damages
def test_a_damaged_manifest_is_named(tmp_path, damage):
    path, whole = (
        tmp_path / "manifest.json",
        json.dumps({"notebooks": {"01": {"status": "finished", "inputs": "abc"}}}).encode(),
    )
    for seed in range(FLIPS if damage == "flipped" else 1):
        path.write_bytes(DAMAGES[damage](whole, random.Random(seed)))
        try:
            read = load_manifest(path)["notebooks"]
            assert damage == "flipped" and all(
                isinstance(entry, dict) for entry in read.values()
            )  # the notebook runs again, if anything
        except SettingsError as error:
            assert "manifest.json is damaged; remove it" in str(error) and "\n" not in str(error)
    path.write_text('{"notebooks": {"01": 3}}')
    with pytest.raises(SettingsError, match="is damaged"):
        load_manifest(path)


@damages
def test_a_damaged_profile_is_named(tmp_path, monkeypatch, damage):
    from tgazsr_utils import profiles

    whole = (profiles.PROFILES / "mini.yaml").read_bytes()
    monkeypatch.setattr(profiles, "PROFILES", tmp_path)
    for seed in range(FLIPS if damage == "flipped" else 1):
        (tmp_path / "mine.yaml").write_bytes(DAMAGES[damage](whole, random.Random(seed)))
        try:
            load_profile("mine")
            assert damage == "flipped"
        except SettingsError as error:
            assert "mine" in str(error) and "\n" not in str(error)


@damages
def test_a_damaged_image_is_named(photo_root, damage):
    broken = sorted((photo_root / "animals").rglob("*.png"))[0]
    content = broken.read_bytes()
    damaged = [DAMAGES[damage](content, random.Random(seed)) for seed in range(FLIPS if damage == "flipped" else 1)]
    data = load_dataset("animals", "test", photo_root, image_size=32, test_fraction=1 - 1e-9)
    before, silent = decoded(data).images, 0
    for changed in damaged:
        broken.write_bytes(changed)
        try:
            after = decoded(load_dataset("animals", "test", photo_root, image_size=32, test_fraction=1 - 1e-9)).images
            silent += not torch.equal(before, after)
        except ValueError as error:
            assert broken.name in str(error) and "cannot be read" in str(error) and "\n" not in str(error)
        else:
            assert damage == "flipped"
    assert damage == "flipped" or silent == 0


def test_an_image_that_changes_between_measurements_is_no_silent_difference(photo_root, mini, tmp_path):
    """A flipped bit may leave a file that can be read, of the same size: no table mixes what came before and after."""
    changed = sorted((photo_root / "animals").rglob("*.png"))[0]
    read = lambda: load_dataset("animals", "test", photo_root, image_size=56, test_fraction=1 - 1e-9, decode=False)
    store = RecordStore(tmp_path / "records")
    first = Bench(store).measure(mini, [read()], ATTACK, method="CLIP")
    assert first[0].pixels == first[1].pixels is not None
    with Image.open(changed) as image:
        size, pixels = changed.stat().st_size, image.convert("RGB")
    pixels.putpixel((30, 30), (0, 0, 0))
    pixels.save(changed)
    changed.write_bytes(changed.read_bytes()[:size].ljust(size, b"\0"))
    other = mini.frozen_copy()
    next(other.visual.parameters()).data += 1e-6
    second = Bench(store).measure(other, [read()], ATTACK, method="Mine")
    assert first[0].data == second[0].data and first[0].pixels != second[0].pixels
    with pytest.raises(
        ValueError,
        match="files of animals changed between measurements: (CLIP and Mine|Mine and CLIP) saw different pixels",
    ):
        leaderboard([*first, *second])


def test_pixel_sums_tell_every_pixel():
    images = torch.randint(0, 256, (3, 3, 8, 8)) / 255
    sums = pixel_sums(images)
    assert sums.shape == (3,) and torch.equal(pixel_sums(images.flip(0)), sums.flip(0))
    for _ in range(50):
        other = images.clone()
        where = tuple(int(torch.randint(n, ())) for n in images.shape)
        other[where] = (other[where] + 1 / 255) % (256 / 255)
        assert (pixel_sums(other) != sums).tolist() == [i == where[0] for i in range(3)]


NAMESPACE = ["unshare", "--map-root-user", "--mount"]  # where a test may mount what it likes
can_mount = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode != 0,
    reason="this machine lets nobody mount a file system of their own",
)
RUN = f"{sys.executable} -m tgazsr_utils.runner smoke 02 -p methods '[TeCoA]' -p output"


def in_namespace(script):
    done = subprocess.run([*NAMESPACE, "bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    return done.stdout, done.stderr


@pytest.mark.long
@can_mount
def test_a_full_disk_stops_the_run_with_its_cause_and_leaves_earlier_results(tmp_path):
    """Eight MiB hold records, perhaps a checkpoint, not the weights; with room (--long) the same command ends well."""
    out = tmp_path / "disk" / "out"
    store = out.parent / "store" / "records"
    (tmp_path / "disk").mkdir()
    again = f"""
        mount -o remount,size=200m {out.parent}
        {RUN} {out} > {tmp_path}/second.log 2>&1; echo "second ended with $?"
        cat {store}/earlier.json; ls {store}/*.json | wc -l
    """
    printed, errors = in_namespace(f"""
        mount -t tmpfs -o size=8m none {out.parent}; mkdir -p {store}; echo kept > {store}/earlier.json
        {RUN} {out} > {tmp_path}/first.log 2>&1; echo "first ended with $?"
        cat {store}/earlier.json; find {out.parent} -name '.*-*' | wc -l
        {size("", again)}
    """)
    log = (tmp_path / "first.log").read_text()
    ended = ["first ended with 1", "kept", "0", *size([], ["second ended with 0", "kept", "5"])]
    assert printed.split("\n")[:-1] == ended, (printed, errors, log)
    said = [line for line in log.splitlines() if line.startswith("02_train_tga_zsr stopped in cell")]
    assert len(said) == 1 and re.search(
        r"OSError: .*TeCoA_seed0_.* cannot be written: .*No space left on device", said[0]
    ), log
    if size(False, True):
        assert "damaged" not in (tmp_path / "second.log").read_text()


@can_mount
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    out = tmp_path / "disk" / "out"
    out.mkdir(parents=True)
    (out / "earlier.txt").write_text("kept")
    printed, errors = in_namespace(
        f"mount --bind -o ro {out.parent} {out.parent} && mount -o remount,bind,ro {out.parent}; {RUN} {out}; echo $?"
    )
    assert printed.strip() == "2" and re.search(r"^error: .*Read-only file system: .*disk/", errors, re.M), errors
    assert "Traceback" not in errors and [path.name for path in out.iterdir()] == ["earlier.txt"]
