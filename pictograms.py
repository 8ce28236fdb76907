"""Pictograms: a small drawn stand-in for CIFAR-10, made offline and from a seed alone.

Every class has one flat drawing in unit coordinates (x to the right, y down, the frame is
[0, 1] x [0, 1]).  Colour, background, size and place vary from image to image.
"""

import colorsys
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Points = Sequence[tuple[float, float]] | np.ndarray

SUPERSAMPLING = 4

BLACK, WHITE, INK, SILVER = (0, 0, 0), (255, 255, 255), (38, 38, 46), (206, 210, 216)
GLASS, SEA, YELLOW, BEAK = (200, 232, 248), (52, 126, 190), (255, 206, 72), (250, 160, 40)
PINK, TONGUE, BARK = (246, 160, 164), (232, 84, 96), (70, 36, 20)
RED, BLUE, TEAL, PURPLE = (214, 56, 56), (48, 100, 196), (22, 142, 142), (128, 78, 176)
ORANGE, GRAY, SLATE, SAND = (236, 130, 48), (134, 138, 148), (92, 108, 132), (214, 172, 112)
BROWN, TAN, CHESTNUT = (150, 96, 56), (200, 146, 90), (164, 78, 44)
GREEN, EMERALD, LIME = (74, 164, 62), (44, 146, 84), (118, 176, 44)


def mix(color: Color, other: Color, amount: float) -> Color:
    """`color` moved towards `other`: 0 leaves it alone, 1 replaces it."""
    return tuple(round(a + amount * (b - a)) for a, b in zip(color, other, strict=True))


def dark(color: Color, amount: float = 0.3) -> Color:
    return mix(color, BLACK, amount)


def light(color: Color, amount: float = 0.5) -> Color:
    return mix(color, WHITE, amount)


def arc(x: float, y: float, rx: float, ry: float, start: float, stop: float) -> np.ndarray:
    """Points (32, 2) on an ellipse about (x, y), clockwise from the right, angles in degrees."""
    angle = np.radians(np.linspace(start, stop, 32))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def smooth(points: Points) -> np.ndarray:
    """Closed Catmull-Rom curve (8 n, 2) through the corners `points` (n, 2)."""
    b = np.asarray(points, dtype=float)
    a, c, d = np.roll(b, 1, axis=0), np.roll(b, -1, axis=0), np.roll(b, -2, axis=0)
    t = np.arange(8)[None, :, None] / 8
    a, b, c, d = (p[:, None] for p in (a, b, c, d))
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return curve.reshape(-1, 2)


class Canvas:
    """Draws shapes given in unit coordinates; `twin` adds a shape's reflection in x = 0.5."""

    def __init__(self, size: int, background: Color, scale: float, center: np.ndarray):
        """The drawing is scaled about its middle, which lands on `center` (2,)."""
        self.pixels, self.scale, self.center = size * SUPERSAMPLING, scale, center
        self.pose = scale * np.eye(2)
        self.image = Image.new("RGB", (self.pixels, self.pixels), background)
        self.pen = ImageDraw.Draw(self.image)

    def turn(self, degrees: float) -> None:
        """Turn all that follows clockwise about the middle of the drawing."""
        cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        self.pose = self.pose @ np.array([[cos, -sin], [sin, cos]])

    def _place(self, points: Points, twin: bool) -> Iterator[list[tuple[float, float]]]:
        """The shape in pixels, then its twin if there is one."""
        offsets = np.asarray(points, dtype=float) - 0.5
        for side in (1, -1) if twin else (1,):
            placed = (offsets * (side, 1)) @ self.pose.T + self.center
            yield [tuple(point) for point in (placed * self.pixels).tolist()]

    def polygon(self, points: Points, fill: Color, twin: bool = False) -> None:
        for corners in self._place(points, twin):
            self.pen.polygon(corners, fill)

    def blob(self, points: Points, fill: Color, twin: bool = False) -> None:
        self.polygon(smooth(points), fill, twin)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Color) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Color, twin=False) -> None:
        self.polygon(arc(x, y, rx, ry, 0, 360), fill, twin)

    def disc(self, x: float, y: float, radius: float, fill: Color, twin: bool = False) -> None:
        self.ellipse(x, y, radius, radius, fill, twin)

    def stroke(self, points: Points, width: float, fill: Color, twin: bool = False) -> None:
        """A line with round ends and joints."""
        thick = width * self.scale * self.pixels
        r = thick / 2
        for path in self._place(points, twin):
            self.pen.line(path, fill, round(thick), joint="curve")
            for x, y in (path[0], path[-1]):
                self.pen.ellipse((x - r, y - r, x + r, y + r), fill)


