"""The page without an installation: what it is made of, and in a real browser its numbers against the package's."""

import importlib.util
import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image

from tgazsr_utils import load_clip, pgd, text_guided_attention
from tgazsr_utils.commands import main
from tgazsr_utils.display import demo
from tgazsr_utils.measuring.attention_shift import attention_shift

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EPSILONS, START, STEPS = (3.5, 8.0), 3.5, 2


@pytest.fixture(scope="module")
def clips():
    return {name: load_clip("mini-clip", weights, "cpu") for name, weights in demo.MODELS.items()}


@pytest.fixture(scope="module")
def content(clips):
    """Facts, images, labels and perturbations of a page that takes less time to make."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"EPSILONS": EPSILONS, "START": START, "STEPS": STEPS}.items():
            patch.setattr(demo, name, value)
        facts, images, labels = demo.chosen(clips)
        found = {name: demo.attacked(clip, facts, images, labels) for name, clip in clips.items()}
    return facts, images, labels, found


def test_what_is_missing_and_what_is_meant_otherwise_is_one_line(monkeypatch, capsys):
    def said(*arguments):
        assert main(["--demo", *arguments]) == 2
        (line,) = (
            capsys.readouterr()
            .err.replace("exporting both models and attacking their images (some minutes)\n", "")
            .splitlines()
        )
        return line

    assert "takes a file's name and nothing else, not --fresh" in said("--fresh")
    assert "is no name for it" in said("runs/demo")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert said() == "error: the demo needs onnx and onnxscript: pip install 'tgazsr-utils[demo]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert "the demo needs npm" in said()


def test_a_runtime_that_is_not_the_one_tested_is_refused(monkeypatch):
    def pack(command, cwd, **_):
        Path(cwd, "other.tgz").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo, "_npm", lambda: "npm")
    monkeypatch.setattr(subprocess, "run", pack)
    with pytest.raises(ValueError, match="is not the onnxruntime-web@"):
        demo.fetch_runtime()
    failed = subprocess.CompletedProcess([], 1, "", "npm error code\nnpm error no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"^npm could not fetch onnxruntime-web@[\d.]+: npm error no network$"):
        demo.fetch_runtime()


def test_the_page_asks_no_host_and_holds_what_it_is_given():
    page = demo._page({"a": "</script>"}, {"model": b"weights"})
    assert re.findall(r"https?://[^\s\"'<]+", page) == re.findall(r'<a href="(https://[^"]+)"', page)
    assert "default-src 'none'" in page and "connect-src" not in page and not re.search(r"@[A-Z]+@", page)
    assert json.loads(re.search(r'id="facts">(.*)</script>\n<script type="text/plain" id="model">', page)[1]) == {
        "a": "</script>"
    }
    assert {path.name for path in resources.files(demo.__package__).joinpath("demo_page").iterdir()} == {
        "page.html",
        "page.css",
        "page.js",
    }


def test_images_are_right_when_clean_and_perturbations_those_of_pgd(clips, content):
    facts, images, labels, found = content
    text = {key: clips["original"].encode_text(task["prompts"]) for key, task in facts["tasks"].items()}
    for row, shown in enumerate(facts["images"]):
        for clip in clips.values():
            assert clip.logits(images[row][None] / 255, text[shown["task"]]).argmax() == labels[row]
    rows, eps = [row for row, shown in enumerate(facts["images"]) if shown["task"] == "shapes"], START / 255
    assert len(rows) == 3
    clean, start = images[rows] / 255, torch.Generator().manual_seed(0)
    exact = pgd(clips["tuned"], clean, labels[rows], text["shapes"], eps, eps / 4, STEPS, generator=start)
    kept = clean + eps * found["tuned"][rows, EPSILONS.index(START)] / 127
    assert (kept - exact).abs().max() <= 1.001 * eps / 127 and (kept - clean).abs().max() <= 1.00001 * eps


@pytest.fixture
def path(clips, content, tmp_path):
    """A page of these."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="the page needs the demo extra")
    if demo._npm() is None:
        pytest.skip("the page needs npm, which the demo extra brings")
    try:
        runtime = demo.fetch_runtime()
    except ValueError as error:
        if "could not fetch" not in str(error):
            raise
        pytest.skip(f"without a network: {error}")
    facts, images, _, found = content
    blobs = runtime | {"pixels": images.numpy().tobytes()}
    for (name, perturbations), file in zip(found.items(), demo.exported(list(clips.values()))):
        blobs |= {f"model-{name}": file, f"attacks-{name}": perturbations.numpy().tobytes()}
    written = tmp_path / "index.html"
    written.write_text(demo._page(facts, blobs), encoding="utf-8")
    return written


