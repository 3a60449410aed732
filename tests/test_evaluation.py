import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tensors_alive

from tgazsr_utils.core import evaluation as core_evaluation
from tgazsr_utils.core.attacks import pgd, run_attack
from tgazsr_utils.core.evaluation import predict, predictor
from tgazsr_utils.core.images import PLUMBING
from tgazsr_utils.core.seeds import Noise
from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.display import plots
from tgazsr_utils.measuring import bench
from tgazsr_utils.measuring import measure as evaluation
from tgazsr_utils.measuring import tables as results
from tgazsr_utils.measuring.attention_shift import attention_under_attack
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.measure import Measurement, answer, evaluate
from tgazsr_utils.measuring.records import RecordStore
from tgazsr_utils.measuring.scoring import score
from tgazsr_utils.measuring.tables import leaderboard, paired_difference
from tgazsr_utils.runtime.fingerprints import fingerprint
from tgazsr_utils.runtime.weights import load_clip

ATTACK = AttackSettings(test_eps=3, test_stepsize=1, test_numsteps=3)


@pytest.fixture(scope="module")
def sets():
    return [load_dataset(key, "test", n=30) for key in ("shapes", "colours")]


@pytest.fixture(scope="module")
def records(mini, sets, tmp_path_factory):
    return Bench(RecordStore(tmp_path_factory.mktemp("records"))).measure(mini, sets, ATTACK, method="CLIP")


@pytest.mark.parametrize(("correct", "n"), [(8, 10), (1, 50), (499, 500)])
def test_intervals_are_wilsons(records, correct, n):
    """The bounds are where |p_hat - p| = z sqrt(p (1 - p) / n); at the ends they are exact."""
    frame = results.to_frame([change(records[0], correct=correct, n=n)]).iloc[0]
    for bound in (frame.low / 100, frame.high / 100):
        assert abs(correct / n - bound) == pytest.approx(1.95996 * math.sqrt(bound * (1 - bound) / n), rel=1e-4)
    none, all_of_them = (results.to_frame([change(records[0], correct=c, n=n)]).iloc[0] for c in (0, n))
    assert none.low == 0 < none.high and all_of_them.low < 100 == all_of_them.high


def test_records_count_what_predictions_say(mini, sets, records):
    by_key = {(r.dataset, r.attack): r for r in records}
    assert set(by_key) == {(s.key, a) for s in sets for a in ("none", "pgd-3")}
    for data in sets:
        text = mini.encode_text(data.prompts)
        right = mini.logits(data.images.float() / 255, text).argmax(1) == data.labels
        record = by_key[data.key, "none"]
        assert (record.correct, record.n, record.world) == (int(right.sum()), 30, "mini-world")
        np.testing.assert_array_equal(results.bits(record), right.numpy())
        assert by_key[data.key, "pgd-3"].correct <= record.correct
    assert by_key["shapes", "pgd-3"].correct < by_key["shapes", "none"].correct


def test_evaluation_is_deterministic_and_ignores_who_asks(mini, sets, records):
    again = evaluate(mini, sets[0], ATTACK, method="CLIP")
    assert again.key == records[1].key and again.hits == records[1].hits
    assert evaluate(mini, sets[0], ATTACK, method="CLIP", seed=1).key != again.key
    assert torch.equal(predict(mini, sets[0], None), predict(mini, sets[0], None, seed=5))


@pytest.mark.parametrize("changes", [{}, {"attack": "cw"}, {"norm": "l2", "test_eps": 100, "test_stepsize": 30}])
def test_under_worst_no_more_is_right_and_the_record_says_so(mini, sets, changes):
    attack = AttackSettings(**ATTACK.model_dump() | changes)
    last, worst = (evaluate(mini, sets[0], attack, protocol, method="CLIP") for protocol in ("last", "worst"))
    assert (results.bits(worst) & ~results.bits(last)).sum() <= 1  # another batch may round the odd one otherwise
    assert worst.key != last.key
    assert (last.protocol, worst.protocol) == ("last", "worst") and last.attack == attack.label


def test_autoattack_counts_any_success_and_clean_images_know_no_protocol(mini, sets):
    attack = AttackSettings(attack="apgd", test_eps=3, test_stepsize=0, test_numsteps=10)
    record = evaluate(mini, sets[0], attack, "last", method="CLIP")
    assert (record.protocol, record.attack) == ("worst", "apgd-10")
    assert record.correct <= evaluate(mini, sets[0], ATTACK, "worst", method="CLIP").correct + 1
    clean = [evaluate(mini, sets[0], None, protocol, method="CLIP") for protocol in ("last", "worst")]
    assert clean[0].key == clean[1].key and clean[1].protocol == "last"


