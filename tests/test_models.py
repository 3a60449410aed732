import argparse
import collections
import contextlib
import copy
import datetime
import enum
import hashlib
import io
import json
import re
import socket
import tarfile
import types
import uuid
from pathlib import Path, PureWindowsPath

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tgazsr_utils import open_workbook
from tgazsr_utils.core.models import Clip
from tgazsr_utils.runtime import weights
from tgazsr_utils.runtime.fingerprints import fingerprint
from tgazsr_utils.runtime.weights import load_clip, read_metadata, save_clip


@pytest.fixture(scope="module")
def vit_b_32():
    return load_clip("ViT-B-32-quickgelu", None, "cpu")


def test_one_forward_gives_class_and_patch_tokens_both_projected(mini, shapes, monkeypatch):
    forwards = []
    hook = mini.visual.transformer.register_forward_hook(lambda *a: forwards.append(1))
    tokens = mini.encode_image(shapes.images.float() / 255)
    hook.remove()
    assert len(forwards) == 1
    assert tokens.pooled.shape == (40, 128) and tokens.patches.shape == (40, 49, 128)


def test_tokens_equal_the_towers_parts_computed_one_by_one(mini, shapes):
    """Final layer norm and projection on the class token and on every patch token alike; normalisation inside."""
    pixels, visual = shapes.images[:3].float() / 255, mini.visual
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    x = visual._embeds((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    x = F.layer_norm(visual.transformer(x), (128,), visual.ln_post.weight, visual.ln_post.bias) @ visual.proj
    tokens = mini.encode_image(pixels)
    torch.testing.assert_close(tokens.pooled, x[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.patches, x[:, 1:], rtol=1e-4, atol=1e-4)


def test_logits_equal_plain_open_clip(mini, shapes):
    pixels = shapes.images[:5].float() / 255
    plain = open_clip.create_model("mini-clip", pretrained=str(_shipped()))
    normalised = (pixels - mini.mean) / mini.std
    tokens = open_clip.get_tokenizer("mini-clip")(list(shapes.prompts))
    with torch.no_grad():
        expected, _ = plain.eval().get_logits(normalised, tokens)
    torch.testing.assert_close(mini.logits(pixels, mini.encode_text(shapes.prompts)), expected, rtol=1e-4, atol=1e-4)


def _shipped():
    from tgazsr_utils.runtime.weights import SHIPPED

    return SHIPPED["mini"]


def test_prompts_are_encoded_once_and_have_unit_norm(monkeypatch):
    clip = load_clip("mini-clip", "mini", "cpu")
    first = clip.encode_text(["a circle", "a square", "a circle"])
    assert torch.equal(first[0], first[2])
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    monkeypatch.setattr(type(clip.model), "encode_text", lambda *a, **k: pytest.fail("text was encoded again"))
    assert torch.equal(clip.encode_text(["a square"]), first[1:2])


def test_saved_weights_load_alike_here_and_in_plain_open_clip(mini, tmp_path):
    path = save_clip(mini, tmp_path / "w.safetensors", note={"a": 1})
    assert read_metadata(path).items() >= {"arch": "mini-clip", "note": {"a": 1}}.items()
    assert fingerprint(load_clip("mini-clip", path, "cpu")) == fingerprint(mini)
    plain = open_clip.create_model("mini-clip", pretrained=str(path)).state_dict()
    assert all(torch.equal(v, plain[k]) for k, v in mini.model.state_dict().items())


def test_any_open_clip_vit_works_by_name(vit_b_32):
    tokens = vit_b_32.encode_image(torch.rand(1, 3, 224, 224))
    assert tokens.pooled.shape == (1, 512) and tokens.patches.shape == (1, 49, 512) and vit_b_32.grid == (7, 7)


def test_another_resolution_interpolates_the_positions(mini):
    clip = load_clip("mini-clip", "mini", "cpu", image_size=112)
    assert clip.grid == (14, 14) and clip.image_size == (112, 112)
    assert clip.encode_image(torch.rand(1, 3, 112, 112)).patches.shape[1] == 196
    fine = clip.visual.positional_embedding[1:].unflatten(0, (14, 14)).permute(2, 0, 1)[None]
    coarse = mini.visual.positional_embedding[1:].unflatten(0, (7, 7)).permute(2, 0, 1)[None]
    torch.testing.assert_close(fine, F.interpolate(coarse, (14, 14), mode="bicubic", antialias=True))
    small = load_clip("mini-clip", "mini", "cpu", image_size=56)
    assert fingerprint(small) == fingerprint(mini)


def test_weights_of_plain_open_clip_give_the_same_logits(mini, shapes, tmp_path):
    """Both ways: open_clip's own saving is read here, and what is saved here is read by open_clip."""
    plain = open_clip.create_model("mini-clip", pretrained=str(_shipped())).eval()
    pixels, text = shapes.images[:4].float() / 255, mini.encode_text(shapes.prompts)
    with torch.no_grad():
        ours = mini.logits(pixels, text)
        features = plain.encode_image((pixels - mini.mean) / mini.std, normalize=True)
        torch.testing.assert_close(plain.logit_scale.exp() * features @ text.T, ours, rtol=1e-4, atol=1e-4)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    back = load_clip("mini-clip", tmp_path / "plain.pt", "cpu")
    torch.testing.assert_close(back.logits(pixels, text), ours, rtol=0, atol=0)
    (tmp_path / "hub").mkdir()
    save_clip(mini, tmp_path / "hub" / "open_clip_model.safetensors")
    config = {
        "model_cfg": open_clip.get_model_config("mini-clip"),
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps(config))
    hub = load_clip("mini-clip", f"local-dir:{tmp_path / 'hub'}", "cpu")
    with pytest.raises(ValueError, match="cannot be loaded into mini-clip: .*nowhere"):
        load_clip("mini-clip", "local-dir:nowhere", "cpu")
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'hub'}").eval()
    with torch.no_grad():
        features = plain.encode_image((pixels - 0.5) / 0.5, normalize=True)
        logits = plain.logit_scale.exp() * features @ text.T
        torch.testing.assert_close(logits, hub.logits(pixels, text), rtol=1e-4, atol=1e-4)
    again = load_clip("mini-clip", save_clip(hub, tmp_path / "again.safetensors"), "cpu")
    assert again.mean.flatten().tolist() == [0.5] * 3  # kept with the weights
    config["model_cfg"]["quick_gelu"] = not config["model_cfg"].get("quick_gelu", False)
    (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another architecture than mini-clip"):
        load_clip("mini-clip", f"local-dir:{tmp_path / 'hub'}", "cpu")


def test_weights_that_say_their_architecture_need_none_given(tmp_path, monkeypatch):
    """A Hub's repository, or a folder of its kind, in a notebook of another architecture; unless one is given."""
    config = open_clip.get_model_config("mini-clip")
    config = config | {"quick_gelu": not config.get("quick_gelu", False)}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "other-mini.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    other = load_clip("other-mini", None, "cpu")
    save_clip(other, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    source = f"local-dir:{tmp_path}"
    given = {"models": {"a": source, "b": {"arch": "mini-clip", "pretrained": source}}, "output": str(tmp_path / "run")}
    book = open_workbook("04_evaluate_16_datasets", given)
    assert book.model(*reversed(book.untuned["a"])).arch == "other-mini" and book.original.arch == "mini-clip"
    with pytest.raises(ValueError, match="another architecture than mini-clip"):
        book.model(*reversed(book.untuned["b"]))
    monkeypatch.setattr(weights, "_download", contextlib.nullcontext)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: tmp_path / name)
    assert weights.described_architecture("hf-hub:owner/name") == "other-mini"
    assert weights.described_architecture("mini") is weights.described_architecture(None) is None
    with pytest.raises(ValueError, match="pretrained 'local-dir:nowhere' cannot be loaded into any architecture"):
        weights.described_architecture("local-dir:nowhere")


def released_by_the_tecoa_line(encoder, order=0):
    """TeCoA, PMG-AFT, TGA-ZSR, Comp-TGA, UCAT: an empty prompter's dictionary beside the image encoder's."""
    parameters = [nn.Parameter(value.clone()) for value in encoder.values()]
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    sum(p.sum() for p in parameters).backward()
    sgd.step()
    sgd.param_groups[0]["lr"] = np.float64(1e-4)
    parts = {"epoch": 10, "state_dict": {}, "add_prompter": {}, "best_acc1": torch.tensor(31.5)}
    parts |= {"optimizer": sgd.state_dict(), "vision_encoder_state_dict": encoder}
    return dict(list(parts.items())[::-1]) if order else parts


def encoder_of(full):
    return {name.removeprefix("visual."): value for name, value in full.items() if name.startswith("visual.")}


class _Edict(dict):
    """A dictionary of somebody's own class, as EasyDict and Lightning's hyper-parameters are."""


def named(prefix, state):
    return {prefix + name: value for name, value in state.items()}


# How the weights lie in the file (of all weights, and of the image encoder alone) -> what is said of it.
RELEASED = {
    "tecoa line": (lambda w, e: released_by_the_tecoa_line(e), "image encoder, from vision_encoder_state_dict"),
    "empty dictionary later": (
        lambda w, e: released_by_the_tecoa_line(e, 1),
        "image encoder, from vision_encoder_state_dict",
    ),
    "data parallel": (
        lambda w, e: released_by_the_tecoa_line(named("module.", e)),
        "image encoder, from vision_encoder_state_dict.module",
    ),
    "AdvFLYP": (lambda w, e: {"state_dict": {}, "partial_state_dict": w}, "all weights, from partial_state_dict"),
    "AdvFLYP, image encoder": (
        lambda w, e: {"state_dict": {}, "partial_state_dict": named("visual.", e)},
        "image encoder, from partial_state_dict",
    ),
    "RobustVLM": (lambda w, e: e, "image encoder"),
    "open_clip training": (
        lambda w, e: {"epoch": 3, "name": "x", "state_dict": named("module.", w)},
        "all weights, from state_dict.module",
    ),
    "PyTorch's tutorial": (
        lambda w, e: {"model_state_dict": w, "loss": torch.tensor(1.5)},
        "all weights, from model_state_dict",
    ),
    "net": (lambda w, e: {"net": w, "acc": 3}, "all weights, from net"),
    "module": (lambda w, e: {"module": w, "acc": 3}, "all weights, from module"),
    "two levels": (lambda w, e: {"checkpoint": {"model": w}}, "all weights, from checkpoint.model"),
    "in a list": (lambda w, e: [{"lr": 0.1}, w], "all weights, from 1"),
    "somebody's dictionary": (lambda w, e: {"m": _Edict(w)}, "all weights, from m"),
    "a prompt beside": (
        lambda w, e: {"state_dict": named("clip_model.", w) | {"prompt_learner.ctx": torch.zeros(4, 128)}},
        "all weights, from state_dict.clip_model; not loaded: prompt_learner",
    ),
    "a head beside": (
        lambda w, e: {"model": w | {"head.weight": torch.zeros(2)}},
        "all weights, from model; not loaded: head",
    ),
    "an encoder and a head": (
        lambda w, e: named("backbone.encoder.", e) | {"fc.weight": torch.zeros(2)},
        "image encoder, from backbone.encoder; not loaded: fc",
    ),
    "compiled": (lambda w, e: named("module._orig_mod.", w), "all weights, from module._orig_mod"),
    "and EMA": (
        lambda w, e: {"model_ema": {k: v + 1 for k, v in w.items()}, "model": w},
        "all weights, from model; not from model_ema, which fits as well",
    ),
    "only EMA": (lambda w, e: {"state_dict_ema": w}, "all weights, from state_dict_ema"),
    "beside the original": (
        lambda w, e: {"state_dict": named("model_orig.", {k: 0 * v for k, v in e.items()}) | named("model.", e)},
        "image encoder, from state_dict.model; not from state_dict.model_orig, which fits as well",
    ),
    "twice the same": (lambda w, e: {"model": w, "best": w}, "all weights, from model"),
    "a larger teacher beside": (
        lambda w, e: {"a": {k: torch.cat([v, v]) if v.ndim else v for k, v in w.items()}, "b": w},
        "all weights, from b",
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_weights_are_found_wherever_they_lie_in_a_file(mini, tmp_path, name, capsys):
    full = {name: value + 0.01 for name, value in mini.model.state_dict().items()}
    make, said = RELEASED[name]
    torch.save(make(full, encoder_of(full)), tmp_path / "w.pth.tar")
    clip = load_clip("mini-clip", tmp_path / "w.pth.tar", "cpu")
    assert capsys.readouterr().out == f"w.pth.tar: {said}\n"
    assert torch.equal(clip.visual.proj, full["visual.proj"])
    whole = said.startswith("all weights")
    assert torch.equal(clip.model.text_projection, (full if whole else mini.model.state_dict())["text_projection"])
    assert load_clip("mini-clip", tmp_path / "w.pth.tar", "cpu", image_size=112).grid == (14, 14)


def test_the_rest_of_an_image_encoder_comes_from_openai(mini, vit_b_32, tmp_path):
    torch.save(encoder_of(mini.model.state_dict()), tmp_path / "w.pt")
    assert {"class_embedding", "positional_embedding", "proj", "conv1.weight"} <= set(vit_b_32.visual.state_dict())
    with pytest.raises(ValueError, match="cannot be loaded into ViT-B-16-plus: .*no 'openai' weights"):
        load_clip("ViT-B-16-plus", tmp_path / "w.pt", "cpu")


def test_an_encoder_with_a_layer_more_is_refused(mini, tmp_path):
    encoder = encoder_of(mini.model.state_dict())
    more = {name.replace("resblocks.4", "resblocks.5"): value for name, value in encoder.items()}
    torch.save(encoder | more, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="Unexpected key.*resblocks.5"):
        load_clip("mini-clip", tmp_path / "w.pt", "cpu")


@pytest.mark.parametrize("suffix", [".pt", ".pth.tar", ".bin", ".ckpt", "", ".safetensors"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch before 1.6"])
def test_files_are_recognised_by_their_content_also_behind_links(mini, tmp_path, kind, suffix):
    full = {name: value + 0.01 for name, value in mini.model.state_dict().items()}
    blob = tmp_path / "blobs" / "0a1b2c"
    blob.parent.mkdir()
    if kind == "safetensors":
        save_file(full, blob)
    else:
        torch.save(full, blob, _use_new_zipfile_serialization=kind == "torch")
    link = tmp_path / f"open_clip_model{suffix}"
    link.symlink_to(blob)
    assert torch.equal(load_clip("mini-clip", link, "cpu").visual.proj, full["visual.proj"])


class _RunsCode:
    def __reduce__(self):
        return pytest.fail, ("pickled code was executed",)


@pytest.mark.parametrize("form", [True, False])
def test_a_file_that_needs_pickled_code_is_refused(tmp_path, form):
    path = tmp_path / "model.pth.tar"
    content = {"vision_encoder_state_dict": {}, "args": _RunsCode()}
    torch.save(content, path, _use_new_zipfile_serialization=form)
    with pytest.raises(ValueError, match="would run code .* refused") as error:
        load_clip("mini-clip", path, "cpu")
    assert "\n" not in str(error.value)


class _Colour(enum.Enum):
    RED = 1


BESIDE = {
    "arguments": argparse.Namespace(lr=1e-5, out=Path("runs/x"), colour=_Colour.RED),
    "path": Path("data/sets"),
    "windows path": PureWindowsPath("C:/data"),
    "by path": {Path("a"): 1},
    "simple namespace": types.SimpleNamespace(a=1),
    "default dictionary": collections.defaultdict(list, {"loss": [1.0]}),
    "counts": collections.Counter("aab"),
    "the last losses": collections.deque([1.0, 2.0], maxlen=3),
    "dictionary of one's own": _Edict(lr=1),
    "a set": {1, 2},
    "time": datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    "duration": datetime.timedelta(seconds=3),
    "version of PyTorch": torch.__version__,
    "type": torch.float16,
    "device": torch.device("cpu"),
    "random state": np.random.RandomState(0).get_state(),
    "generator": torch.Generator().get_state(),
    "id": uuid.UUID(int=3),
    "module of one's own": nn.Linear(2, 2),
    "schedule": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), 3),
    "a function that is not called": json.dumps,
}


@pytest.mark.parametrize("form", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_weights_is_data(mini, tmp_path, name, form):
    path = tmp_path / "w.pth"
    torch.save({"args": BESIDE[name], "model": mini.model.state_dict()}, path, _use_new_zipfile_serialization=form)
    assert fingerprint(load_clip("mini-clip", path, "cpu")) == fingerprint(mini)


def tar_of(name):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


FOREIGN = {
    "tar": (tar_of("storages"), "an archive of files; unpack it first"),
    "page": (b"\n<!DOCTYPE html><html><title>Quota exceeded</title></html>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 605\n", "git lfs pull"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "packed by gzip"),
    "text": (b"just a note", "no PyTorch checkpoint, or is damaged"),
    "empty": (b"", "cannot be loaded into mini-clip"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_are_no_weights_are_named_for_what_they_are(tmp_path, name):
    content, message = FOREIGN[name]
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_clip("mini-clip", tmp_path / "w.pt", "cpu")
    assert "\n" not in str(error.value) and "run code" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds no weights"),
        ({"epoch": 3}, "holds no weights"),
        ({"model": {}, "state_dict": {}}, "holds no weights"),
        ({"model": {"conv1.weight": torch.zeros(1)}}, "among its 1 tensors is conv1.weight"),
        ({"base.q_proj.lora_A.weight": torch.zeros(1)}, "LoRA parts only"),
        ({"vision_model.embeddings.class_embedding": torch.zeros(1)}, "a transformers model"),
    ],
)
def test_weights_of_other_kinds_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        load_clip("mini-clip", tmp_path / "w.pt", "cpu")


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int8", "int64", "uint32", "bool"])
@pytest.mark.parametrize("several", [False, True])
def test_numbers_of_any_kind_may_lie_beside_weights(mini, tmp_path, kind, several):
    beside = np.ones(3, kind) if several else np.ones(1, kind)[0]
    torch.save({"vision_encoder_state_dict": mini.visual.state_dict(), "best": beside}, tmp_path / "w.pt")
    assert torch.equal(load_clip("mini-clip", tmp_path / "w.pt", "cpu").visual.proj, mini.visual.proj)


class _Archived(nn.Module):
    """Weights under their names, as a module that can be scripted."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *path, last = name.split(".")
            holder = self
            for part in path:
                if not hasattr(holder, part):
                    holder.add_module(part, _Archived({}))
                holder = getattr(holder, part)
            holder.register_buffer(last, value)

    def forward(self, x):
        return x


@pytest.fixture
def mini_quickgelu(monkeypatch):
    """The name of the mini model's architecture with OpenAI's activation."""
    config = open_clip.get_model_config("mini-clip") | {"quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "mini-clip-quickgelu", config)
    return "mini-clip-quickgelu"


def test_torchscript_is_taken_only_as_the_very_file_that_openai_publishes(mini, mini_quickgelu, tmp_path, monkeypatch):
    path = tmp_path / "ViT.pt"
    state = {name: value.half() for name, value in mini.model.state_dict().items()}
    torch.jit.save(torch.jit.script(_Archived(state | {"context_length": torch.tensor(32)})), path)
    with pytest.raises(ValueError, match="a TorchScript archive, which is code") as error:
        load_clip(mini_quickgelu, path, "cpu")
    assert "weights_only" not in str(error.value)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"url": f"https://example.org/{sha}/ViT.pt"})
    loaded = load_clip(mini_quickgelu, path, "cpu").model.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in state.items())
    with pytest.raises(ValueError, match="OpenAI's CLIP, another architecture than mini-clip: quick_gelu is True"):
        load_clip("mini-clip", path, "cpu")


def test_weights_are_refused_by_another_architecture_that_their_shapes_fit(mini, mini_quickgelu, tmp_path, monkeypatch):
    heads = copy.deepcopy(open_clip.get_model_config("mini-clip"))
    heads["vision_cfg"]["head_width"] *= 2
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "mini-clip-heads", heads)
    path = save_clip(mini, tmp_path / "w.safetensors")
    for arch, differs in [(mini_quickgelu, "quick_gelu is False, not True"), ("mini-clip-heads", "head_width is")]:
        with pytest.raises(ValueError, match=f"of mini-clip, another architecture than {arch}: .*{differs}"):
            load_clip(arch, path, "cpu")


@pytest.mark.parametrize(
    "arch, tag, message",
    [
        (
            "ViT-B-32",
            "openai",
            "of ViT-B-32-quickgelu, another architecture than ViT-B-32: quick_gelu is True, not Fal",
        ),
        ("ViT-B-16", "dfn2b", "of ViT-B-16-quickgelu, another architecture than ViT-B-16: quick_gelu is True"),
    ],
)
def test_published_weights_of_another_activation_are_refused_before_a_download(arch, tag, message):
    with pytest.raises(ValueError, match=message):
        load_clip(arch, tag, "cpu")


@pytest.mark.parametrize(
    "arch, close",
    [
        ("ViT-B/32", "ViT-B-32-quickgelu"),
        ("vit_b32", "ViT-B-32-quickgelu"),
        ("ViT-L/14@336px", "ViT-L-14-336"),
        ("minicl1p", "mini-clip"),
    ],
)
def test_a_wrong_architecture_gets_the_closest_right_one(arch, close):
    with pytest.raises(ValueError, match=f"arch '{re.escape(arch)}' is unknown to open_clip; did you mean {close}"):
        load_clip(arch, None, "cpu")


@pytest.mark.parametrize(
    "template", ["{} " + 40 * "very ", 40 * "very " + "{}", "of " + 31 * "x" + " a {}" + 20 * " dim"]
)
def test_prompts_that_the_text_tower_would_cut_are_refused(template):
    clip = load_clip("mini-clip", "mini", "cpu")
    with pytest.raises(ValueError, match="prompt '.*' is longer than the 32 tokens that mini-clip reads"):
        clip.encode_text([template.replace("{}", "cat")])
    assert clip.encode_text(["cat" + 29 * " a"]).shape == (1, 128)  # 30 tokens, start and end


def test_images_of_another_size_are_refused(mini):
    with pytest.raises(ValueError, match="images are 64x56; this mini-clip takes 56x56"):
        mini.encode_image(torch.rand(1, 3, 64, 56))


def test_a_frozen_copy_has_weights_of_its_own(mini):
    copy = mini.frozen_copy()
    with torch.no_grad():
        copy.visual.proj += 1
    assert fingerprint(copy) != fingerprint(mini)
    assert not any(p.requires_grad for p in copy.visual.parameters())
    assert copy.model.transformer is mini.model.transformer


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("RN50", None), "RN50.*patch tokens"),
        (("ViT-X", None), "'ViT-X' is unknown"),
        (("mini-clip", "nowhere.pt"), "'nowhere.pt' cannot be loaded.*neither a file .* nor a name.*mini"),
        (("mini-clip", "mini", "cuda:99"), "'cuda:99' cannot be used"),
        (("mini-clip", "mini", "cpu", "fp8"), "'fp8' is unknown"),
    ],
)
def test_bad_names_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        load_clip(*arguments)
    assert "\n" not in str(error.value)


def test_a_long_reason_ends_with_a_whole_word(mini, tmp_path):
    torch.save(dict(list(mini.model.state_dict().items())[:9]), tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"part.pt' cannot be loaded into mini-clip: .* \.\.\.$") as error:
        load_clip("mini-clip", tmp_path / "part.pt", "cpu")
    assert str(error.value).split()[-2] in str(error.value.__cause__).split()


@pytest.mark.parametrize("pretrained", ["openai", "hf-hub:nobody/nothing"])
@pytest.mark.parametrize("silent", [False, True])
def test_without_a_network_weights_are_refused_soon_and_a_file_is_named(pretrained, silent, monkeypatch):
    monkeypatch.setattr(weights, "_PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not silent:
            server.close()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(
            ValueError, match=f"{pretrained}.*{address} cannot be reached.*-p pretrained /path"
        ) as error:
            load_clip("ViT-B-32-quickgelu", pretrained, "cpu")
    assert "\n" not in str(error.value) and not str(error.value).endswith("...")
    assert socket.getdefaulttimeout() is None and not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("damage", ["empty", "truncated", "foreign"])
def test_damaged_weights_are_named(damage, tmp_path):
    path = tmp_path / "weights.safetensors"
    whole = _shipped().read_bytes()
    path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "foreign": b"not weights" * 100}[damage])
    with pytest.raises(ValueError, match="weights.safetensors.*cannot be loaded into mini-clip") as error:
        load_clip("mini-clip", path, "cpu")
    assert "\n" not in str(error.value)


def test_the_shipped_model_is_small():
    clip = load_clip("mini-clip", "mini", "cpu")
    assert 0.8e6 < sum(p.numel() for p in clip.visual.parameters()) < 1.2e6
    assert _shipped().stat().st_size <= 10e6
    assert isinstance(clip, Clip) and clip.grid == (7, 7) and clip.image_size == (56, 56)
