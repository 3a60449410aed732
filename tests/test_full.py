"""The published protocol end to end, with random weights on miniatures of all 16 sets. Plumbing, no result.

With --long its model is ViT-B/32 and all three notebooks run, else the mini-CLIP and the last one.
"""

import json
from pathlib import Path

import pandas as pd
from conftest import size
from miniatures import write_all

from tgazsr_utils.runner import main


def test_the_full_profile_runs_on_miniatures_of_the_sixteen_sets(tmp_path, monkeypatch, capfd):
    root, out = write_all(tmp_path / "sets"), tmp_path / "out"
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    here = str(Path(__file__).parent)
    lines = (
        f"import sys; sys.path.append({here!r}); from tgazsr_utils.core.libraries import torchvision; torchvision()\n"
    )
    lines += "import miniatures; miniatures.without_checksums()\n"
    (startup / "00.py").write_text(lines)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    given = {"data_root": root, "output": out, "pretrained": "null", "epochs": 1, "batch_size": 4, "warmup_steps": 1}
    given |= {"test_numsteps": 2, "quick_eval": 3, "device": "cpu", "methods": "[TeCoA, TGA-ZSR]"}
    given |= size({"arch": "mini-clip"}, {"eps_list": "[1]"})
    arguments = [part for name, value in given.items() for part in ("-p", name, str(value))]
    assert main(["full", *size(["04"], []), *arguments]) == 0, capfd.readouterr().err
    assert "plumbing check, not a result" in capfd.readouterr().out

    table = pd.read_csv(out / "tables" / "leaderboard.csv", index_col="method", dtype=str)
    assert set(table.index) == {"CLIP", "TeCoA", "TGA-ZSR"}
    assert set(table.sets) == {"16"} and set(table.world) == {"plumbing check, not a result"}
    records = [json.loads(path.read_text()) for path in tmp_path.glob("store/records/*.json")]
    sixteen = [r for r in records if r["dataset"] != "tinyImageNet" or r["n"] == 3]
    assert len(sixteen) == 3 * 16 * 2 and all(2 <= r["n"] <= 3 and not r["published"] for r in sixteen)
    available = {r["dataset"]: r["available"] for r in sixteen}
    assert set(table.images) == {f"{16 * 3:,} of {sum(available.values()):,}"}
    html = (out / "html" / "04_evaluate_16_datasets.html").read_text()
    assert "plumbing check, not a result" in html and ">ours</th>" not in html
