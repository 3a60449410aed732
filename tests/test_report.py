"""A run's plan, its page, its HTML and what it says of where it ran."""

import json
import re
import shutil
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import yaml
from PIL import Image, PngImagePlugin
from test_commands import add_notebook

from tgazsr_utils import manifests, open_workbook, profiles, runner
from tgazsr_utils.display import pages, panels, report
from tgazsr_utils.measuring import bench
from tgazsr_utils.parameters import SettingsError, validate
from tgazsr_utils.paths import ROOT
from tgazsr_utils.profiles import default_parameters, settings_of

OTHER_HOSTS = re.compile(
    r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=\s*[\"']?https?:|@import|import\(|url\([\"']?http"
)
EVIL = '"><script>alert(1)</script>'


def picture(path, **words):
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for name, text in words.items():
        info.add_text(name, text)
    Image.new("RGB", (30, 10)).save(path, pnginfo=info)


@pytest.fixture
def folder(tmp_path):
    """What a run leaves that stopped in its second notebook."""
    run = tmp_path / "run"
    picture(run / "figures" / "01_flip_roc.png", Title="Does it flip?", Description=f"AUC 0.89 {EVIL}")
    picture(run / "figures" / "01_plain.png")
    (run / "figures" / "01_plain.svg").write_text("<svg/>")
    (run / "html").mkdir()
    (run / "html" / "01_attention_shift.html").write_text("")
    (run / "answers").mkdir()
    (run / "answers" / "01_attention_shift.txt").write_text(f"Yes: by 1.29 {EVIL}.\n")
    (run / "tables").mkdir()
    row = {"robust": 51.04, "robust_ci": 6.08, "clean": 81.8, "clean_ci": 5.2, "average": 66.4, "average_ci": 5.0}
    row |= {"harmonic": 62.9, "interval": "images", "sets": "16", "images": "192", "world": "mini-world"}
    pd.DataFrame({"A_B": row}).T.rename_axis("method").to_csv(run / "tables" / "leaderboard.csv")
    return run


def manifest():
    values = {"seed": 7, "output": "x", "Alpha": EVIL}
    about = {"environment": manifests.environment_of("cpu"), "started": "2026-01-02T03:04:05", "parameters": values}
    books = {"01_attention_shift": about | {"status": "finished", "seconds": 66.0}}
    books["04_evaluate_16_datasets"] = about | {"status": "failed", "error": "stopped in cell 3: ValueError: x"}
    return {"notebooks": books | {"07_gone": {"status": "running"}}, "profile": "mini"}


def test_a_run_that_stopped_has_a_page_of_what_is_there(folder, capsys):
    manifests.report(folder, manifest(), "the mini-world")
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not capsys.readouterr().err and not OTHER_HOSTS.search(page)
    assert "alert(1)</script>" not in page and page.count("&lt;script&gt;alert(1)") >= 3
    assert (
        'class="answer yes"' in page and 'class="answer failed"' in page and "stopped in cell 3: ValueError: x" in page
    )
    assert "the paper gives TGA-ZSR 42.1 and 56.4, TeCoA 28.1 and 45.8, CLIP 4.9 and 64.4." in page
    assert "does tuning keep it in place?" in page and "finished in 1.1 minutes, 2026-01-02" in page
    assert re.search(r'<img src="figures/01_flip_roc.png" alt="AUC 0.89 [^"]*" width="30">', page)
    assert "Does it flip?" not in page  # which the image says itself
    assert '<a href="figures/01_plain.svg"><img src="figures/01_plain.png" alt="01 plain" width="30">' in page
    assert '<a href="figures/01_plain.svg">svg</a> · <a href="figures/01_plain.png">png</a>' in page
    linked = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    assert "html/01_attention_shift.html" in linked and all((folder / name).exists() for name in linked)
    assert "robust, % ↑" in page and "51.0\u00a0±\u00a06.1" in page.replace("&nbsp;", "\u00a0")
    assert "prefers-color-scheme" in page or "light-dark(" in page
    assert "seed = 7" in page and "@inproceedings{yu2024" in page and "output = " not in page


def test_panels_of_the_explorer_are_on_the_page_and_other_pages_are_linked(folder):
    pages_of = {"05_a": panels.document("<b>the panel</b>", "Mixed <1>"), "05_b": "<p>of another kind</p>"}
    pages_of["05_c"] = panels.document("<b>has a script</b><script>alert(2)</script>", "Not safe")
    for name, text in pages_of.items():
        (folder / "figures" / f"{name}.html").write_text(text, encoding="utf-8")
    picture(folder / "figures" / "06_last.png")
    manifests.report(folder, manifest(), "")
    page = (folder / "index.html").read_text(encoding="utf-8")
    places = [
        page.index(words) for words in ("01 plain", "Mixed &lt;1&gt;", "<b>the panel</b>", "05 b", "05 c", "06 last")
    ]
    assert places == sorted(places) and page.count("<style>") == 2 and ".tga svg" in page
    assert all(f'<a href="figures/{name}.html">html</a>' in page for name in pages_of)
    assert "of another kind" not in page and "has a script" not in page


def test_a_page_within_the_workbook_links_to_what_explains_it(folder, monkeypatch):
    manifests.report(folder, manifest(), "")
    assert "To understand it" not in (folder / "index.html").read_text(encoding="utf-8")
    monkeypatch.setattr(report, "ROOT", folder.parent.resolve())  # as if the workbook were there
    for name in report._EXPLAINED.values():
        (folder.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / name).write_text("")
        assert (ROOT / name).exists()
    manifests.report(folder, manifest(), "")
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert all(f'<a href="../{name}">{words}</a>' in page for words, name in report._EXPLAINED.items())


def test_the_leaderboard_is_there_for_papers_and_readmes(folder):
    manifests.report(folder, manifest(), "")
    lines = (folder / "tables" / "leaderboard.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| method | robust, % ↑ | clean, % ↑ |") and lines[1].count("|") == lines[0].count("|")
    assert lines[2].replace("\u00a0", " ").startswith("| A_B | 51.0 ± 6.1 | 81.8 ± 5.2 | 66.4 ± 5.0 | 62.9 | images |")
    latex = (folder / "tables" / "leaderboard.tex").read_text(encoding="utf-8")
    assert latex.isascii() and r"A\_B & 51.0 $\pm$ 6.1 & 81.8" in latex and r"robust, \% $\uparrow$" in latex


def test_a_page_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "index.html").mkdir()
    manifests.report(tmp_path, {"notebooks": {}}, "")
    assert re.fullmatch("no report could be made: .*index.html.*\n", capsys.readouterr().err)


