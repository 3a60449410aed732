"""The mini-world: a rendered image-text world with exact masks, small enough to train a CLIP on a laptop.

An image is one object (or several alike) over a natural-looking background; a vector of seven attributes says all
about it. A caption names some of the attributes, so whether a caption fits an image is known exactly. Sixteen tasks
play the part of the sixteen published data sets. Whatever is computed here is a statement about the mini-world only.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tgazsr_utils.core.seeds import digest

SIDE = 56

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "heart", "crescent", "bar")
LETTERS = tuple(f"letter {c}" for c in "AEHKLTVXYZ")
_COLOUR_RGB = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.96, 0.52, 0.06),
    "yellow": (0.95, 0.88, 0.15),
    "green": (0.12, 0.62, 0.18),
    "blue": (0.14, 0.28, 0.88),
    "purple": (0.55, 0.16, 0.68),
    "white": (0.96, 0.96, 0.96),
    "black": (0.07, 0.07, 0.07),
}
TEXTURES = ("plain", "striped", "dotted", "checkered", "faded")
SIZES = ("small", "medium", "large")
PLACES = ("centre", "top left", "top right", "bottom left", "bottom right")
COUNTS = ("one", "two", "three", "four")
_SCENE_RGB = {  # the two colours that fractal noise mixes
    "sky": ((0.42, 0.63, 0.86), (0.88, 0.92, 0.96)),
    "grass": ((0.20, 0.38, 0.12), (0.48, 0.66, 0.26)),
    "sand": ((0.74, 0.62, 0.42), (0.90, 0.82, 0.62)),
    "water": ((0.06, 0.32, 0.42), (0.32, 0.64, 0.68)),
    "rock": ((0.30, 0.28, 0.27), (0.62, 0.60, 0.57)),
    "night": ((0.03, 0.04, 0.12), (0.16, 0.16, 0.30)),
    "bricks": ((0.50, 0.24, 0.18), (0.68, 0.38, 0.28)),
}
COLOURS, SCENES = tuple(_COLOUR_RGB), tuple(_SCENE_RGB)
ATTRIBUTES = {
    "kind": SHAPES + LETTERS,
    "colour": COLOURS,
    "texture": TEXTURES,
    "size": SIZES,
    "place": PLACES,
    "count": COUNTS,
    "scene": SCENES,
}
COLUMN = {name: i for i, name in enumerate(ATTRIBUTES)}
ANY = -1  # in a caption: not named; every image fits
NOT_APPLICABLE = -2  # in an image: no caption that names this attribute fits (the place of several objects)

# Two shapes per colour that pre-training never shows; together every shape but two is held out with some colour.
HELD_OUT_PAIRS = frozenset((c, (c + shift) % len(SHAPES)) for c in range(len(COLOURS)) for shift in (1, 4))

_RGB, _SCENES = torch.tensor([*_COLOUR_RGB.values()]), torch.tensor([*_SCENE_RGB.values()])
_RADIUS = torch.tensor([[8.0, 10.5], [13.0, 16.5], [20.0, 25.0]])  # pixels, by size
_CENTRES = torch.tensor([[0.0, 0.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])  # by place, (x, y)
_STROKES = {  # letters as line segments (x0, y0, x1, y1), y downwards
    "A": [(-0.7, 0.9, 0, -0.9), (0.7, 0.9, 0, -0.9), (-0.4, 0.25, 0.4, 0.25)],
    "E": [(-0.6, -0.9, -0.6, 0.9), (-0.6, -0.9, 0.6, -0.9), (-0.6, 0, 0.45, 0), (-0.6, 0.9, 0.6, 0.9)],
    "H": [(-0.65, -0.9, -0.65, 0.9), (0.65, -0.9, 0.65, 0.9), (-0.65, 0, 0.65, 0)],
    "K": [(-0.6, -0.9, -0.6, 0.9), (-0.6, 0.1, 0.6, -0.9), (-0.2, -0.2, 0.65, 0.9)],
    "L": [(-0.5, -0.9, -0.5, 0.9), (-0.5, 0.9, 0.65, 0.9)],
    "T": [(-0.75, -0.9, 0.75, -0.9), (0, -0.9, 0, 0.9)],
    "V": [(-0.75, -0.9, 0, 0.9), (0.75, -0.9, 0, 0.9)],
    "X": [(-0.7, -0.9, 0.7, 0.9), (0.7, -0.9, -0.7, 0.9)],
    "Y": [(-0.7, -0.9, 0, 0), (0.7, -0.9, 0, 0), (0, 0, 0, 0.9)],
    "Z": [(-0.65, -0.9, 0.65, -0.9), (0.65, -0.9, -0.65, 0.9), (-0.65, 0.9, 0.65, 0.9)],
}


@dataclass(frozen=True)
class Rendering:
    """How images are rendered beyond their attributes; tasks use it for domains that pre-training never shows."""

    noise: tuple[float, float] = (0.0, 0.03)  # range of the sensor noise's standard deviation, in [0,1] pixel units
    blur: int = 1  # down- and upsampling factor
    flat_background: bool = False


@dataclass(frozen=True)
class Task:
    """One zero-shot task: class ``i`` means the attribute values ``classes[i]``; other attributes are random."""

    columns: tuple[str, ...]
    classes: tuple[tuple[int, ...], ...]
    class_names: tuple[str, ...]
    prompt: str = "This is a photo of a {}"
    fixed: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    rendering: Rendering = Rendering()

    @property
    def prompts(self) -> list[str]:
        return [self.prompt.format(name) for name in self.class_names]

    @property
    def descriptions(self) -> tuple[tuple[str, ...], ...]:
        """A caption a class with each of the prefixes, which names what makes the class and nothing else."""
        named = [dict(zip(self.columns, values)) for values in self.classes]
        demands = [[values.get(column, ANY) for column in COLUMN] for values in named]
        return tuple(tuple(caption(of_class, prefix) for prefix in _PREFIXES) for of_class in demands)


# --- attributes -----------------------------------------------------------------------------------------------------


def sample_attributes(n: int, generator: torch.Generator, held_out: bool = True) -> Tensor:
    """Random attribute vectors ``[n, 7]`` (int64). ``held_out=False`` leaves out the pairs of HELD_OUT_PAIRS."""
    draw = lambda weights: torch.multinomial(torch.tensor(weights), n, replacement=True, generator=generator)
    uniform = lambda k: torch.randint(k, (n,), generator=generator)
    kind = torch.where(draw([0.65, 0.35]) == 0, uniform(len(SHAPES)), len(SHAPES) + uniform(len(LETTERS)))
    columns = [kind, uniform(len(COLOURS)), uniform(len(TEXTURES)), draw([0.2, 0.35, 0.45]), uniform(len(PLACES))]
    attributes = torch.stack([*columns, draw([0.76, 0.08, 0.08, 0.08]), uniform(len(SCENES))], dim=1)
    return make_consistent(attributes if held_out else _avoid_held_out(attributes, generator))


def make_consistent(attributes: Tensor) -> Tensor:
    """Large objects stand in the centre; several objects are small and have no one place."""
    a = attributes.clone()
    several = a[:, COLUMN["count"]] > 0
    a[several, COLUMN["size"]] = 0
    a[several, COLUMN["place"]] = NOT_APPLICABLE
    a[a[:, COLUMN["size"]] == 2, COLUMN["place"]] = 0
    return a


def _avoid_held_out(attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Moves a held-out (colour, shape) pair to another colour; two shifts are held out, so a few tries always do."""
    banned = torch.zeros(len(COLOURS), len(ATTRIBUTES["kind"]), dtype=torch.bool)
    for colour, shape in HELD_OUT_PAIRS:
        banned[colour, shape] = True
    a = attributes.clone()
    kind, colour = a[:, COLUMN["kind"]], a[:, COLUMN["colour"]]
    while (bad := banned[colour, kind]).any():
        colour[bad] = torch.randint(len(COLOURS), (int(bad.sum()),), generator=generator)
    return a


