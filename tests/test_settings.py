import math

import pytest
from pydantic import ValidationError

from tgazsr_utils import open_workbook
from tgazsr_utils.core.images import PLUMBING
from tgazsr_utils.core.objectives import OBJECTIVES, Step
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings
from tgazsr_utils.effects import units, without_effect
from tgazsr_utils.parameters import (
    NOTEBOOKS,
    AblationNotebook,
    AttentionShiftNotebook,
    EvaluateNotebook,
    SettingsError,
    TrainNotebook,
    from_notebook,
    named_weights,
    untuned,
    validate,
)
from tgazsr_utils.profiles import check_effect, default_parameters, given_value, names_set_in
from tgazsr_utils.strict_yaml import load_yaml

KNOWN = FinetuneSettings.model_fields
GOOD = {"test_eps": 1.0, "test_stepsize": 1.0, "test_numsteps": 10}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"test_eps": "abc"}, "parameter test_eps = 'abc': input should be a valid number"),
        ({"test_eps": -1}, "parameter test_eps = -1: input should be greater than or equal to 0"),
        ({"test_numsteps": 1.5}, "parameter test_numsteps = 1.5: .*integer"),
        ({"test_eps": float("nan")}, "parameter test_eps = nan: .*finite"),
        ({"test_eps": 256}, "parameter test_eps = 256: .*less than or equal to 255"),
        ({"attack": "magic"}, "parameter attack = 'magic': input should be 'pgd'"),
        ({"test_epz": 1}, "unknown parameter 'test_epz': did you mean test_eps"),
    ],
)
def test_bad_values_are_refused_in_one_line(changes, message):
    with pytest.raises(SettingsError, match=message) as error:
        validate(AttackSettings, GOOD | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [("test_eps", True), ("test_numsteps", True), ("eps_list", [1.0, False]), ("seed", 2**63), ("seed", 1e30)],
)
def test_yes_is_no_number_and_a_seed_fits(field, value):
    values = default_parameters("01_attention_shift") | {"output": "unused"}
    assert validate(AttentionShiftNotebook, values | {"compiled": True}).compiled is True
    with pytest.raises(
        SettingsError,
        match=rf"parameter {field}.* = .*: (input should be a number|input should be less|unable to parse)",
    ):
        validate(AttentionShiftNotebook, values | {field: value})


def test_messages_quote_a_part_of_what_is_long():
    nested = []
    for _ in range(60):  # a repr of 2^60 characters
        nested = [nested, nested]
    with pytest.raises(SettingsError) as error:
        validate(AttackSettings, GOOD | {"test_eps": nested})
    assert len(str(error.value)) < 2000


def test_a_missing_value_is_named():
    with pytest.raises(SettingsError, match="parameter test_eps: field required"):
        validate(AttackSettings, {"test_stepsize": 1, "test_numsteps": 1})


def test_settings_are_frozen():
    settings = validate(AttackSettings, GOOD)
    with pytest.raises(ValidationError):
        settings.test_eps = 2


def notebook(*cells):
    """The namespace of a notebook that has run these cells."""
    namespace = {"unrelated": 5, "In": list(cells), "Out": {}}
    for cell in cells:
        exec(cell, namespace)
    return namespace


GOOD_CELL = "test_eps = 1.0\ntest_stepsize = 1.0\ntest_numsteps = 10"


def test_a_notebooks_parameters_are_read_and_injected_ones_win():
    assert from_notebook(AttackSettings, notebook(GOOD_CELL, "# Parameters\ntest_eps = 4")).test_eps == 4.0


@pytest.mark.parametrize("slip", ["test_epz", "test_step_size", "Norm"])
@pytest.mark.parametrize("method", ["", "def anchored(step, settings):\n    return []"])
def test_a_name_that_is_nearly_a_parameters_is_refused_wherever_it_is_set(slip, method):
    for cells in ((GOOD_CELL, f"# Parameters\n{slip} = 4", method), (GOOD_CELL, method, f"{slip} = 'l2'")):
        with pytest.raises(SettingsError, match=f"unknown parameter '{slip}': did you mean"):
            from_notebook(AttackSettings, notebook(*cells))


def test_other_cells_may_define_what_they_like():
    cells = "x = print()", "import re\nscratch = 3\nweights = [1.0]", GOOD_CELL, "def test_epz():\n    pass"
    assert from_notebook(AttackSettings, notebook(*cells)).test_numsteps == 10


