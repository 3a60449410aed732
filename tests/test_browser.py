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

from tgazsr_utils.paths import ROOT

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs playwright (the test extra brings it)"
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

WAIT = 120_000  # milliseconds that a step may take on a busy machine
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
    return {name: str(folder / part) for name, part in own.items()} | {"JUPYTER_PREFER_ENV_PATH": "1"}


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
    parameters.source += f'\noutput = "{tmp_path / "run"}"\ntrain_images = 320'
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
        until = time.monotonic() + 60
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
        page.get_by_role("button", name="Fine-tune", exact=True).wait_for()
        yield page
        browser.close()


@pytest.fixture
def shot(page, tmp_path):
    """Keeps a picture of the page where a locator is."""

    def keep(locator, name):
        locator.scroll_into_view_if_needed()
        page.screenshot(path=tmp_path / f"{name}.png")

    return keep


def test_a_person_can_use_the_explorer(page, shot):
    mix_by_mouse(page, shot)
    attack_by_keyboard(page, shot)
    fine_tune_cancel_and_go_on(page, shot)
    shot(page.locator("text=Nothing between is measured"), "surface")
    assert page.locator(ERRORS).count() == 0, page.locator(ERRORS).all_inner_texts()
    fits_and_can_be_read(page)


def mix_by_mouse(page, shot):
    row = lambda name: page.locator(f".tga tr:has(td:text-is('{name}'))").first.inner_text().split("\t")
    handle, before = page.locator(".noUi-handle").first, row("weighted sum")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y), page.mouse.down(), page.mouse.move(x + 60, y, steps=10), page.mouse.up()
    page.wait_for_function("was => document.querySelector('.tga .sum td:nth-child(4)').innerText != was", arg=before[3])
    weight = page.locator(".widget-readout").first.inner_text().strip()
    page.locator(f".tga tr:has(td:text-is('L_AR')) td:nth-child(3):text-is('{weight}')").wait_for()
    assert float(weight) > 0.12
    terms = sum(float(row(name)[3]) for name in ("CE", "L_AR", "L_AMC"))
    assert float(row("weighted sum")[3]) == pytest.approx(terms, abs=0.002)
    shot(page.locator("text=Cosines between gradients"), "mixer")
    page.get_by_role("button", name="published values").click()
    page.wait_for_function("is => document.querySelector('.tga .sum td:nth-child(4)').innerText == is", arg=before[3])


def attack_by_keyboard(page, shot):
    caption = page.locator("figcaption:has-text('perturbation')").inner_text()
    epsilon = page.locator(".widget-slider:has(label:text-is('epsilon (1/255)')) .noUi-handle")
    epsilon.focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "was => [...document.querySelectorAll('figcaption')]"
        ".some(e => /perturbation/.test(e.innerText) && e.innerText != was)",
        arg=caption,
    )
    shot(page.locator("text=Away from:"), "attack")
    prompt = page.get_by_label("prompt")
    prompt.fill("a red <b>thing</b> & more"), prompt.press("Enter")
    prompt.fill(""), prompt.press("Enter")
    page.locator(".tga .error:has-text('the prompt is empty')").wait_for()  # said, not lost
    prompt.fill("a star"), prompt.press("Enter")
    page.wait_for_function("!document.querySelector('.tga .error')")


def fine_tune_cancel_and_go_on(page, shot):
    tune = page.get_by_role("button", name="Fine-tune", exact=True)
    models = page.get_by_label("model").first.locator("option")
    there = models.count()
    tune.click()
    page.locator(".tga:has-text('of 20: loss')").wait_for()
    assert tune.is_disabled()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.locator("text=/was cancelled after step \\d+ of 20/").wait_for()
    shot(tune, "cancelled")
    tune.click()
    page.locator("text=is among the models now").wait_for()
    assert models.count() == there + 1
    shot(tune, "trained")
    page.get_by_label("model").nth(1).select_option(index=there)
    page.wait_for_timeout(2000)


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