# --- rendering ------------------------------------------------------------------------------------------------------


def _shape_distance(shape: int, u: Tensor, v: Tensor) -> Tensor:
    """Approximate signed distance (negative inside) in units of the object's radius; u, v point right and down."""
    name = ATTRIBUTES["kind"][shape]
    if name.startswith("letter "):
        return torch.stack([_segment(u, v, *s) for s in _STROKES[name[-1]]]).amin(0) - 0.17
    x, y = u.abs(), v.abs()
    if name == "circle":
        return (u * u + v * v).sqrt() - 0.9
    if name == "square":
        return torch.maximum(x, y) - 0.76
    if name == "triangle":
        return torch.maximum(0.88 * x - 0.47 * v - 0.36, v - 0.72)
    if name == "diamond":
        return 0.83 * x + 0.56 * y - 0.53
    if name == "cross":
        return torch.minimum(torch.maximum(x - 0.28, y - 0.92), torch.maximum(x - 0.92, y - 0.28))
    if name == "star":
        fold = torch.remainder(torch.atan2(u, -v) + torch.pi / 5, 2 * torch.pi / 5) - torch.pi / 5
        r = (u * u + v * v).sqrt()
        return 0.85 * r * fold.abs().sin() + 0.52 * r * fold.cos() - 0.5
    if name == "ring":
        return ((u * u + v * v).sqrt() - 0.68).abs() - 0.22
    if name == "heart":
        lobes = ((x - 0.4) ** 2 + (v + 0.32) ** 2).sqrt() - 0.46
        point = torch.maximum(0.75 * x + 0.66 * v - 0.53, -v - 0.32)
        return torch.minimum(lobes, point)
    if name == "crescent":
        return torch.maximum((u * u + v * v).sqrt() - 0.92, 0.78 - ((u - 0.45) ** 2 + v * v).sqrt())
    return torch.maximum(x - 0.95, y - 0.3)  # bar