@pytest.fixture(scope="module")
def tuned():
    return load_clip("mini-clip", "mini-tga-zsr", "cpu")


@pytest.mark.parametrize("protocol", ["last", "worst"])
def test_transferred_images_are_made_against_the_source_and_read_by_the_target(mini, tuned, sets, protocol):
    """Image by image what pgd alone makes of the source; what fools the source on the way says nothing."""
    data, kinds = sets[0], {"method": "Tuned", "seed": 3}
    record = evaluate(tuned, data, ATTACK, protocol, source=mini, **kinds)
    noise = Noise.named(torch.arange(30), "evaluation", "shapes", 3)
    text, images = mini.encode_text(data.prompts), data.images.float() / 255
    made = pgd(mini, images, data.labels, text, 3 / 255, 1 / 255, 3, generator=noise)
    right = tuned.logits(made, tuned.encode_text(data.prompts)).argmax(1) == data.labels
    np.testing.assert_array_equal(results.bits(record), right.numpy())
    assert (record.attack, record.protocol) == ("transfer-pgd-3", "last")
    assert record.settings == ATTACK.model_dump() | {"source": fingerprint(mini)}
    keys = {Measurement(tuned, data, ATTACK, source=source, **kinds).key for source in (None, mini, tuned)}
    assert len(keys) == 3 and record.key in keys
    clean = {Measurement(tuned, data, None, source=source, **kinds).key for source in (None, mini)}
    assert len(clean) == 1


def test_a_rerun_measures_only_what_is_missing(mini, sets, tmp_path, monkeypatch):
    store = RecordStore(tmp_path)
    first = Bench(store).measure(mini, sets[:1], ATTACK, method="CLIP")
    asked = []
    noted = lambda ms, *a: asked.append([(m.data.key, m.label) for m in ms]) or answer(ms, *a)
    monkeypatch.setattr(bench, "answer", noted)
    second = Bench(store).measure(mini, sets, ATTACK, method="CLIP")
    assert (
        asked == [[("colours", "none"), ("colours", "pgd-3")]]
        and second[:2] == first
        and len(list(tmp_path.glob("*.json"))) == 4
    )


def test_a_damaged_record_is_named(mini, sets, tmp_path):
    store = RecordStore(tmp_path)
    record = store.add(evaluate(mini, sets[0], None, method="CLIP"))
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=f"{record.key}.json is damaged"):
        store.get(record.key)


@pytest.mark.parametrize("correct", [0, 30])
def test_accuracy_bars_take_all_and_nothing(records, correct):
    frame = results.to_frame([change(r, correct=correct) for r in records if r.dataset == "shapes"])
    assert plots.accuracy_bars(frame, "title").axes[0].get_xlim() == (0, 100)


def change(record, **changes):
    return record.model_copy(update=changes)


def test_the_leaderboard_averages_sets_then_seeds(records):
    values = iter([10, 20, 12, 22, 30, 25, 30, 25])  # correct of 30: (clean, robust) x (shapes, colours) x seeds
    seeds = [change(r, seed=seed, correct=next(values)) for seed in (0, 1) for r in records]
    table = leaderboard(seeds)
    row = table.loc["CLIP"]
    clean, robust = [(10 + 12) / 60, 1.0], [(20 + 22) / 60, 50 / 60]
    assert row.clean == pytest.approx(100 * np.mean(clean)) and row.robust == pytest.approx(100 * np.mean(robust))
    assert row.average == pytest.approx((row.clean + row.robust) / 2)
    # Two values: Student's t for 97.5 % with one degree of freedom is 12.706, and s / sqrt(2) is half their distance.
    assert row.clean_ci == pytest.approx(100 * 12.7062 * abs(clean[0] - clean[1]) / 2, rel=1e-4)
    assert row.sets == "2 of 16" and row.interval == "2 seeds" and row.world == "mini-world"


def under(records, attack, correct, eps=3.0, **settings):
    """The attacked ones of ``records`` as if under another attack."""
    attacked = [r for r in records if r.attack != "none"]
    kept = np.packbits(np.arange(30) < correct).tobytes().hex()
    changes = {"attack": attack, "correct": correct, "hits": kept, "eps_255": eps}
    return [change(r, **changes, settings=r.settings | settings) for r in attacked]