def test_where_a_run_was_made_is_in_its_manifest(monkeypatch):
    said = manifests.environment_of("cpu")
    assert said["cpu"] and {"torch", "numpy", "nbconvert", "jinja2"} <= {name.lower() for name in said["packages"]}
    assert re.fullmatch("[0-9a-f]{40}", said["commit"]) and isinstance(said["uncommitted"], bool)
    monkeypatch.setattr(manifests, "ROOT", ROOT / "notebooks")  # as of a folder in somebody else's repository
    assert manifests.environment_of("cpu")["commit"] is None


def test_the_citation_is_usable_as_bibtex():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper, software = report.bibtex(cited["preferred-citation"]), report.bibtex(cited, note="commit abc")
    assert (
        paper.startswith("@inproceedings{yu2024,\n")
        and "author = {Yu, Lu and Zhang, Haiyang and Xu, Changsheng}" in paper
    )
    for field in ("year = {2024}", "url = {https://arxiv.org/abs/2410.21802}", "booktitle = {Advances in Neural"):
        assert f"  {field}" in paper
    assert software.startswith("@software{") and "year = {2026}" in software and "note = {commit abc}" in software


def test_html_asks_no_other_host_and_formulas_are_pictures(tmp_path):
    text = "With $x' \\le \\lVert y \\rVert$ and `$a$ $b$`:\n\n$$\\alpha\n+ \\beta$$\n\nand $\\no_such{$, costs 5 $."
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_markdown_cell("```\n$PATH $HOME\n```")]
    book = nbformat.v4.new_notebook(
        cells=cells, metadata={"widgets": {"application/vnd.jupyter.widget-state+json": {}}}
    )
    nbformat.write(book, tmp_path / "a.ipynb")
    pages.export(tmp_path / "a.ipynb", tmp_path / "html" / "a.html", {"report": "../index.html", "<b>": "b.html"})
    html = (tmp_path / "html" / "a.html").read_text(encoding="utf-8")
    assert not OTHER_HOSTS.search(html) and "MathJax" not in html and "require" not in html.split("</head>")[1]
    assert html.count('src="data:image/svg+xml;base64,') == 2 and 'alt="\\alpha + \\beta"' in html
    assert "<code>$a$ $b$</code>" in html and "$\\no_such{$" in html and "$PATH" in html
    assert '<a href="../index.html">report</a>' in html and "<b>" not in html and "&lt;b&gt;" in html