def draw_airplane(c: Canvas, color: Color) -> None:
    """From above, flying towards a corner."""
    c.turn(45)
    c.polygon([(0.50, 0.32), (0.98, 0.56), (0.98, 0.67), (0.50, 0.57)], dark(color), twin=True)
    c.polygon([(0.50, 0.78), (0.74, 0.91), (0.74, 0.99), (0.50, 0.93)], dark(color), twin=True)
    c.stroke([(0.70, 0.39), (0.70, 0.48)], 0.08, dark(color, 0.5), twin=True)
    c.blob([(0.50, -0.07), (0.58, 0.06), (0.58, 0.60), (0.52, 1.02),
            (0.48, 1.02), (0.42, 0.60), (0.42, 0.06)], color)
    c.ellipse(0.50, 0.07, 0.05, 0.06, GLASS)


def draw_automobile(c: Canvas, color: Color) -> None:
    c.blob([(0.12, 0.60), (0.28, 0.26), (0.49, 0.19), (0.68, 0.26), (0.88, 0.60)], color)
    c.polygon([(0.24, 0.48), (0.33, 0.30), (0.46, 0.27), (0.46, 0.48)], GLASS)
    c.polygon([(0.53, 0.48), (0.53, 0.27), (0.65, 0.30), (0.76, 0.48)], GLASS)
    c.stroke([(0.14, 0.62), (0.86, 0.62)], 0.26, color)
    c.disc(0.92, 0.60, 0.05, YELLOW)
    wheels(c, 0.14, 0.26, 0.75)


def draw_bird(c: Canvas, color: Color) -> None:
    c.stroke([(0.42, 0.72), (0.42, 0.93), (0.50, 0.93)], 0.045, BEAK)
    c.stroke([(0.56, 0.72), (0.56, 0.93), (0.64, 0.93)], 0.045, BEAK)
    c.polygon([(0.80, 0.20), (1.00, 0.31), (0.80, 0.38)], BEAK)
    c.polygon([(0.30, 0.46), (0.00, 0.30), (0.04, 0.50), (0.24, 0.66)], dark(color))
    c.blob([(0.54, 0.16), (0.70, 0.08), (0.84, 0.16), (0.86, 0.32), (0.80, 0.58),
            (0.60, 0.79), (0.36, 0.76), (0.16, 0.50), (0.42, 0.40)], color)
    c.blob([(0.83, 0.40), (0.78, 0.60), (0.60, 0.76), (0.44, 0.76), (0.64, 0.62)], light(color))
    c.blob([(0.60, 0.40), (0.62, 0.56), (0.44, 0.64), (0.14, 0.62), (0.34, 0.46)], dark(color))
    c.disc(0.72, 0.24, 0.045, INK)


def draw_cat(c: Canvas, color: Color) -> None:
    c.polygon([(0.10, 0.04), (0.08, 0.56), (0.48, 0.28)], color, twin=True)
    c.polygon([(0.16, 0.16), (0.16, 0.40), (0.33, 0.28)], PINK, twin=True)
    c.ellipse(0.50, 0.60, 0.43, 0.34, color)
    c.stroke([(0.50, 0.28), (0.50, 0.40)], 0.055, dark(color))
    c.stroke([(0.40, 0.30), (0.41, 0.38)], 0.05, dark(color), twin=True)
    c.ellipse(0.50, 0.76, 0.20, 0.14, light(color, 0.7))
    c.ellipse(0.30, 0.54, 0.09, 0.10, YELLOW, twin=True)
    c.ellipse(0.30, 0.54, 0.035, 0.09, INK, twin=True)
    c.polygon([(0.43, 0.66), (0.57, 0.66), (0.50, 0.74)], TONGUE)
    c.stroke(arc(0.43, 0.76, 0.07, 0.07, 0, 150), 0.03, INK, twin=True)
    c.stroke([(0.24, 0.70), (0.00, 0.64)], 0.03, INK, twin=True)
    c.stroke([(0.24, 0.78), (0.01, 0.82)], 0.03, INK, twin=True)