def test_the_harmonic_mean_is_of_clean_and_the_strongest_attack(records):
    clean = [change(r, correct=24) for r in records if r.attack == "none"]
    measured = [*clean, *under(records, "pgd-3", 12), *under(records, "apgd-3", 6), *under(records, "pgd-3", 0, 9.0)]
    table = results.under_attacks(measured)
    assert table.loc["CLIP"].to_dict() == {"pgd-3, 3/255": 40, "apgd-3, 3/255": 20, "pgd-3, 9/255": 0}
    own = [r for r in measured if (r.attack, r.eps_255) in (("none", 0), ("pgd-3", 3))]
    assert leaderboard(own).harmonic["CLIP"] == pytest.approx(2 * 80 * 40 / 120)
    board = leaderboard(own, table[["pgd-3, 3/255", "apgd-3, 3/255"]])
    assert board.harmonic["CLIP"] == pytest.approx(2 * 80 * 20 / 100) and board.average["CLIP"] == 60
    assert results.readable(board).harmonic["CLIP"] == "32.0" and list(board)[4:7] == [
        "average",
        "average_ci",
        "harmonic",
    ]
    nothing = [change(r, correct=0, hits="00000000") for r in records]
    assert leaderboard(nothing).harmonic["CLIP"] == 0
    assert results.readable(leaderboard(clean)).harmonic["CLIP"] == "not counted"


def test_of_a_transferred_attack_the_worst_source_counts_and_is_named(records):
    """Each method has other sources; of two seeds each its own, called by one name."""
    a, b = ([change(r, method=m, model=m, seed=s) for s in (0, 1) for r in records] for m in "ab")
    a, b = ([change(r, model=f"{r.method}{r.seed}") for r in part] for part in (a, b))
    of = lambda part, source, correct: [
        change(r, settings=r.settings | {"source": source if source == "CLIP model" else f"{source}{r.seed}"})
        for r in under(part, "transfer-pgd-3", correct)
    ]
    original = [change(r, model="CLIP model") for r in records]
    measured = [*original, *a, *b, *of(a, "CLIP model", 12), *of(a, "b", 9), *of(b, "CLIP model", 15), *of(b, "a", 18)]
    table = results.under_attacks(measured)
    assert list(table) == ["pgd-3, 3/255", "transfer-pgd-3, 3/255", "transfer-pgd-3, 3/255, from"]
    worst = table["transfer-pgd-3, 3/255"]
    assert worst[["a", "b"]].tolist() == [30, 50] and np.isnan(worst["CLIP"])
    assert table["transfer-pgd-3, 3/255, from"][["a", "b"]].tolist() == ["b", "CLIP"]


def test_further_sets_are_in_no_mean_with_others_and_that_is_said(records):
    """Alone they have one of their own."""
    renamed = {"shapes": "dtd", "colours": "ImageNet-R"}
    measured = [change(r, dataset=renamed[r.dataset], world="photographs") for r in records]
    worse = [change(r, method="Worse", correct=0, hits="00000000") for r in measured]
    of_dtd = lambda part: [r for r in part if r.dataset == "dtd"]
    board, alone = leaderboard([*measured, *worse]), leaderboard(of_dtd([*measured, *worse]))
    same = ["robust", "clean", "average", "average_ci", "harmonic", "images"]
    pd.testing.assert_frame_equal(board[same], alone[same])
    assert board.sets["CLIP"] == "1 of 16 (without ImageNet-R)" and alone.sets["CLIP"] == "1 of 16"
    robust = [r for r in measured if r.attack != "none"]
    against = [r for r in worse if r.attack != "none"]
    assert paired_difference(robust, against) == paired_difference(of_dtd(robust), of_dtd(against))
    figure = plots.accuracy_heatmap(results.to_frame(measured), "title")
    shown = [float(text.get_text()) for text in figure.axes[0].texts]
    assert shown[0] == shown[2] == round(board.robust["CLIP"]) != shown[1]  # dtd, ImageNet-R, MEAN
    further = leaderboard([r for r in measured if r.dataset == "ImageNet-R"])
    assert further.sets["CLIP"] == "1" and further.images["CLIP"] == "30"