def test_every_formula_of_the_workbook_is_drawn():
    for name in profiles.NOTEBOOKS:
        for cell in profiles.cells(name):
            if cell.kind == "markdown":
                drawn = pages._CODE_OR_FORMULA.sub(pages._drawn, cell.source)
                assert "$" not in re.sub(r"`[^`]*`|<img[^>]*>", "", drawn), (name, cell.source)


def test_a_run_says_its_plan_and_where_it_is_and_ends_in_a_page_also_when_it_fails(tmp_path, monkeypatch, capfd):
    own = tmp_path / "notebooks"
    monkeypatch.setattr(profiles, "FOLDER", own)
    add_notebook(own, "07_mine", "x = 3", "print('fine')")
    add_notebook(own, "08_bad", "x = 3", "raise ValueError('not this way')")
    out = tmp_path / "out"
    arguments = ["smoke", "07", "08", "-p", "output", str(out)]
    assert runner.main(arguments) == 1
    said = capfd.readouterr().out
    plan, first = (
        said.index("07_mine               runs, as it has not run here yet; no earlier"),
        said.index("=== [1/2"),
    )
    assert plan < said.index("no earlier time") < first
    assert "=== [1/2 · 07_mine · 0 min so far]" in said and "=== [2/2 · 08_bad · " in said
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "ValueError: not this way" in page and 'href="html/07_mine.html"' in page
    assert (
        '<a href="../index.html">report</a> <a href="08_bad.html">08_bad</a>'
        in (out / "html" / "07_mine.html").read_text()
    )
    copies = [(out / "notebooks" / f"{name}.ipynb").read_text() for name in ("07_mine", "08_bad")]
    assert "not this way" in copies[1] and not any("\\u001b" in copy or "\x1b" in copy for copy in copies)
    manifest = json.loads((out / "manifest.json").read_text())["notebooks"]["08_bad"]
    assert manifest["status"] == "failed" and manifest["environment"]["cpu"]


def test_minutes_are_those_of_earlier_runs_then_of_the_profile(tmp_path, capsys):
    entry = {"status": "finished", "seconds": 90.0, "started": "2026-01-02T03"}
    earlier = {tmp_path: {}, tmp_path / "b": {"01": entry}}
    plan, wanted = [("01", "new"), ("02", "new"), ("03", None)], {name: {"seed": 1} for name in ("01", "02", "03")}
    found = manifests.show_plan(plan, wanted, earlier, {"01": 9, "02": 4}, "runs")
    said = " ".join(capsys.readouterr().out.split())
    assert found == {"01": 1.5, "02": 4} and "5.5 minutes in all" in said and ", with other seed" in said
    assert "01 runs, as new; 1.5 minutes on 2026-01-02 in" in said and "about 4 minutes on two CPU cores" in said
    earlier[tmp_path / "c"] = {"01": {**entry, "seconds": 60.0, "parameters": {"seed": 1, "output": "c"}}}
    assert manifests.show_plan(plan, wanted, earlier, {"01": 9}, "runs") == {"01": 1.0, "02": None}
    said = " ".join(capsys.readouterr().out.split())
    assert "with other" not in said and "1.0 minutes in all, but one of these has no time yet" in said
    assert re.fullmatch(r"0 of about 6 min", runner._so_far(runner.time.time(), [1.5, 4]))
    assert runner._so_far(runner.time.time() - 360, [None, 4]) == "6 min so far"