def draw_deer(c: Canvas, color: Color) -> None:
    antler = mix(color, BARK, 0.7)
    c.stroke([(0.42, 0.46), (0.28, 0.32), (0.20, 0.18), (0.22, 0.03)], 0.065, antler, twin=True)
    c.stroke([(0.24, 0.26), (0.08, 0.22), (0.03, 0.08)], 0.06, antler, twin=True)
    c.stroke([(0.31, 0.35), (0.37, 0.20), (0.37, 0.08)], 0.06, antler, twin=True)
    c.blob([(0.36, 0.52), (0.20, 0.42), (0.04, 0.44), (0.14, 0.58)], dark(color, 0.2), twin=True)
    c.blob([(0.50, 0.39), (0.70, 0.46), (0.72, 0.60), (0.63, 0.80), (0.60, 0.95), (0.50, 0.99),
            (0.40, 0.95), (0.37, 0.80), (0.28, 0.60), (0.30, 0.46)], color)
    c.ellipse(0.50, 0.89, 0.11, 0.09, light(color, 0.65))
    c.ellipse(0.50, 0.85, 0.075, 0.05, INK)
    c.disc(0.37, 0.60, 0.05, INK, twin=True)


def draw_dog(c: Canvas, color: Color) -> None:
    c.blob([(0.50, 0.10), (0.76, 0.18), (0.84, 0.46), (0.76, 0.74), (0.50, 0.86),
            (0.24, 0.74), (0.16, 0.46), (0.24, 0.18)], color)
    c.blob([(0.36, 0.12), (0.16, 0.14), (0.03, 0.40), (0.05, 0.70), (0.16, 0.74),
            (0.24, 0.50)], mix(color, BARK, 0.6), twin=True)
    c.stroke([(0.50, 0.80), (0.50, 0.91)], 0.16, TONGUE)
    c.ellipse(0.41, 0.69, 0.15, 0.13, light(color, 0.75), twin=True)
    c.ellipse(0.50, 0.58, 0.12, 0.16, light(color, 0.75))
    c.ellipse(0.50, 0.56, 0.11, 0.08, INK)
    c.stroke([(0.50, 0.60), (0.50, 0.74)], 0.03, INK)
    c.stroke(arc(0.41, 0.71, 0.09, 0.08, 0, 150), 0.03, INK, twin=True)
    c.disc(0.35, 0.38, 0.055, INK, twin=True)


def draw_frog(c: Canvas, color: Color) -> None:
    c.ellipse(0.18, 0.78, 0.15, 0.18, dark(color, 0.2), twin=True)
    c.ellipse(0.22, 0.93, 0.20, 0.05, dark(color), twin=True)
    c.ellipse(0.50, 0.74, 0.28, 0.23, color)
    c.ellipse(0.50, 0.80, 0.19, 0.16, light(color, 0.65))
    c.disc(0.24, 0.20, 0.17, color, twin=True)
    c.ellipse(0.50, 0.43, 0.43, 0.25, color)
    c.disc(0.24, 0.19, 0.115, WHITE, twin=True)
    c.disc(0.25, 0.20, 0.06, INK, twin=True)
    c.stroke(arc(0.50, 0.40, 0.31, 0.17, 10, 170), 0.045, dark(color, 0.65))
    c.disc(0.45, 0.38, 0.02, dark(color, 0.65), twin=True)


def draw_horse(c: Canvas, color: Color) -> None:
    """Head in profile; the neck runs out of the frame."""
    mane = mix(color, BARK, 0.8)
    for x, y in ((0.37, 0.20), (0.27, 0.38), (0.19, 0.58), (0.15, 0.80), (0.13, 1.04)):
        c.disc(x, y, 0.15, mane)
    c.blob([(0.46, 0.12), (0.60, 0.14), (0.73, 0.30), (0.93, 0.52), (0.96, 0.64), (0.87, 0.73),
            (0.74, 0.71), (0.61, 0.68), (0.60, 0.82), (0.70, 1.30), (0.20, 1.30), (0.22, 0.66),
            (0.33, 0.28)], color)
    c.blob([(0.85, 0.46), (0.97, 0.58), (0.95, 0.70), (0.84, 0.74), (0.77, 0.62)], light(color))
    c.polygon([(0.35, 0.24), (0.39, -0.03), (0.54, 0.17)], color)
    c.blob([(0.49, 0.08), (0.61, 0.12), (0.65, 0.25), (0.53, 0.20)], mane)
    c.disc(0.63, 0.36, 0.05, INK)
    c.disc(0.90, 0.58, 0.028, INK)


