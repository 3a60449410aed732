"""SIGKILL at random moments, again and again: what was done is kept, and the end is that of an undisturbed run.

``--kills N`` kills as often as that; ``--kills-seed S`` repeats a run (the seed is printed).
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import time

import pytest
import torch
from conftest import own_environment, run_all, size, train_settings
from safetensors.torch import load_file

from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.measuring import measure as evaluation
from tgazsr_utils.measuring import trust as sanity
from tgazsr_utils.measuring.ablations import Sweep, plan
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.records import RecordStore
from tgazsr_utils.parameters import AblationNotebook, validate
from tgazsr_utils.paths import ROOT
from tgazsr_utils.profiles import default_parameters
from tgazsr_utils.runner import main
from tgazsr_utils.runtime.finetuning import finetune
from tgazsr_utils.runtime.weights import load_clip

SETTINGS = train_settings(epochs=4)
fork = multiprocessing.get_context("fork")  # a child has all that is imported


def work(folder):
    """Training, measuring and a sweep, as notebooks 02 to 04 do; saves as often as it can."""
    os.setsid()
    torch.set_num_threads(1)
    evaluation.SAVE_EVERY, evaluation.batch_that_fits = 0.0, lambda clip: 4
    sanity.STEPS, sanity.LARGE_STEPS, sanity.QUERIES = (1, 2), 4, 5
    clip, train = load_clip("mini-clip", "mini", "cpu"), load_dataset("shapes", "train", n=24)
    sets = [load_dataset(key, "test", n=16) for key in ("shapes", "letters")]
    tuned = finetune(clip, train, "TGA-ZSR", SETTINGS, folder / "models")
    attack = AttackSettings(test_eps=3, test_stepsize=1, test_numsteps=3)
    bench = Bench.checking(RecordStore(folder / "records"), attack, sets, 8)
    bench.measure(tuned.clip, sets, attack, method="TGA-ZSR")
    parameters = default_parameters("03_ablations") | {
        "train_images": 24,
        "epochs": 1,
        "batch_size": 8,
        "ablations": ["loss_parts"],
    }
    sweep = Sweep(clip, train, sets, sets, folder / "models", Bench(bench.store))
    settings = validate(AblationNotebook, parameters | {"output": str(folder), "test_numsteps": 2})
    sweep.run("loss_parts", plan(settings)["loss_parts"][:2])


def start(folder):
    child = fork.Process(target=work, args=(folder,))
    child.start()
    return child


def outcome(folder):
    """Records but for what tells of time, and tuned weights; not the hidden files that a killed process was writing."""
    store = RecordStore(folder / "records")
    records = {
        r.key: r.model_dump(exclude={"time", "seconds"}) for r in [*store.all(), *store.checks.all()]
    }  # raises for what is half written
    return records, {path.name: load_file(path) for path in (folder / "models").glob("[!.]*.safetensors")}


def same(first, second):
    equal = lambda a, b: set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
    return (
        first[0] == second[0]
        and set(first[1]) == set(second[1])
        and all(equal(first[1][n], second[1][n]) for n in first[1])
    )


def test_killed_at_random_moments_and_resumed_it_ends_as_if_nothing_had_been(tmp_path, request, capsys):
    kills, seed = request.config.option.kills or size(2, 25), request.config.option.kills_seed
    chance = random.Random(seed)
    child, started = start(tmp_path / "whole"), time.monotonic()
    child.join()
    duration, whole = time.monotonic() - started, outcome(tmp_path / "whole")
    assert child.exitcode == 0 and len(whole[0]) == 13 and len(whole[1]) == 3
    done, rounds, killed = 0, 0, False
    while done < kills:
        folder, rounds, before = tmp_path / f"round {rounds}", rounds + 1, {}
        while True:
            child = start(folder)
            child.join(chance.uniform(0.02, 0.5) * duration)
            if killed := child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                done += 1
            child.join()
            records = outcome(folder)[0]
            assert before.items() <= records.items()  # none is lost or changed
            before = records
            if not killed:
                break
        assert child.exitcode == 0 and same(outcome(folder), whole)
        assert not list((folder / "models").glob("*.ckpt")) and not list(
            (folder / "records" / "unfinished").glob("[!.]*")
        )
    with capsys.disabled():
        print(f"\n{done} kills in {rounds} runs, seed {seed}: each run ended as the undisturbed one", flush=True)


@pytest.mark.long
def test_the_whole_run_killed_and_started_again(tmp_path, request, capsys):
    """run_all.sh, which becomes the runner: while its notebook starts, trains, or measures; with --long, thrice."""
    chance = random.Random(request.config.option.kills_seed)
    given = {"methods": "[TGA-ZSR]", "train_images": "80", "epochs": "2"}
    asked = ["smoke", "02", *(word for item in given.items() for word in ("-p", *item)), "-p", "output"]
    options = {"cwd": ROOT, "env": own_environment(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    landmarks = ["run/manifest.json", "store/models/*.ckpt", "store/records/*.json"]
    landmarks = size([chance.choice(landmarks)], landmarks)
    assert main([*asked, str(tmp_path / "whole" / "run")]) == 0
    for landmark in landmarks:
        process = subprocess.Popen(
            ["bash", "run_all.sh", *asked, str(tmp_path / "parts" / "run")], text=True, **options
        )
        while process.poll() is None and not list((tmp_path / "parts").glob(landmark)):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        assert process.poll() in (None, 0), process.communicate()[0]
        process.kill()
        process.communicate()
    last = run_all(*asked, tmp_path / "parts" / "run")
    assert last.returncode == 0, last.stderr
    assert same(outcome(tmp_path / "parts" / "store"), outcome(tmp_path / "whole" / "store"))
    manifest = json.loads((tmp_path / "parts" / "run" / "manifest.json").read_text())
    assert {entry["status"] for entry in manifest["notebooks"].values()} == {"finished"}
    with capsys.disabled():
        print(f"\nrun_all.sh killed at {', '.join(landmarks)}: it ended as the undisturbed one", flush=True)
