"""The repository keeps its promises: requirements in step, notebooks as agreed, the README's files there."""

import ast
import json
import os
import re
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import document_paths, documents
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import tgazsr_utils
from tgazsr_utils.core.defences import DEFENCES
from tgazsr_utils.measuring.ablations import best_rates
from tgazsr_utils.measuring.published import published
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.measuring.tables import leaderboard, readable
from tgazsr_utils.parameters import NOTEBOOKS, validate
from tgazsr_utils.paths import ROOT
from tgazsr_utils.profiles import PROFILES, check_names, default_parameters, load_profile, parameters_of
from tgazsr_utils.runtime import fingerprints

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_conda_and_pip_requirements_are_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    assert set(pip) == {*project["dependencies"], *project["optional-dependencies"]["test"], "--editable ."}
    assert f"python{project['requires-python']}" in conda


def test_the_lock_is_within_the_bounds():
    """Triton is as PyTorch wants it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        wanted = Requirement(text)
        assert wanted.name == "triton" or wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), text
    pair = f"TORCH=(torch=={locked['torch']} torchvision=={locked['torchvision']})"
    assert pair in (ROOT / "run_all.sh").read_text()


def test_every_notebook_has_settings_and_every_settings_class_a_notebook():
    assert [book.stem for book in BOOKS] == list(NOTEBOOKS)


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_a_notebook_is_as_agreed(book):
    cells = nbformat.read(book, as_version=4).cells
    code = [c for c in cells if c.cell_type == "code"]
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith(f"# {book.stem[:2]} ")
    assert "**Question.**" in cells[0].source and re.search(r"minute", cells[0].source)
    assert code[0].metadata.get("tags") == ["parameters"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    for cell in code:
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.end_lineno - node.lineno < 10
    assert f'open_workbook("{book.stem}", globals())' in code[1].source


def test_shared_parameters_have_the_same_defaults_everywhere():
    """What is trained in 02 is what 03 and 04 measure; 00 differs where pre-training is another thing."""
    first = default_parameters("02_train_tga_zsr")
    differ = {
        "01_attention_shift": {"test_images"},
        "03_ablations": {"test_images", "check_images"},
        "04_evaluate_16_datasets": {"methods", "test_images", "check_images"},
    }
    for name, own in differ.items():
        other = default_parameters(name)
        for shared in (set(first) & set(other)) - own:
            assert first[shared] == other[shared], (name, shared)


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_profile_is_valid(path):
    profile = load_profile(path.stem)
    check_names(profile, {}, profile.notebooks)
    for notebook in profile.notebooks:
        root = {"data_root": str(ROOT)} if "data_root" in profile.parameters else {}
        values = profile.model_copy(update={"parameters": profile.parameters | root})
        parameters_of(notebook, values, "runs/x", {})


REFERENCE = ROOT / "data" / "reference" / "mini"


def readme_rows():
    return {line.strip() for line in documents().splitlines() if line.startswith("|")}


def as_row(name, row):
    return f"| {name} | {row.robust} | {row.clean} | {row.average} |".replace("\u00a0", " ")


def test_the_readmes_leaderboard_is_that_of_the_kept_records():
    records = [Record.model_validate_json(line) for line in (REFERENCE / "records.jsonl").read_text().splitlines()]
    table = leaderboard(records)
    kept = pd.read_csv(REFERENCE / "tables" / "leaderboard.csv", index_col="method")
    profile = load_profile("mini-reference").by_notebook["04_evaluate_16_datasets"]
    assert list(kept.index) == list(table.index) and set(table.index) == {"CLIP", *profile["methods"]}
    assert set(published()["PGD", "paper"].dropna().index) <= set(table.index)
    pd.testing.assert_frame_equal(kept[["robust", "clean", "average"]], table[["robust", "clean", "average"]])
    assert {as_row(name, row) for name, row in readable(table).iterrows()} <= readme_rows()


@pytest.mark.parametrize(
    "name", ["ablation_attention", "ablation_loss_parts", "ablation_distance", "ablation_tuned_part", "options"]
)
def test_the_readmes_ablations_are_those_of_the_kept_tables(name):
    table = pd.read_csv(REFERENCE / "tables" / f"{name}.csv", index_col=0)
    assert {as_row(label, row) for label, row in readable(table).iterrows()} <= readme_rows()
    assert set(table.interval) == {"3 seeds"}


def test_the_readmes_answer_whether_it_holds_is_that_of_the_kept_table():
    table = pd.read_csv(REFERENCE / "tables" / "does_it_hold.csv", index_col=[0, 1])
    assert {*table.interval} == {"3 seeds", "images"}
    attacks = [*table.loc["TGA-ZSR"].index]
    for model, part in table.groupby(level=0):
        kept = part.droplevel(0).robust.reindex(attacks)
        cells = ["" if pd.isna(right) else f"{right:.1f}" for right in kept]  # CLIP is not attacked against itself
        lost = [part.iloc[-1][f"robust_minus_first{end}"] for end in ("", "_low", "_high")]
        assert f"| {model} | {' | '.join(cells)} | {lost[0]:.1f} ({lost[1]:.1f} to {lost[2]:.1f}) |" in readme_rows()


def test_the_readmes_other_attacks_are_those_of_the_kept_table():
    table = pd.read_csv(REFERENCE / "tables" / "other_attacks.csv", index_col="method").iloc[:, :-1]
    assert {re.split("[-,]", column)[0] for column in table} == {"pgd", "apgd", "square", "standard", "transfer"}
    assert (table["standard, 3.5/255"] == table.min(axis=1)).all()
    for method, row in table.iterrows():
        assert f"| {method} | {' | '.join(f'{value:.1f}' for value in row)} |" in readme_rows()


def test_the_readmes_last_iterates_are_those_of_the_kept_table():
    table = pd.read_csv(REFERENCE / "tables" / "last_or_worst.csv", index_col=[0, 1])
    for attack, part in table.groupby(level=0):
        cells = [
            f"{part.robust[attack, name]:.1f} ± {part.robust_ci[attack, name]:.1f}"
            for name in ("TeCoA", "TGA-ZSR", "CLIP")
        ]
        assert f"| {attack} | {' | '.join(cells)} |" in readme_rows()
    last, worst = (table.robust.filter(like=kind) for kind in ("last", "worst"))
    assert len(last) == len(worst) == 6 and (last.to_numpy() - worst.to_numpy()).max() < 0.25


def test_the_readmes_defences_are_those_of_the_kept_table():
    table = pd.read_csv(REFERENCE / "tables" / "defences.csv")
    assert set(table.defence) == {"none", *DEFENCES} and set(table.interval) == {"3 seeds", "images"}
    assert (table.aware <= table.unaware).all()
    for _, row in table.iterrows():
        cells = [f"{row[kind]:.1f} ± {row[f'{kind}_ci']:.1f}" for kind in ("clean", "unaware", "aware")]
        passes = f"{row.forwards:.1f} + {row.backwards:.1f}"
        assert f"| {row.method} | {row.defence} | {' | '.join(cells)} | {passes} |" in readme_rows()


def test_the_notebooks_learning_rates_are_those_that_the_kept_sweep_chose():
    rates = pd.read_csv(REFERENCE / "tables" / "ablation_learning_rate.csv").set_index(["method", "lr"])
    defaults = default_parameters("04_evaluate_16_datasets")
    chosen = {method: change for method, change in best_rates(rates).items() if change["lr"] != defaults["lr"]}
    assert chosen == validate(NOTEBOOKS["04_evaluate_16_datasets"], defaults | {"output": None}).overrides


def test_the_readmes_photo_table_is_that_of_the_kept_tables():
    kept = {}
    for eps in (2, 1):
        frame = pd.read_csv(ROOT / "data" / "reference" / "photo" / f"eps_{eps}" / "accuracy_by_set.csv")
        assert set(frame[frame.kind == "robust"].eps_255) == {eps}
        frame["accuracy"] = 100 * frame.correct / frame.n
        kept[eps] = frame.pivot_table(index="dataset", columns=["method", "kind"], values="accuracy", sort=False)
    for key in kept[2].index:
        cells = [
            f"{table.loc[key, (method, 'robust')]:.1f} / {table.loc[key, (method, 'clean')]:.1f}"
            for table in kept.values()
            for method in ("CLIP", "TeCoA", "TGA-ZSR")
        ]
        assert f"| {key} | {' | '.join(cells)} |" in documents()
    table = pd.read_csv(ROOT / "data" / "reference" / "photo" / "h200" / "leaderboard.csv", index_col="method")
    assert {as_row(name, row) for name, row in readable(table).iterrows()} <= readme_rows()


def test_how_soon_attacks_repeat_is_that_of_the_kept_benchmark():
    rows = json.loads((ROOT / "data" / "reference" / "benchmarks" / "repeats.json").read_text())["rows"]
    for r in rows:
        line = f"| {r['model']} | {r['set']} | {r['eps_255']:g} | {r['step_255']:g} | "
        line += f"{100 * r['share_that_repeat']:.0f} % of {r['images']} | {r['median_step']:g} | {r['last_at']:g} | "
        line += f"{100 * r['share_of_two']:.0f} % | "
        assert f"{line}{r['steps_of_the_whole_batch']} |" in documents()
    published = [r for r in rows if r["eps_255"] == r["step_255"] == 1]
    medians, last = [r["median_step"] for r in published], max(r["last_at"] for r in published)
    among = f"{min(medians):g} to {max(medians):g} steps"
    assert documents().count(among) == 2 and f"and after {last:g} at the latest" in documents()
    assert all(r["share_that_repeat"] == 1 and r["share_of_two"] == 1 for r in published)
    taken = [r["steps_of_the_whole_batch"] for r in published if "mini" in r["model"]]
    assert f"for {min(taken)} to {max(taken)} percent of the work" in documents()


def test_the_readmes_step_is_that_of_the_kept_benchmark():
    found = json.loads((ROOT / "data" / "reference" / "benchmarks" / "cpu.json").read_text())
    operations, step, released = found["operations"], found["step"], found["released"]
    ours = f"| {operations['ours_forwards']:.1f} | {operations['ours_forwards_after_the_first_epoch']:.1f} | "
    ours += f"{step['seconds']:.1f}"
    theirs = 2 * f"| {operations['released_forwards']:.1f} " + f"| {released['seconds']:.1f} | "
    assert {
        f"| released {theirs}| {released['peak_memory_gib']:.1f} GiB |",
        f"| this workbook {ours} | {100 * step['utilisation']:.0f} % | {step['peak_memory_gib']:.1f} GiB |",
    } <= readme_rows()
    gpu = json.loads((ROOT / "data" / "reference" / "benchmarks" / "h200.json").read_text())
    operations, step, released = gpu["operations"], gpu["step"], gpu["released"]
    ours = f"| {operations['ours_forwards']:.1f} | {operations['ours_forwards_after_the_first_epoch']:.1f} | "
    ours += f"{1000 * step['seconds']:.0f} ms | {100 * step['utilisation']:.0f} % | {step['peak_memory_gib']:.1f} GiB |"
    theirs = 2 * f"| {operations['released_forwards']:.1f} " + f"| {1000 * released['seconds']:.0f} ms | | "
    theirs += f"{released['peak_memory_gib']:.1f} GiB |"
    assert {f"| released, H200 {theirs}", f"| this workbook, H200 {ours}"} <= readme_rows()
    text = documents()
    rate, kernel = gpu["attack"]["images_a_second"], gpu["kernel"]
    assert f"{gpu['speed_up']:.1f} times faster" in text and f"attacks {rate:,.0f} images a second" in text
    assert (
        f"{kernel['triton_microseconds'] / 1000:.1f} ms" in text
        and f"{kernel['compiled_microseconds'] / 1000:.1f}" in text
    )
    moves = found["explorer"]["seconds_of_an_alpha_move"], found["explorer"]["seconds_of_an_epsilon_move"]
    kept = f"measured, clean and attacked, keep {found['evaluation']['mib_kept']:.2f} MiB, "
    kept += f"200 slider moves {found['explorer']['mib_kept_by_200_moves']:.2f} MiB"
    assert f"{found['evaluation']['images']:,} image files {kept}" in text
    assert f"redraws in {1000 * moves[0]:.0f} ms, one of epsilon in {moves[1]:.2f} s" in text
    assert (
        f"That is {found['speed_up']:.0f} times faster" in text
        and f"attacks {found['attack']['images_a_second']:.2f} images" in text
    )


PACKAGE = ROOT / "tgazsr_utils"
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
LEAVES = {"paths", "progress", "machine"}  # small modules that any room but core may import
ROOMS = {
    "core": {"core"},
    "datasets": {"core", "datasets"},
    "runtime": {"core", "datasets", "runtime"},
    "measuring": {"core", "datasets", "runtime", "measuring"},
    "display": {"core", "datasets", "runtime", "measuring", "display"},
}


def imported(path):
    """Modules of the package that one imports, anywhere in it, as "room/module"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            parts = (node.module or "").split(".")
            if parts[0] == "tgazsr_utils":
                for name in ["/".join(parts[1:]), *("/".join([*parts[1:], alias.name]) for alias in node.names)]:
                    if name in MODULES:
                        yield name
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.startswith("tgazsr_utils.")}
            assert not names, path