@pytest.mark.parametrize("methods, message", [([], "at least 1 item"), (["A", "A"], "twice")])
def test_lists_are_neither_empty_nor_double(methods, message):
    with pytest.raises(SettingsError, match=message):
        validate(TrainNotebook, {"methods": methods})


def test_overrides_change_one_method_and_are_checked():
    values = default_parameters("02_train_tga_zsr")
    settings = validate(TrainNotebook, values | {"overrides": {"FARE": {"lr": "1e-4", "train_numsteps": 5}}})
    assert (settings.finetuning("FARE").lr, settings.finetuning("FARE").train_numsteps) == (1e-4, 5)
    assert settings.finetuning("TeCoA").lr == values["lr"] and settings.finetuning("FARE", seed=7).seed == 7
    for bad, message in (
        ({"lr": -1}, "overrides of FARE: parameter lr = -1"),
        ({"lrr": 1}, "overrides of FARE: unknown parameter 'lrr'"),
        ({"seed": 1}, "one for all methods"),
    ):
        with pytest.raises(SettingsError, match=message) as error:
            validate(TrainNotebook, values | {"overrides": {"FARE": bad}})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, value", [("8/255", 8), (" 0.5 / 255 ", 0.5), ("4/255.", 4), ("8.0/255.0", 8), ("4", 4)])
def test_epsilons_may_be_written_as_fractions_of_255(text, value):
    assert AttackSettings(**GOOD | {"test_eps": text}).test_eps == value
    values = default_parameters("03_ablations") | {"train_eps": text, "test_eps_list": [text, 1]}
    found = validate(AblationNotebook, values)
    assert found.train_eps == value and found.test_eps_list == [value, 1]


def test_epsilons_below_a_tenth_are_told_their_unit():
    values = default_parameters("03_ablations") | {"train_eps": 0.0314, "test_eps_list": [0.0, 0.05, 2.0]}
    assert units(validate(AblationNotebook, values).model_dump()) == [
        "train_eps = 0.0314 is in 1/255; for 0.0314 of the pixel range give 8.007",
        "test_eps_list = 0.05 is in 1/255; for 0.05 of the pixel range give 12.75",
    ]


def test_the_released_attack_is_for_one_protocol_and_not_for_autoattack():
    values = default_parameters("04_evaluate_16_datasets") | {"attack_precision": "released-fp16"}
    assert validate(EvaluateNotebook, values).only(AttackSettings).label == "pgd-10-released-fp16"
    for changes, message in (
        ({"protocol": "worst"}, "read at the last iterate, protocol 'last'"),
        ({"attack": "apgd"}, "attack_precision = 'released-fp16': is for the attacks pgd and cw"),
    ):
        with pytest.raises(SettingsError, match=message):
            validate(EvaluateNotebook, values | changes)


def test_an_attack_may_be_named_as_in_the_original_code():
    assert validate(AttackSettings, GOOD | {"attack": "CW"}).label == "cw-10"
    assert validate(AttackSettings, GOOD | {"norm": "l2", "test_eps": 765}).label == "pgd-10-l2"
    assert validate(AttackSettings, GOOD | {"attack": "autoattack"}).label == "apgd-10"


@pytest.mark.parametrize(
    "name, label",
    [("apgd-ce", "apgd-ce-10"), ("APGD-T", "apgd-t-10"), ("standard", "standard"), ("square", "square-9")],
)
def test_every_attack_has_one_exact_name(name, label):
    assert validate(AttackSettings, GOOD | {"attack": name, "square_queries": 9}).label == label


@pytest.mark.parametrize(
    "names, expected",
    [
        (["pgd", "apgd"], {"square_queries"}),
        (["apgd-t", "apgd"], {"square_queries", "test_stepsize"}),
        (["square", "standard"], {"test_stepsize", "test_numsteps"}),
        (["standard"], {"square_queries", "test_stepsize", "test_numsteps"}),
        (["square", "transfer"], set()),
    ],
)
def test_what_none_of_the_attacks_uses_is_known(names, expected):
    values = default_parameters("04_evaluate_16_datasets") | {"attack": names[0], "other_attacks": names[1:]}
    idle = without_effect(validate(EvaluateNotebook, values))
    assert {"square_queries", "test_stepsize", "test_numsteps"} & set(idle) == expected


