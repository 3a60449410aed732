import html
import json
import os
import re
import shutil
import subprocess
import venv

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch
from conftest import own_environment, run_all, size
from PIL import Image

from tgazsr_utils import load_clip, open_workbook, profiles, runner, save_clip
from tgazsr_utils.core.images import PLUMBING
from tgazsr_utils.core.libraries import open_clip
from tgazsr_utils.datasets.__main__ import copy_samples
from tgazsr_utils.display import style
from tgazsr_utils.parameters import SettingsError
from tgazsr_utils.paths import ROOT
from tgazsr_utils.profiles import default_parameters, given_value, load_profile, parameters_of
from tgazsr_utils.runner import fingerprint, main
from tgazsr_utils.runtime.fingerprints import fingerprint as fingerprint_of


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nonsense"], "profile 'nonsense' is unknown; there are: .*mini.*smoke"),
        (["mini", "09"], "notebook '09' is unknown; there are: 00, 01"),
        (["mini", "-p", "alpa", "1"], "unknown parameter 'alpa': did you mean Alpha"),
        (["mini", "01", "-p", "Alpha", "1"], "parameter 'Alpha' is one of 02_train_tga_zsr, .*not of what is to run"),
        (["mini", "00", "-p", "sets", "[a]"], "00_pretrain_mini_clip: .*sets are folders of data_root"),
        (["mini", "-p", "Alpha", "abc"], "02_train_tga_zsr: parameter Alpha = 'abc': input should be a valid number"),
        (["mini", "-p", "test_eps", "-3"], "parameter test_eps = -3: .*greater than or equal to 0"),
        (["mini", "-p", "data_root", "no/such/folder"], "parameter data_root = 'no/such/folder': .*no such folder"),
        (["mini", "-p", "device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["mini", "-p", "lr", "[1, 2"], "parameter lr = '\\[1, 2' is not valid YAML"),
        (["mini", "-p", "lr", 600 * "["], "parameter lr = .* is not valid YAML"),
        (["mini", "-p", "lr", "2001-13-01"], "parameter lr = '2001-13-01' is not valid YAML"),
        (["mini", "-p", "data_root", "~nobody-here/sets"], "path '~nobody-here/sets': "),
        (["mini", "-p", "methods", "[TGA]"], "02_train_tga_zsr: method 'TGA' is unknown; there are: FT-Clean"),
        (["mini", "-p", "dataset", "shape"], "01_attention_shift: image set 'shape' is not there; there are: shapes"),
        (["mini", "-p", "testdata", "[shapes, nowhere]"], "03_ablations: image set 'nowhere' is not there"),
        (
            ["mini", "-p", "pretrained", "none.pt"],
            "01_attention_shift: 'none.pt' is neither a file .*/none.pt. nor a name known",
        ),
        (["mini", "-p", "arch", "ViT-X"], "01_attention_shift: arch 'ViT-X' is unknown to open_clip"),
        (["mini", "05", "-p", "tuned", "latest:FARE"], "05_.*: tuned = 'latest:FARE': no model 'FARE' in"),
        (["mini", "01", "-p", "pretrained", "latest:pretrained"], "pretrained = 'latest:pretrained': no model"),
        (["mini", "-p", "testdata", "foo"], "parameter testdata = 'foo': .*list of sets, 'published'"),
        (
            ["mini", "00", "-p", "prompt", "A {}" + 40 * " dim"],
            "00_.*: prompt 'A circle dim.*' is longer than the 32 tok",
        ),
        (
            ["mini", "04", "-p", "prompt", "itap of {}"],
            "04_.*: method Comp-TGA: prompt 'itap of .*' has no known negation",
        ),
        (
            ["mini", "03", "-p", "prompt", "A {}" + 28 * " a"],
            "03_.*: method Comp-TGA: prompt 'This is not a .* 32 tokens",
        ),
        (
            ["mini", "03", "-p", "test_eps_list", "[300]"],
            "test_eps_list: parameter test_eps = 300.0: .*less than or equal to 255",
        ),
        (["mini", "02", "-p", "test_eps", "4/100"], "test_eps = '4/100': .*it is in 1/255, such as 8 or '8/255'"),
        (["mini", "05", "-p", "tuned", "latest:/x"], "tuned = 'latest:/x': no model '/x'"),
        (["mini", "-p", "preprocess", "crop"], "preprocess = 'crop' is for image files; the mini-world"),
        (["mini", "00", "-p", "test_fraction", "0.5"], "test_fraction = 0.5 is for image files; the mini-world"),
        (["mini", "02", "-p", "on_bad_image", "leave_out"], "on_bad_image = 'leave_out' is for image files; the mini"),
        (["mini", "02", "04", "-p", "square_queries", "100"], "square_queries = 100 has no effect: attack is 'pgd'"),
        (["mini", "04", "-p", "attack", "autoattack", "-p", "test_stepsize", "1"], "no effect: AutoAttack chooses its"),
        (["mini", "04", "-p", "attack", "square", "-p", "test_numsteps", "9"], "no effect: attack square has its own"),
        (["mini", "05", "-p", "norm", "l2"], "norm = 'l2' has no effect: the explorer attacks by PGD in linf"),
        (
            ["mini", "03", "-p", "ablations", "distance", "-p", "Beta_list", "[1.0]"],
            "no effect: .* ablations alpha_beta",
        ),
        (["mini", "04", "-p", "methods", "[TeCoA]", "-p", "Alpha", "1"], "no effect: none of the methods compares att"),
        (["mini", "04", "-p", "methods", "[FT-Clean]", "-p", "train_eps", "1"], "no effect: FT-Clean trains on clean"),
        (["mini", "02", "-p", "optimizer", "adamw", "-p", "momentum", "0.5"], "no effect: optimizer is 'adamw'"),
        (["mini", "02", "-p", "labels", "cat"], "'labels' is one of 01_attention_shift, 05_.*, not of what is to run"),
        (["mini", "01", "-p", "labels", "[]"], "01_.*: parameter labels = \\[\\]: .*at least 1 item"),
        (["mini", "01", "-p", "labels", "dog, cat, dog"], "parameter labels = .*: an entry is there twice"),
        (["mini", "05", "-p", "labels", "dog,, cat"], "parameter labels.1 = '': a label is empty"),
        (["mini", "01", "-p", "labels", "[3]"], "parameter labels.0 = 3: .*valid string"),
        (["mini", "01", "-p", "labels", "cat" + 40 * " dim"], "01_.*: prompt 'This is a photo of a cat .* the 32 tok"),
        (["mini", "03", "-p", "models", "{a: mini}"], "parameter 'models' is one of 04_evaluate_16_datasets, not of"),
        (["mini", "04", "-p", "models", "{a: mini, a: mini}"], "parameter models = .*: the name 'a' is there twice"),
        (["mini", "04", "-p", "models", "{TeCoA: mini}"], "04_.*: models: 'TeCoA' is a method's name, too"),
        (["mini", "04", "-p", "models", "{a: none.pt}"], "04_.*: 'none.pt' is neither a file .*/none.pt. nor a name"),
        (["mini", "04", "-p", "models", "{a: 'latest:X'}"], "04_.*: models: a = 'latest:X': no model 'X' in"),
        (
            ["mini", "04", "-p", "models", "{a: {arch: ViT-B-32, pretrained: openai, eps: 1}}"],
            "04_.*: parameter models = .*: 'a' is .*; it should be weights",
        ),
        (["mini", "04", "-p", "models", "{a: {arch: ViT-X, pretrained: openai}}"], "arch 'ViT-X' is unknown"),
        (["mini", "04", "-p", "methods", "[]", "-p", "epochs", "3"], "epochs = 3 has no effect: there is no method to"),
        (["mini", "02", "-p", "methods", "[]"], "02_.*: parameter methods = ..: list should have at least 1 item"),
        ([5000 * "x"], "profile 'xxx.* is unknown; there are: .*mini"),
    ],
)
def test_bad_calls_stop_with_one_line_and_leave_nothing(arguments, message, tmp_path, capsys):
    assert main([*arguments, "-p", "output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


LONG = [
    300 * "a",
    1000 * "word ",
    2500 * "a/",
    200 * "\U0001f408",
    "/" + 300 * "a",
    "latest:" + 300 * "a",
    "a\0b",
    "a\udcff",
]


@pytest.mark.parametrize("name", ["data_root", "output", "weights", "pretrained", "tuned", "dataset", "arch", "device"])
def test_long_text_is_never_taken_for_a_file_name(name, tmp_path, capsys):
    notebooks = ["00"] if name == "weights" else ["01"]
    for text in LONG:
        given = {"output": str(tmp_path / "out")} | {name: text}
        assert main(["mini", *notebooks, *(word for pair in given.items() for word in ("-p", *pair))]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 2000
        assert "Errno" not in error and repr(text)[1:20] in error
        assert main(["compare", text, text]) == 2 and "Errno" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_prompts_of_every_set_are_counted_before_anything_is_trained(photo_root, tmp_path, capsys):
    long = "_".join("abcdefghijklmnopqrstuvwxyzabcdefgh")
    shutil.copytree(photo_root / "animals", photo_root / "more")
    (photo_root / "more" / "images" / "002_green-x").rename(photo_root / "more" / "images" / long)
    given = {"data_root": photo_root, "dataset": "animals", "output": tmp_path / "out"}
    assert main(["mini", "02", "04", *(word for name in given for word in ("-p", name, str(given[name])))]) == 2
    error = capsys.readouterr().err
    assert re.search("04_.*: prompt 'This is a photo of a a b c .*' is longer than the 32 tokens that mini-clip", error)
    assert not (tmp_path / "out").exists()
    values = default_parameters("04_evaluate_16_datasets") | {name: str(value) for name, value in given.items()}
    with pytest.raises(ValueError, match="longer than the 32 tokens"):
        open_workbook("04_evaluate_16_datasets", values)
    open_workbook("04_evaluate_16_datasets", values | {"testdata": ["animals", "tiny"]})


def test_classes_of_the_same_tokens_are_told(photo_root, tmp_path, capsys):
    (photo_root / "tiny" / "words.txt").write_text("n01\tred fox\nn02\tRed  Fox\nn03\tabsent\n")
    values = default_parameters("02_train_tga_zsr") | {"data_root": str(photo_root), "output": str(tmp_path / "out")}
    open_workbook("02_train_tga_zsr", values | {"dataset": "animals"})
    assert "cannot be told apart" not in capsys.readouterr().out
    for _ in range(2):
        open_workbook("02_train_tga_zsr", values | {"dataset": "tiny"})
        told = capsys.readouterr().out
        assert told.count("tiny: classes that cannot be told apart, as their prompts are the same tokens") == 1
        assert "of a red fox'" in told and "of a red  fox'" in told


def test_labels_join_the_classes_of_a_set(photo_root, tmp_path, capsys):
    given = {
        "data_root": str(photo_root / "animals"),
        "dataset": ".",
        "test_fraction": 1,
        "output": str(tmp_path / "out"),
    }
    given |= {"labels": "tea pot, Red fox,dog", "prompt": "a photo of a {}", "tuned": None}
    for number, name in ((1, "01_attention_shift"), (2, "05_alpha_beta_explorer")):
        data = open_workbook(name, default_parameters(name) | given).test
        assert data.class_names == ("green x", "red fox", "tea pot", "dog") and len(data) == 20
        assert data.key == "animals"
        assert data.prompts[1:3] == ("a photo of a red fox", "a photo of a tea pot")
        assert capsys.readouterr().out.count("images to tune on are those to test on") == number - 1
    name, mini_world = "01_attention_shift", {"labels": ["heart", "dog"], "output": str(tmp_path / "out")}
    data = open_workbook(name, default_parameters(name) | mini_world).test
    assert data.class_names.count("heart") == 1 and data.class_names[-1] == "dog" and data.prompts[-1].endswith(" dog")


@pytest.mark.long
def test_the_clip_profile_runs_on_photographs(tmp_path, capfd):
    copy_samples(tmp_path / "samples")
    given = {"data_root": tmp_path / "samples", "arch": "mini-clip", "pretrained": "mini", "output": tmp_path / "out"}
    given |= {"eps_list": "[1]", "device": "cpu"}
    assert main(["clip", *(word for name in given for word in ("-p", name, str(given[name])))]) == 0
    said = capfd.readouterr().out
    assert "8 images of samples, photographs" in said and "has neither masks nor boxes" in said
    assert not (tmp_path / "out" / "figures" / "01_energy_inside.png").exists()
    assert len(list((tmp_path / "out" / "figures").glob("0*.[ph][nt][gm]*"))) == 3 + 4


@pytest.mark.parametrize("line", ["test_eps = 8 / 255", "import os", "a, b = (1, 2)", "seed"])
def test_a_cell_of_parameters_that_is_no_list_of_values_is_refused_by_its_line(line, tmp_path, monkeypatch):
    name = "01_attention_shift"
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    book.cells[1].source += f"\n{line}"
    nbformat.write(book, tmp_path / f"{name}.ipynb")
    with pytest.raises(SettingsError, match=f"cell of parameters says '{re.escape(line)}', which is no name = value"):
        default_parameters(name)


@pytest.mark.parametrize("text", ["a: b", "a #1", "007", "yes", "[a]", "'quoted'", "a\nb", "-x"])
def test_what_is_text_is_taken_as_it_is(text):
    assert given_value("output", text) == given_value("prompt", text) == text
    assert given_value("output", "null") is None and given_value("dataset", "null") == "null"
    assert (
        given_value("seeds", "[0, 1]") == [0, 1]
        and given_value("lr", "null") is None
        and given_value("nothing", "3") == 3
    )


@pytest.mark.parametrize("folder", ["with a file", "the workbook", "home of the workbook"])
def test_fresh_moves_only_what_a_run_has_left(folder, tmp_path, capsys, monkeypatch):
    out = {"with a file": tmp_path / "out", "the workbook": tmp_path, "home of the workbook": tmp_path.parent}[folder]
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    if folder != "with a file":
        (out / "manifest.json").write_text('{"notebooks": {}}')
    assert main(["smoke", "02", "--fresh", "-p", "output", str(out)]) == 2
    assert "is not such a folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-p", "x", "1", "mini", "04"],
        ["mini", "-p", "x", "1", "04"],
        ["--fresh", "04", "-p", "x", "1"],
        ["04", "--fresh", "-p", "x", "1"],
    ],
)
def test_options_come_in_any_order(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "run", lambda *call: seen.append(call) or 0)
    assert main(arguments) == 0 and seen == [("mini", ["04"], {"x": 1}, "--fresh" in arguments)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mini", "--frsh"], "unrecognized arguments: --frsh; there are a profile, notebook numbers, -p NAME VALUE"),
        (["-p", "Alpha"], "argument -p: expected 2 arguments; there are"),
        (["--lab", "--test"], "--test and --lab are two calls"),
    ],
)
def test_unknown_options_get_one_line(arguments, message):
    done = run_all(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_the_tests_start_with_options_in_any_order():
    done = run_all("--collect-only", "--long", "-n", "0", "--test", "tests/test_machine.py")
    assert done.returncode == 0 and "test_machine.py" in done.stdout


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_what_another_launcher_has_left_is_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(name, "4")
    assert main(["smoke", "01", "-p", "output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name} = '4' is set") and "torchrun" in error and error.count("\n") == 1


LEFT = {  # by launchers, hosts of notebooks and odd machines
    "HOME": "/dev/null/home",
    "XDG_RUNTIME_DIR": "/dev/null/runtime",
    "JUPYTER_RUNTIME_DIR": "/dev/null/runtime",
    "IPYTHONDIR": "/dev/null/ipython",
    "LC_ALL": "C",
    "PYTHONIOENCODING": "ascii",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "CUDA_VISIBLE_DEVICES": "",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "nowhere",
    "MASTER_PORT": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "PMI_SIZE": "4",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_MIXED_PRECISION": "fp8",
}


@pytest.mark.long
def test_a_run_minds_no_odd_environment(tmp_path):
    """Nor a folder for temporary files that is deeper than the path of a socket may be."""
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    own = own_environment() | LEFT | {"TMPDIR": str(deep), "PYTHONPATH": f"/nowhere{os.pathsep}{ROOT}"}
    command = ["bash", ROOT / "run_all.sh", "smoke", "01", "-p", "test_images", "2", "-p", "output", tmp_path / "out"]
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "figures").glob("*.png"))) == 4


