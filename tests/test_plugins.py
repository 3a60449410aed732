"""Python files of one's own that add methods and attacks."""

import re

import pandas as pd
import pytest
from conftest import train_settings

from tgazsr_utils import AttackSettings, evaluate, find_objective, leaderboard, open_workbook, runner
from tgazsr_utils.core.attacks import ATTACKS
from tgazsr_utils.core.objectives import OBJECTIVES
from tgazsr_utils.core.settings import ADDED_ATTACKS
from tgazsr_utils.measuring.measure import Measurement
from tgazsr_utils.parameters import NOTEBOOKS, SettingsError, validate
from tgazsr_utils.profiles import default_parameters
from tgazsr_utils.runtime import plugins
from tgazsr_utils.runtime.finetuning import tuned_path

METHOD = '''from tgazsr_utils import Term, objective


@objective("Anchored", lr=1e-4)
def anchored(step, settings):
    """TeCoA that keeps attacked embeddings near the original model's clean ones."""
    return [Term("CE", 1.0, step.cross_entropy(step.adversarial_tokens)), Term("L_emb", 1.0, drift(step))]


def drift(step):
    return (step.adversarial_tokens.pooled - step.original_tokens.pooled).square().sum(1).mean()
'''
ATTACK = "from tgazsr_utils.core.attacks import ATTACKS, Attack, pgd\nATTACKS['pgd again'] = Attack(pgd)\n"


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setattr(plugins, "_loaded", {})
    before = [(registry, dict(registry)) for registry in plugins.REGISTRIES.values()]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)
    ADDED_ATTACKS.clear()