def draw_ship(c: Canvas, color: Color) -> None:
    c.stroke([(0.82, 0.60), (0.82, 0.14)], 0.035, INK)
    c.polygon([(0.82, 0.14), (1.00, 0.22), (0.82, 0.31)], YELLOW)
    c.box(0.30, 0.12, 0.43, 0.40, color)
    c.box(0.30, 0.12, 0.43, 0.19, INK)
    c.box(0.20, 0.36, 0.68, 0.62, WHITE)
    for x in (0.30, 0.44, 0.58):
        c.disc(x, 0.47, 0.045, dark(SEA))
    c.polygon([(0.02, 0.58), (1.00, 0.54), (0.86, 0.90), (0.14, 0.90)], color)
    c.box(-0.50, 0.82, 1.50, 1.50, SEA)
    for x in np.arange(-0.4, 1.5, 0.2):
        c.ellipse(x, 0.82, 0.11, 0.045, SEA)


def draw_truck(c: Canvas, color: Color) -> None:
    c.box(0.02, 0.66, 0.98, 0.76, INK)
    c.box(0.01, 0.14, 0.63, 0.68, color)
    c.polygon([(0.67, 0.30), (0.86, 0.30), (0.99, 0.50), (0.99, 0.72), (0.67, 0.72)], dark(color))
    c.polygon([(0.73, 0.36), (0.84, 0.36), (0.92, 0.50), (0.73, 0.50)], GLASS)
    wheels(c, 0.11, 0.19, 0.46, 0.82)


def wheels(c: Canvas, radius: float, *places: float) -> None:
    for x in places:
        c.disc(x, 0.76, radius, INK)
        c.disc(x, 0.76, 0.45 * radius, SILVER)


PICTOGRAMS = (
    (draw_airplane, (RED, BLUE, SLATE, TEAL)),
    (draw_automobile, (RED, BLUE, TEAL, PURPLE)),
    (draw_bird, (RED, BLUE, TEAL, PURPLE)),
    (draw_cat, (ORANGE, GRAY, SAND)),
    (draw_deer, (BROWN, TAN, CHESTNUT)),
    (draw_dog, (BROWN, TAN, SAND)),
    (draw_frog, (GREEN, EMERALD, LIME)),
    (draw_horse, (BROWN, CHESTNUT, GRAY)),
    (draw_ship, (RED, SLATE, TEAL, ORANGE)),
    (draw_truck, (RED, BLUE, ORANGE, TEAL)),
)


def draw_pictogram(
    class_index: int, image_size: int, generator: np.random.Generator
) -> Image.Image:
    """One RGB picture, `image_size` pixels square, of a class in CIFAR-10 order."""
    draw, colors = PICTOGRAMS[class_index]
    color = light(colors[generator.integers(len(colors))], generator.uniform(0.0, 0.15))
    hue, saturation, value = generator.uniform((0.0, 0.08, 0.92), (1.0, 0.22, 0.99))
    background = tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value))
    scale = generator.uniform(0.8, 1.0)
    center = generator.uniform(0.47, 0.53, size=2)

    canvas = Canvas(image_size, background, scale, center)
    draw(canvas, color)
    return canvas.image.resize((image_size, image_size), Image.Resampling.BOX)


def pictogram_dataset(
    images_per_class: int, image_size: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, S, S) in uint8 and labels (N,) in int64, the classes taking turns.

    Image i depends on (seed, i) alone, so a larger set starts with the smaller one.
    """
    labels = np.arange(images_per_class * len(PICTOGRAMS), dtype=np.int64) % len(PICTOGRAMS)
    images = np.empty((len(labels), 3, image_size, image_size), dtype=np.uint8)
    for i, label in enumerate(labels):
        picture = draw_pictogram(label, image_size, np.random.default_rng((seed, i)))
        images[i] = np.asarray(picture).transpose(2, 0, 1)
    return images, labels
