"""What the command line says of what there is and what would run, and its other name, ``python -m tgazsr_utils``."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import run_all

from tgazsr_utils import commands, listing, profiles, runner
from tgazsr_utils.core.attacks import ATTACKS
from tgazsr_utils.core.objectives import OBJECTIVES
from tgazsr_utils.parameters import NOTEBOOKS
from tgazsr_utils.paths import ROOT
from tgazsr_utils.profiles import PROFILES, default_parameters, settings_of
from tgazsr_utils.runtime import plugins


def package(*arguments, cwd=ROOT, **environment):
    command = [sys.executable, "-m", "tgazsr_utils", *map(str, arguments)]
    own = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=own)


def add_notebook(folder, name, *sources, tags=("parameters",)):
    """One of these cells, of which the first has tags."""
    folder.mkdir(exist_ok=True)
    made = [nbformat.v4.new_code_cell(source) for source in sources]
    made[0].metadata["tags"] = list(tags)
    nbformat.write(nbformat.v4.new_notebook(cells=made), folder / f"{name}.ipynb")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder for notebooks of one's own, beside those of the workbook."""
    monkeypatch.setattr(profiles, "FOLDER", tmp_path / "notebooks")
    return tmp_path / "notebooks"


def test_each_profile_notebook_method_attack_and_parameter_is_listed_with_its_meaning(capsys):
    assert runner.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= listing.WIDTH
    sections = dict(re.findall(r"^(\w+) \(.*\)\n((?:  .*\n)+)", said, re.MULTILINE))
    there = {name: set(re.findall(r"^  (\S+)", text, re.MULTILINE)) for name, text in sections.items()}
    assert there["profiles"] == {path.stem for path in PROFILES.glob("*.yaml")}
    assert set(NOTEBOOKS) <= there["notebooks"]
    assert there["methods"] == set(OBJECTIVES) and there["attacks"] == set(ATTACKS)
    assert there["parameters"] == {name for model in NOTEBOOKS.values() for name in model.model_fields}
    assert "Does robustness learnt on one set carry over" in sections["notebooks"]
    for name, meaning in listing.SECTIONS["parameters"][1]():
        assert not meaning.startswith("("), f"{name} has no comment where it is defined"
    assert "  Distance_metric       of two attention maps (l2 or l1 or cos; 02-06)\n" in sections["parameters"]