@pytest.fixture
def page(path):
    """Opened as a file, without a network; whatever goes wrong or leaves is among ``page.problems``."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True).new_page()
        page.set_default_timeout(600_000)
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: page.problems.append(message.text) if message.type != "log" else None)
        inside = ("file:", "blob:", "data:")
        page.on("request", lambda asked: asked.url.startswith(inside) or page.problems.append(asked.url))
        page.goto(path.as_uri())
        page.locator("body[data-ready]").wait_for()
        yield page
        browser.close()


READ = """([n, model]) => { const image = demo.images[n] ?? demo.own, { rows, tokens } = demo.readings(image, model);
  return { rows: rows.map(({ logits, probabilities, map, shift }) => ({ logits, probabilities, map: [...map], shift })),
           pixels: [...tokens.pixels] }; }"""
GRADIENT = """async ([n, model]) => { const { pixels, task, label } = demo.images[n];
  return [...(await demo.encode(model, pixels, demo.tasks[task], label)).gradient]; }"""


def agrees(clip, prompts, pixels, label, rows):
    """Are the browser's ``rows`` what the package computes of ``pixels`` ``[E+1,3,H,W]``, clean ones first?"""
    tokens, text = clip.encode_image(pixels), clip.encode_text(prompts)
    logits, maps = clip.similarity(tokens.pooled, text), text_guided_attention(tokens, text[label])
    shift = attention_shift(maps[:1].expand_as(maps), maps)["l2"]
    found = {name: torch.tensor([row[name] for row in rows]) for name in ("logits", "probabilities", "map", "shift")}
    wanted = {"logits": logits, "probabilities": logits.softmax(1), "map": maps.flatten(1), "shift": shift}
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() < 1e-3, name
    return logits.argmax(1)


def test_in_a_browser_numbers_are_the_packages_and_a_person_can_use_it(path, page, clips, content, tmp_path):
    assert path.stat().st_size < 30e6
    numbers_are_the_packages(page, clips, content)
    by_keyboard(page)
    own_drawing_and_image(page, clips, content[0]["tasks"]["shapes"]["prompts"], tmp_path)
    assert page.problems == []


def numbers_are_the_packages(page, clips, content):
    facts, images, labels, found = content
    eps = torch.tensor(EPSILONS)[:, None, None, None] / 255
    for n in (0, 3, 7):
        shown, clean = facts["images"][n], images[n][None] / 255
        prompts = facts["tasks"][shown["task"]]["prompts"]
        for model, clip in clips.items():
            pixels = torch.cat([clean, clean + eps * found[model][n] / 127])
            rows = page.evaluate(READ, [n, model])["rows"]
            agrees(clip, prompts, pixels, shown["label"], rows)
    one = clean.clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(clip.logits(one, clip.encode_text(prompts)), labels[n][None])
    (slope,) = torch.autograd.grad(loss, one)
    there = torch.tensor(page.evaluate(GRADIENT, [n, model])).view_as(slope)
    assert (there - slope).abs().max() < 1e-3 * slope.abs().max()


def by_keyboard(page):
    page.get_by_label(re.compile("^Attack: epsilon")).focus(), page.keyboard.press("ArrowRight")
    page.locator("#sentence", has_text="At epsilon 8/255").wait_for()
    page.locator("#models input").first.focus(), page.keyboard.press("ArrowRight")
    assert page.locator("#models input:checked").input_value() == "tuned"
    page.get_by_label("Attention of the text").select_option(label="heart")
    assert "This is a photo of a heart" in page.locator("#clean-map").get_attribute("aria-label")


def own_drawing_and_image(page, clips, prompts, folder):
    sentence = page.locator("#sentence")
    page.get_by_text("Draw, or your image").click()
    sentence.filter(has_text="At epsilon 8/255").wait_for()
    before = page.evaluate("[...demo.own.pixels]")
    box = page.locator("#pad").bounding_box()
    (
        page.mouse.move(box["x"] + 20, box["y"] + 20),
        page.mouse.down(),
        page.mouse.move(box["x"] + 90, box["y"] + 200),
        page.mouse.up(),
    )
    sentence.filter(has_text="Attacking your picture").wait_for()
    assert page.evaluate("[...demo.own.pixels]") != before
    page.locator("#pad").focus(), page.keyboard.press("ArrowLeft"), page.keyboard.press(" ")
    assert page.locator("#tip").is_visible() and page.locator("#tip").evaluate("tip => tip.style.background") != "none"
    broken, own = folder / "broken.png", folder / "own.png"
    broken.write_bytes(b"no image"), Image.new("RGB", (120, 80), (30, 60, 200)).save(own)
    page.locator("#file").set_input_files(broken)
    page.get_by_text("broken.png is not an image").wait_for()
    page.locator("#file").set_input_files(own)
    page.get_by_text("own.png: its middle").wait_for()
    sentence.filter(has_text="At epsilon 8/255").wait_for()
    for model, clip in clips.items():
        read = page.evaluate(READ, [-1, model])
        pixels = torch.tensor(read["pixels"]).view(-1, 3, 56, 56)
        torch.testing.assert_close(pixels[0], (torch.tensor([30, 60, 200]) / 255)[:, None, None].expand(3, 56, 56))
        seen = clip.logits(pixels[:1], clip.encode_text(prompts)).argmax()
        answers = agrees(clip, prompts, pixels, seen, read["rows"])
        reach = (pixels - pixels[:1]).abs().amax((1, 2, 3)) * 255
        assert answers[0] == seen and torch.allclose(reach, torch.tensor([0.0, *EPSILONS]), atol=1e-3)
