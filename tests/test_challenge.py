"""The challenge: files of what a run measured are whole, right and of one kind, or refused with the reason."""

import json
import re
import shutil
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import size
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz import anything, damaged

from tgazsr_utils.core.seeds import digest
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.datasets.published_sets import DATASETS
from tgazsr_utils.measuring import challenge as joint
from tgazsr_utils.measuring import submissions, tables, trust
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.records import RecordStore
from tgazsr_utils.measuring.submissions import MINI, Submission, check, read, write
from tgazsr_utils.runner import main
from tgazsr_utils.runtime.runs import Run
from tgazsr_utils.runtime.weights import load_clip

TASKS = ("shapes", "colours")


def model(seed, part):
    """The shipped tuned model, or one between it and the original: weights of another seed."""
    clip = load_clip("mini-clip", "mini-tga-zsr", "cpu")
    original = load_clip("mini-clip", "mini", "cpu").model.state_dict()
    for name, value in clip.model.state_dict().items():
        value.copy_(torch.lerp(value, original[name], part)) if value.is_floating_point() else None
    clip.training_record = {"method": "Mine", "settings": {"lr": 1e-3, "seed": seed}, "data": "d", "code": "c"}
    return clip


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory):
    """A run's folder and store, with records of two tasks: a method of two seeds, and CLIP."""
    run = Run(tmp_path_factory.mktemp("runs") / "mini")
    sets = [load_dataset(key, "test", n=9) for key in TASKS]
    bench = Bench(RecordStore(run.stored_records), checked_with=MINI, checked_on=[sets[0].subset(1)])
    measured = [("CLIP", 0, mini), ("Mine", 0, model(0, 0.0)), ("Mine", 1, model(1, 0.1))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "LARGE_STEPS", 5)
        patch.setattr(trust, "QUERIES", 5)
        records = [r for name, seed, clip in measured for r in bench.measure(clip, sets, MINI, method=name, seed=seed)]
    path = run.folder / joint.RECORDS
    path.parent.mkdir(parents=True)
    path.write_text("".join(r.model_dump_json() + "\n" for r in records), encoding="utf-8")
    return SimpleNamespace(folder=run.folder, records=records, store=run.stored_records)


@pytest.fixture(autouse=True)
def two_tasks(monkeypatch):
    monkeypatch.setitem(submissions.SETS, "mini-world", TASKS)