@pytest.fixture
def plugin(tmp_path):
    """Writes a plugin, and gives its path."""

    def write(text, name="my_method.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_a_plugin_is_loaded_before_anything_is_checked_and_once(plugin):
    path = plugin(METHOD + ATTACK)
    values = default_parameters("02_train_tga_zsr") | {"methods": ["Anchored"], "overrides": {"Anchored": {"lr": 1}}}
    for given in (path, [path]):  # one file may come without brackets
        assert validate(NOTEBOOKS["02_train_tga_zsr"], values | {"plugins": given}).plugins == [path]
    added, attack = OBJECTIVES["Anchored"], ATTACKS["pgd again"]
    open_workbook("02_train_tga_zsr", values | {"plugins": [path]})
    assert OBJECTIVES["Anchored"] is added and ATTACKS["pgd again"] is attack
    assert plugins.source_of(added) == plugins.source_of(attack) == METHOD + ATTACK
    assert plugins.source_of(ATTACKS["pgd"]) is plugins.source_of(find_objective("TeCoA")) is None


def test_what_is_trained_with_a_plugin_is_named_by_all_of_its_text(plugin, mini, shapes, tmp_path):
    """As it was loaded, also of what its method calls; a text of the same length is another one."""
    path = plugin(METHOD)
    named = lambda: tuned_path(tmp_path, find_objective("Anchored"), train_settings(), shapes, mini)
    plugins.load(path)
    first = named()
    plugin(METHOD.replace("sum(1)", "sum(0)"))
    assert named() == first
    plugins.load(path)
    assert named() != first
    plugin(METHOD)
    plugins.load(path)
    assert named() == first
    plugin(METHOD.replace('"Anchored"', '"Renamed"'))
    plugins.load(path)
    assert "Renamed" in OBJECTIVES and "Anchored" not in OBJECTIVES


def test_a_changed_plugin_is_a_changed_input_of_its_notebook(plugin):
    parameters = default_parameters("04_evaluate_16_datasets") | {"plugins": [plugin(METHOD)]}
    first = runner.fingerprint("04_evaluate_16_datasets", parameters, "")
    plugin(METHOD + "# more\n")
    assert runner.fingerprint("04_evaluate_16_datasets", parameters, "") != first


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot be read: there is no such file"),
        ("\nx = y\n", "fails in line 2: NameError: name 'y' is not defined"),
        (METHOD + "def f():\n    raise SystemExit('no')\nf()\n", "fails in line 13: SystemExit: no"),
        (
            "from tgazsr_utils import objective\n\nobjective('x', speed=3)\n",
            "fails in line 3: ValueError: setting 'speed'",
        ),
        ("x = (\n", "fails in line 1: SyntaxError: '\\(' was never closed"),
        ("x = 1\n", "registers nothing; a method is a function under @objective\\(NAME\\)"),
        (METHOD.replace("Anchored", "TeCoA"), "adds the method 'TeCoA', which is there already, of the workbook"),
        (ATTACK.replace("pgd again", "cw"), "adds the attack 'cw', which is there already"),
        (
            ATTACK.replace("Attack(pgd)", "pgd"),
            "adds the attack 'pgd again' as a function; it should be .*attacks.Attack",
        ),
        ("caf\xe9".encode("latin-1"), "cannot be read: .*can't decode"),
    ],
)
def test_a_plugin_that_is_none_gets_one_line_and_leaves_nothing(text, message, tmp_path, capsys):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = [dict(registry) for registry in plugins.REGISTRIES.values()]
    given = ["-p", "plugins", f"[{path}]", "-p", "output", str(tmp_path / "out")]
    assert runner.main(["smoke", "04", *given]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith(f"error: 04_evaluate_16_datasets: plugins: '{path}'") and error.count("\n") == 1
    assert before == [dict(registry) for registry in plugins.REGISTRIES.values()]
    assert not (tmp_path / "out").exists()


def test_an_attack_of_a_plugin_is_measured_and_its_text_names_the_record(plugin, mini, shapes, tmp_path):
    path = plugin(ATTACK)
    values = default_parameters("04_evaluate_16_datasets") | {"plugins": [path], "attack": "pgd again"}
    settings = validate(NOTEBOOKS["04_evaluate_16_datasets"], values | {"test_numsteps": 1})
    attack = settings.only(AttackSettings)
    assert settings.model_dump()["attack"] == attack.model_dump()["attack"] == "pgd again"
    first, data = Measurement(mini, shapes.subset(4), attack), shapes.subset(4)
    record, usual = (evaluate(mini, data, attack.model_copy(update={"attack": name})) for name in ("pgd again", "pgd"))
    assert record.attack == "pgd again-1" and record.hits == usual.hits and record.key == first.key != usual.key
    plugin(ATTACK + "# more\n")
    plugins.load(path)
    assert Measurement(mini, data, attack).key != first.key
    with pytest.raises(SettingsError, match="parameter attack = 'pgd never': input should be 'pgd'"):
        validate(AttackSettings, attack.model_dump() | {"attack": "pgd never"})


def test_two_plugins_cannot_add_one_name(plugin):
    first, second = plugin(METHOD, "a.py"), plugin(METHOD, "b.py")
    plugins.load(first)
    with pytest.raises(ValueError, match=f"'{second}' adds the method 'Anchored', which is there already, of {first}"):
        plugins.load(second)
    plugin(METHOD.replace("Anchored", "Another"), "b.py")
    plugins.load(second)
    assert {"Anchored", "Another"} <= OBJECTIVES.keys()


def test_what_a_plugin_trains_is_measured_beside_the_rest(plugin, tmp_path):
    values = default_parameters("04_evaluate_16_datasets") | {"plugins": [plugin(METHOD)], "methods": ["Anchored"]}
    values |= {"testdata": ["shapes"], "train_images": 16, "test_images": 4, "check_images": 0, "test_numsteps": 1}
    book = open_workbook("04_evaluate_16_datasets", values | {"output": str(tmp_path / "out"), "device": "cpu"})
    tuned = book.tune("Anchored").clip
    records = book.measure(book.original, "CLIP", 0) + book.measure(tuned, "Anchored", 0)
    assert set(leaderboard(records).index) == {"CLIP", "Anchored"}


@pytest.mark.long
def test_a_plugin_of_ten_lines_is_trained_and_stands_in_the_leaderboard(plugin, tmp_path, capfd):
    given = {"plugins": f"[{plugin(METHOD)}]", "methods": "[Anchored]", "output": tmp_path / "out"}
    given |= {"testdata": "[shapes]", "train_images": 16, "test_images": 4}
    arguments = ["smoke", "04", *(word for name, value in given.items() for word in ("-p", name, str(value)))]
    assert len(METHOD.splitlines()) <= 11 and runner.main(arguments) == 0, capfd.readouterr().err
    table = pd.read_csv(tmp_path / "out" / "tables" / "leaderboard.csv", index_col="method")
    assert set(table.index) == {"CLIP", "Anchored"}
    assert len(list((tmp_path / "out" / "models").glob("Anchored_seed0_*.safetensors"))) == 1