def test_further_epsilons_have_steps_in_proportion_and_none_is_there_twice(tmp_path):
    given = {"test_eps": 2.0, "test_stepsize": 0.3, "test_eps_list": ["1/255", 2, 4], "other_attacks": ["autoattack"]}
    values = default_parameters("04_evaluate_16_datasets") | given | {"output": str(tmp_path)}
    book = open_workbook("04_evaluate_16_datasets", values)
    found = [(one.label, one.test_eps, one.test_stepsize) for one in book.attacks]
    expected = [(name, eps, pytest.approx(0.3 * eps / 2)) for eps in (2, 1, 4) for name in ("pgd-10", "apgd-10")]
    assert found == expected and book.attacks[0] == book.attack


def test_a_missing_data_root_is_refused():
    field = {"data_root": "no/such/folder"}
    with pytest.raises(SettingsError, match="data_root = 'no/such/folder': .*no such folder .*/no/such/folder"):
        validate(TrainNotebook, field | {"arch": "mini-clip"})


def test_a_parameter_that_another_notebook_reads_is_accepted_and_told_where_it_changes_nothing(tmp_path, capsys):
    values = {name: default_parameters(name) for name in ("03_ablations", "04_evaluate_16_datasets")}
    check_effect({"square_queries": 100, "seed": 1}, {n: v | {"seed": 1} for n, v in values.items()})
    for name, told in (("03_ablations", False), ("04_evaluate_16_datasets", True)):
        given = {"square_queries": 100, "seed": 1, "output": str(tmp_path)}
        open_workbook(name, values[name] | given)
        said = "square_queries = 100 has no effect here: attack is 'pgd'"
        assert (said in capsys.readouterr().out) == told


def test_descriptions_and_interpolation_have_no_effect_where_nothing_reads_them():
    values = default_parameters("04_evaluate_16_datasets") | {"descriptions": "a.json", "interpolate": [0.5]}
    for methods, idle in (
        ([], {"descriptions", "interpolate"}),
        (["TeCoA"], {"descriptions"}),
        (["SAFT", "FARE"], set()),
    ):
        found = without_effect(validate(EvaluateNotebook, values | {"methods": methods}))
        assert {"descriptions", "interpolate"} & set(found) == idle
    assert "attack_warmup" in without_effect(validate(EvaluateNotebook, values | {"methods": ["FT-Clean"]}))
    for bad, message in (
        ({"attack_warmup": [0.5, 0.2]}, "the first share should be at most the second"),
        ({"attack_warmup": [0.5]}, "at least 2 items"),
        ({"attack_warmup": [0.5, 2]}, "less than or equal to 1"),
        ({"interpolate": [0]}, "greater than 0"),
        ({"interpolate": [0.5, 0.5]}, "twice"),
    ):
        with pytest.raises(SettingsError, match=message):
            validate(EvaluateNotebook, values | bad)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_which_methods_compare_attention_is_known(name, mini, shapes):
    """Whatever does so has terms that Alpha weighs."""
    settings = FinetuneSettings(**{k: v for k, v in default_parameters("02_train_tga_zsr").items() if k in KNOWN})
    chunk = next(shapes.batches(4))
    step = Step.of(shapes, chunk, mini, mini)
    step.adversarial = chunk.images
    objective = OBJECTIVES[name]
    weights = lambda alpha: [
        t.weight for t in objective.terms(step, objective.with_preset(settings.model_copy(update={"Alpha": alpha})))
    ]
    values = default_parameters("04_evaluate_16_datasets") | {"methods": [name]}
    idle = without_effect(validate(EvaluateNotebook, values))
    assert (weights(0.5) == weights(0.25)) == ("Alpha" in idle)
    assert ("train_eps" in idle) == (objective.attack is None)


@pytest.mark.parametrize(
    "text, value",
    [
        *[
            ("010", 10),
            ("-007", -7),
            ("+3", 3),
            ("1_000", 1000),
            ("[007, 008, 010]", [7, 8, 10]),
            ("{a: 010}", {"a": 10}),
        ],
        *[("1e-3", 1e-3), ("1E-3", 1e-3), (".5", 0.5), ("5.", 5.0), ("010.5", 10.5), ("-.inf", -math.inf)],
        *[("1:40", "1:40"), ("190:20:30", "190:20:30"), ("1:40.5", "1:40.5"), ("0x10", "0x10"), ("0b1", "0b1")],
        *[("true", True), ("null", None), ("~", None), ("'010'", "010"), ("e5", "e5"), (".", ".")],
    ],
)
def test_numbers_are_decimal(text, value):
    assert load_yaml(text) == value and type(load_yaml(text)) is type(value)


