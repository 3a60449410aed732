"""What the explorer's panels are made of: widgets in line with each other, and a figure that outlives them."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython.display import HTML, display

from tgazsr_utils.core.objectives import PRESET
from tgazsr_utils.display import panels
from tgazsr_utils.progress import HEADLESS
from tgazsr_utils.runtime.files import write_atomic

BELOW_SLIDER = "2px 2px 8px 92px"  # margin that puts a widget under the track of a slider

# The figure as it was when a notebook was saved: there where the widgets beside it are not. Sliders' handles get names.
STILL = """<style>
.jp-OutputArea:has(.widget-box) .tga-still { display: none; }
.jp-OutputArea-child:has(+ * .tga-still):not(:has(.widget-box)) { display: none; }
</style><script>
if (!window.tgaNames) {
  window.tgaNames = () => {
    for (const handle of document.querySelectorAll(".widget-slider .noUi-handle")) {
      const label = handle.closest(".widget-slider").querySelector("label");
      const exact = handle.getAttribute("aria-valuetext");
      for (const [name, value] of [["aria-label", label && label.innerText], ["aria-valuenow", exact]])
        if (value && handle.getAttribute(name) !== value) handle.setAttribute(name, value);
    }
    for (const play of document.querySelectorAll(".widget-play"))
      play.querySelectorAll("button").forEach((button, i) =>
        button.setAttribute("aria-label", ["play or pause epsilon", "stop", "repeat"][i]));
  };
  new MutationObserver(window.tgaNames).observe(
    document.body, {childList: true, subtree: true, attributes: true, attributeFilter: ["aria-valuetext"]});
}
window.tgaNames();
</script>"""


class Panel:
    """Widgets: controls, the ``result`` they lead to and a ``status`` line."""

    title: str
    hint: str  # something to try

    def __init__(self, *controls: widgets.Widget, height: int):
        self.result = widgets.HTML(layout=widgets.Layout(min_height=f"{height}px"))
        self.status = widgets.HTML(panels.sentence(""))
        hint = widgets.HTML(panels.block(f'<p class="quiet"><b>Try this:</b> {self.hint}</p>'))
        children = [widgets.HTML(panels.STYLE), hint, *controls, self.result, self.status]
        self.widget = widgets.VBox(children, layout=widgets.Layout(max_width=f"{panels.WIDEST}px"))
        self.error: Exception | None = None
        self._still: Any = None  # the display of ``html`` beside the widgets

    @property
    def html(self) -> str:
        """What is shown, but for the controls."""
        return panels.STYLE + self.result.value + self.status.value

    def save(self, folder: Path, name: str) -> Path:
        """Writes ``<folder>/figures/<name>.html``, self-contained. Raises the error that the panel shows, if any."""
        if self.error is not None:
            raise self.error
        text = panels.document(self.result.value + self.status.value, self.title)
        path = folder / "figures" / f"{name}.html"
        return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {"text/html": self.html, "text/plain": f"{self.title}: HTML of its state"}

    def _ipython_display_(self) -> None:
        """The widgets, and beside them what a saved notebook shows."""
        if os.environ.get(HEADLESS):
            raise NotImplementedError  # then the cell's result is HTML
        display(self.widget)
        self._still = display(self._as_still(), display_id=True)

    def _as_still(self) -> HTML:
        return HTML(f'{STILL}<div class="tga-still">{self.html}</div>')

    def say(self, text: str, kind: str = "quiet") -> None:
        self.status.value = panels.sentence(text, kind)

    @contextmanager
    def at_work(self, dimmed: bool = False) -> Iterator[None]:
        """What goes wrong within is said in the panel; what comes of it is what a saved notebook shows."""
        self.error = None
        if dimmed:
            self.result.add_class("tga-working")
        try:
            yield
        except Exception as error:  # a panel stays usable whatever its input makes a library raise
            self.error = error
            self.say(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}", "error")
        finally:
            if dimmed:
                self.result.remove_class("tga-working")
            if self._still is not None:
                self._still.update(self._as_still())


def control(widget: type[widgets.Widget], description: str, width: int = 385, **options: Any) -> widgets.Widget:
    """A widget of ``width`` pixels with its description before it, in line with the others."""
    layout, style = widgets.Layout(width=f"{width}px"), {"description_width": "84px"}
    return widget(description=description, style=style, layout=layout, **options)


def weight_slider(name: str, meaning: str, value: float) -> widgets.FloatSlider:
    form = {"min": 0.0, "max": 0.4, "step": 0.005, "readout_format": ".3f"}
    return control(widgets.FloatSlider, name, value=value, tooltip=meaning, **form)


def published_mark(slider: widgets.FloatSlider) -> widgets.HTML:
    """A line below a slider that says where on its track, between description and readout, the published value is."""
    value = PRESET[slider.description]
    at = 93 + 205 * (value - slider.min) / (slider.max - slider.min)
    words = panels.block(f'<div style="padding-left:{at:.0f}px" class="quiet">▲ {value:g} published</div>')
    return widgets.HTML(words, layout=widgets.Layout(height="22px"))


def side_by_side(*parts: widgets.Widget) -> widgets.HBox:
    """Below each other where the page is narrow."""
    return widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap"))


def on_change(controls: Iterable[widgets.Widget], action: Callable[[], None]) -> None:
    for each in controls:
        each.observe(lambda _: action(), "value")
