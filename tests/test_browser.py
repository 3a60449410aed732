"""The explorer in a real JupyterLab and a real browser. With --basetemp=FOLDER the screenshots stay there."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from conftest import only_long
from PIL import Image

from tgazsr_utils.paths import ROOT

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs playwright (the test extra brings it)"
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

WAIT = 600_000  # milliseconds that a step may take on a busy machine
ERRORS = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"], .tga .error'


@pytest.fixture(params=["Dark", *only_long("Light")])
def theme(request):
    """JupyterLab's. Dark alone, where colours that follow no theme show; with --long both."""
    return f"JupyterLab {request.param}"


def settings_folders(folder, theme):
    """JupyterLab settings of its own in ``folder``, as environment variables; a person's are left alone."""
    for name, values in {"themes": {"theme": theme}, "notification": {"fetchNews": "false"}}.items():
        path = folder / "settings" / "@jupyterlab" / "apputils-extension" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    own = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
    }
    return {name: str(folder / part) for name, part in own.items()}


def answers(url):
    try:
        urllib.request.urlopen(url).close()
        return True
    except OSError:
        return False


@pytest.fixture
def address(theme, tmp_path):
    """Of a JupyterLab with a copy of the notebook whose output goes to ``tmp_path``."""
    book = nbformat.read(ROOT / "notebooks" / "05_alpha_beta_explorer.ipynb", as_version=4)
    (parameters,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    quick = "train_images = 64\nbatch_size = 8\nwarmup_steps = 2\ntest_images = 20"
    parameters.source += f'\noutput = "{tmp_path / "run"}"\n{quick}'
    (tmp_path / "lab").mkdir()
    nbformat.write(book, tmp_path / "lab" / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex()
    options = {"--ip": "127.0.0.1", "--port": port, "--IdentityProvider.token": token}
    options["--ServerApp.root_dir"] = tmp_path / "lab"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"{name}={value}" for name, value in options.items()]
    environment = os.environ | settings_folders(tmp_path, theme)
    with open(tmp_path / "jupyterlab.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 600
        while not answers(f"http://127.0.0.1:{port}/api") and time.monotonic() < until:
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def page(address):
    """The notebook in a page 1280 pixels wide, all its cells run."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        page.locator("text=Python 3 (ipykernel) | Idle").wait_for()  # before, the menu does nothing
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.get_by_role("button", name="Fine-tune", exact=True).wait_for(state="attached")  # perhaps out of view
        page.locator("text=Python 3 (ipykernel) | Idle").wait_for()
        yield page
        browser.close()


@pytest.fixture
def shot(page, tmp_path):
    """Keeps a picture of the page where a locator is."""

    def keep(locator, name):
        locator.scroll_into_view_if_needed()
        page.screenshot(path=tmp_path / f"{name}.png")

    return keep


def test_a_person_can_use_the_explorer(page, shot, tmp_path):
    mix_by_mouse(page, shot)
    attack_by_keyboard(page, shot)
    ask_an_own_image(page, shot, tmp_path)
    fine_tune_cancel_and_go_on(page, shot)
    shot(page.locator("text=Nothing between is measured").first, "surface")
    assert page.locator(ERRORS).count() == 0, page.locator(ERRORS).all_inner_texts()
    fits_and_can_be_read(page)
    opened_again_it_shows_what_was_seen(page, shot)


def mix_by_mouse(page, shot):
    row = lambda name: page.locator(f".tga tr:has(td:text-is('{name}'))").first.inner_text().split("\t")
    handle = page.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.tga .sum').innerText.includes('\\t')")  # laid out once in view
    box, before = handle.bounding_box(), row("weighted sum")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y), page.mouse.down(), page.mouse.move(x + 60, y, steps=10), page.mouse.up()
    page.wait_for_function("was => document.querySelector('.tga .sum td:nth-child(4)').innerText != was", arg=before[3])
    weight = page.locator(".widget-readout").first.inner_text().strip()
    page.locator(f".tga tr:has(td:text-is('L_AR')) td:nth-child(3):text-is('{weight}')").first.wait_for()
    assert float(weight) > 0.12
    alpha = page.get_by_role("slider", name="Alpha", exact=True).first
    assert float(alpha.get_attribute("aria-valuenow")) == float(weight)  # exact, for who cannot see it
    terms = sum(float(row(name)[3]) for name in ("CE", "L_AR", "L_AMC"))
    assert float(row("weighted sum")[3]) == pytest.approx(terms, abs=0.002)
    said = page.locator(".tga .says").first.inner_text()
    assert re.match(r"Of the loss: CE \d+ %, L_AR \d+ %, L_AMC \d+ %. The gradient of L_A", said), said
    shot(page.locator("text=is the norm of the summed gradient").first, "mixer")
    page.get_by_role("button", name="published values").click()
    page.wait_for_function("is => document.querySelector('.tga .sum td:nth-child(4)').innerText == is", arg=before[3])


def attack_by_keyboard(page, shot):
    """Both models, under the same attack."""
    captions = page.locator("figcaption:has-text('perturbation'):visible")
    assert captions.count() == 2
    caption = captions.first.inner_text()
    epsilon = page.get_by_role("slider", name="epsilon/255")
    epsilon.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    page.locator("text=/at epsilon 4\\/255/").first.wait_for()
    page.wait_for_function("!document.querySelector('.tga-working')")
    assert captions.first.inner_text() != caption
    attacked = page.locator(".pair").first
    shot(attacked, "attack")
    assert attacked.inner_text() == "image, attacked"
    attacked.hover()
    assert attacked.inner_text() == "image, clean"
    page.mouse.move(0, 0)
    page.get_by_role("button", name="flip to clean").click()
    page.locator(".pair:has-text('image, clean')").first.wait_for()
    page.get_by_role("button", name="flip to clean").click()
    page.get_by_role("button", name="play or pause epsilon").click()
    page.locator("text=/at epsilon 5\\/255/").first.wait_for()
    page.get_by_role("button", name="play or pause epsilon").click()
    prompt = page.get_by_label("prompt")
    prompt.fill("a red <b>thing</b> & more"), prompt.press("Enter")
    prompt.fill(""), prompt.press("Enter")
    page.locator(".tga .error:has-text('the prompt is empty')").first.wait_for()  # said, not lost
    prompt.fill("a star"), prompt.press("Enter")
    page.wait_for_function("!document.querySelector('.tga .error')")


def ask_an_own_image(page, shot, tmp_path):
    """Any labels; the prompt follows the answer, and the set is a click away."""
    Image.new("RGB", (90, 70), "red").save(tmp_path / "mine.png")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="upload one").click()
    chooser.value.set_files(tmp_path / "mine.png")
    page.locator("text=/^your image; attention/").first.wait_for()
    labels = page.get_by_label("labels")
    labels.fill("red square, dog"), labels.blur()
    page.locator("text=/has read no caption with “dog”/").first.wait_for()
    shown = page.locator("h3:has-text('original') + .row").first.inner_text()
    assert "red square" in shown and "dog" in shown and "circle" not in shown
    assert page.get_by_label("prompt").input_value() in ("This is a photo of a red square", "This is a photo of a dog")
    shot(labels, "own_image")
    page.get_by_role("button", name="back to the set").click()
    page.locator("text=/^image 0 of shapes/").first.wait_for()


def fine_tune_cancel_and_go_on(page, shot):
    """It ends in an outcome, and a star on the map."""
    tune = page.get_by_role("button", name="Fine-tune", exact=True)
    models = page.get_by_label("model").first.locator("option")
    there = models.count()
    tune.click()
    page.locator(".tga:has-text('of 8: loss')").first.wait_for()
    assert tune.is_disabled()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.locator("text=/cancelled after step \\d+ of \\d+/").first.wait_for()
    shot(tune, "cancelled")
    assert page.locator("svg polygon").count() == 0
    tune.click()
    page.locator("text=its star on the map").first.wait_for()
    told = page.locator(".says:has-text('At the published setting')").first.inner_text()
    assert re.search(r": \d+ \[\d+, \d+\] robust / \d+ \[\d+, \d+\] clean", told), told
    assert page.locator("svg polygon:visible").count() == 3 and models.count() == there + 1
    shot(tune, "trained")
    page.get_by_label("model").nth(1).select_option(index=there)
    page.locator("h3:has-text('TGA-ZSR, Alpha 0.08')").first.wait_for()


def opened_again_it_shows_what_was_seen(page, shot):
    """A saved notebook whose kernel is gone: figures, and no error in place of widgets."""
    assert not page.locator(".tga-still").first.is_visible()
    page.locator("[data-command='docmanager:save']").first.click()
    page.locator("text=Saving completed").wait_for()
    api = "/api/sessions"
    page.evaluate(
        "async api => { const cookie = document.cookie.match(/_xsrf=([^;]*)/)[1];"
        "for (const one of await (await fetch(api)).json())"
        " await fetch(`${api}/${one.id}`, {method: 'DELETE', headers: {'X-XSRFToken': cookie}}) }",
        api,
    )
    page.reload()
    page.locator(".tga-still").nth(3).wait_for()
    page.locator("text=Error displaying widget").nth(3).wait_for(state="attached")
    assert page.locator("text=/Error displaying widget|Loading widget/").filter(visible=True).count() == 0
    assert page.locator(".tga-still .says:has-text('At the published setting')").is_visible()
    assert page.locator(".tga-still svg polygon:visible").count() == 3
    shot(page.locator(".tga-still").nth(2), "opened_again")


def fits_and_can_be_read(page):
    wide = (
        "[...document.querySelectorAll('.jp-OutputArea-output, .widget-html-content')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 80))"
    )
    assert page.evaluate(wide) == []  # nothing to scroll sideways
    ink = page.evaluate("getComputedStyle(document.querySelector('.tga td')).color")
    paper = page.evaluate("getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor")
    lightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (ink, paper)]
    assert abs(lightness[0] - lightness[1]) > 120, (ink, paper)
