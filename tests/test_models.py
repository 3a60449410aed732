import contextlib
import hashlib
import json
import re
import socket

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tgazsr_utils import open_workbook
from tgazsr_utils.core.models import Clip
from tgazsr_utils.durable import weights
from tgazsr_utils.durable.fingerprints import fingerprint
from tgazsr_utils.durable.weights import load_clip, read_metadata, save_clip


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
    torch.testing.assert_close(tokens.pooled, x[:, 0])
    torch.testing.assert_close(tokens.patches, x[:, 1:])


def test_logits_equal_plain_open_clip(mini, shapes):
    pixels = shapes.images[:5].float() / 255
    plain = open_clip.create_model("mini-clip", pretrained=str(_shipped()))
    normalised = (pixels - mini.mean) / mini.std
    tokens = open_clip.get_tokenizer("mini-clip")(list(shapes.prompts))
    with torch.no_grad():
        expected, _ = plain.eval().get_logits(normalised, tokens)
    torch.testing.assert_close(mini.logits(pixels, mini.encode_text(shapes.prompts)), expected, rtol=1e-4, atol=1e-4)


def _shipped():
    from tgazsr_utils.durable.weights import SHIPPED

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
        torch.testing.assert_close(plain.logit_scale.exp() * features @ text.T, ours)
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
        torch.testing.assert_close(plain.logit_scale.exp() * features @ text.T, hub.logits(pixels, text))
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


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_checkpoints_hold_an_image_encoder(mini, vit_b_32, tmp_path, prefix):
    """As released: OpenAI's names for the image encoder, beside optimiser state (REFERENCE Q7)."""
    encoder = {prefix + name: value + 0.01 for name, value in mini.visual.state_dict().items()}
    optimizer = torch.optim.SGD(mini.visual.parameters(), lr=0.1).state_dict()
    path = tmp_path / "model_best.pth.tar"
    torch.save(
        {"epoch": 3, "best_acc1": np.float64(42.0), "vision_encoder_state_dict": encoder, "optimizer": optimizer}, path
    )
    clip = load_clip("mini-clip", path, "cpu")
    torch.testing.assert_close(clip.visual.proj, mini.visual.proj + 0.01)
    assert load_clip("mini-clip", path, "cpu", image_size=112).grid == (14, 14)
    assert torch.equal(clip.model.text_projection, mini.model.text_projection)
    openai_names = {
        "class_embedding",
        "positional_embedding",
        "proj",
        "conv1.weight",
        "ln_pre.weight",
        "ln_post.bias",
        "transformer.resblocks.0.attn.in_proj_weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
    }
    assert openai_names <= set(vit_b_32.visual.state_dict())
    with pytest.raises(ValueError, match="cannot be loaded into ViT-B-16-plus: .*no 'openai' weights"):
        load_clip("ViT-B-16-plus", path, "cpu")


USUAL = ["", "module.", "_orig_mod.", "model.", "module._orig_mod."]


@pytest.mark.parametrize(
    "encoder_only, prefix",
    [*((False, p) for p in USUAL), *((True, p) for p in USUAL), (True, "visual."), (True, "module.visual.")],
)
@pytest.mark.parametrize("outer", [None, "state_dict", "model"])
def test_weights_are_found_below_usual_names(mini, tmp_path, encoder_only, prefix, outer):
    """RobustVLM releases an image encoder alone; training code puts prefixes before names, and dictionaries around."""
    changed = {name: value + 0.01 for name, value in mini.model.state_dict().items()}
    if encoder_only:
        changed = {name.removeprefix("visual."): v for name, v in changed.items() if name.startswith("visual.")}
    state = {prefix + name: value for name, value in changed.items()}
    torch.save({outer: state, "epoch": 3} if outer else state, tmp_path / "w.pt")
    clip = load_clip("mini-clip", tmp_path / "w.pt", "cpu")
    assert torch.equal(clip.visual.proj, mini.visual.proj + 0.01)
    expected = mini.model.text_projection + (0 if encoder_only else 0.01)
    assert torch.equal(clip.model.text_projection, expected)


class _RunsCode:
    def __reduce__(self):
        return pytest.fail, ("pickled code was executed",)


def test_a_file_that_needs_pickled_code_is_refused(tmp_path):
    path = tmp_path / "model.pth.tar"
    torch.save({"vision_encoder_state_dict": {}, "args": _RunsCode()}, path)
    with pytest.raises(ValueError, match="would run code .* refused") as error:
        load_clip("mini-clip", path, "cpu")
    assert "\n" not in str(error.value)


FOREIGN = {
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
        ([1, 2], "holds a list, not weights by name"),
        ({"epoch": 3}, "holds no weights"),
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


def test_torchscript_is_taken_only_as_the_very_file_that_openai_publishes(mini, tmp_path, monkeypatch):
    path = tmp_path / "ViT.pt"
    state = {name: value.half() for name, value in mini.model.state_dict().items()}
    torch.jit.save(torch.jit.script(_Archived(state | {"context_length": torch.tensor(32)})), path)
    with pytest.raises(ValueError, match="a TorchScript archive, which is code") as error:
        load_clip("mini-clip", path, "cpu")
    assert "weights_only" not in str(error.value)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"url": f"https://example.org/{sha}/ViT.pt"})
    loaded = load_clip("mini-clip", path, "cpu").model.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in state.items())


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
    torch.save(dict(list(mini.model.state_dict().items())[40:]), tmp_path / "part.pt")
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