@pytest.mark.parametrize("text", ["1:40", "0x10", "1__0"])
def test_other_notations_of_numbers_are_refused(text):
    values = default_parameters("04_evaluate_16_datasets") | {"seed": given_value("seed", text)}
    with pytest.raises(SettingsError, match=f"seed = '{text}': .*valid integer"):
        validate(NOTEBOOKS["04_evaluate_16_datasets"], values)


ARCH = {"arch": "ViT-L-14-quickgelu", "pretrained": "openai"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"models": {"mine": 5}}, "models = .*: 'mine' is 5; it should be weights .*arch: ARCHITECTURE"),
        ({"models": {"mine": None}}, "'mine' is None; it should be weights"),
        ({"models": {"mine": {"arch": "ViT-B-32"}}}, "'mine' is {'arch': 'ViT-B-32'}; it should be weights"),
        ({"models": {"mine": ARCH | {"eps": 1}}}, "'mine' is .*; it should be weights"),
        ({"models": {"mine": ARCH | {"arch": 5}}}, "'mine' is .*; it should be weights"),
        ({"models": ["mini"]}, "models = .*: input should be a valid dictionary"),
        ({"models": {"TGA-ZSR": "mini"}}, "'TGA-ZSR' is a method's name, too; give these weights another one"),
        ({"models": {"CLIP": "mini"}, "methods": []}, "'CLIP' is the untuned model's name, too"),
        ({"models": {"mine": "a\0b"}}, "models = .*path 'a"),
        ({"methods": ["A", "A"]}, "twice"),
        ({"other_attacks": ["PGD"]}, "other_attacks: 'pgd' is the attack itself"),
        ({"other_attacks": ["magic"]}, "other_attacks.0 = 'magic': should be one of pgd, .*, transfer$"),
        ({"other_attacks": ["cw", ""]}, "other_attacks.1 = '': should be one of pgd, "),
        ({"other_attacks": ["cw", "cw"]}, "twice"),
        ({"other_attacks": ["apgd", "AutoAttack"]}, "twice"),
        ({"attack": "transfer"}, "attack = 'transfer': input should be 'pgd'"),
        ({"test_eps_list": [1, 300]}, "test_eps_list: parameter test_eps = 300.0: .*less than or equal to 255"),
        ({"test_eps_list": [1, 1.0]}, "twice"),
    ],
)
def test_given_models_and_other_attacks_are_checked_in_one_line(changes, message):
    with pytest.raises(SettingsError, match=message) as error:
        validate(EvaluateNotebook, default_parameters("04_evaluate_16_datasets") | changes)
    assert "\n" not in str(error.value)


def test_given_models_have_an_architecture_and_may_stand_alone():
    models = {"tuned": "mini-tga-zsr", "big": ARCH}
    values = default_parameters("04_evaluate_16_datasets") | {"methods": [], "models": models}
    settings = validate(EvaluateNotebook, values | {"other_attacks": ["CW", "autoattack"], "epochs": 3})
    each = [(None, "mini-tga-zsr"), ("ViT-L-14-quickgelu", "openai")]
    assert untuned(settings.model_dump()) == {"CLIP": ("mini-clip", "mini")} | dict(zip(models, each))
    named = [
        ("pretrained", "mini-clip", "mini"),
        ("models: tuned", "mini-clip", "mini-tga-zsr"),
        ("models: big", *each[1]),
    ]
    assert named_weights(settings.model_dump()) == named
    idle = without_effect(settings)
    assert {"epochs", "dataset", "train_images", "seeds"} <= set(idle) and not {"seed", "models", "methods"} & set(idle)
    assert settings.other_attacks == ["cw", "apgd"] and "square_queries" in idle and "test_stepsize" not in idle
    assert settings.data_options["world"] is None
    assert settings.model_copy(update={"plumbing": True}).data_options["world"] == PLUMBING


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_what_a_notebook_names_itself_is_no_slip_when_its_first_cell_runs_again(notebook, tmp_path):
    """Nor is one a parameter's, whose value would be taken for it."""
    own = dict.fromkeys(names_set_in(notebook), 1)
    assert not own.keys() & NOTEBOOKS[notebook].model_fields.keys()
    assert open_workbook(notebook, own | {"output": str(tmp_path / "run")}).settings.output