@pytest.fixture(scope="module")
def files(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(submissions.SETS, "mini-world", TASKS)
        return {name: joint.submit(name, f"who made {name}", run.folder) for name in ("Mine", "CLIP")}


def test_a_file_is_what_the_run_measured(run, files, capsys):
    assert main(["submit", "Mine", "--by", "a | b", str(run.folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    own = [r for r in run.records if r.method == "Mine"]
    means = tables.leaderboard(own).loc["Mine"]
    assert printed[0] == f"| Mine | a / b | {means.robust:.2f} | {means.clean:.2f} | {means.average:.2f} |"
    assert str(files["Mine"]) in printed[1] and "cpu" in printed[1]
    found = read(files["Mine"])
    assert found.records == own and found.by == "a | b" and {c.model for c in found.checks} == {r.model for r in own}
    assert len(found.models) == 2 and files["Mine"].stat().st_size < 20_000
    copy = write(found, run.folder / "copy.jsonl")
    assert copy.read_bytes() == files["Mine"].read_bytes() and copy.read_bytes().isascii()
    joint.submit("Mine", "who made Mine", run.folder)


def test_a_name_of_any_letters_makes_a_file(run, tmp_path, capsys):
    shutil.copytree(run.folder.parent, tmp_path / "runs")
    kept = tmp_path / "runs" / "mini" / joint.RECORDS
    kept.write_text(kept.read_text().replace('"method":"Mine"', '"method":"../My | ünë"'), encoding="utf-8")
    path = joint.submit("../My | ünë", "me", tmp_path / "runs" / "mini")
    assert path.parent == tmp_path / "runs" / "mini" / "challenge" and path.name.startswith(".._My_n_")
    assert "| ../My / ünë | me |" in capsys.readouterr().out and read(path).method == "../My | ünë"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Min", "--by", "me", "RUN"], "'Min' is none of the methods of .*; there are: CLIP, Mine"),
        (["Mine", "--by", "me", "RUN/none"], "RUN/none has no records/04_evaluate_16_datasets.jsonl"),
        (["Mine", "--by", "a\nb", "RUN"], "Mine of RUN cannot be submitted: by: .*one printable line"),
        (["Mine", "--by", 200 * "x", "RUN"], "by: .*at most 100 characters"),
        (["Mine", "RUN"], 'submit takes a method, --by "WHO"'),
        (["--by", "me"], 'submit takes a method, --by "WHO"'),
    ],
)
def test_a_bad_call_is_answered_in_one_line(run, arguments, message, capsys):
    assert main(["submit", *(text.replace("RUN", str(run.folder)) for text in arguments)]) == 2
    error = capsys.readouterr().err
    pattern = message.replace("RUN", str(run.folder))
    assert error.count("\n") == 1 and re.search(pattern, error), error


def test_what_failed_its_check_or_had_none_is_not_submitted(run, tmp_path):
    folder = tmp_path / "runs" / "mini"
    shutil.copytree(run.folder, folder)
    with pytest.raises(ValueError, match="Mine of .* cannot be submitted: lacks a check of the attack"):
        joint.submit("Mine", "me", folder)
    store = RecordStore(tmp_path / "runs" / "store" / "records").checks
    for number, check_of in enumerate(RecordStore(run.store).checks.all()):
        store.add(check_of)
        later = {"key": f"later{number}", "time": "9999", "problems": ["Square fools more"]}
        store.add(check_of.model_copy(update=later))
    with pytest.raises(ValueError, match="the attack cannot be trusted: Square fools more"):
        joint.submit("Mine", "me", folder)


def test_the_latest_run_is_submitted_from(run, tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="no run below runs/ has records of notebook 04"):
        joint.submit("Mine", "me")
    shutil.copytree(run.folder.parent, tmp_path / "runs")
    assert joint.submit("Mine", "me").is_relative_to(tmp_path / "runs" / "mini" / "challenge")


def test_the_table_is_that_of_the_records(run, files, capsys):
    """Intervals as in the leaderboard, differences as in the notebook."""
    assert main(["challenge", *map(str, files.values())]) == 0
    printed = capsys.readouterr()
    assert not printed.err
    board = tables.readable(tables.leaderboard(run.records))
    lines = {line.split("  ")[0]: line for line in printed.out.splitlines()}
    order = [line for line in lines if line in board.index]
    assert order == list(board.index)
    for name, row in board.iterrows():
        assert all(text in lines[name] for text in (row.robust, row.clean, row.average, f"who made {name}", "checked"))
    paired = tables.differences(run.records).set_index(["method", "other", "kind"])
    for i, a in enumerate(order):
        for b in order[i + 1 :]:
            for kind in ("robust", "clean"):
                said = paired.loc[(a, b, kind)]
                assert f"{said.difference:+.1f} [{said.low:+.1f}, {said.high:+.1f}]" in lines[f"{a} - {b}"]


def parts(path):
    first, *records = [json.loads(line) for line in path.read_text().splitlines()]
    return first, records


def put(path, first, records, resign=True):
    first = dict(first)
    if resign:
        first.pop("digest", None)
        first["digest"] = digest(first, records)
    path.write_text("".join(json.dumps(line) + "\n" for line in [first, *records]))
    return path


def flip(records, first=None):
    records[1]["hits"] = f"{int(records[1]['hits'][0], 16) ^ 8:x}" + records[1]["hits"][1:]


def each(records, **changes):
    for record in records:
        record.update(changes)


def attacked(records):
    return [r for r in records if r["attack"] != "none"]


def other_eps(first, records):
    for part in [*attacked(records), *first["checks"]]:
        part["settings"]["test_eps"] = 4.0
    each(attacked(records), eps_255=4.0)


def other_seed_of_one(first, records):
    attacked(records)[0]["seed"] = 2


REFUSED = {
    "a flipped bit": (lambda f, r: flip(r), "counted as right, and its bits say otherwise"),
    "a changed count": (lambda f, r: r[0].update(correct=r[0]["correct"] - 1), "its bits say otherwise"),
    "bits beyond the last image": (lambda f, r: r[0].update(hits=r[0]["hits"][:-1] + "f"), "its bits say otherwise"),
    "bits of fewer images": (lambda f, r: r[0].update(hits=r[0]["hits"][:2]), "not one for each of 9 images"),
    "bits that are none": (lambda f, r: r[0].update(hits="zz_0"), "not one for each of 9 images"),
    "more images than bits": (lambda f, r: r[0].update(n=10**30), "not one for each"),
    "no images": (lambda f, r: each(r, n=0, correct=0, hits=""), "not one for each of 0 images"),
    "another epsilon": (other_eps, "shapes: attack='pgd' .*test_eps=4.0.*; it should be .*test_eps=3.5"),
    "an epsilon not of its settings": (lambda f, r: each(r, eps_255=1.0), "attack and epsilon are not those"),
    "another name of the attack": (lambda f, r: each(attacked(r), attack="pgd-100"), "are not those of its settings"),
    "settings that are none": (lambda f, r: each(r, settings={"attack": "no"}), "attack: Input should be 'pgd'"),
    "another protocol": (lambda f, r: each(attacked(r), protocol="worst"), "'pgd'.*, worst; it should be .*, last"),
    "mixed protocols": (lambda f, r: r[1].update(protocol="worst"), "it should be .*, last"),
    "mixed precisions": (lambda f, r: r[1].update(precision="fp16"), "mixes records of several precision: fp16, fp32"),
    "mixed versions": (lambda f, r: r[1].update(code="other"), "mixes records of several code"),
    "mixed seeds": (other_seed_of_one, "mixes weights and seeds"),
    "the same weights twice": (lambda f, r: each(r, model=r[0]["model"]), "mixes weights and seeds"),
    "mixed trainings": (lambda f, r: r[0]["training"]["settings"].update(lr=1.0), "mixes trainings"),
    "a missing set": (lambda f, r: r.__delitem__(slice(0, 2)), "lacks 2 of 8 records, such as seed 0 on shapes, clean"),
    "a missing half": (lambda f, r: r.pop(1), "lacks 1 of 8 records, such as seed 0 on shapes, robust"),
    "a set twice": (lambda f, r: r.append(r[1]), "has several robust records on shapes"),
    "a set too many": (lambda f, r: r.append(r[1] | {"dataset": "letters"}), "'letters' is none of the challenge's"),
    "one set as another": (
        lambda f, r: each(r, data=r[0]["data"], pixels=r[0]["pixels"]),
        "same data are said to be of several",
    ),
    "a part of a set": (lambda f, r: r[0].update(available=20), "shapes has 9 images of 9, 0 left out of 20"),
    "images left out": (lambda f, r: each(r, left_out=1), "shapes has 9 images of 9, 1 left out"),
    "other images of one seed": (lambda f, r: r[0].update(data="0" * 12), "records of shapes are of different images"),
    "another world": (
        lambda f, r: each(r, world="mine"),
        "lacks|is of 'mine'; there are challenges of photographs and",
    ),
    "mixed worlds": (lambda f, r: r[0].update(world="photographs"), "several world: mini-world, photographs"),
    "another method's record": (lambda f, r: r[0].update(method="CLIP"), "is of 'CLIP', not of 'Mine'"),
    "no digest of weights": (lambda f, r: each(r, model="\x1b[31m"), "digest of weights cannot be"),
    "text for the terminal": (lambda f, r: r[0].update(device="\x1b[31m"), "text that cannot be printed"),
    "negative time": (lambda f, r: r[0].update(seconds=-1.0), "seed, seconds or digest of weights cannot be"),
    "no finite time": (lambda f, r: r[0].update(seconds=float("inf")), "records.0.seconds: Input should be a finite"),
    "an unknown name": (lambda f, r: r[0].update({"a\nb": 1}), "records.0.a b: Extra inputs are not permitted"),
    "no records": (lambda f, r: r.clear(), "records: List should have at least 1 item"),
    "no checks": (lambda f, r: f.update(checks=[]), "lacks a check of the attack on each seed's weights"),
    "a check too few": (lambda f, r: f["checks"].pop(), "lacks a check of the attack on each seed's weights"),
    "a check twice": (lambda f, r: f["checks"].append(f["checks"][0]), "lacks a check .* or has others"),
    "a check that failed": (lambda f, r: f["checks"][0].update(problems=["weak"]), "cannot be trusted: weak"),
    "a check of another attack": (
        lambda f, r: f["checks"][1]["settings"].update(test_numsteps=1),
        "is of another attack, world or precision",
    ),
    "a check that miscounts": (lambda f, r: f["checks"][1].update(n=0), "counts what cannot be"),
    "a check cut short": (
        lambda f, r: f["checks"][0]["outcomes"].__delitem__(slice(2, None)),
        "lacks an attack; .*Square",
    ),
    "a defence before all": (lambda f, r: each(r, defence="TTC"), "behind a defence, by 1 passes"),
    "a defence before one": (lambda f, r: r[0].update(defence="TTC", aware=True), "behind a defence"),
    "more passes than one": (lambda f, r: each(r, forwards=40.0), "by 40 passes; a challenge is of models alone"),
    "nobody": (lambda f, r: f.update(by=""), "by: String should have at least 1 character"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_lacks_or_contradicts_is_refused(name, files, tmp_path, capsys):
    """In one line that names the file; others are shown."""
    change, message = REFUSED[name]
    first, records = deepcopy(parts(files["Mine"]))
    change(first, records)
    bad = put(tmp_path / "bad.jsonl", first, records)
    assert joint.challenge([str(bad), str(files["CLIP"])]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith(f"refused: {bad}: ")
    assert re.search(message, printed.err), printed.err
    assert "Mine" not in printed.out and "bad" not in printed.out and "who made CLIP" in printed.out
    put(bad, first, records, resign=False)
    assert joint.challenge([str(bad)]) == 1
    assert "the digest is another" in capsys.readouterr().err or "no digest" in message


OF_OTHERS = {
    "other images": (
        lambda r: each(r[:2], data="0" * 12),
        r"shapes has other images, labels or prompts \(0{12}\) than in",
    ),
    "other pixels": (lambda r: each(r[:2], pixels="0" * 12), r"shapes has other pixels \(0{12}\) than in"),
    "another precision": (lambda r: each(r, precision="amp_bf16"), "precision='amp_bf16'; .* has .*precision='fp32'"),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_files_agree_on_images_prompts_and_attack(name, files, tmp_path, capsys):
    change, message = OF_OTHERS[name]
    first, records = parts(files["CLIP"])
    change(records)
    each(first["checks"], precision=records[0]["precision"])
    other = put(tmp_path / "other.jsonl", first, records)
    assert joint.challenge([str(other)]) == 0
    capsys.readouterr()
    assert joint.challenge([str(files["Mine"]), str(other)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and re.search(message, printed.err), printed.err
    assert "who made Mine" in printed.out and "who made CLIP" not in printed.out


def test_who_measures_the_same_weights_again_is_told_what_differs(files, tmp_path, capsys):
    first, records = parts(files["CLIP"])
    again = put(tmp_path / "again.jsonl", first | {"by": "another"}, records)
    assert joint.challenge([str(files["CLIP"]), str(again)]) == 0
    assert f"{again}: the weights of {files['CLIP']} again; 0 of 36 bits differ" in capsys.readouterr().out
    flip(records)
    records[1]["correct"] = bin(int(records[1]["hits"], 16)).count("1")
    put(again, first, records)
    assert joint.challenge([str(files["CLIP"]), str(again)]) == 0
    printed = capsys.readouterr().out
    assert "1 of 36 bits differ" in printed and printed.count("who made CLIP") == 1


def test_seeds_are_paired_by_their_order_and_names_told_apart(files, tmp_path, capsys):
    first, records = parts(files["Mine"])
    for part in [*records, *first["checks"]]:
        part["model"] = digest(part["model"])
        if "seed" in part:
            part["seed"] += 7
            part["training"]["settings"]["seed"] += 7
    other = put(tmp_path / "other.jsonl", first, records)
    assert joint.challenge([str(files["Mine"]), str(other)]) == 0
    printed = capsys.readouterr().out
    assert "+0.0 [+0.0, +0.0]" in printed and printed.count("2 seeds") == 2 and "not comparable" not in printed
    assert all(f"Mine {min(read(path).models)} " in printed for path in (files["Mine"], other))


CONTENTS = [
    b"",
    b"\n",
    b"[]\n",
    b"3\n",
    b"{}\n",
    b'{"digest": 1}',
    b"[" * 10_000,
    b"\xff\xfe",
    b"1" * 5000,
    b"not JSON",
]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_what_is_no_such_file_is_refused(content, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(content)
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "none"), str(tmp_path), "a\0b", 5000 * "x", "\x1b[31m"]
    assert joint.challenge(names) == 1
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == len(names) and all(line.startswith("refused: ") for line in lines) and not printed.out
    assert all(line.isprintable() and len(line) < 1400 for line in lines)


def test_a_file_too_large_is_not_read(files, tmp_path, monkeypatch):
    monkeypatch.setattr(submissions, "LARGEST", 100)
    with pytest.raises(ValueError, match="no file of at most 100 bytes"):
        read(files["Mine"])


def fuzz(short, long):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=size(short, long), deadline=None, database=None, suppress_health_check=checks)


@fuzz(150, 3000)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_change_nothing(files, tmp_path, data):
    whole = files["CLIP"].read_bytes()
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(data.draw(damaged(whole)))
    try:
        found = read(path)
        check(found)
        assert found == read(files["CLIP"])
    except ValueError as error:
        assert "\n" not in joint._reason(error) and joint._reason(error)


@fuzz(20, 1000)
@given(data=st.data())
def test_a_liar_with_a_right_digest_is_refused_or_shown(files, tmp_path, capsys, data):
    """Any value anywhere: a table, or one line."""
    first, records = parts(files["CLIP"])
    where = data.draw(st.sampled_from([first, first["checks"][0], first["checks"][0]["outcomes"][0], *records[:2]]))
    odd = anything | st.sampled_from(
        [10**400, -(10**30), 1e308, float("nan"), "\ud800", 10_000 * "f", "\u2028", "ff f0"]
    )
    where[data.draw(st.sampled_from([*where, "other"]))] = data.draw(odd)
    path = put(tmp_path / "liar.jsonl", first, records)
    refused = joint.challenge([str(path)])
    printed = capsys.readouterr()
    assert printed.err.count("\n") == refused and ("who made CLIP" in printed.out or refused or where is first)
    assert printed.err.strip().isprintable() and printed.out.replace("\n", "").replace("\u00a0", " ").isprintable()


def whole_sets(run, chance, **changes):
    """A file of photographs, all 16 sets as published, its records forged from one of the mini-world."""
    clean, robust = run.records[:2]
    step = {"test_eps": 1.0, "test_stepsize": 1.0, "test_numsteps": 100}
    how = MINI.model_copy(update=step | changes)
    common = {"world": "photographs", "arch": "ViT-B-32-quickgelu", "published": True}
    records = []
    for key, spec in DATASETS.items():
        for record, attack in ((clean, None), (robust, how)):
            right = chance.random(spec.images) < (0.6 if attack is None else 0.3)
            one = {"dataset": key, "data": digest(key), "pixels": digest(key), "n": spec.images}
            one |= {"hits": np.packbits(right).tobytes().hex(), "correct": int(right.sum())}
            if attack:
                one |= {"attack": attack.label, "eps_255": attack.test_eps, "settings": attack.model_dump()}
            records.append(record.model_copy(update=common | one))
    checks = [c for c in RecordStore(run.store).checks.all() if c.model == clean.model]
    checks = [c.model_copy(update={"world": "photographs", "settings": how.model_dump()}) for c in checks]
    return Submission(method="CLIP", by="forger", checks=checks, records=records)


def test_photographs_are_as_published_and_beside_what_was_printed(run, files, tmp_path, capsys):
    s = whole_sets(run, np.random.default_rng(0))
    path = write(s, tmp_path / "photographs.jsonl")
    assert path.stat().st_size < submissions.LARGEST / 100
    assert joint.challenge([str(path), str(files["CLIP"])]) == 0
    printed = capsys.readouterr().out
    photographs, mini = printed.split("mini-world: ")
    assert photographs.count("printed, not checked") == 16
    assert f"{sum(spec.images for spec in DATASETS.values()):,}" in photographs
    assert re.search(r"42\.09 +56\.44 +49\.27", photographs) and "printed" not in mini and "who made CLIP" in mini
    cut = s.records[0].model_copy(update={"n": 8, "hits": "ff", "correct": 8, "available": 10_000})
    for records, reason in (
        ([cut, *s.records[1:]], "tinyImageNet has 8 images of 10,000, 0 left out of 10,000"),
        ([r.model_copy(update={"published": False}) for r in s.records], "tinyImageNet is not as published"),
        ([r.model_copy(update={"arch": "ViT-L-14"}) for r in s.records], "not as published: ViT-L-14"),
        (whole_sets(run, np.random.default_rng(0), test_eps=2.0).records, "not as published: pgd-100, epsilon 2/255"),
    ):
        checks = [c.model_copy(update={"settings": records[1].settings}) for c in s.checks]
        write(s.model_copy(update={"records": records, "checks": checks}), path)
        assert joint.challenge([str(path)]) == 1
        assert reason in capsys.readouterr().err


def test_the_kept_files_are_right(monkeypatch, capsys):
    """As run_all.sh shows them when it is given none."""
    monkeypatch.setitem(submissions.SETS, "mini-world", tuple(submissions.TASKS))
    assert main(["challenge"]) == 0
    printed = capsys.readouterr()
    assert not printed.err and printed.out.count("printed, not checked") == 16
    table = printed.out.split("mini-world: ")[1]
    assert "TGA-ZSR - TeCoA" in table and table.count("  checked") == 2
