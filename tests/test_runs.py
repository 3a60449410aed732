"""One store, many views: what a run shows, what it reuses, and what its folder is called."""

import json
import os

import nbformat
import papermill
import pytest
from filelock import FileLock

from tgazsr_utils import profiles, runner, workbook
from tgazsr_utils.core.settings import FinetuneSettings
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.parameters import SettingsError, TrainNotebook, validate
from tgazsr_utils.paths import ROOT
from tgazsr_utils.profiles import cells_digest, default_parameters, folder_name, load_profile
from tgazsr_utils.runtime.finetuning import finetune
from tgazsr_utils.runtime.runs import Run
from tgazsr_utils.runtime.weights import find_weights, load_clip


def weights(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(name.encode())
    return folder / name


def test_a_run_shows_models_of_the_store_and_the_last_shown_is_the_latest(tmp_path):
    run, other = Run(tmp_path / "runs" / "mini"), Run(tmp_path / "runs" / "mini-Alpha-0.1")
    assert run.stored_models == other.stored_models == tmp_path / "runs" / "store" / "models"
    first, second = (weights(run.stored_models, f"TeCoA_seed0_{name}.safetensors") for name in ("a", "b"))
    for number, shown in enumerate((first, second, first)):
        os.utime(run.show(shown), ns=(0, number), follow_symlinks=False)
    other.show(second)
    assert find_weights("latest:TeCoA", run.models) == str(run.models / first.name)
    assert find_weights("latest:TeCoA", other.models) == str(other.models / second.name)
    assert (run.models / first.name).read_bytes() == first.read_bytes()
    with pytest.raises(ValueError, match="no model 'TGA-ZSR'"):
        find_weights("latest:TGA-ZSR", run.models)
    (tmp_path / "runs").rename(tmp_path / "moved")  # links are relative
    assert (tmp_path / "moved" / "mini" / "models" / first.name).read_bytes() == first.name.encode()


def test_where_no_links_can_be_made_a_model_is_copied(tmp_path, monkeypatch):
    run = Run(tmp_path / "mini")
    path = weights(run.stored_models, "TeCoA_seed0_a.safetensors")
    monkeypatch.setattr(type(path), "symlink_to", lambda *a: (_ for _ in ()).throw(OSError("not here")))
    shown = run.show(path)
    assert not shown.is_symlink() and shown.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "mini"),
        ({"Alpha": 0.1}, "mini-Alpha-0.1"),
        ({"seed": 3, "Alpha": 0.1, "device": "cpu", "processes": 2, "output": "x"}, "mini-Alpha-0.1-seed-3"),
        ({"methods": ["TeCoA", "../x y"]}, "mini-methods-TeCoA_.._x_y"),
    ],
)
def test_a_folder_is_named_after_what_differs(changes, name):
    assert folder_name("mini", changes) == name


def test_a_long_name_stays_short_and_of_its_own():
    names = {folder_name("mini", {"methods": ["x" * 200, i]}) for i in range(5)}
    assert len(names) == 5 and all(len(name) <= 80 for name in names)


def test_headless_and_by_hand_have_the_same_folder():
    """What is as it would be anyway is no difference."""
    profile = load_profile("mini")
    chosen, given = ["02_train_tga_zsr"], {"Alpha": 0.1, "seed": 0}
    assert runner.folder_of("mini", profile, chosen, given) == ROOT / "runs" / "mini-Alpha-0.1"
    assert runner.folder_of("mini", profile, chosen, {"seed": 0}) == ROOT / "runs" / "mini"
    assert runner.folder_of("mini", profile, chosen, given | {"output": "runs/mine"}) == ROOT / "runs" / "mine"
    profile = load_profile("photo").model_copy(update={"parameters": {"data_root": "no/such/folder"}})
    assert runner.folder_of("photo", profile, chosen, {"data_root": "docs"}) == ROOT / "runs" / "photo-data_root-docs"
    settings = validate(TrainNotebook, default_parameters("02_train_tga_zsr") | {"Alpha": 0.1})
    assert workbook.changes("02_train_tga_zsr", settings) == {"Alpha": 0.1}


