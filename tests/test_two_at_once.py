"""Two runs: into one folder the second is refused, or both find the same whole files; one seed means one outcome."""

import multiprocessing

import pytest
import torch
from conftest import train_settings
from filelock import FileLock
from safetensors.torch import load_file

from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.records import RecordStore
from tgazsr_utils.runner import environment_of, main
from tgazsr_utils.runtime.finetuning import finetune
from tgazsr_utils.runtime.weights import load_clip

SETTINGS = train_settings(epochs=3)


def test_a_second_headless_run_into_a_folder_is_refused(tmp_path, capsys):
    with FileLock(tmp_path / ".out.lock"):  # as a run that goes on holds it
        assert main(["smoke", "01", "-p", "output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "another run writes to" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_torchrun_into_the_folder_of_a_run_is_refused(tmp_path, monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with FileLock(tmp_path / ".out.lock"):
        assert main(["smoke", "04", "-p", "output", str(tmp_path / "out")]) == 2
    assert "another run writes to" in capsys.readouterr().err


def work(folder):
    """Trains and measures, as a notebook does."""
    torch.set_num_threads(1)
    clip = load_clip("mini-clip", "mini", "cpu")
    tuned = finetune(clip, load_dataset("shapes", "train", n=20), "TGA-ZSR", SETTINGS, folder / "models")
    sets = [load_dataset(key, "test", n=20) for key in ("shapes", "letters")]
    attack = AttackSettings(test_eps=3, test_stepsize=1, test_numsteps=3)
    return [
        (r.key, r.hits)
        for r in Bench(RecordStore(folder / "records")).measure(tuned.clip, sets, attack, method="TGA-ZSR")
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One that this process has filled alone, one that two others have filled together; and what all three found."""
    alone, shared = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("shared")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        both = pool.map_async(work, [shared, shared], chunksize=1)
        found = [work(alone), *both.get()]
    return [alone, shared], found


def test_the_same_seed_in_another_process_gives_the_same_weights_and_records(folders):
    """Same machine, same number of threads."""
    folders, _ = folders
    records = [
        [r.model_dump(exclude={"time", "seconds"}) for r in RecordStore(folder / "records").all()] for folder in folders
    ]
    assert records[0] == records[1] and len(records[0]) == 4
    assert all(
        r["training"]["settings"]["seed"] == 0 and r["data"] and r["pixels"] and r["code"] and r["model"]
        for r in records[0]
    )
    weights = [load_file(next((folder / "models").glob("*.safetensors"))) for folder in folders]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    said = environment_of("cpu")
    assert (
        said["threads"] == torch.get_num_threads()
        and "versions, devices or thread counts may change results by rounding" in said["note"]
    )


def test_two_notebooks_that_train_and_measure_the_same_end_alike(folders):
    (_, shared), (alone, *both) = folders
    assert both == [alone, alone]
    assert len(list((shared / "records").glob("*.json"))) == 4
    assert len(list((shared / "models").glob("*"))) == 2  # the weights, and the emptied folder of unfinished work
