"""A procedural street, drawn twice: as a game renders it (source) and as a camera sees it elsewhere (target).

A frame is a function of its domain, seed and index alone. Both domains share the classes and the rules of a street in
perspective; they differ in appearance (flat colours against textures, light, weather, lens and sensor) and in
statistics (how the streets are laid out, how much traffic, how many people), as GTA and Cityscapes do. Classes are
long-tailed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Tuple

import numpy as np
from numpy.random import Generator
from scipy import ndimage

CLASSES = ("road", "sidewalk", "building", "wall", "vegetation", "sky", "pole", "sign", "person", "car")
ROAD, SIDEWALK, BUILDING, WALL, VEGETATION, SKY, POLE, SIGN, PERSON, CAR = range(len(CLASSES))
COLOURS = np.array(
    [
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (107, 142, 35),
        (70, 130, 180),
        (153, 153, 153),
        (220, 220, 0),
        (220, 20, 60),
        (0, 0, 142),
    ],
    dtype=np.uint8,
)  # for figures: Cityscapes' own
HEIGHT, WIDTH = 64, 128


class Resolution(NamedTuple):
    """The size of frames, and how many times larger they are drawn: the image is averaged, the labels are sampled."""

    height: int
    width: int
    scale: int


SMALL, LARGE = Resolution(HEIGHT, WIDTH, 2), Resolution(256, 512, 1)


class Frame(NamedTuple):
    """An image, float32 ``(3, H, W)`` in [0, 1], and its labels, uint8 ``(H, W)``."""

    image: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Layout:
    """The statistics of a domain's streets.

    Attributes:
        horizon: Range of the horizon's height, as a share of the image.
        road: Range of half the road's width at the lower edge, in image widths.
        sidewalk: Range of a sidewalk's width there.
        open_side: Probability that a side has no buildings: sky and vegetation instead.
        storeys: Range of a building's height at the near end, in image heights.
        trees: Mean number of trees on a side.
        poles: Mean number of poles on a side.
        signs: Probability that a pole bears a sign.
        persons: Mean number of persons.
        cars: Mean number of cars.
        walls: Probability of a wall along a side.
        tilt: Standard deviation of the camera's roll, degrees.
    """

    horizon: Tuple[float, float]
    road: Tuple[float, float]
    sidewalk: Tuple[float, float]
    open_side: float
    storeys: Tuple[float, float]
    trees: float
    poles: float
    signs: float
    persons: float
    cars: float
    walls: float
    tilt: float


GAME = Layout((0.36, 0.46), (0.45, 0.70), (0.12, 0.25), 0.25, (0.35, 0.9), 1.0, 1.5, 0.35, 1.2, 1.8, 0.35, 0.5)
PHOTO = Layout((0.42, 0.54), (0.35, 0.60), (0.15, 0.40), 0.15, (0.5, 1.2), 2.2, 1.8, 0.45, 2.4, 2.8, 0.25, 1.5)


def game_frame(index: int, seed: int = 0, resolution: Resolution = SMALL) -> Frame:
    """Return source frame number ``index`` of a seed."""
    rng = np.random.default_rng([11, seed, index])
    labels, depth, tone = _draw(rng, GAME, resolution)
    return _finish(_render_game(rng, labels, depth, tone), labels, resolution)


def photo_frame(index: int, seed: int = 0, resolution: Resolution = SMALL) -> Frame:
    """Return target frame number ``index`` of a seed."""
    rng = np.random.default_rng([23, seed, index])
    labels, depth, tone = _draw(rng, PHOTO, resolution)
    return _finish(_render_photo(rng, labels, depth, tone), labels, resolution)


# ------------------------------------------------------------------------------------------------------------ geometry


class _Canvas:
    """Labels, depth in [0, 1] (1 is far), and a random tone per object, painted from far to near."""

    def __init__(self, resolution: Resolution) -> None:
        self.height, self.width = resolution.height * resolution.scale, resolution.width * resolution.scale
        self.labels = np.full((self.height, self.width), SKY, dtype=np.uint8)
        self.depth = np.ones((self.height, self.width), dtype=np.float32)
        self.tone = np.zeros((self.height, self.width), dtype=np.float32)
        self.y, self.x = np.mgrid[0 : self.height, 0 : self.width].astype(np.float32)

    def paint(self, where: np.ndarray, label: int, depth: object, tone: float) -> None:
        self.labels[where] = label
        self.depth[where] = depth if np.isscalar(depth) else np.asarray(depth)[where]
        self.tone[where] = tone


def _draw(rng: Generator, layout: Layout, resolution: Resolution) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    canvas = _Canvas(resolution)
    height, width = canvas.height, canvas.width
    horizon = rng.uniform(*layout.horizon) * height
    vanishing = width * (0.5 + rng.normal(0, 0.08))
    # How near a row of the ground is: 0 at the horizon, 1 at the lower edge.
    nearness = np.clip((canvas.y - horizon) / (height - horizon), 0, 1)
    ground = canvas.y >= horizon
    half_road = rng.uniform(*layout.road) * width
    sidewalks = rng.uniform(*layout.sidewalk, size=2) * width
    offset = rng.normal(0, 0.12) * half_road
    side_x = canvas.x - vanishing - offset * nearness
    edge = half_road * nearness
    tones = rng.normal(0, 1, size=8)
    canvas.paint(ground, VEGETATION if rng.random() < 0.4 else SIDEWALK, 1 - nearness, tones[0])
    for side, wide in zip((-1, 1), sidewalks):
        beside = ground & (side * side_x >= edge) & (side * side_x <= edge + wide * nearness)
        canvas.paint(beside, SIDEWALK, 1 - nearness, tones[1])
    canvas.paint(ground & (np.abs(side_x) <= edge), ROAD, 1 - nearness, tones[2])
    for side, wide in zip((-1, 1), sidewalks):
        _draw_side(rng, canvas, layout, side, horizon, vanishing, offset, half_road + wide)
    _draw_things(rng, canvas, layout, horizon, vanishing, offset, half_road, sidewalks)
    angle = rng.normal(0, layout.tilt)
    arrays = [
        ndimage.rotate(array, angle, reshape=False, order=order, mode="nearest")
        for array, order in ((canvas.labels, 0), (canvas.depth, 1), (canvas.tone, 0))
    ]
    return arrays[0], np.clip(arrays[1], 0, 1), arrays[2]


def _draw_side(
    rng: Generator,
    canvas: _Canvas,
    layout: Layout,
    side: int,
    horizon: float,
    vanishing: float,
    offset: float,
    reach: float,
) -> None:
    """Draw what stands along one side, house by house, from far to near."""
    height = canvas.height
    is_open = rng.random() < layout.open_side
    wall = rng.random() < layout.walls
    edges = np.concatenate([[0.02], np.sort(rng.uniform(0.05, 0.9, size=rng.integers(3, 7))), [1.3]])
    for near, far in zip(edges[1:], edges[:-1]):
        inner = vanishing + side * reach * far + offset * far
        outer = vanishing + side * reach * near + offset * near
        low, high = sorted((inner, outer))
        columns = (canvas.x >= low) & (canvas.x < high)
        # A façade along the street: its foot and its top follow the perspective of the columns.
        along = np.clip(side * (canvas.x - vanishing) / max(reach, 1.0), 0, 1.4)
        foot = horizon + along * (height - horizon)
        tone = rng.normal()
        if is_open:
            tall = rng.uniform(0.05, 0.35) * height
            label = VEGETATION if rng.random() < 0.7 else BUILDING
            top = foot - tall * (0.3 + along) * (1 + 0.3 * np.sin(canvas.x / rng.uniform(2, 6)))
        else:
            tall = rng.uniform(*layout.storeys) * height
            label = BUILDING
            top = foot - tall * (0.25 + along)
        depth = 1 - np.clip(along, 0, 1)
        if rng.random() > 0.1:  # otherwise a gap between houses
            canvas.paint(columns & (canvas.y <= foot) & (canvas.y >= top), label, depth, tone)
        if wall and rng.random() < 0.6:
            low = foot - 0.24 * height * (0.2 + along)
            canvas.paint(columns & (canvas.y <= foot) & (canvas.y >= low), WALL, depth, rng.normal())


def _draw_things(
    rng: Generator,
    canvas: _Canvas,
    layout: Layout,
    horizon: float,
    vanishing: float,
    offset: float,
    half_road: float,
    sidewalks: np.ndarray,
) -> None:
    """Draw trees, poles, people and cars, from far to near."""
    things: List[Tuple[float, str, int]] = []
    for side in (-1, 1):
        things += [(rng.uniform(0.15, 0.95), "tree", side) for _ in range(rng.poisson(layout.trees))]
        things += [(rng.uniform(0.2, 1.0), "pole", side) for _ in range(rng.poisson(layout.poles))]
    things += [(rng.uniform(0.2, 1.0), "person", int(rng.choice((-1, 1)))) for _ in range(rng.poisson(layout.persons))]
    things += [(rng.uniform(0.12, 0.9), "car", int(rng.choice((-1, 1)))) for _ in range(rng.poisson(layout.cars))]
    for near, kind, side in sorted(things):
        foot = horizon + near * (canvas.height - horizon)
        wide = sidewalks[0 if side < 0 else 1]
        beside = half_road + wide * rng.uniform(0.15, 0.9)
        if kind == "car":
            beside = half_road * rng.choice((rng.uniform(0.15, 0.6), rng.uniform(0.85, 1.0)))
        elif kind == "person" and rng.random() < 0.2:
            beside = half_road * rng.uniform(0.0, 1.0)
        centre = vanishing + (offset + side * beside) * near
        _THINGS[kind](rng, canvas, layout, centre, foot, near * canvas.height, 1 - near)


def _tree(rng: Generator, canvas: _Canvas, layout: Layout, x: float, foot: float, size: float, depth: float) -> None:
    tall, tone = rng.uniform(0.5, 0.9) * size, rng.normal()
    trunk = (np.abs(canvas.x - x) < 0.025 * size) & (canvas.y < foot) & (canvas.y > foot - tall)
    canvas.paint(trunk, POLE, depth, tone)
    for _ in range(rng.integers(3, 7)):
        cx, cy = x + rng.normal(0, 0.10) * size, foot - tall - rng.normal(0, 0.10) * size
        rx, ry = rng.uniform(0.10, 0.2, size=2) * size
        blob = ((canvas.x - cx) / rx) ** 2 + ((canvas.y - cy) / ry) ** 2 < 1
        canvas.paint(blob, VEGETATION, depth, tone)


def _pole(rng: Generator, canvas: _Canvas, layout: Layout, x: float, foot: float, size: float, depth: float) -> None:
    tall, thick = rng.uniform(0.5, 0.95) * size, max(0.022 * size, 1.5)
    canvas.paint(
        (np.abs(canvas.x - x) < thick) & (canvas.y < foot) & (canvas.y > foot - tall), POLE, depth, rng.normal()
    )
    if rng.random() < layout.signs:
        half, centre = rng.uniform(0.08, 0.13) * size, foot - tall * rng.uniform(0.75, 1.0)
        across, along = np.abs(canvas.x - x), np.abs(canvas.y - centre)
        shapes = (across**2 + along**2 < half**2, (across < half) & (along < half), across + along < 1.3 * half)
        canvas.paint(shapes[rng.integers(3)], SIGN, depth, rng.normal())


def _person(rng: Generator, canvas: _Canvas, layout: Layout, x: float, foot: float, size: float, depth: float) -> None:
    tall = rng.uniform(0.38, 0.50) * size
    half, tone = tall * rng.uniform(0.16, 0.24), rng.normal()
    body = (np.abs(canvas.x - x) < half) & (canvas.y < foot) & (canvas.y > foot - 0.8 * tall)
    gap = (np.abs(canvas.x - x) < 0.25 * half) & (canvas.y > foot - 0.35 * tall)
    head = (canvas.x - x) ** 2 + (canvas.y - (foot - 0.88 * tall)) ** 2 < (0.12 * tall) ** 2
    canvas.paint((body & ~gap) | head, PERSON, depth, tone)


def _car(rng: Generator, canvas: _Canvas, layout: Layout, x: float, foot: float, size: float, depth: float) -> None:
    tall = rng.uniform(0.26, 0.34) * size
    half, tone = tall * rng.uniform(0.6, 1.3), rng.normal()
    across, up = np.abs(canvas.x - x), (foot - canvas.y) / tall
    body = (across < half) & (up > 0.1) & (up < 0.6)
    cabin = (across < half * (0.85 - 0.5 * (up - 0.6))) & (up >= 0.55) & (up < 1.0)
    wheels = (np.abs(across - 0.7 * half) < 0.14 * tall) & (up > 0) & (up < 0.2)
    canvas.paint(body | cabin | wheels, CAR, depth, tone)


_THINGS = {"tree": _tree, "pole": _pole, "person": _person, "car": _car}


# ---------------------------------------------------------------------------------------------------------- appearance

_GAME_PALETTE: Dict[int, Tuple[float, float, float]] = {
    ROAD: (0.33, 0.33, 0.36),
    SIDEWALK: (0.62, 0.60, 0.56),
    BUILDING: (0.66, 0.55, 0.44),
    WALL: (0.55, 0.50, 0.47),
    VEGETATION: (0.30, 0.52, 0.22),
    SKY: (0.50, 0.72, 0.95),
    POLE: (0.42, 0.42, 0.42),
    SIGN: (0.85, 0.75, 0.15),
    PERSON: (0.75, 0.45, 0.35),
    CAR: (0.62, 0.16, 0.16),
}
_PHOTO_PALETTE: Dict[int, Tuple[float, float, float]] = {
    ROAD: (0.38, 0.38, 0.39),
    SIDEWALK: (0.57, 0.55, 0.52),
    BUILDING: (0.58, 0.51, 0.44),
    WALL: (0.52, 0.48, 0.45),
    VEGETATION: (0.29, 0.44, 0.22),
    SKY: (0.65, 0.77, 0.89),
    POLE: (0.39, 0.40, 0.40),
    SIGN: (0.70, 0.63, 0.30),
    PERSON: (0.55, 0.39, 0.35),
    CAR: (0.50, 0.28, 0.29),
}
# How much an object's own colour varies around its class's.
_SPREAD = {BUILDING: 0.14, CAR: 0.22, PERSON: 0.18, SIGN: 0.22, SKY: 0.04, ROAD: 0.04, VEGETATION: 0.06}


def _coloured(labels: np.ndarray, tone: np.ndarray, palette: Dict[int, Tuple[float, ...]], spread: float) -> np.ndarray:
    image = np.array([palette[label] for label in range(len(CLASSES))], dtype=np.float32)[labels]
    amount = np.array([_SPREAD.get(label, 0.08) for label in range(len(CLASSES))], dtype=np.float32)[labels]
    # One tone per object, turned into a shift of lightness and a smaller one of hue.
    shift = np.stack([tone, 0.8 * tone + 0.3 * np.sin(3 * tone), 0.7 * tone + 0.5 * np.cos(5 * tone)], axis=-1)
    return image + spread * amount[..., None] * np.clip(shift, -2, 2)


def _render_game(rng: Generator, labels: np.ndarray, depth: np.ndarray, tone: np.ndarray) -> np.ndarray:
    image = _coloured(labels, tone, _GAME_PALETTE, 0.8)
    image *= (1.08 - 0.16 * depth)[..., None]
    image += 0.01 * rng.standard_normal(image.shape)
    return image * rng.uniform(0.9, 1.1)


def _render_photo(rng: Generator, labels: np.ndarray, depth: np.ndarray, tone: np.ndarray) -> np.ndarray:
    image = _coloured(labels, tone, _PHOTO_PALETTE, 1.0)
    image *= 1 + _texture(rng, labels, depth)[..., None]
    # Light: its colour, shade on one side, a road that is brighter or darker (dry, wet).
    image *= np.array([1.0, 1.0, 1.0]) + rng.normal(0, 0.06) * np.array([1.0, 0.1, -1.0])
    across = np.linspace(-1, 1, labels.shape[1])[None, :, None]
    image *= 1 + rng.uniform(-0.25, 0.25) * across
    image[labels == ROAD] *= rng.uniform(0.75, 1.25)
    weather = rng.choice(("clear", "overcast", "fog", "dusk"), p=(0.35, 0.35, 0.15, 0.15))
    if weather == "fog":
        veil = (1 - np.exp(-rng.uniform(1.0, 2.5) * depth**2))[..., None]
        image = image * (1 - veil) + 0.72 * veil
    elif weather == "dusk":
        image = image * rng.uniform(0.5, 0.7) * np.array([0.95, 0.95, 1.1])
    elif weather == "clear":
        image[labels == SKY] = image[labels == SKY] * np.array([0.75, 0.9, 1.08])
        image = 0.5 + (image - 0.5) * 1.25
    height, width = labels.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    image = image * (1 - rng.uniform(0.05, 0.25) * (x**2 + y**2) / 2)[..., None]
    image = ndimage.gaussian_filter(image, sigma=(rng.uniform(0.3, 1.1),) * 2 + (0,))
    image = image + rng.uniform(0.01, 0.04) * rng.standard_normal(image.shape)
    return np.clip(image, 0, 1) ** rng.uniform(0.8, 1.25)


def _texture(rng: Generator, labels: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return relative lightness: leaves, windows, paving, asphalt."""
    height, width = labels.shape
    texture = np.zeros((height, width), dtype=np.float32)
    noises = {size: _noise(rng, height, width, size) for size in (2, 5, 14)}
    texture += 0.04 * noises[14]
    texture += np.where(labels == VEGETATION, 0.25 * noises[2] + 0.2 * noises[5], 0)
    texture += np.where(labels == ROAD, 0.06 * noises[2] + 0.05 * noises[14], 0)
    y, x = np.mgrid[0:height, 0:width]
    scale = rng.uniform(6, 11)
    windows = ((x % scale) > 0.45 * scale) & ((y % (0.9 * scale)) > 0.4 * scale)
    texture += np.where((labels == BUILDING) & windows, rng.uniform(-0.35, -0.1), 0)
    texture += np.where((labels == SIDEWALK) & ((x + 2 * y) % rng.integers(7, 12) < 1), -0.2, 0)
    texture += np.where(np.isin(labels, (CAR, PERSON, SIGN, WALL)), 0.15 * noises[5], 0)
    texture += np.where(labels == SKY, 0.04 * noises[14], 0)
    return texture


def _noise(rng: Generator, height: int, width: int, size: int) -> np.ndarray:
    """Return smooth noise of standard deviation 1 with spots of about ``size`` pixels."""
    coarse = rng.standard_normal((height // size + 3, width // size + 3))
    smooth = ndimage.zoom(coarse, size, order=1)[:height, :width]
    return (smooth / (smooth.std() + 1e-6)).astype(np.float32)


def _finish(image: np.ndarray, labels: np.ndarray, resolution: Resolution) -> Frame:
    height, width, scale = resolution
    image = np.clip(image, 0, 1).reshape(height, scale, width, scale, 3).mean(axis=(1, 3))
    return Frame(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32), labels[::scale, ::scale].copy())
