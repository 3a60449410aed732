"""More than ten thousand bad inputs: each is taken, or refused in one line that names the file or the value.

A tenth of them without --long.
"""

import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import documents, size
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tgazsr_utils import profiles
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.measuring import measure as evaluation
from tgazsr_utils.measuring.records import Record, RecordStore
from tgazsr_utils.parameters import NOTEBOOKS, SettingsError, validate
from tgazsr_utils.runtime.checkpoints import Checkpoints
from tgazsr_utils.runtime.files import save_tensors
from tgazsr_utils.runtime.original_cache import OriginalCache
from tgazsr_utils.runtime.weights import SHIPPED, load_clip, read_metadata

TOTAL = []  # with --long


def fuzz(examples):
    TOTAL.append(examples)
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=size(examples // 10, examples), deadline=None, database=None, suppress_health_check=checks
    )


def one_line(error):
    assert str(error) and "\n" not in str(error).strip(), str(error)


RECORD = {
    "key": "abc",
    "method": "CLIP",
    "model": "m",
    "arch": "mini-clip",
    "world": "mini-world",
    "dataset": "shapes",
    "data": "d",
    "attack": "none",
    "eps_255": 0.0,
    "protocol": "last",
    "seed": 0,
    "n": 2,
    "correct": 1,
    "hits": "80",
    "settings": {},
    "code": "c",
    "device": "cpu",
    "seconds": 1.0,
    "time": "now",
}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, whole: bytes, most=64):
    """A cut, an overwritten piece, an insertion, or other bytes altogether."""
    kind = draw(st.sampled_from(["cut", "piece", "insert", "other"]))
    at = draw(st.integers(0, len(whole)))
    piece = draw(st.binary(min_size=1, max_size=most))
    return {
        "cut": whole[:at],
        "piece": whole[:at] + piece + whole[at + len(piece) :],
        "insert": whole[:at] + piece + whole[at:],
        "other": piece,
    }[kind]


def try_record(folder, content):
    (folder / "abc.json").write_bytes(content)
    try:
        assert isinstance(RecordStore(folder).get("abc"), Record)
    except ValueError as error:
        one_line(error)
        assert "abc.json" in str(error)


@fuzz(2500)
@given(content=damaged(json.dumps(RECORD | {"checksum": digest(RECORD)}).encode()))
def test_damaged_records(tmp_path, content):
    try_record(tmp_path, content)


@fuzz(2000)
@given(name=st.sampled_from([*RECORD, "other"]), value=anything)
def test_records_with_a_strange_value(tmp_path, name, value):
    content = RECORD | {name: value}
    try_record(tmp_path, json.dumps(content | {"checksum": digest(content)}).encode())


PROFILE = b"""description: mine
notebooks: [02_train_tga_zsr]
parameters: {seed: 3, methods: [TeCoA]}
by_notebook:
  02_train_tga_zsr: {epochs: 2}
"""


@fuzz(2000)
@given(content=damaged(PROFILE, 24))
def test_damaged_profiles(tmp_path, monkeypatch, content):
    monkeypatch.setattr(profiles, "PROFILES", tmp_path)
    (tmp_path / "mine.yaml").write_bytes(content)
    try:
        profile = profiles.load_profile("mine")
        profiles.check_names(profile, {}, profile.notebooks)
        for notebook in profile.notebooks:
            profiles.parameters_of(notebook, profile, "runs/x", {})
    except SettingsError as error:
        one_line(error)


@fuzz(2000)
@given(notebook=st.sampled_from(list(NOTEBOOKS)), data=st.data())
def test_parameters_with_a_strange_value(notebook, data):
    model = NOTEBOOKS[notebook]
    name = data.draw(st.sampled_from([*model.model_fields, "other"]))
    values = profiles.default_parameters(notebook) | {name: data.draw(anything)}
    try:
        validate(model, values)
    except SettingsError as error:
        one_line(error)
        assert name in str(error) or "other" in str(error) or "data_root" in str(error)


@st.composite
def headers(draw):
    """A safetensors file with a header of our making, whose length may lie."""
    entry = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), anything, max_size=4)
    header = draw(
        st.dictionaries(
            st.sampled_from(["predictions", "values", "__metadata__", "visual.proj"]), entry | anything, max_size=3
        )
    )
    text = json.dumps(header).encode()
    return struct.pack("<Q", draw(st.just(len(text)) | st.integers(0, 2**64 - 1))) + text + draw(st.binary(max_size=32))


def ours(tensors, **about):
    """Bytes of a file as we write it."""
    with tempfile.TemporaryDirectory() as folder:
        return save_tensors(Path(folder) / "a", tensors, **about).read_bytes()


ANSWERS = evaluation.Answers(
    torch.tensor([1, -1, 3]),
    torch.tensor([1, 2, 1], dtype=torch.uint8),
    torch.tensor([4, 5, 6]),
    torch.tensor([8, 8, 8]),
    torch.tensor([1.0, 1.0, 5.0]),
    torch.tensor([0.0, 0.0, 2.0]),
)
PREDICTIONS = ours(ANSWERS._asdict(), run="key_0", seconds=3.0)


@fuzz(1500)
@given(content=headers() | damaged(PREDICTIONS))
def test_kept_predictions(tmp_path, content):
    """What cannot be used is measured anew."""
    (tmp_path / "key_0.safetensors").write_bytes(content)
    kept, _ = evaluation._kept(tmp_path / "key_0.safetensors", 3)
    assert kept.states.tolist() == (
        [1, evaluation.UNREADABLE, 1] if content == PREDICTIONS else 3 * [evaluation.NOT_YET]
    )


MAPS = ours({"values": torch.rand(3, 2)}, run="run", name="pooled")


@fuzz(1000)
@given(content=headers() | damaged(MAPS))
def test_kept_maps(tmp_path, content):
    (tmp_path / "run_pooled.safetensors").write_bytes(content)
    values = OriginalCache(None, None, tmp_path / "run")._read("pooled")
    assert (values is not None) == (content == MAPS)


MODULE = torch.nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(MODULE.parameters(), lr=0.1, momentum=0.9)
MODULE(torch.rand(1, 2)).sum().backward()
OPTIMIZER.step()


def checkpoint():
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(Path(folder) / "run")
        kept.save({"step": 3, "history": [{"loss": 0.5}]}, MODULE, OPTIMIZER)
        return kept.newest().read_bytes()


CHECKPOINT = checkpoint()


@fuzz(1500)
@given(content=headers() | damaged(CHECKPOINT))
def test_checkpoints(tmp_path, content):
    kept = Checkpoints(tmp_path / "run")
    (tmp_path / "run.step3.ckpt").write_bytes(content)
    try:
        assert kept.load(MODULE, OPTIMIZER)["step"] == 3 and content == CHECKPOINT
    except ValueError as error:
        one_line(error)
        assert "run.step3.ckpt" in str(error) and content != CHECKPOINT


@fuzz(60)
@given(content=headers() | damaged(SHIPPED["mini"].read_bytes()[:4000]))
def test_weights(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_clip("mini-clip", path, "cpu")
    one_line(caught.value)
    assert "weights.safetensors" in str(caught.value)
    try:
        assert isinstance(read_metadata(path), dict)
    except ValueError as error:
        one_line(error)
        assert "weights.safetensors" in str(error)


def test_there_are_more_than_ten_thousand():
    assert sum(TOTAL) > 10_000 and f"{sum(TOTAL):,} bad inputs" in documents()
