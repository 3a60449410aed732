"""What JupyterLab opens at, and what git sees of notebooks that were run and saved."""

import json
import shutil
import subprocess

import nbformat
import pytest
from jupyter_server.services.contents.largefilemanager import LargeFileManager
from traitlets.config import Config

from tgazsr_utils import clean_notebook, commands, start_page
from tgazsr_utils.paths import NOTEBOOKS, ROOT
from tgazsr_utils.profiles import load_profile

NAME = "04_evaluate_16_datasets"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The workbook's notebooks and filter in a repository of their own, as ``--lab`` sets it up."""
    root = tmp_path / "work book"
    (root / "tgazsr_utils").mkdir(parents=True)
    shutil.copytree(NOTEBOOKS, root / "notebooks", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / ".gitattributes", root)
    shutil.copy(ROOT / ".gitignore", root)
    shutil.copy(clean_notebook.__file__, root / "tgazsr_utils")
    monkeypatch.setattr(clean_notebook, "__file__", str(root / "tgazsr_utils" / "clean_notebook.py"))
    git(root, "init", "--quiet")
    clean_notebook.install(root)
    git(root, "add", ".")
    git(root, "-c", "user.name=n", "-c", "user.email=n@n", "commit", "--quiet", "-m", "all")
    return root


def git(root, *arguments):
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def save(root, change):
    """As JupyterLab saves it through its server, with the hook that ``--lab`` names."""
    hook = "tgazsr_utils.clean_notebook.after_save"
    config = Config({"FileContentsManager": {"post_save_hook": hook}})
    manager = LargeFileManager(root_dir=str(root), config=config)
    model = manager.get(f"notebooks/{NAME}.ipynb")
    change(model["content"])
    manager.save({"type": "notebook", "content": model["content"]}, f"notebooks/{NAME}.ipynb")
    return nbformat.read(root / "notebooks" / f"{NAME}.ipynb", as_version=4)


def run(book):
    """What running all cells leaves."""
    for number, cell in enumerate(cell for cell in book.cells if cell.cell_type == "code"):
        cell.execution_count, cell.metadata["execution"] = number, {"iopub.status.busy": "2026-01-02T03:04:05Z"}
        cell.outputs = [nbformat.v4.new_output("stream", text=f"öutput {number}\n")]
    book.cells[0].metadata["trusted"] = True
    book.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    book.metadata.language_info = {"name": "python", "version": "3.11.7", "codemirror_mode": {"name": "ipython"}}
    book.metadata.kernelspec.display_name = "Python 3"


def test_running_and_saving_leaves_git_clean_and_the_outputs_in_the_file(repository):
    saved = save(repository, run)
    assert git(repository, "status", "--short") == "" and git(repository, "diff") == ""
    assert all(cell.outputs for cell in saved.cells if cell.cell_type == "code")


def test_an_own_cell_is_seen_kept_and_committed_without_outputs(repository):
    def add(book):
        run(book)
        book.cells.insert(2, nbformat.v4.new_code_cell("mine = 1"))

    save(repository, add)
    assert git(repository, "status", "--short") == f" M notebooks/{NAME}.ipynb\n"
    changed = git(repository, "diff", "--stat")
    assert "1 file changed" in changed and "deletion" not in changed
    git(repository, "-c", "user.name=n", "-c", "user.email=n@n", "commit", "-qam", "mine")
    kept = git(repository, "show", f"HEAD:notebooks/{NAME}.ipynb")
    assert "mine = 1" in kept and "öutput" not in kept and git(repository, "status", "--short") == ""


def test_what_git_sees_of_each_notebook_is_the_notebook():
    for path in NOTEBOOKS.glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert clean_notebook.cleaned(clean_notebook.cleaned(text)) == clean_notebook.cleaned(text)
        book = nbformat.reads(text, as_version=4)
        run(book)
        assert clean_notebook.cleaned(nbformat.writes(book) + "\n") == clean_notebook.cleaned(text)
    for text in ("", "{", '{"cells": 3}', "[]", "no notebook\n"):
        assert clean_notebook.cleaned(text) == text


def test_without_a_repository_nothing_is_installed(tmp_path):
    clean_notebook.install(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_start_page_says_what_there_is_and_what_came_out_last(tmp_path):
    page = start_page.write(tmp_path, NOTEBOOKS).read_text(encoding="utf-8")
    assert "Nothing has run yet" in page
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert f"](../notebooks/{path.name}) | " in page
    minutes = load_profile("mini").minutes["06_does_it_hold"]
    assert f"Is the robustness that PGD with its published step shows real? | {minutes:.1f} |" in page
    for name, day, seconds in (("old", "2026-01-01", 600), ("new run", "2026-01-02", 300)):
        (tmp_path / "runs" / name / "answers").mkdir(parents=True)
        entry = {"status": "finished", "seconds": seconds, "started": f"{day}T00:00:00"}
        books = {"06_does_it_hold": entry, "03_ablations": {"status": "failed", "error": "stopped in cell 3"}}
        (tmp_path / "runs" / name / "manifest.json").write_text(json.dumps({"notebooks": books}))
        (tmp_path / "runs" / name / "answers" / "06_does_it_hold.txt").write_text(f"Yes: {name}.")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "manifest.json").write_text("{")
    page = start_page.write(tmp_path, NOTEBOOKS).read_text(encoding="utf-8")
    assert "## The last run: new run" in page and "shows real? | 5.0 |" in page
    assert "[06_does_it_hold](new%20run/notebooks/06_does_it_hold.ipynb): Yes: new run." in page
    assert "stopped in cell 3" in page and "Yes: old" not in page


def test_lab_opens_at_that_page_without_a_question_about_news(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "NOTEBOOKS", tmp_path / "notebooks")
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    usual = tmp_path / "usual"
    usual.mkdir()
    (usual / "overrides.json").write_text('{"theirs": {"kept": 1}}')
    started = []
    monkeypatch.setattr(commands, "_become", lambda module, arguments: started.append((module, arguments)) or 0)
    assert commands.main(["--lab", "--no-browser"]) == 0
    module, arguments = started[0]
    assert module == "jupyterlab" and "--no-browser" in arguments and "--LabApp.news_url=None" in arguments
    assert "--FileContentsManager.post_save_hook=tgazsr_utils.clean_notebook.after_save" in arguments
    assert f"--ServerApp.root_dir={tmp_path}" in arguments and (tmp_path / "runs" / "start.md").exists()
    assert "--LabApp.default_url=/lab/tree/runs/start.md?file-browser-path=/" in arguments
    kept = json.loads((start_page.settings(tmp_path, usual) / "overrides.json").read_text())
    assert kept["theirs"] == {"kept": 1} and kept["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
    monkeypatch.setattr(commands, "NOTEBOOKS", NOTEBOOKS)  # as a wheel has them, elsewhere
    assert commands.main(["--lab"]) == 0 and str(NOTEBOOKS) in started[1][1]
