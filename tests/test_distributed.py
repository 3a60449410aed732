"""Several processes on the CPU: the outcome is that of one."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial

import psutil
import pytest
import torch
from conftest import check_same_training, disagreements, only_long, train_settings

from tgazsr_utils import open_workbook, together
from tgazsr_utils.core.attacks import ATTACKS
from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.objectives import Objective, Term
from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.measuring import measure as evaluation
from tgazsr_utils.measuring.ablations import Sweep, plan, variant
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.records import RecordStore
from tgazsr_utils.parameters import SettingsError, TrainNotebook, validate
from tgazsr_utils.paths import ROOT
from tgazsr_utils.runner import main
from tgazsr_utils.runtime import processes
from tgazsr_utils.runtime.finetuning import finetune
from tgazsr_utils.runtime.fingerprints import fingerprint
from tgazsr_utils.runtime.weights import load_clip

SETTINGS = train_settings(Beta=0.0, epochs=2)


@pytest.fixture(scope="module")
def train_set():
    return load_dataset("shapes", "train", n=17)  # the last batch of an epoch has a single image


def centred_squares(step, settings):
    """Of another kind: it encodes images by itself, and mixes the batch."""
    pooled = step.clip.encode_image(step.adversarial).pooled + step.clean_tokens.pooled
    return [Term("spread", 1e-3, (pooled - pooled.mean(0)).square().sum())]


def towards_the_original(step):
    """A training attack that asks for tokens itself."""
    target = step.original_tokens.pooled + step.clean_tokens.pooled.detach()
    return lambda tokens: -(tokens.pooled - target).square().sum()


@pytest.mark.parametrize(
    "method",
    [
        "TGA-ZSR",
        "FT-Adv.",
        "Vision-based-grad",
        Objective("Mine", centred_squares, towards_the_original),
        "AdvFLYP",
        *only_long("PMG-AFT", "FARE", "SAFT"),
    ],
)
def test_two_processes_train_as_one_does(mini, train_set, tmp_path, method):
    settings = SETTINGS.model_copy(update={"lr": 1e-2}) if method == "PMG-AFT" else SETTINGS
    one, two = (finetune(mini, train_set, method, settings, tmp_path / str(n), number_of_processes=n) for n in (1, 2))
    assert one.weights.name == two.weights.name
    check_same_training(one, two, mini)
    assert not list((tmp_path / "2" / "unfinished").glob("*")) and not list((tmp_path / "2").glob("*.ckpt"))


@pytest.mark.parametrize("protocol", ["last", "worst"])
def test_two_processes_measure_what_one_does(mini, tmp_path, protocol):
    sets = [load_dataset(key, "test", n=25) for key in ("shapes", "letters")]
    attack = AttackSettings(test_eps=3, test_stepsize=1, test_numsteps=3)
    stores = [RecordStore(tmp_path / str(n)) for n in (1, 2)]
    one, two = (
        Bench(store, n).measure(mini, sets, attack, protocol, method="CLIP") for n, store in enumerate(stores, start=1)
    )
    assert [(r.key, r.n) for r in one] == [(r.key, r.n) for r in two]
    assert all(disagreements(*pair) <= 1 for pair in zip(one, two))
    assert {r.attack for r in two} == {"none", "pgd-3"} and two[1].correct < two[0].correct
    assert not list((tmp_path / "2" / "unfinished").glob("*"))


def test_two_processes_measure_apgd_as_one_does_whatever_fits(mini, tmp_path, monkeypatch):
    monkeypatch.setitem(ATTACKS, "apgd", ATTACKS["apgd"]._replace(batch=8))
    data, attack = (
        load_dataset("shapes", "test", n=20),
        AttackSettings(attack="apgd", test_eps=1.5, test_stepsize=0, test_numsteps=5),
    )
    found = []
    for count, fits in ((1, 64), (1, 4), (2, 64)):
        monkeypatch.setattr(evaluation, "batch_that_fits", lambda clip, fits=fits: fits)
        store = RecordStore(tmp_path / f"{count} {fits}")
        found.append(Bench(store, count).measure(mini, [data], attack, method="CLIP")[1])
    assert all(disagreements(found[0], other) <= 1 for other in found[1:])


def test_a_large_set_is_measured_in_slices_by_whoever_is_free(mini, tmp_path, monkeypatch):
    """As one process measures it at once; a slice that another process has left is not measured again."""
    data, attack = load_dataset("letters", "test", n=40), AttackSettings(test_eps=3, test_stepsize=1, test_numsteps=2)
    whole = Bench(RecordStore(tmp_path / "whole")).measure(mini, [data], attack, method="CLIP")
    monkeypatch.setattr(evaluation, "SLICE", 16)
    for count in (1, 2):
        store = RecordStore(tmp_path / str(count))
        m = evaluation.Measurement(mini, data, attack)
        assert m.slices == [range(0, 16), range(16, 32), range(32, 40)]
        evaluation.answer([m], m.slices[1], [store.folder / "unfinished" / f"{m.key}_16.safetensors"])
        asked = []
        noted = lambda *a, asked=asked, batches=ImageSet.batches: asked.append([len(c) for c in a[1]]) or batches(*a)
        with monkeypatch.context() as patch:
            patch.setattr(ImageSet, "batches", noted)
            found = Bench(store, count).measure(mini, [data], attack, method="CLIP")
        assert [(r.key, r.pixels) for r in found] == [(r.key, r.pixels) for r in whole]
        assert all(disagreements(*pair) <= 1 for pair in zip(found, whole))
        assert not list((store.folder / "unfinished").iterdir())
        assert asked == ([[16], [16], [8]] if count == 1 else [])  # of two processes, none is this one


def test_random_weights_are_the_same_in_every_process():
    assert fingerprint(load_clip("mini-clip", None, "cpu")) == fingerprint(load_clip("mini-clip", None, "cpu"))
    assert fingerprint(load_clip("mini-clip", None, "cpu", seed=1)) != fingerprint(load_clip("mini-clip", None, "cpu"))


def test_what_goes_wrong_in_one_of_them_is_said(mini, train_set, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    broken = Objective(
        "Broken", lambda step, settings: [Term("CE", 1.0, float("nan") * step.cross_entropy(step.adversarial_tokens))]
    )
    with pytest.raises(
        FloatingPointError,
        match="one of 2 processes failed: FloatingPointError: loss of Broken is not finite at step 0",
    ):
        finetune(mini, train_set, broken, SETTINGS, tmp_path, number_of_processes=2)
    assert not list(tmp_path.glob("*.safetensors"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_jobs_are_shared_out_by_what_they_cost(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    parts = []
    for number in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda number=number: number)
        parts.append((processes.own_part("abcdef", [9, 2, 2, 2, 2, 1]), processes.own_part("abc")))
    assert parts == [(["a"], ["a", "c"]), (["b", "c", "d", "e", "f"], ["b"])]


def test_as_many_processes_as_suit(monkeypatch):
    """One a processor where a small model is on the CPU; a GPU is for one."""
    monkeypatch.setattr(processes, "allowed_cpus", lambda: 3)
    monkeypatch.setattr(sys, "platform", "linux")
    for there, device, number in ((False, "auto", 3), (False, "mps", 1), (True, "auto", 1), (True, "cpu", 1)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        settings = validate(TrainNotebook, NOTEBOOK | {"processes": "auto", "device": device})
        assert settings.number_of_processes == number and settings.model_options["waiting"] == (number > 1)
    monkeypatch.setattr(processes, "allowed_cpus", lambda: 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.that_suit("cpu") == processes.MOST_PROCESSES
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes.that_suit("cpu") == 1


def test_devices_are_shared_out():
    for device in ("cpu", "cuda:1"):
        with pytest.raises(
            SettingsError, match=f"device = '{device}': each of several processes takes a device of its"
        ):
            validate(TrainNotebook, NOTEBOOK | {"processes": 2, "device": device})
    assert validate(TrainNotebook, NOTEBOOK | {"processes": 2, "device": "cuda"}).model_options["waiting"]
    options = validate(TrainNotebook, NOTEBOOK | {"processes": 2}).model_options
    clip = load_clip("mini-clip", "mini", **options)
    assert clip.device.type == "cpu"  # it waits there
    assert clip.numerics.device == ("cuda" if torch.cuda.is_available() else "cpu")


NOTEBOOK = SETTINGS.model_dump() | {
    "arch": "mini-clip",
    "data_root": None,
    "output": "unused",
    "pretrained": "mini",
    "dataset": "shapes",
    "train_images": 4,
    "test_images": 4,
    "methods": ["TeCoA"],
    "test_eps": 1,
    "test_stepsize": 1,
    "test_numsteps": 1,
}


@pytest.mark.long
def test_torchrun_fills_the_folder_that_a_notebook_then_only_reads(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    given = {"output": str(out), "testdata": "[shapes, letters]", "methods": "[TGA-ZSR]", "check_images": "2"}
    asked = ["smoke", "04", *(word for item in given.items() for word in ("-p", *item))]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tgazsr_utils.runner"]
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"cwd": ROOT, "env": os.environ | own, "capture_output": True, "text": True}
    together = subprocess.run([sys.executable, *start, *asked], **options)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("TGA-ZSR seed 0: 4/4") == 1  # from one of them
    with monkeypatch.context() as patch:
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}.items():
            patch.setenv(name, value)
        assert main([*asked, "-p", "processes", "2"]) == 2
    assert "under torchrun each process takes its own device" in capsys.readouterr().err
    stored = lambda: {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.*")}
    made = stored()
    assert sum(path.suffix == ".json" for path in made) == 2 * 2 * 2 + 2  # and a check of each model
    leaderboard = (out / "tables" / "leaderboard.csv").read_bytes()
    assert main(asked) == 0, capsys.readouterr().err
    assert (out / "notebooks" / "04_evaluate_16_datasets.ipynb").exists()
    assert (out / "tables" / "leaderboard.csv").read_bytes() == leaderboard
    assert stored() == made


@pytest.mark.long
def test_the_processes_of_a_run_are_started_once_for_all_its_notebooks(tmp_path, capfd, monkeypatch):
    """What they leave is what one process of one thread does, and the notebooks then only read it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def outcome(count):
        folder, store = tmp_path / str(count) / "run", tmp_path / str(count) / "store"
        of_run = {"testdata": "[shapes, letters]", "methods": "[TeCoA, TGA-ZSR]"}
        words = [word for item in of_run.items() for word in ("-p", *item)]
        assert main(["smoke", "02", "04", *words, "-p", "output", str(folder), "-p", "processes", str(count)]) == 0
        books = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["notebooks"]
        assert [book["parameters"]["processes"] for book in books.values()] == [count, count]
        names = {path.relative_to(store).as_posix() for path in store.rglob("*.*")}
        return names, (folder / "tables" / "leaderboard.csv").read_bytes(), capfd.readouterr().out

    (alone, table, _), (shared, same, shown) = outcome(1), outcome(2)
    assert alone == shared and table == same
    assert shown.count("=== 02_train_tga_zsr, in 2 processes") == 1
    assert shown.count("=== 04_evaluate_16_datasets, in 2 processes") == 1
    before, after = shown.split("=== [1/2 · 02_train_tga_zsr")
    assert "evaluate TGA-ZSR" in before and "evaluate TGA" not in after and "IPython" not in before


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_stopped_stops_its_processes(sent, tmp_path):
    """And under nohup, where SIGHUP is ignored, it ends when they do."""
    waits = "import os, signal, sys; from tgazsr_utils.runtime.processes import run_in_own_session; "
    waits += "signal.signal(signal.SIGINT, signal.default_int_handler); "  # as of a shell's foreground
    waits += "signal.signal(signal.SIGHUP, signal.SIG_IGN); " if sent == signal.SIGHUP else ""
    child = "import os, time; print(os.getpid(), os.getsid(0), flush=True); time.sleep(3600)"
    waits += f"run_in_own_session([sys.executable, '-c', {child!r}])"
    parent = subprocess.Popen(
        [sys.executable, "-c", waits], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    number, session = map(int, parent.stdout.readline().split())
    assert session == number != os.getsid(0)  # what closes the terminal does not reach it
    parent.send_signal(sent)
    if sent == signal.SIGHUP:
        os.kill(number, signal.SIGTERM)
    assert parent.wait() == {signal.SIGTERM: -15, signal.SIGINT: -2, signal.SIGHUP: 0}[sent]
    assert not psutil.pid_exists(number)


def test_fresh_processes_leave_signals_and_folders_as_they_were(monkeypatch, tmp_path, capfd):
    """What goes wrong in them is one line."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    handlers = [signal.getsignal(number) for number in processes._SIGNALS]
    assert processes.launch_anew(2, int, "7") == 7
    with pytest.raises(RuntimeError, match="^one of 2 processes failed: ValueError: invalid literal") as error:
        processes.launch_anew(2, int, "x")
    assert [signal.getsignal(number) for number in processes._SIGNALS] == handlers
    assert "\n" not in str(error.value) and not capfd.readouterr().err
    assert not list(tmp_path.glob("torchelastic*")) and "TORCHELASTIC_SIGNALS_TO_HANDLE" not in os.environ
    monkeypatch.setattr(together, "take_part", interrupted)
    with pytest.raises(RuntimeError, match="it was interrupted"):
        together._take_part_on_one_thread({})


def test_where_a_runs_processes_fail_its_notebooks_start_their_own(capfd):
    assert together.ahead({"no_such_notebook": {"processes": 3}, "nor_this": {"processes": 2}}) == {}
    said = capfd.readouterr().err
    assert re.fullmatch("one of 3 processes failed: .*no_such_notebook.*; the notebooks go on from there\n", said)


def test_what_torchruns_processes_cannot_do(monkeypatch):
    together.check({"02_train_tga_zsr": {"device": "cuda", "processes": "auto"}}, fresh=False)  # as full has it
    for name, values in (("02_train_tga_zsr", {"device": "cpu"}), ("00_pretrain_mini_clip", {})):
        with pytest.raises(SettingsError, match="under torchrun each process takes its own device"):
            together.check({name: values}, fresh=False)


def test_the_processes_of_a_notebook_are_started_once(mini, tmp_path, monkeypatch):
    """What is left of whole rounds of trainings shares its batches. Bits depend on the number of threads."""
    started, launch = [], processes.launch
    monkeypatch.setattr(processes, "launch", lambda *a: started.append(a[0]) or launch(*a))
    given = {"train_images": 12, "batch_size": 4, "warmup_steps": 1, "test_images": 4, "test_numsteps": 1}
    given |= {"testdata": ["shapes", "letters"], "check_images": 0}
    methods = ["TeCoA", "FT-Clean", "FT-Adv."]

    def outcome(count):
        output = str(tmp_path / str(count) / "run")
        book = open_workbook("04_evaluate_16_datasets", given | {"processes": count, "output": output})
        trainings = [partial(book.tune, method) for method in methods]
        work = lambda: [book.measure(train().clip, method, 0) for method, train in zip(methods, trainings)]
        book.ahead(work, trainings)
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / str(count) / "store").rglob("*.*")}
        records = [(r.method, r.dataset, r.attack) for part in work() for r in part]
        assert count == 1 or made == {path: path.stat().st_mtime_ns for path in made}  # all that was to do
        return records, [train().clip for train in trainings]

    alone, together = outcome(1), outcome(2)
    assert started == [2] and alone[0] == together[0]
    weights = lambda clip: torch.cat([value.flatten() for value in clip.visual.state_dict().values()])
    for one, other in zip(alone[1], together[1], strict=True):
        assert (weights(one) - weights(other)).norm() < 1e-2 * (weights(one) - weights(mini)).norm()


def test_a_learning_rate_too_high_is_left_out_by_several_processes_too(tmp_path, monkeypatch, capfd):
    """Whichever trained it ahead; a person reads of it once they are done."""
    given = {"train_images": 8, "batch_size": 4, "warmup_steps": 0, "testdata": ["shapes"], "test_numsteps": 1}
    given |= {"ablations": ["learning_rate"], "methods": ["FARE"], "lr": 1e-4, "lr_list": [1e-4, 1e3], "overrides": {}}
    book = open_workbook("03_ablations", given | {"processes": 2, "output": str(tmp_path / "run")})
    tests = book.tests(2)
    sweep = Sweep(book.original, book.train, tests, tests, book.run.stored_models, book.bench(tests))
    rates = plan(book.settings)
    book.ahead(lambda: sweep.run("learning_rate", rates["learning_rate"]), sweep.trainings(rates))
    assert "left out: gradient of FARE is not finite at step 1" in capfd.readouterr().out
    assert [v.training.lr for v, _ in sweep.run("learning_rate", rates["learning_rate"])] == [1e-4]


def test_a_sweep_asks_for_models_in_the_same_order_in_all_processes(tmp_path):
    """Though each has trained another one of them ahead; if not, they wait for each other for ever."""
    given = {"train_images": 8, "batch_size": 4, "warmup_steps": 1, "testdata": ["shapes"], "test_numsteps": 1}
    book = open_workbook("06_does_it_hold", given | {"processes": 2, "output": str(tmp_path / "run")})
    tests = book.tests(2)
    sweep = Sweep(book.original, book.train, tests, tests, book.run.stored_models, book.bench(tests))
    variants = [variant(book.settings, {"model": method}, method, own=True) for method in ("TeCoA", "TGA-ZSR")]
    late = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the processes wait for each other"))
    signal.alarm(600)
    try:
        book.ahead(lambda: sweep.run("methods", variants), sweep.trainings({"methods": variants}))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, late)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.*")}
    done = sweep.run("methods", variants)
    assert [[r.attack for r in records] for _, records in done] == 2 * [["none", "pgd-1"]]
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.*")}  # all that was to do