def test_parameters_are_exported_for_plain_papermill(tmp_path, capsys):
    out = tmp_path / "out"
    assert runner.main(["--export-parameters", "mini", "02", "04", "-p", "Alpha", "0.1", "-p", "output", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("papermill notebooks/02_train_tga_zsr.ipynb ")
    assert lines[0].endswith(f"-f {out / 'parameters' / '02_train_tga_zsr.yaml'}")
    batch = runner.batch_of("mini", ["02", "04"], {"Alpha": 0.1, "output": str(out)})
    for name in batch.chosen:
        values = yaml.safe_load((out / "parameters" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert values == batch.parameters[name] and values["Alpha"] == 0.1
        validate(settings_of(name), values)


def test_lists_and_mappings_may_be_text_as_plain_papermill_gives_them(tmp_path):
    name, usual = "04_evaluate_16_datasets", {"output": str(tmp_path / "out")}
    given = {
        "methods": '["TGA-ZSR"]',
        "models": "{mine: mini}",
        "test_eps_list": "[1, '2/255']",
        "testdata": "[shapes]",
    }
    settings = open_workbook(name, default_parameters(name) | usual | given).settings
    assert settings.methods == ["TGA-ZSR"] and settings.models == {"mine": "mini"} and settings.testdata == ["shapes"]
    assert settings.test_eps_list == [1, 2]
    for wrong in ("[TGA-ZSR", "{a: 1, a: 2}"):
        with pytest.raises(SettingsError, match="parameter methods = .* is not valid YAML"):
            open_workbook(name, default_parameters(name) | usual | {"methods": wrong})
    as_it_is = {"prompt": "[a] {}", "methods": ["TGA-ZSR"]}
    assert open_workbook(name, default_parameters(name) | usual | as_it_is).settings.prompt == "[a] {}"


def test_the_check_of_the_attack_says_what_each_attack_leaves(monkeypatch, capsys):
    left = (("clean", 0.0, 8), ("PGD-10", 3.5, 1), ("PGD-20, large", 16.0, 0))
    outcomes = [SimpleNamespace(attack=name, eps_255=eps, correct=count) for name, eps, count in left]
    check, kept = SimpleNamespace(n=8, seconds=1.2, outcomes=outcomes, settings={"test_eps": 3.5}), []
    monkeypatch.setattr(bench, "check_attack", lambda *_: check)
    bench.Bench(SimpleNamespace(checks=SimpleNamespace(add=kept.append)))._check_now(None)
    assert kept == [check]
    left = "clean 8, PGD-10 1, PGD-20, large (epsilon 16/255) 0"
    assert capsys.readouterr().out == f"check of the attack: of 8 images are right, {left}; 1 s\n"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(folder, scheme):
    """It asks for nothing but files, is as wide as the window, follows the theme, and its button copies."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (the test extra brings it)")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    manifests.report(folder, manifest(), "the mini-world")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = started.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / "index.html").as_uri())
        page.get_by_role("button", name="Copy").click()
        page.get_by_text("copied", exact=True).wait_for()
        link = page.locator("a").first.evaluate("element => getComputedStyle(element).color")
        assert page.evaluate("document.documentElement.scrollWidth") == 1280
        assert all(size > 0 for size in page.evaluate("[...document.images].map(one => one.naturalWidth)"))
        started.close()
    assert all(url.startswith("file:") for url in asked) and link == LINKS[scheme]


LINKS = {"light": "rgb(11, 87, 208)", "dark": "rgb(138, 180, 248)"}