def test_a_notebook_counts_by_its_cells_sources_and_tags(tmp_path, monkeypatch):
    """Not by what JupyterLab adds when it is opened, run or saved."""
    name = "01_attention_shift"
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    write = lambda: nbformat.write(book, tmp_path / f"{name}.ipynb")
    write()
    before = cells_digest(name)
    for number, cell in enumerate(cell for cell in book.cells if cell.cell_type == "code"):
        cell.execution_count = number
        cell.outputs = [nbformat.v4.new_output("stream", text="done")]
        cell.metadata["trusted"] = True
    book.metadata["widgets"] = {}
    write()
    assert cells_digest(name) == before
    book.cells[1].metadata["tags"] = []
    write()
    assert cells_digest(name) != before
    book.cells[1].metadata["tags"] = ["parameters"]
    book.cells[3].source += " "
    write()
    assert cells_digest(name) != before


def test_starting_over_has_a_store_of_its_own(tmp_path):
    run = Run(tmp_path / "mini")
    shared = run.store
    run.folder.mkdir()
    (run.folder / "manifest.json").write_text('{"notebooks": {}}')
    runner.start_over(run.folder)
    assert run.store == run.folder / "store" != shared
    (aside,) = tmp_path.glob("mini-before-*")
    assert (aside / "manifest.json").exists()


@pytest.mark.long  # the runner calls papermill too, from a working directory of its own
def test_plain_papermill_runs_a_notebook(tmp_path):
    """As anybody would call it; a relative folder is below the workbook."""
    given = {"test_images": 6, "shown_images": 1, "eps_list": [4.0], "test_numsteps": 1, "output": str(tmp_path / "a")}
    book = ROOT / "notebooks" / "01_attention_shift.ipynb"
    papermill.execute_notebook(book, tmp_path / "01.ipynb", given, progress_bar=False, kernel_name="python3", cwd=ROOT)
    assert (tmp_path / "a" / "figures" / "01_flip_roc.png").exists()


def test_two_runs_are_compared(tmp_path, smoke, capsys):
    """Parameters that differ, and paired differences; of a run with itself they are zero."""
    out = smoke.folder
    assert runner.main(["compare", str(out), str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("+0.0 [+0.0, +0.0]") >= 6 and " is " not in printed.split("minus")[0]
    other = tmp_path / "other"
    (other / "records").mkdir(parents=True)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["notebooks"]["04_evaluate_16_datasets"]["parameters"] |= {"lr": 0.5, "Alpha": 0.1}
    (other / "manifest.json").write_text(json.dumps(manifest))
    lines = (out / "records" / "04_evaluate_16_datasets.jsonl").read_text().splitlines()
    flipped = [json.loads(line) for line in lines if '"method":"TeCoA"' in line]
    for record in flipped:
        record["hits"] = "".join(f"{15 - int(digit, 16):x}" for digit in record["hits"])
    text = "".join(json.dumps(record) + "\n" for record in flipped)
    (other / "records" / "04_evaluate_16_datasets.jsonl").write_text(text)
    assert runner.main(["compare", str(out), str(other)]) == 0
    printed = capsys.readouterr().out
    assert f"04_evaluate_16_datasets: lr is 0.0007 in {out}, 0.5 in {other}" in printed
    assert f"Alpha is each method's own (TGA-ZSR: 0.08) in {out}, 0.1 in {other}" in printed
    rows = [line for line in printed.splitlines() if line.startswith("TeCoA")]
    assert len(rows) == 1 and "+0.0 [+0.0, +0.0]" not in rows[0]
    assert runner.main(["compare", str(out)]) == 2 and "compare takes two folders" in capsys.readouterr().err
    assert runner.main(["compare", str(out), str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_what_one_run_has_trained_another_only_loads(tmp_path, mini):
    settings = FinetuneSettings(
        Alpha=None, Beta=None, Distance_metric="l2", attention_variant="reference", epochs=1, batch_size=8, lr=1e-3,
        warmup_steps=1, train_eps=3, train_stepsize=3, train_numsteps=1, seed=0,
    )  # fmt: skip
    data, never = load_dataset("shapes", "train", n=16), lambda: pytest.fail("trained again")
    runs = [Run(tmp_path / name) for name in ("a", "b")]
    first, second = (finetune(mini, data, "TeCoA", settings, run.stored_models, **options).weights
                     for run, options in zip(runs, ({}, {"stop": never})))  # fmt: skip
    assert first == second and load_clip("mini-clip", runs[1].show(second), "cpu").training_record["method"] == "TeCoA"


def test_the_lock_is_of_a_runs_folder_and_not_of_the_store(tmp_path):
    with FileLock(tmp_path / ".a.lock"), pytest.raises(SettingsError, match="another run writes to"):
        runner.run("smoke", ["01"], {"output": str(tmp_path / "a")}, fresh=False)
