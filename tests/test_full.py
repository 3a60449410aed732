"""The published protocol end to end, with random weights on miniatures of all 16 sets. Plumbing, no result.

With --long its model is ViT-B/32 and all three notebooks run, else the mini-CLIP and the last one.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import size
from miniatures import write_all

from tgazsr_utils.runner import main


def run_on_miniatures(profile, tmp_path, monkeypatch, notebooks, **given):
    """A profile, cut down, on a data root with miniatures of the sixteen sets; is it a success?"""
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    here = str(Path(__file__).parent)
    lines = (
        f"import sys; sys.path.append({here!r}); from tgazsr_utils.core.libraries import torchvision; torchvision()\n"
    )
    lines += "import miniatures; miniatures.without_checksums()\n"
    (startup / "00.py").write_text(lines)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    given |= {"data_root": write_all(tmp_path / "sets"), "output": tmp_path / "out", "pretrained": "null", "epochs": 1}
    given = {"batch_size": 4, "warmup_steps": 1, "test_numsteps": 2, "quick_eval": 3} | given
    arguments = [part for name, value in given.items() for part in ("-p", name, str(value))]
    return main([profile, *notebooks, "-p", "device", "cpu", *arguments]) == 0


@pytest.mark.long
def test_the_quick_profile_runs_and_fetches_nothing_that_is_there(tmp_path, monkeypatch, capfd):
    assert run_on_miniatures("quick", tmp_path, monkeypatch, [], arch="mini-clip", eps_list="[1]"), (
        capfd.readouterr().err
    )
    assert "to download" not in capfd.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "tables" / "leaderboard.csv", index_col="method", dtype=str)
    assert set(table.index) == {"CLIP", "TeCoA", "TGA-ZSR"} and set(table.sets) == {"8 of 16"}


def test_the_full_profile_runs_on_miniatures_of_the_sixteen_sets(tmp_path, monkeypatch, capfd):
    images, steps = size((3, 2), (2, 1))  # an image takes ViT-B/32 seconds
    given = {"methods": "[TeCoA, TGA-ZSR]", "quick_eval": images, "test_numsteps": steps}
    given |= size({"arch": "mini-clip"}, {"eps_list": "[1]"})
    assert run_on_miniatures("full", tmp_path, monkeypatch, size(["04"], []), **given), capfd.readouterr().err
    out = tmp_path / "out"
    assert "plumbing check, not a result" in capfd.readouterr().out

    table = pd.read_csv(out / "tables" / "leaderboard.csv", index_col="method", dtype=str)
    assert set(table.index) == {"CLIP", "TeCoA", "TGA-ZSR"}
    assert set(table.sets) == {"16"} and set(table.world) == {"plumbing check, not a result"}
    records = [json.loads(path.read_text()) for path in tmp_path.glob("store/records/*.json")]
    sixteen = [r for r in records if r["dataset"] != "tinyImageNet" or r["n"] == images]
    assert len(sixteen) == 3 * 16 * 2 and all(2 <= r["n"] <= images and not r["published"] for r in sixteen)
    available = {r["dataset"]: r["available"] for r in sixteen}
    assert set(table.images) == {f"{16 * images:,} of {sum(available.values()):,}"}
    html = (out / "html" / "04_evaluate_16_datasets.html").read_text()
    assert "plumbing check, not a result" in html and ">ours</th>" not in html