def test_run_all_passes_errors_on():
    shown = subprocess.run(["bash", ROOT / "run_all.sh", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "-p name value" in shown.stdout


def test_an_environment_that_was_killed_while_it_was_made_is_made_again(tmp_path):
    """Its python is there before pip is; without an index, what follows says what it looks for."""
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    venv.create(tmp_path / ".venv", with_pip=False)
    plain = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    done = subprocess.run(
        ["bash", tmp_path / "run_all.sh"],
        env=plain | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode != 0
        and "No matching distribution found for torch" in done.stderr
        and "No module named pip" not in done.stderr
    )


BUILDS = {  # --torch-backend that can be had -> what is asked for then, and what is said
    "auto": (["--torch-backend auto"], []),
    "cpu": (
        ["--torch-backend auto", "--torch-backend cpu"],
        ["no build of torch==", "for this GPU's driver: the CPU's"],
    ),
    "none": (["--torch-backend auto", "--torch-backend cpu", "pip install"], ["may be that for CUDA (several GB)"]),
    "none, no GPU": (["--torch-backend auto", "pip install"], ["may be that for CUDA (several GB)"]),
    "given": (["pip install --quiet --index-url https://builds.example/cpu"], []),
}


@pytest.mark.parametrize("there", BUILDS)
def test_the_build_of_pytorch_is_the_drivers_or_that_of_an_index_that_is_given(there, tmp_path):
    """With a python that notes what it is asked to install, and has nothing there yet; and a GPU's nvidia-smi."""
    for name in ("run_all.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python, own = tmp_path / ".venv" / "bin" / "python", tmp_path / "bin"
    python.parent.mkdir(parents=True)
    python.write_text(f"""#!/bin/bash
        echo "$@" >> {tmp_path}/asked
        case "$*" in *--no-index*|*torch-backend*) case "$*" in *"torch-backend {there}"*) exit 0;; esac; exit 1;; esac
    """)
    python.chmod(0o755)
    own.mkdir()
    if gpu := "no GPU" not in there:
        (own / "nvidia-smi").write_text("#!/bin/sh\n")
        (own / "nvidia-smi").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment |= {"TORCH_INDEX": "https://builds.example/cpu" if there == "given" else ""}
    environment["PATH"] = f"{own}:{environment['PATH']}"
    done = subprocess.run(["bash", tmp_path / "run_all.sh", "mini"], env=environment, capture_output=True, text=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert done.returncode == 0 and asked[-1] == "-m tgazsr_utils mini"
    builds = [line for line in asked if " torch==" in line and "--no-index" not in line]
    wanted, told = BUILDS[there]
    assert len(builds) == len(wanted) and all(part in line for part, line in zip(wanted, builds)), builds
    assert all(part in done.stderr for part in told)
    assert ("PyTorch, as there is a GPU for CUDA (several GB) ..." in done.stderr) == (gpu and there != "given")


def test_a_failing_notebook_stops_the_run_and_leaves_its_copy(photo_root, tmp_path, capfd):
    broken = photo_root / "animals" / "images" / "017.red_Fox" / "3.png"
    broken.write_bytes(b"not an image")
    out = tmp_path / "out"
    given = ["-p", "data_root", str(photo_root), "-p", "dataset", "animals", "-p", "output", str(out)]
    assert main(["smoke", "02", "04", *given]) == 1
    error = capfd.readouterr().err
    assert "02_train_tga_zsr stopped in cell 3: ValueError: image" in error and "3.png cannot be read" in error
    assert "04_evaluate" not in error
    executed = nbformat.read(out / "notebooks" / "02_train_tga_zsr.ipynb", as_version=4)
    assert any(o.output_type == "error" for c in executed.cells if c.cell_type == "code" for o in c.outputs)
    entry = json.loads((out / "manifest.json").read_text())["notebooks"]["02_train_tga_zsr"]
    assert entry["status"] == "failed" and "3.png" in entry["error"]
    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_the_fingerprint_follows_every_input(tmp_path, monkeypatch):
    parameters = parameters_of("01_attention_shift", load_profile("mini"), "runs/x", {})
    first = fingerprint("01_attention_shift", parameters, "")
    own = {"pretrained": "data/mini_clip.safetensors"}
    assert fingerprint("01_attention_shift", parameters | own, "") == fingerprint(
        "01_attention_shift", parameters | {"pretrained": str(ROOT / own["pretrained"]), "output": "elsewhere"}, ""
    )  # a checkout that is copied elsewhere
    assert fingerprint("01_attention_shift", parameters | {"seed": 1}, "") != first
    assert fingerprint("01_attention_shift", parameters, "other") != first
    words = parameters | {"prompt": str(tmp_path), "dataset": 300 * "a"}  # which name no files
    worded = fingerprint("01_attention_shift", words, "")
    (tmp_path / "new.png").write_bytes(b"x")
    assert fingerprint("01_attention_shift", words, "") == worded
    monkeypatch.setattr(runner, "code_version", lambda: "other")
    assert fingerprint("01_attention_shift", parameters, "") != first


def test_the_whole_workbook_runs_in_the_smoke_profile(smoke, capfd):
    """This test alone may run it again."""
    out, given, log, _ = smoke
    manifest = json.loads((out / "manifest.json").read_text())
    assert [e["status"] for e in manifest["notebooks"].values()] == ["finished"] * 7
    assert {"torch", "open_clip_torch"} <= set(manifest["notebooks"]["02_train_tga_zsr"]["environment"]["packages"])
    assert "TGA-ZSR seed 0: 4/4" in log and "16 sets" in log  # progress reached the log
    for name in manifest["notebooks"]:
        assert (out / "html" / f"{name}.html").stat().st_size > 10_000
        executed = nbformat.read(out / "notebooks" / f"{name}.ipynb", as_version=4)
        assert all(c.execution_count for c in executed.cells if c.cell_type == "code")
    figures = {p.stem for p in (out / "figures").glob("*.png")}
    assert figures == {p.stem for p in (out / "figures").glob("*.svg")}
    assert len(figures) + len(list((out / "figures").glob("05_*.html"))) >= 25
    told = {p.stem: Image.open(p).text for p in (out / "figures").glob("*.png")}
    assert len({text["Title"] for text in told.values()}) == len(told)  # a question each
    for stem, text in told.items():
        assert text["Title"].endswith("?") and text["Description"].startswith(text["Title"]), stem
        assert re.search(r"\d", text["Description"]) and "nan" not in text["Description"], stem
    pages = {p.stem[:2]: html.unescape(p.read_text(encoding="utf-8")) for p in (out / "html").glob("*.html")}
    assert all(text["Description"] in pages[stem[:2]] for stem, text in told.items())
    explorer = nbformat.read(out / "notebooks" / "05_alpha_beta_explorer.ipynb", as_version=4)
    panels = [
        output.data
        for cell in explorer.cells
        for output in cell.get("outputs", [])
        if output.output_type == "execute_result"
    ]
    assert len(panels) == 4 and all(
        "text/html" in data and not any("widget" in kind for kind in data) for data in panels
    )
    assert "TGA-ZSR" in log.rsplit("robust", 1)[1]  # the closing table
    assert len(list((out.parent / "store" / "records").glob("*.json"))) >= 3 * 16 * 2

    assert "mini-world" in log.rsplit("robust", 1)[1]

    assert main(given) == 0
    assert capfd.readouterr().out.count("done already") == 7
    table = out / "tables" / "leaderboard.csv"
    whole = table.read_text()
    table.write_text(whole.replace("TeCoA,", "TeCoA,9"))
    assert main(given) == 0
    printed = capfd.readouterr().out
    assert (
        printed.count("done already") == 6
        and "04_evaluate_16_datasets: runs again, as tables/leaderboard.csv is not as it was written" in printed
    )
    assert table.read_text() == whole
    assert main([*given, "--fresh", "-p", "seed", "x"]) == 2  # refused before anything is moved
    assert out.exists() and not [path for path in out.parent.iterdir() if "-before-" in path.name]


@pytest.mark.long
def test_the_photo_profile_runs_on_folders_of_photographs(photo_root, tmp_path_factory, capfd):
    """Without --long, only what is looked at, and 01 with the pre-trained model in place of the tuned one."""
    out = tmp_path_factory.mktemp("photo") / "out"  # not below the folder of image sets
    small = {"steps": 3, "batch_size": 4, "epochs": 1, "test_images": 4, "test_numsteps": 1, "warmup_steps": 1}
    given = {"data_root": photo_root, "dataset": "tiny", "output": out, "eps_candidates": "[1.0]", **small}
    given |= size({"tuned": "latest:pretrained", "check_images": 0}, {})
    notebooks = size(["00", "01", "04"], [])
    assert main(["photo", *notebooks, *(word for item in given.items() for word in ("-p", item[0], str(item[1])))]) == 0
    log = capfd.readouterr().out
    assert "pre-train mini-clip: 3/3" in log and "2 sets" in log
    assert re.search(r"\n.* 2  +8 +photographs", log)  # sets, images, world
    assert (out / "models" / "pretrained_mini-clip.safetensors").exists()
    assert (out / "figures" / "01_energy_inside.png").exists()  # the boxes were found


def test_an_html_copy_that_fails_does_not_fail_a_finished_notebook(tmp_path, monkeypatch, capfd):
    def fails(executed, target, links):
        raise RuntimeError("no template\nis there")

    monkeypatch.setattr("tgazsr_utils.display.pages.export", fails)
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: None)
    runner.execute("01_attention_shift", {}, tmp_path)
    assert "no HTML copy of 01_attention_shift could be made: no template is there" in capfd.readouterr().err


def test_missing_published_sets_are_all_named_with_what_fetches_them(photo_root, tmp_path, capsys):
    given = {"testdata": "[cifar10, STL10, dtd]", "methods": "[]", "arch": "mini-clip", "pretrained": "mini"}
    given |= {"data_root": str(photo_root)}
    arguments = ["full", "04", *(word for item in given.items() for word in ("-p", *item))]
    assert main([*arguments, "-p", "output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    fetch = f"python -m tgazsr_utils.datasets fetch cifar10 STL10 dtd --root {photo_root}"
    assert f"'cifar10', 'STL10', 'dtd' are not there ({fetch})" in error
    assert "there are: animals, tiny" in error and error.count("\n") == 1


def test_where_weights_cannot_be_had_a_profile_goes_on_with_others_and_says_so(capsys):
    profile, chosen = load_profile("verify"), ["04_evaluate_16_datasets"]
    there = profile.model_copy(update={"parameters": profile.parameters | WEIGHTS | {"pretrained": "mini"}})
    assert runner.with_weights(there, chosen, {}) is there and not capsys.readouterr().out
    for gone in (WEIGHTS | {"pretrained": "no/such.pt"}, WEIGHTS | {"models": {"a": "no/such.pt"}}):
        wanted = profile.model_copy(update={"parameters": profile.parameters | gone})
        found = runner.with_weights(wanted, chosen, {})
        said = capsys.readouterr().out
        assert said.startswith("PLUMBING CHECK, NOT A RESULT: other weights stand in, as pretrained 'no/such.pt' ")
        assert said.count("\n") == 1
        values = parameters_of(chosen[0], found, "runs/x", {"test_images": 3})
        assert (values["pretrained"], values["data_root"], values["test_images"]) == ("mini", None, 3)
        assert runner.with_weights(wanted, chosen, {"pretrained": "mini"}) is wanted  # what is given is not replaced
    assert load_profile("mini").without_weights == {}


WEIGHTS = {"arch": "mini-clip", "pretrained": "mini", "models": {"a": "mini-tga-zsr"}}


def test_what_takes_over_without_weights_is_stamped_wherever_it_is_shown(tmp_path, capsys, monkeypatch):
    """The cells of notebook 04, as profile verify runs them then."""
    plt.close("all")
    titles, save = [], style.save
    monkeypatch.setattr(style, "save", lambda figure, *rest: titles.append(figure.get_label()) or save(figure, *rest))
    profile = load_profile("verify")
    small = {"test_images": 2, "test_numsteps": 1, "output": str(tmp_path / "out")}
    values = parameters_of("04_evaluate_16_datasets", profile, "x", profile.without_weights | small)
    run_cells("04_evaluate_16_datasets", values)
    stamped = [title for title in titles if PLUMBING in title]
    assert len(titles) == len(stamped) == 3  # what others published is drawn where ours can be beside it
    tables = {path.stem: pd.read_csv(path) for path in (tmp_path / "out" / "tables").glob("*.csv")}
    assert set(tables["verdicts"].verdict) == {PLUMBING} and len(tables["verdicts"]) == 2 * 3 * 4
    assert set(tables["leaderboard"].world) == set(tables["accuracy_by_set"].world) == {PLUMBING}
    assert list(tables["other_attacks"]) == ["method", *(f"{name}-1, 1/255" for name in ("pgd", "apgd", "apgd-t"))]
    assert f"{PLUMBING}: {PLUMBING} (24)" in capsys.readouterr().out


def run_cells(notebook, values):
    namespace = {}
    for cell in profiles.code_cells(notebook):
        exec(cell.source, namespace)
        if "parameters" in cell.tags:
            namespace.update(values)
    open_workbook(notebook, namespace)  # as who runs that cell again does: no other name is taken for a parameter's
    return namespace


def test_without_methods_nothing_is_trained_and_given_models_are_measured_at_their_own_size(mini, tmp_path):
    """Here of an architecture that takes larger images; differences between images of two sizes are left out."""
    config = json.loads((ROOT / "tgazsr_utils" / "core" / "model_configs" / "mini-clip.json").read_text())
    config["vision_cfg"]["image_size"] *= 2
    (tmp_path / "large-clip.json").write_text(json.dumps(config))
    open_clip().add_model_config(tmp_path / "large-clip.json")
    save_clip(load_clip("mini-clip", "mini", "cpu", image_size=2 * mini.image_size[0]), tmp_path / "large.safetensors")
    models = {
        "tuned": "mini-tga-zsr",
        "large": {"arch": "large-clip", "pretrained": str(tmp_path / "large.safetensors")},
    }
    values = {"methods": [], "models": models, "testdata": ["shapes"], "test_images": 6, "test_numsteps": 1}
    values |= {"dataset": "none such", "output": str(tmp_path / "out"), "device": "cpu", "check_images": 0}
    found = run_cells("04_evaluate_16_datasets", default_parameters("04_evaluate_16_datasets") | values)
    book, records = found["book"], found["records"]
    assert "train" not in vars(book) and not (tmp_path / "store" / "models").exists()
    assert {r.method for r in records} == {"CLIP", "tuned", "large"}
    data = {name: {r.data for r in records if r.method == name} for name in ("CLIP", "tuned", "large")}
    assert data["CLIP"] == data["tuned"] and not data["CLIP"] & data["large"]
    table = found["differences"].set_index(["kind", "method", "other"]).difference
    assert table["clean", "CLIP", "tuned"] == -table["clean", "tuned", "CLIP"]
    assert table[:, "CLIP", "large"].isna().all() and table[:, "large", "tuned"].isna().all()
    assert set(found["table"].index) == {"CLIP", "tuned", "large"}


def test_a_published_name_among_the_models_is_of_the_notebooks_architecture(mini, tmp_path, monkeypatch, capsys):
    torch.save(mini.model.state_dict(), tmp_path / "published.pt")
    published = {"openai": {"url": (tmp_path / "published.pt").as_uri()}}
    monkeypatch.setitem(open_clip().pretrained._PRETRAINED, "mini-clip", published)
    monkeypatch.setenv("HOME", str(tmp_path))  # where it is downloaded to
    values = {"methods": [], "models": {"x": "openai"}, "testdata": ["shapes"], "test_images": 6, "check_images": 0}
    values |= {"test_numsteps": 1, "output": str(tmp_path / "out"), "device": "cpu"}
    found = run_cells("04_evaluate_16_datasets", default_parameters("04_evaluate_16_datasets") | values)
    assert {r.method: r.model for r in found["records"]} == dict.fromkeys(["CLIP", "x"], fingerprint_of(mini))
    assert "x: not trained here\n" in capsys.readouterr().out


def test_all_attacks_at_all_epsilons_stand_in_one_table_and_none_is_measured_twice(tmp_path, monkeypatch):
    values = {"methods": [], "models": {"tuned": "mini-tga-zsr"}, "testdata": ["shapes"], "test_images": 8}
    values |= {"test_eps": 2.0, "test_eps_list": [1.0, 2.0], "test_numsteps": 2, "square_queries": 3, "device": "cpu"}
    values |= {"other_attacks": ["autoattack", "square", "transfer"], "check_images": 0, "output": str(tmp_path / "a")}
    values = default_parameters("04_evaluate_16_datasets") | values
    found = run_cells("04_evaluate_16_datasets", values)
    kinds = ("pgd-2", "apgd-2", "square-3", "transfer-pgd-2")
    expected = [f"{kind}, {eps}/255" for eps in (2, 1) for kind in kinds[:3]]
    expected += [f"{kinds[3]}, {eps}/255{end}" for eps in (2, 1) for end in ("", ", from")]
    table = pd.read_csv(tmp_path / "a" / "tables" / "other_attacks.csv", index_col="method")
    assert list(table) == expected and set(table.index) == {"CLIP", "tuned"} and table.notna().all(axis=None)
    assert table.loc["CLIP", "transfer-pgd-2, 1/255, from"] == "tuned"
    assert {(r.attack, r.eps_255) for r in found["records"]} == {("none", 0.0), ("pgd-2", 2.0)}
    assert len(found["others"]) == 2 * (2 * 4 - 1)
    least = table.filter(regex=", 2/255$").min(axis=1)
    board = found["table"]
    harmonic = 2 * board.clean * least / (board.clean + least).replace(0, 1)
    assert board.harmonic.to_dict() == pytest.approx(harmonic.to_dict())
    monkeypatch.setattr("tgazsr_utils.measuring.bench.answer", None)
    again = run_cells("04_evaluate_16_datasets", values | {"output": str(tmp_path / "b"), "test_eps_list": [1]})
    assert [r.key for r in again["measured"]] == [r.key for r in found["measured"]]


def test_a_log_holds_what_the_user_needs_and_nothing_else(smoke):
    lines = [*smoke.log.splitlines(), *smoke.errors.splitlines()]
    assert not [line for line in lines if "Warning" in line or "could not be drawn" in line or "site-packages" in line]


CHANGES = {  # of what a notebook reads -> what is done to it
    "another image": lambda root: (root / "sets/s/a/2.bmp").write_bytes(b"12"),
    "an image less": lambda root: (root / "sets/s/a/1.bmp").unlink(),
    "another name": lambda root: (root / "sets/s/a/1.bmp").rename(root / "sets/s/a/3.bmp"),
    "another image of the same size": lambda root: written_later(root / "sets/s/a/1.bmp", b"34"),
    "an image behind a link": lambda root: written_later(root / "elsewhere/b/1.bmp", b"34"),
    "an image behind a link of its own": lambda root: written_later(root / "elsewhere/1.bmp", b"34"),
    "descriptions": lambda root: written_later(root / "descriptions.json", b'{"b": ["x"], "a": ["x"]}'),
    "weights": lambda root: written_later(root / "mine.pt", b"34"),
    "a file in a folder of weights": lambda root: written_later(root / "model/open_clip_config.json", b"[]"),
    "the latest weights": lambda root: (root / "out/models/TeCoA_seed0_2.safetensors").write_bytes(b"2"),
    "a plugin": lambda root: written_later(root / "plugin.py", b"2"),
}


def written_later(path, content):
    time = path.stat().st_mtime_ns
    assert len(content) == path.stat().st_size
    path.write_bytes(content)
    os.utime(path, ns=(time, time + 1))  # also where a file system's clock has not moved on


@pytest.mark.parametrize("name", CHANGES)
def test_all_that_a_notebook_reads_is_an_input(tmp_path, name):
    contents = {f"sets/s/{of}/{i}.bmp": "12" for of in "ac" for i in (0, 1)} | {"elsewhere/b/1.bmp": "12"}
    contents |= {"elsewhere/1.bmp": "12", "descriptions.json": '{"a": ["x"], "b": ["x"]}', "mine.pt": "12"}
    contents |= {"model/open_clip_config.json": "{}", "out/models/TeCoA_seed0_1.safetensors": "1", "plugin.py": "1"}
    for path, text in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "sets/s/b").symlink_to(tmp_path / "elsewhere/b")
    (tmp_path / "sets/s/a/link.bmp").symlink_to(tmp_path / "elsewhere/1.bmp")
    (tmp_path / "sets/s/circle").symlink_to(tmp_path / "sets")
    models = {"mine": str(tmp_path / "mine.pt"), "folder": f"local-dir:{tmp_path}/model", "latest": "latest:TeCoA"}
    parameters = default_parameters("04_evaluate_16_datasets") | {"models": models, "output": str(tmp_path / "out")}
    parameters |= {"data_root": str(tmp_path / "sets"), "plugins": [str(tmp_path / "plugin.py")]}
    parameters |= {"descriptions": str(tmp_path / "descriptions.json")}
    before = fingerprint("04_evaluate_16_datasets", parameters, "")
    assert fingerprint("04_evaluate_16_datasets", parameters, "") == before
    CHANGES[name](tmp_path)
    assert fingerprint("04_evaluate_16_datasets", parameters, "") != before