def _segment(u: Tensor, v: Tensor, x0: float, y0: float, x1: float, y1: float) -> Tensor:
    dx, dy = x1 - x0, y1 - y0
    t = (((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy)).clamp_(0, 1)
    return ((u - x0 - t * dx).square_() + (v - y0 - t * dy).square_()).sqrt_()


def _texture(texture: Tensor, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """How much of the second tone is mixed in, ``[n,H,W]`` in [0,1]; the period is fixed in pixels."""
    mix = torch.zeros_like(u)
    for index, name in enumerate(TEXTURES[1:], start=1):
        rows = (texture == index).nonzero().squeeze(1)
        x, y = u[rows] * radius[rows], v[rows] * radius[rows]
        if name == "striped":
            tone = torch.sin(y * (2 * torch.pi / 7)) * 3 + 0.5
        elif name == "dotted":
            tone = (torch.cos(x * (2 * torch.pi / 7)) + torch.cos(y * (2 * torch.pi / 7)) - 0.6) * 3
        elif name == "checkered":
            tone = torch.sin(x * (torch.pi / 5)) * torch.sin(y * (torch.pi / 5)) * 4 + 0.5
        else:
            tone = (u[rows] + 0.9) / 1.8
        mix[rows] = tone.clamp_(0, 1)
    return mix


def _background(scene: Tensor, generator: torch.Generator, flat: bool) -> Tensor:
    n = len(scene)
    if flat:
        grey = 0.35 + 0.3 * torch.rand(n, 1, 1, 1, generator=generator)
        return grey.expand(n, 3, SIDE, SIDE).clone()
    mix = torch.zeros(n, 1, SIDE, SIDE)
    grass, water = ((scene == SCENES.index(name))[:, None, None, None] for name in ("grass", "water"))
    for cells, weight in ((3, 0.55), (7, 0.3), (14, 0.2), (28, 0.15)):  # coarse to fine: roughly 1/f
        noise = torch.rand(n, 1, cells, cells, generator=generator) - 0.5
        noise = torch.where(water, noise.mean(3, keepdim=True) * 2.5, noise)  # waves: rows move together
        noise = torch.where(grass, noise * (0.4 if cells < 14 else 2.0), noise)  # blades: the fine part counts
        mix += weight * F.interpolate(noise, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    mix = (mix * 1.6 + 0.5).clamp_(0, 1)
    rows = (scene == SCENES.index("bricks")).nonzero().squeeze(1)
    if len(rows):
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        mortar = (y % 8 == 0) | ((x + (y // 8 % 2) * 7) % 14 == 0)
        mix[rows] = mix[rows] * ~mortar
    base, top = _SCENES[scene].unbind(1)
    image = torch.lerp(base[:, :, None, None], top[:, :, None, None], mix)
    rows = (scene == SCENES.index("night")).nonzero().squeeze(1)
    if len(rows):
        stars = torch.rand(len(rows), 1, SIDE, SIDE, generator=generator) > 0.992
        image[rows] = torch.where(stars, 0.9, image[rows])
    tint = 1 + 0.2 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5)
    return image.mul_(tint).clamp_(0, 1)


def _objects(attributes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One row for each object: image index, kind, centre ``[m,2]`` and radius in pixels, angle in radians."""
    n = len(attributes)
    size, place, count = (attributes[:, COLUMN[c]] for c in ("size", "place", "count"))
    low, high = _RADIUS[size].unbind(1)
    radius = low + (high - low) * torch.rand(n, generator=generator)
    slots = torch.rand(n, 4, generator=generator).argsort(dim=1)  # which quadrants several objects take
    several = count > 0
    index = torch.repeat_interleave(torch.arange(n), count + 1)
    nth = torch.arange(len(index)) - torch.cumsum(count + 1, 0)[index] + (count + 1)[index]
    spot = torch.where(several[index], 1 + slots[index, nth], place.clamp(min=0)[index])
    reach = (SIDE / 2 - radius - 1).clamp(min=0)[index]
    offset = torch.where(several[index], torch.full_like(reach, 13.5), reach * 0.8)
    jitter = torch.where(spot == 0, 3.0, 1.5)[:, None] * (2 * torch.rand(len(index), 2, generator=generator) - 1)
    centre = SIDE / 2 + _CENTRES[spot] * offset[:, None] + jitter
    angle = 0.3 * (torch.rand(len(index), generator=generator) - 0.5)
    return index, attributes[index, COLUMN["kind"]], centre, radius[index], angle


def render(attributes: Tensor, generator: torch.Generator, rendering: Rendering = Rendering()) -> tuple[Tensor, Tensor]:
    """Images ``[n,3,56,56]`` (uint8) and object masks ``[n,56,56]`` (bool) of attribute vectors ``[n,7]``.

    The same attributes, generator state and rendering give the same images.
    """
    image = _background(attributes[:, COLUMN["scene"]], generator, rendering.flat_background)
    cover, mix = _cover_and_mix(attributes, generator)
    n = len(attributes)
    base = (_RGB[attributes[:, COLUMN["colour"]]] + 0.1 * (torch.rand(n, 3, generator=generator) - 0.5)).clamp_(0, 1)
    second = torch.where(base.mean(1, keepdim=True) > 0.3, base * 0.35, base * 0.5 + 0.42)
    paint = torch.lerp(base[:, :, None, None], second[:, :, None, None], mix[:, None])
    image.lerp_(paint, cover[:, None])
    del paint, mix  # thousands of images at once: memory counts
    if rendering.blur > 1:
        small = F.avg_pool2d(image, rendering.blur)
        image = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    low, high = rendering.noise
    sigma = low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)
    image += torch.rand(n, 3, SIDE, SIDE, generator=generator).sub_(0.5).mul_(sigma * 12**0.5)
    image.mul_(255).add_(0.5).clamp_(0, 255)
    return image.to(torch.uint8), cover > 0.5


def _cover_and_mix(attributes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both ``[n,56,56]`` in [0,1]: how much of a pixel is object, and of that how much has the second tone."""
    n = len(attributes)
    index, kind, centre, radius, angle = _objects(attributes, generator)
    axis = torch.arange(SIDE) + 0.5
    scale = radius[:, None, None]
    dx = ((axis[None, :] - centre[:, :1]) / radius[:, None])[:, None, :]
    dy = ((axis[None, :] - centre[:, 1:]) / radius[:, None])[:, :, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    distance = torch.empty_like(u)
    for shape in kind.unique().tolist():
        rows = (kind == shape).nonzero().squeeze(1)
        distance[rows] = _shape_distance(shape, u[rows], v[rows])
    cover_each = (0.5 - distance * scale).clamp_(0, 1)
    mix_each = _texture(attributes[index, COLUMN["texture"]], u, v, scale)
    cover = torch.zeros(n, SIDE, SIDE).index_add_(0, index, cover_each).clamp_(max=1)
    if len(index) == n:  # one object an image
        return cover, mix_each
    return cover, torch.zeros(n, SIDE, SIDE).index_add_(0, index, mix_each * cover_each)


# --- captions -------------------------------------------------------------------------------------------------------

_PREFIXES = ("This is a photo of", "A photo of", "An image of", "There is", "")
_MENTION = torch.tensor([0.75, 0.5, 0.4, 0.3, 0.3, 0.25, 0.25])  # how often a caption names each attribute


def sample_captions(attributes: Tensor, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """One caption for each image and what it demands: ``[n,7]`` with ANY where nothing is said."""
    named = torch.rand(attributes.shape, generator=generator) < _MENTION
    scene_only = torch.rand(len(attributes), generator=generator) < 0.06
    named[scene_only] = torch.arange(len(COLUMN)) == COLUMN["scene"]
    demands = torch.where(named & (attributes != NOT_APPLICABLE), attributes, ANY)
    prefixes = torch.randint(len(_PREFIXES), (len(attributes),), generator=generator).tolist()
    return [caption(d, _PREFIXES[p]) for d, p in zip(demands.tolist(), prefixes)], demands


def caption(demands: list[int], prefix: str = _PREFIXES[0]) -> str:
    """A sentence that names the demanded attributes, as in "A photo of a small red circle on grass"."""
    word = {name: values[d] if d >= 0 else "" for (name, values), d in zip(ATTRIBUTES.items(), demands)}
    if word["scene"] and not any(word[name] for name in word if name != "scene"):
        return f"{prefix} {word['scene']}".strip()
    noun = word["kind"] or "object"
    plural = word["count"] not in ("", "one")
    words = list(filter(None, [word["size"], word["texture"], word["colour"], noun]))
    article = "an" if words[0][0] in "aeiou" else "a"
    phrase = " ".join([word["count"] or article, *words]) + ("s" if plural else "")
    phrase += f" in the {word['place']}" if word["place"] else ""
    phrase += f" on {word['scene']}" if word["scene"] else ""
    return f"{prefix} {phrase}".strip()


def caption_fits(demands: Tensor, attributes: Tensor) -> Tensor:
    """``[captions, images]`` bool: does every demanded attribute have the demanded value?"""
    return ((demands[:, None] == ANY) | (demands[:, None] == attributes[None])).all(-1)


# --- tasks ----------------------------------------------------------------------------------------------------------


def _single(column: str, values: range, prompt: str, **fixed: int | tuple[int, ...]) -> Task:
    """A class for each of these values of one attribute."""
    names = tuple(ATTRIBUTES[column][value] for value in values)
    return Task((column,), tuple((value,) for value in values), names, prompt, fixed)


def _product(first: str, second: str, seconds: range, suffix: str = "") -> Task:
    """A class for each pair of a value of ``first`` and one of ``seconds``."""
    pairs = tuple((a, b) for a in range(len(ATTRIBUTES[first])) for b in seconds)
    names = tuple(f"{ATTRIBUTES[first][a]} {ATTRIBUTES[second][b]}{suffix}" for a, b in pairs)
    return Task((first, second), pairs, names, fixed=_CLEAR)


_SHAPE_IDS, _LETTER_IDS = range(len(SHAPES)), range(len(SHAPES), len(SHAPES) + len(LETTERS))
_CLEAR = {"count": 0, "size": (1, 2)}  # one object, not small
_SHAPES = _single("kind", _SHAPE_IDS, "This is a photo of a {}", **_CLEAR)
_COUNTS = ("one object", "two objects", "three objects", "four objects")

TASKS: dict[str, Task] = {
    "shapes": _SHAPES,
    "letters": _single("kind", _LETTER_IDS, "This is a photo of a {}", **_CLEAR),
    "colours": _single("colour", range(len(COLOURS)), "This is a photo of a {} object", **_CLEAR),
    "textures": _single("texture", range(len(TEXTURES)), "This is a photo of a {} object", **_CLEAR),
    "sizes": _single("size", range(len(SIZES)), "A photo of a {} object", count=0, place=0),
    "places": _single("place", range(len(PLACES)), "There is an object in the {}", count=0, size=(0, 1)),
    "counts": Task(("count",), ((0,), (1,), (2,), (3,)), _COUNTS, "An image of {}", {"size": 0}),
    "scenes": _single("scene", range(len(SCENES)), "A photo of {}"),
    "colour_shapes": _product("colour", "kind", _SHAPE_IDS),
    "texture_shapes": _product("texture", "kind", _SHAPE_IDS),
    "colour_letters": _product("colour", "kind", _LETTER_IDS),
    "texture_colours": _product("texture", "colour", range(len(COLOURS)), " object"),
    "shapes_small": _single("kind", _SHAPE_IDS, "An image of a small {}", count=0, size=0),
    "shapes_noisy": replace(_SHAPES, rendering=Rendering(noise=(0.10, 0.12))),
    "shapes_blurred": replace(_SHAPES, rendering=Rendering(blur=2)),
    "shapes_plain": replace(_SHAPES, rendering=Rendering(flat_background=True)),
}


@lru_cache(maxsize=64)
def task_images(name: str, n: int, split: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``[n,3,56,56]`` (uint8), labels ``[n]`` and masks ``[n,56,56]`` (bool) of a task.

    Every class is there as often, within one. ``split`` is "train" or "test": disjoint random streams.
    Raises KeyError for an unknown task.
    """
    labels, attributes, generator = _drawn(name, n, split, seed)
    images, masks = render(attributes, generator, TASKS[name].rendering)
    return images, labels, masks


@lru_cache(maxsize=64)
def task_captions(name: str, n: int, split: str, seed: int = 0) -> tuple[str, ...]:
    """A caption for each of ``task_images``, such as pre-training has."""
    _, attributes, generator = _drawn(name, n, split, seed)
    own = torch.Generator().manual_seed(generator.initial_seed() ^ 2**40)  # the images' noise is not in their captions
    return tuple(sample_captions(attributes, own)[0])


def _drawn(name: str, n: int, split: str, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Labels and attributes, and what is to draw the rest."""
    task = TASKS[name]
    stream = {"train": 1, "test": 2}[split]
    own = ((seed * 2 + stream) * 64 + list(TASKS).index(name)) * 1_000_003 + n
    # PyTorch ignores all but the last 32 bits of a seed.
    generator = torch.Generator().manual_seed(own if own < 2**32 else int(digest(own), 16))
    order = torch.randperm(len(task.classes), generator=generator)
    labels = order[torch.arange(n) % len(order)]
    attributes = sample_attributes(n, generator)
    for column, value in task.fixed.items():
        choices = torch.tensor(value if isinstance(value, tuple) else (value,))
        attributes[:, COLUMN[column]] = choices[torch.randint(len(choices), (n,), generator=generator)]
    wanted = torch.tensor(task.classes)[labels]
    for i, column in enumerate(task.columns):
        attributes[:, COLUMN[column]] = wanted[:, i]
    return labels, make_consistent(attributes), generator