def test_a_section_alone_and_what_plugins_and_notebooks_of_ones_own_add(own, tmp_path, capsys, monkeypatch):
    add_notebook(own, "07_mine", "speed = 3  # of the wheel\nlr = None")
    own.joinpath("08_broken.ipynb").write_text("{")
    (tmp_path / "mine.py").write_text(
        "from tgazsr_utils import objective\nobjective('Mine')(lambda step, settings: [])\n"
    )
    monkeypatch.setattr(plugins, "_loaded", {})
    monkeypatch.delitem(OBJECTIVES, "Mine", raising=False)
    try:
        assert runner.main(["--list", "methods", "-p", "plugins", str(tmp_path / "mine.py")]) == 0
    finally:
        OBJECTIVES.pop("Mine", None)
    said = capsys.readouterr().out
    assert "  Mine                  not described\n" in said and "parameters (" not in said
    assert runner.main(["--list", "parameters"]) == 0
    assert "  speed                 of the wheel (any value; 07)\n" in capsys.readouterr().out
    assert runner.main(["--list", "notebooks"]) == 0
    assert "08_broken.ipynb is no notebook" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_says_what_would_run_and_how_long_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["smoke", "01", "02", "-p", "output", str(out)]
    assert runner.main([*arguments, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())
    assert "01_attention_shift would run, as it has not run here yet; " in said
    assert "store holds 0 models (FT-Clean 0, FT-Adv. 0, " in said
    batch = runner.batch_of("smoke", ["01", "02"], {"output": str(out)})
    parts = {name: inputs for name, inputs, _ in batch.plan({"notebooks": {}})}
    entry = {"status": "finished", "seconds": 90.0, "started": "2026-01-02T03", "files": {}}
    books = {name: entry | {"inputs": parts[name], "parameters": batch.parameters[name]} for name in parts}
    books["02_train_tga_zsr"]["inputs"] = "other"
    (out / "notebooks").mkdir(parents=True)
    (out / "notebooks" / "01_attention_shift.ipynb").write_text("")
    (out / "manifest.json").write_text(json.dumps({"notebooks": books, "profile": "smoke"}))
    (tmp_path / "store" / "models").mkdir(parents=True)
    for name in ("FARE_seed0_ab12", "FARE_seed1_ab12", "FARE-RobustVLM_seed0_ab12"):
        (tmp_path / "store" / "models" / f"{name}.safetensors").touch()
    files = sorted(tmp_path.rglob("*"))
    assert runner.main([*arguments, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "01_attention_shift done already" in said and "1.5 minutes in all" in said
    assert re.search("02_train_tga_zsr would run, as its cells, .* changed; 1.5 minutes on 2026-01-02 in", said)
    assert "holds 3 models" in said and "FARE 2, FARE-RobustVLM 1," in said
    assert runner.main([*arguments, "--dry-run", "-p", "seed", "3"]) == 0
    assert "would run, as seed changed;" in " ".join(capsys.readouterr().out.split())
    # of another run of the profile, where this folder has none
    assert runner.main(["smoke", "02", "-p", "output", str(tmp_path / "other"), "--dry-run"]) == 0
    assert f"1.5 minutes on 2026-01-02 in {out}" in " ".join(capsys.readouterr().out.split())
    assert runner.main([*arguments, "--dry-run", "--fresh"]) == 0
    assert capsys.readouterr().out.count("--fresh starts over") == 2
    assert files == sorted(tmp_path.rglob("*"))


def test_a_dry_run_fetches_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "resolve", lambda path: tmp_path / path)
    for profile in ("quick", "verify"):
        assert runner.main([profile, "--dry-run", "-p", "output", str(tmp_path / "out")]) == 0
        assert "would run" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "sources, given, message",
    [
        (["speed = 3"], ["-p", "spead", "2"], "unknown parameter 'spead': did you mean speed"),
        (["lr = 0.1"], ["-p", "lr", "fast"], "07_mine: parameter lr = 'fast': input should be a valid number"),
        (["x = 8 / 255"], [], "07_mine: its cell of parameters says 'x = 8 / 255', which is no name = value"),
        (["x = (\n"], [], "07_mine: line 1 of its cell of parameters is no Python"),
        (["x = 1"], ["-p", "lr", "1"], "parameter 'lr' is one of .*02_train_tga_zsr.*, not of what is to run"),
    ],
)
def test_parameters_of_a_notebook_of_ones_own_are_those_of_its_cell(own, tmp_path, capsys, sources, given, message):
    add_notebook(own, "07_mine", *sources)
    assert runner.main(["smoke", "07", "-p", "output", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_two_notebooks_of_one_number_are_named(own, capsys):
    add_notebook(own, "07_mine", "x = 1")
    add_notebook(own, "07_yours", "x = 1")
    assert runner.main(["smoke", "07", "--dry-run"]) == 2
    assert "notebook '07' may be 07_mine or 07_yours; say its name" in capsys.readouterr().err
    assert runner.main(["smoke", "07_mine", "--dry-run"]) == 0


def test_a_notebook_of_ones_own_takes_what_the_one_takes_that_it_opens(own):
    name = "08_copy"
    add_notebook(
        own,
        name,
        "methods = ['TeCoA']\nmine = 3",
        "%time x = 1\nbook = open_workbook('04_evaluate_16_datasets', globals())",
    )
    assert settings_of(name).model_fields.keys() - NOTEBOOKS["04_evaluate_16_datasets"].model_fields.keys() == {"mine"}
    usual = default_parameters("04_evaluate_16_datasets")
    assert default_parameters(name) == usual | {"methods": ["TeCoA"], "mine": 3}
    with pytest.raises(ValueError, match="08_copy: method 'no' is unknown"):
        runner.batch_of("smoke", ["08"], {"methods": ["no"]})


def test_a_notebook_of_ones_own_runs_by_its_number_after_those_of_the_profile(own, tmp_path, capfd):
    add_notebook(
        own,
        "07_mine",
        "speed = 3\noutput = None",
        "import pathlib\npathlib.Path(output, 'made').write_text(str(speed))",
    )
    add_notebook(own, "08_without", "print('no parameters')", tags=())
    arguments = ["smoke", "8", "07", "-p", "speed", "4", "-p", "output", str(tmp_path / "out")]
    assert runner.main(arguments) == 0, capfd.readouterr().err
    assert (tmp_path / "out" / "made").read_text() == "4"
    assert [*runner.batch_of("smoke", ["07", "00"], {}).parameters][-1] == "07_mine"
    assert runner.main(arguments) == 0 and capfd.readouterr().out.count("done already") == 2
    add_notebook(own, "07_mine", "speed = 3\noutput = None", "1 + 1")
    assert runner.main([*arguments, "--dry-run"]) == 0
    assert "07_mine               would run, as its cells" in capfd.readouterr().out


@pytest.mark.parametrize("start", [run_all, package])
def test_verbs_are_those_of_run_all_and_of_the_package(start, tmp_path):
    shown = start("--help")
    assert shown.returncode == 0 and shown.stdout.startswith("Usage: ") and "-p name value" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 120
    refused = start("--lab", "--test")
    assert refused.returncode == 2 and refused.stderr == "error: --test and --lab are two calls\n"


@pytest.mark.long
def test_other_verbs_of_the_package(tmp_path):
    listed = package("--list", "attacks", cwd=tmp_path)
    assert listed.returncode == 0 and "  pgd  " in listed.stdout
    collected = package("--test", "--collect-only", "-n", "0", "tests/test_machine.py", cwd=tmp_path)
    assert collected.returncode == 0 and "test_machine.py" in collected.stdout
    lab = package("--lab", "--version", cwd=tmp_path)
    assert lab.returncode == 0 and re.match(r"\d+\.\d+", lab.stdout)


@pytest.mark.parametrize("level", ["1", "2"])
def test_python_without_assertions_and_docstrings_runs_and_helps(level, tmp_path):
    assert package("--help", PYTHONOPTIMIZE=level).stdout == commands.__doc__
    given = ("-p", "ablations", "[seeds]", "-p", "methods", "[TeCoA]", "-p", "output", tmp_path / "out")
    done = package("smoke", "03", *given, PYTHONOPTIMIZE=level)
    assert done.returncode == 0, done.stderr
    assert "03_seeds.png" in done.stdout and "How much is chance?" in (tmp_path / "out" / "index.html").read_text()