def test_one_seed_has_intervals_over_images(records):
    row = leaderboard(records).loc["CLIP"]
    for kind in ("clean", "robust"):
        rates = [r.correct / r.n for r in records if (r.attack == "none") == (kind == "clean")]
        smooth = [(30 * p + 1) / 32 for p in rates]  # one success and one failure more
        half = 196 * np.sqrt(sum(p * (1 - p) / 32 for p in smooth)) / len(rates)
        assert row[f"{kind}_ci"] == pytest.approx(half)
    assert row.interval == "images"
    assert max(row.clean_ci, row.robust_ci) / 2 <= row.average_ci <= (row.clean_ci + row.robust_ci) / 2
    assert leaderboard(records[::-1]).loc["CLIP", "average_ci"] == row.average_ci
    all_right = [change(r, correct=30, hits=np.packbits(np.ones(30, bool)).tobytes().hex()) for r in records]
    assert leaderboard(all_right).loc["CLIP", "clean_ci"] > 1  # not certainty
    with pytest.raises(ValueError, match="differ in attack"):
        results.summary([*records, *(change(r, attack="pgd-9") for r in records if r.attack != "none")])


@pytest.mark.parametrize(
    "changes",
    [
        {"world": "photographs"},
        {"eps_255": 8.0},
        {"attack": "pgd-100"},
        {"protocol": "worst"},
        {"precision": "amp_bf16"},
        {"dataset": "letters"},
        {"code": "other"},
        {"data": "other"},
        {"pixels": "other"},
        {"settings": {"test_stepsize": 0.01}},
    ],
)
@pytest.mark.parametrize("who", [{"method": "Other"}, {"seed": 1}])
def test_the_leaderboard_refuses_mixtures(records, changes, who):
    """Of methods in one table, and of seeds in one row."""
    merged = lambda r: {"settings": r.settings | changes["settings"]} if "settings" in changes else changes
    other = [change(r, **who, **(merged(r) if r.attack != "none" else {})) for r in records]
    with pytest.raises(ValueError, match="differ|different (sets|images|pixels)") as error:
        leaderboard([*records, *other])
    assert "\n" not in str(error.value)


def test_the_leaderboard_refuses_two_trainings_under_one_name(records):
    with pytest.raises(ValueError, match="CLIP, seed 0, has several clean records on shapes .of models .*, another"):
        leaderboard([*records, *(change(r, model="another") for r in records)])


def test_images_left_out_or_not_used_are_told_in_the_table(records):
    assert leaderboard(records).loc["CLIP", "images"] == "60"
    some = [change(r, n=29, correct=20, left_out=1, available=1000) for r in records]
    assert leaderboard(some).loc["CLIP", "images"] == "58 of 2,000, 2 unreadable left out"


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "batch_that_fits", lambda clip: 8)
    monkeypatch.setattr(evaluation, "SAVE_EVERY", 0.0)
    m, kept = Measurement(mini, load_dataset("letters", "test", n=30), ATTACK), tmp_path / "key_0.safetensors"
    ((whole, _),) = answer([m], range(30))
    assert torch.equal(whole.classes, predict(mini, m.data, ATTACK))
    seen = []

    class Stop:
        def update(self, n):
            seen.append(n)
            if len(seen) == 4:  # nothing done before, two batches saved, the third not yet
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer([m], range(30), [kept], Stop())
    assert list(tmp_path.iterdir()) == [kept]
    attacks = []
    monkeypatch.setattr(core_evaluation, "run_attack", lambda *a: attacks.append(len(a[1])) or run_attack(*a))
    ((again, seconds),) = answer([m], range(30), [kept])
    assert all(map(torch.equal, again, whole)) and attacks == [8, 6] and seconds > 0
    kept.write_bytes(b"half a file")
    assert all(map(torch.equal, answer([m], range(30), [kept])[0][0], whole))