def room(module):
    return module.split("/")[0] if "/" in module else None


@pytest.mark.parametrize("module", [name for name in MODULES if room(name)])
def test_arrows_point_down(module):
    """core imports nothing of the package but itself; the other rooms what DESIGN's table allows, and leaves."""
    for other in imported(MODULES[module]):
        if room(other) is None:
            assert other in LEAVES and room(module) != "core", f"{module} imports {other}"
        else:
            assert room(other) in ROOMS[room(module)], f"{module} imports {other}"


def test_leaves_import_nothing_and_there_is_no_circle():
    arrows = {name: set(imported(path)) - {"__init__"} for name, path in MODULES.items()}
    assert all(not arrows[name] for name in LEAVES)
    waiting = dict(arrows)
    while waiting:
        free = [name for name, others in waiting.items() if not others & waiting.keys()]
        assert free, f"a circle among {sorted(waiting)}"
        for name in free:
            del waiting[name]


def test_the_linter_and_the_formatter_find_nothing():
    """120 columns among it; see pyproject.toml."""
    for command in (["check", "--quiet"], ["format", "--quiet", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_types_of_the_core():
    command = [sys.executable, "-m", "mypy", "--no-incremental"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


LONG = {"core/attention_kernel: _backward"}  # one kernel, whose registers no call can share


def test_functions_fit_a_screen():
    """Forty lines besides the docstring."""
    long = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                said = len((ast.get_docstring(node) or "").splitlines())
                if (lines := node.end_lineno - node.lineno + 1 - said) > 40 and f"{name}: {node.name}" not in LONG:
                    long.append(f"{name}: {node.name}, {lines} lines")
    assert not long, long


def test_the_whole_package_is_thin():
    """About 1,700 lines are the methods; none of its files is longer than one reads at a sitting."""
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert sum(count for name, count in lines.items() if room(name) == "core") < 2440
    assert max(lines.values()) <= 450, max(lines, key=lines.get)


ASKING = [
    "tgazsr_utils.measuring.measure",
    "tgazsr_utils.measuring.trust",
    "tgazsr_utils.runtime.finetuning",
    "tgazsr_utils.pretraining",
]


@pytest.mark.parametrize("asking", ASKING)
def test_what_a_result_depends_on_is_found(asking, monkeypatch):
    """A line more in any module of core or datasets names other records and weights; one in a figure's does not."""
    before = fingerprints.code_version(asking)
    for path, source in dict(fingerprints.SOURCES).items():
        with monkeypatch.context() as patch:
            patch.setitem(fingerprints.SOURCES, path, source + "another = 1\n")
            changed = fingerprints.code_version(asking) != before
        if path.startswith(("core/", "datasets/")) or path == asking.split(".", 1)[1].replace(".", "/") + ".py":
            assert changed, path
        if path.startswith("display/") or path in ("runner.py", "measuring/tables.py"):
            assert not changed, path
    with monkeypatch.context() as patch:
        patch.setitem(fingerprints.SOURCES, "core/new/deep.py", "x = 1\n")
        assert fingerprints.code_version(asking) != before
    assert fingerprints.code_version(asking) == before


def test_what_is_only_said_in_the_code_changes_no_result():
    source = "def double(x):\n    return 2 * x  # twice\n"
    said = '"""A module."""\n\n# Of numbers.\ndef double(x):\n    """Twice "it".\n\n    #"""\n\n    return 2 * x\n'
    same, text = fingerprints._what_runs("a.py", source), 'x = """# no comment"""\ndef f(): "one"\n'
    assert same == fingerprints._what_runs("a.py", said) == ["def double(x):", "    return 2 * x"]
    assert fingerprints._what_runs("b.py", text) == ['x = """# no comment"""', "def f():"]


def test_public_names_are_there_and_quick():
    """Those of README, notebooks and examples come from the package itself, each once."""
    for name in tgazsr_utils.__all__:
        assert getattr(tgazsr_utils, name).__module__.startswith("tgazsr_utils."), name
    code = "import os, sys, tgazsr_utils; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])\n"
    code += "from tgazsr_utils import load_clip, load_dataset, pgd, text_guided_attention, attention_distance\n"
    code += "from tgazsr_utils import finetune, evaluate, objective\n"
    code += "print(*(name in sys.modules for name in ('torchvision', 'open_clip', 'timm', 'scipy', 'matplotlib')))"
    plain = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    # PyTorch comes with the first name; what takes as long as it does, when it is needed.
    assert done.stdout.split() == ["False", "PASSIVE", *5 * ["False"]], done.stderr


def test_no_path_of_a_machine_and_no_output_is_committed():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*.sh"), *(ROOT / "tgazsr_utils").rglob("*.py"), *BOOKS]:
        assert not re.search(r"/(home|root|Users|work)/", path.read_text()), path


def anchors(path):
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readmes_first_picture_says_in_words_what_the_kept_figure_shows():
    kept = REFERENCE / "figures" / "01_attention_before_and_after.png"
    about = Image.open(kept).text
    numbers = lambda text: {*re.findall(r"\d+(?:\.\d+)?", text)}
    for path in (ROOT / "README.md", REFERENCE / "README.md"):
        (words,) = re.findall(rf"!\[([^]]+)\]\([^)]*{kept.name}\)", path.read_text(encoding="utf-8"))
        assert words.startswith(about["Title"]) and numbers(words) <= numbers(about["Description"])
        assert len(numbers(words)) > 3


def test_the_readme_is_one_page_and_no_link_is_broken():
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) < 9_000
    for path in [*document_paths(), ROOT / "data" / "README.md", ROOT / "CONTRIBUTING.md"]:
        for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            assert text, f"{path}: a link or picture without words"
            if not target.startswith("https://"):
                name, _, anchor = target.partition("#")
                assert (linked := path.parent / name).exists(), f"{path}: {target}"
                assert not anchor or anchor in anchors(linked), f"{path}: {target}"
    pages = [path for path in document_paths() if path.parent.name == "docs"]
    assert all(f"docs/{page.name}" in documents() for page in pages), "a page that nothing leads to"
