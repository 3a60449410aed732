"""README's "Add your own method", word for word: a cell in notebook 04, and nothing else."""

import json
import re
import shutil

import nbformat
import pandas as pd
import pytest
from conftest import size

from tgazsr_utils import profiles, runner
from tgazsr_utils.paths import ROOT


def the_readmes_cell():
    section = (ROOT / "README.md").read_text().split("## Your own method")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1).strip()


@pytest.mark.long
def test_a_cell_of_ten_lines_brings_a_method_into_the_leaderboard(tmp_path, monkeypatch, capfd):
    cell = the_readmes_cell()
    assert len(cell.splitlines()) <= 10
    folder, out, name = tmp_path / "notebooks", tmp_path / "out", "04_evaluate_16_datasets"
    shutil.copytree(ROOT / "notebooks", folder)
    monkeypatch.setattr(profiles, "FOLDER", folder)
    package = {path: path.read_bytes() for path in (ROOT / "tgazsr_utils").rglob("*.py")}
    given = {"methods": "[TeCoA, Anchored]", "output": out, "testdata": "[shapes, colours]"}
    given |= {"train_images": 16, "check_images": 0}
    arguments = ["smoke", "04", *(word for name, value in given.items() for word in ("-p", name, str(value)))]
    assert runner.main(arguments) == 2  # not before the cell is there
    assert "method 'Anchored' is unknown" in capfd.readouterr().err

    def with_cell(source):
        book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        book.cells.insert(2, nbformat.v4.new_code_cell(source))
        nbformat.write(book, folder / f"{name}.ipynb")
        assert runner.main(arguments) == 0, capfd.readouterr().err
        return sorted((out / "models").glob("Anchored_seed0_*.safetensors"))

    models = with_cell(cell)
    assert "Anchored: lr is 0.0007 here, not its own 0.0003 (-p lr null: each" in capfd.readouterr().out
    table = pd.read_csv(out / "tables" / "leaderboard.csv", index_col="method")
    assert set(table.index) == {"CLIP", "TeCoA", "Anchored"} and set(table.sets) == {"2 of 16"}
    records = [json.loads(path.read_text()) for path in tmp_path.glob("store/records/*.json")]
    assert sum(r["method"] == "Anchored" for r in records) == 2 * 2
    compared = pd.read_csv(out / "tables" / "differences.csv")
    assert len(compared) == 2 * 3 * 3
    assert len(models) == 1
    if size(False, True):  # without --long only as test_training has it
        assert len(with_cell(cell.replace('"L_emb", 1.0', '"L_emb", 2.0'))) == 2  # a change trains anew
    assert package == {path: path.read_bytes() for path in package}