def test_where_memory_runs_out_the_batch_is_halved_with_the_same_outcome(mini, monkeypatch, capsys):
    m, sizes = Measurement(mini, load_dataset("letters", "test", n=30), ATTACK), []
    ((whole, _),) = answer([m], range(30))

    def small_machine(*arguments):
        sizes.append(len(arguments[1]))
        if len(arguments[1]) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if len(sizes) == 4:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
        return run_attack(*arguments)

    monkeypatch.setattr(core_evaluation, "run_attack", small_machine)
    monkeypatch.setattr(evaluation, "batch_that_fits", lambda clip: 32)
    monkeypatch.setattr(evaluation, "_fitted", {})
    ((halved, _),) = answer([m], range(30))
    assert all(map(torch.equal, halved[1:3], whole[1:3])) and (halved.classes != whole.classes).sum() <= 1
    assert halved.at_once.tolist() == 8 * [8] + 22 * [4]
    assert evaluation.record_of(m, [halved], 1.0).batch == 4
    assert sizes == [30, 16, 8, 8, 4, 4, 4, 4, 4, 2]  # each image attacked once in the end, none lost
    assert "memory ran out; going on with 16 images at once" in capsys.readouterr().out
    assert [*evaluation._fitted.values()] == [4]  # from where the next set starts

    def broken(*arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(core_evaluation, "run_attack", broken)
    with pytest.raises(RuntimeError, match="something else"):
        answer([m], range(30))


def test_the_batch_that_fits_is_a_power_of_two_of_all_memory(mini, monkeypatch):
    """So it is the same each time, but where others have filled a CPU's."""

    def fits(total, free=2**40, group=2**40):
        memory = SimpleNamespace(total=total, available=free)
        monkeypatch.setattr(evaluation.psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(evaluation, "allowed_memory", lambda total: min(total, group))
        return evaluation.batch_that_fits(mini)

    found = [fits(total) for total in (1, 2**26, 2**28, 2**40)]
    assert found[0] == 1 and found == sorted(found) and found[-1] == 128 and 1 < found[1] < found[2] < 128
    assert all(n & (n - 1) == 0 for n in found)
    assert fits(2**28, free=2**27) == fits(2**28, group=2**28) == found[2] > fits(2**28, free=2**26) >= 1
    assert fits(2**40, group=2**28) == found[2]


class CountedMemory:
    """In place of ``torch.cuda``: each image of an attack takes 32 MiB at its peak, weights and the rest 2 GiB."""

    def __init__(self, total):
        self.total, self.peak = total, 0

    def attack(self, clip, images, *_):
        self.peak = 2**31 + len(images) * 2**25

    reset_peak_memory_stats = lambda self, device: None
    max_memory_allocated = lambda self, device: self.peak
    get_device_properties = lambda self, device: SimpleNamespace(total_memory=self.total)


@pytest.mark.parametrize("total, fits", [(80 * 2**30, 1024), (24 * 2**30, 512), (8 * 2**30, 128), (2**25, 1)])
def test_on_cuda_the_batch_goes_by_the_peaks_of_small_ones(monkeypatch, total, fits):
    """Seven tenths of the device's memory, whatever else is there; where that is too much, it is halved."""
    memory = CountedMemory(total)
    clip = SimpleNamespace(device=SimpleNamespace(type="cuda"), image_size=(8, 8), encode_text=lambda prompts: None)
    monkeypatch.setattr(evaluation, "_place_of", lambda clip: ("cuda",))
    zeros = lambda *size, device, **options: torch.zeros(*size, **options)
    monkeypatch.setattr(evaluation, "torch", SimpleNamespace(cuda=memory, zeros=zeros, int64=torch.int64))
    monkeypatch.setattr(evaluation, "pgd", memory.attack)
    assert evaluation.batch_that_fits(clip) == fits
    monkeypatch.setattr(evaluation, "_fitted", {("cuda",): 16})  # memory has run out before
    assert evaluation.batch_that_fits(clip) == min(fits, 16)


def test_what_is_said_stands_where_another_part_of_the_pass_fails(mini, tmp_path, monkeypatch):
    data, rows = load_dataset("letters", "test", n=6), range(6)
    ms, kept = [Measurement(mini, data, attack) for attack in (None, ATTACK)], [tmp_path / "a.st", tmp_path / "b.st"]

    def fails(*arguments):
        raise ValueError("an attack of one's own")

    with monkeypatch.context() as patch:
        patch.setattr(core_evaluation, "run_attack", fails)
        with pytest.raises(ValueError, match="an attack of one's own"):
            answer(ms, rows, kept)
    assert not evaluation._Part(ms[0], rows, kept[0]).left.any() and evaluation._Part(ms[1], rows, kept[1]).left.all()
    assert all(map(torch.equal, answer(ms, rows, kept)[1][0], answer(ms[1:], rows)[0][0]))


def test_an_image_is_read_once_for_clean_and_attacked(mini, tmp_path, monkeypatch):
    """Also where a stop has left one of them further than the other; the outcome is that of each by itself."""
    monkeypatch.setattr(evaluation, "batch_that_fits", lambda clip: 4)
    letters, read = load_dataset("letters", "test", n=10), []

    class Counted:
        def read(self, chunks, device):
            for rows in chunks:
                read.append(rows.tolist())
                yield rows, letters.images[rows]

    data = replace(letters, images=Counted())
    ms, rows = [Measurement(mini, data, attack) for attack in (None, ATTACK)], range(10)
    monkeypatch.setattr(Measurement, "key", property(lambda m: m.label))  # a reader has no identity here
    alone = [answer([m], rows)[0][0] for m in ms]
    read.clear()
    together = answer(ms, rows)
    assert read == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for one, (other, seconds) in zip(alone, together):
        assert all(map(torch.equal, one, other)) and seconds > 0
    kept = [tmp_path / "none.safetensors", tmp_path / "pgd.safetensors"]
    part = evaluation._Part(ms[0], rows, kept[0])
    for tensor, whole in zip(part.answers, alone[0]):
        tensor[:6] = whole[:6]
    evaluation._keep([part])
    predicted = []
    monkeypatch.setattr(core_evaluation, "run_attack", lambda *a: predicted.append(len(a[1])) or run_attack(*a))
    again = [found for found, _ in answer(ms, rows, kept)]
    assert all(torch.equal(a, b) for one, other in zip(alone, again) for a, b in zip(one, other))
    assert predicted == [4, 4, 2] and all(path.exists() for path in kept)


def test_measuring_image_files_keeps_none(mini, photo_root):
    alive = []
    for seed in range(3):
        data = load_dataset("animals", "train", photo_root, image_size=56, decode=False)
        evaluate(mini, data, ATTACK, method="CLIP", seed=seed)
        del data
        alive.append(tensors_alive())
    assert alive[0] == alive[1] == alive[2]


def test_an_image_is_attacked_alike_in_every_batch(mini, monkeypatch):
    data, images = load_dataset("letters", "test", n=12), []
    for chunks in (5, torch.arange(12).flip(0).split(4)):
        found = torch.empty_like(data.images, dtype=torch.float)
        start = ATTACK.model_copy(update={"test_numsteps": 1, "test_stepsize": 0.0})
        for batch, attacked, *_ in map(predictor(mini, data, start), data.batches(chunks)):
            found[batch.rows] = attacked
        images.append(found)
    assert torch.equal(*images)  # steps of length zero: this is the random start


def test_paired_differences_use_the_same_images(records):
    robust = [r for r in records if r.attack != "none"]
    same = paired_difference(robust, robust)
    assert same == (0, 0, 0)
    all_right = [change(r, hits=np.packbits(np.ones(r.n, bool)).tobytes().hex()) for r in robust]
    mean, low, high = paired_difference(all_right, robust)
    errors = [1 - r.correct / r.n for r in robust]
    assert mean == pytest.approx(100 * np.mean(errors))
    variance = sum(e * (1 - e) / 30 for e in errors)
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(variance * 30 / 29) / 2)  # of the sample
    alone = [change(r, n=1, hits="80") for r in robust]
    assert np.isnan(paired_difference(alone, [change(r, hits="00") for r in alone])[1])  # one image a set: no interval
    seeds = [change(r, seed=s) for s in range(3) for r in robust]
    again = paired_difference([change(r, seed=s) for s in range(3) for r in all_right], seeds)
    assert again == pytest.approx((mean, low, high))  # the same images three times are not three times the evidence
    with pytest.raises(ValueError, match="same images"):
        paired_difference(robust, robust[:1])


def test_methods_of_one_weight_are_named(records):
    """As Vision-based, whose maps train nothing, trains what TeCoA does."""
    alike = [change(r, method="Alike") for r in records]
    other = [change(r, method="Other", model="other") for r in records]
    assert results.of_one_weight([*records, *alike, *other]) == [
        "CLIP and Alike have the same weights, to the bit: what differs between them trains nothing"
    ]
    assert results.of_one_weight([*records, *other]) == []


def test_tables_can_be_read(records):
    table = leaderboard(records)
    shown = results.readable(table).loc["CLIP"]
    assert (
        shown.clean == f"{table.clean.iloc[0]:.1f}\u00a0±\u00a0{table.clean_ci.iloc[0]:.1f}" and "clean_ci" not in shown
    )
    columns = {
        f"robust_minus_first{end}": [float("nan"), value] for end, value in (("", 3.06), ("_low", -1), ("_high", 4.2))
    }
    twice = pd.concat([table, table]).assign(**columns)
    assert results.readable(twice).robust_minus_first.tolist() == ["", "+3.1 [-1.0, 4.2]"]


def test_differences_of_all_pairs(records):
    """The untuned model, measured once, stands beside each seed of a tuned one."""
    none_right = np.packbits(np.zeros(30, bool)).tobytes().hex()
    another = [change(r, method="Another", seed=5) for r in records]
    assert (results.differences([*records, *another]).difference == 0).all()  # one seed each, not the same one
    lost = [change(r, method="Lost", seed=s, correct=0, hits=none_right) for s in (0, 1) for r in records]
    table = results.differences([*records, *lost]).set_index(["kind", "method", "other"])
    board = leaderboard([*records, *lost])
    assert len(table) == 2 * 2 * 2 and list(board.index) == ["CLIP", "Lost"]
    for kind in ("robust", "clean"):
        row = table.loc[kind, "CLIP", "Lost"]
        assert row.difference == pytest.approx(board.loc["CLIP", kind]) and row.low < row.difference < row.high
        assert table.loc[kind, "Lost", "CLIP"].difference == pytest.approx(-row.difference)
        assert table.loc[kind, "CLIP", "CLIP"].tolist() == [0, 0, 0]
    figure = plots.difference_matrix(table.reset_index(), "title")
    shown = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert {f"{sign}{abs(board.loc['CLIP', kind]):.1f}" for sign in "+-" for kind in ("robust", "clean")} == {
        t.split("\n")[0] for t in shown
    }


def test_attention_under_attack_belongs_to_the_images(mini, sets):
    result = attention_under_attack(mini, sets[0], ATTACK)
    assert result.clean_maps.shape == result.attacked_maps.shape == (30, 7, 7)
    right = predict(mini, sets[0], ATTACK) == sets[0].labels
    assert (result.frame.attacked_prediction == result.frame.label).tolist() == right.tolist()
    assert (result.frame.flipped == result.frame.clean_correct & ~right.numpy()).all()
    assert result.frame.l2.mean() > 0 and {"energy_clean", "energy_uniform"} <= set(result.frame)


def test_a_score_is_the_evaluations_of_each_set(mini, sets, records):
    found = score(mini, sets, ATTACK)
    assert [(r.key, r.hits) for r in found] == [(r.key, r.hits) for r in records]
    assert [r.key for r in score(mini, sets)] == [r.key for r in records[::2]]
    assert leaderboard(score(mini, sets[:1], ATTACK, method="mine")).index == ["mine"]


def test_models_of_two_image_sizes_share_a_table_and_are_never_paired(records):
    large = [change(r, method="Large", arch="ViT-B-32", data=f"{r.data} at 224", pixels="others") for r in records]
    another = [change(r, method="Another", correct=0, hits="00000000") for r in records]
    assert set(leaderboard([*records, *large]).index) == {"CLIP", "Large"}
    table = results.differences([*records, *large, *another]).set_index(["kind", "method", "other"])
    for kind in ("robust", "clean"):
        assert table.loc[kind, "CLIP", "Large"].isna().all() and table.loc[kind, "Large", "Another"].isna().all()
        assert table.loc[kind, "CLIP", "Another"].difference == pytest.approx(leaderboard(records)[kind].item())
        assert table.loc[kind, "Large", "Large"].tolist() == [0, 0, 0]
    plots.difference_matrix(table.reset_index(), "title")
    with pytest.raises(ValueError, match="same images"):
        paired_difference(records, large)
    for changes in ({"n": 31}, {"available": 1000}, {"left_out": 1}):
        with pytest.raises(ValueError, match="records of colours are of different images"):
            leaderboard([*records, *(change(r, **changes) for r in large)])
    same_size = [change(r, method="Same", arch="ViT-B-16", data="elsewhere") for r in large]
    with pytest.raises(ValueError, match="records of colours are of different images"):
        leaderboard([*records, *large, *same_size])


def test_what_is_measured_for_show_has_records_of_its_own(mini, sets):
    shown = replace(sets[0], world=PLUMBING)
    assert Measurement(mini, shown, None).key != Measurement(mini, sets[0], None).key
    assert Measurement(mini, replace(sets[0], world="photographs"), None).key == Measurement(mini, sets[0], None).key
