"""Draws scenes of coloured shapes and written numbers, and asks questions whose answers it knows.

Everything is a function of a `random.Random`, so a seed and an index fix a scene. Held-out scenes differ from training
scenes in three ways: other seeds, numbers that training never writes (`is_held_out_number`), and, for the rows named
`unseen phrasing`, questions that training never asks.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

Levels = tuple[int, int, int]  # red, green, blue
COLORS: Mapping[str, Levels] = {
    "red": (216, 36, 36),
    "green": (36, 156, 60),
    "blue": (44, 84, 220),
    "yellow": (242, 214, 40),
    "orange": (244, 134, 24),
    "purple": (132, 48, 172),
    "pink": (250, 146, 194),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star")
MAX_SHAPES = 5

Question = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A shape or one digit. Centre and radius are fractions of the picture's width and height."""

    kind: str  # a name in SHAPES, or a digit
    color: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Palette:
    """What a scene is drawn with, and asked about."""

    colors: Mapping[str, Levels]
    shapes: tuple[str, ...]


TRAINED = Palette(colors=COLORS, shapes=SHAPES)
NEW_COLOR, NEW_SHAPE = "cyan", "cross"  # which the embedded model never saw, nor read: fine-tuning teaches them
EXTENDED = Palette(colors={**COLORS, NEW_COLOR: (28, 196, 204)}, shapes=(*SHAPES, NEW_SHAPE))


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A drawn picture and what is on it, sorted from left to right. `number` is empty where shapes are drawn."""

    image: Image.Image
    things: tuple[Thing, ...]
    number: str = ""
    palette: Palette = TRAINED


def is_held_out_number(number: str) -> bool:
    """Half of the numbers that end in 3 are never written in training; every digit is still seen in every place."""
    return number.endswith("3") and zlib.crc32(number.encode()) % 2 == 0


def draw_scene(
    rng: random.Random,
    *,
    held_out: bool = False,
    number: bool | None = None,
    side_px: int = 0,
    palette: Palette = TRAINED,
) -> Scene:
    """A scene of 1 to 5 shapes or a number of 1 to 3 digits; 48 to 256 px a side, or with `side_px` at that longest."""
    if side_px:
        width = height = side_px
    else:
        width = height = rng.choice((64, 80, 96, 128, 160, 192, 224, 256))
    if rng.random() < 0.35:
        short = max(48, int(width * rng.uniform(0.6, 1.0)))
        width, height = (width, short) if rng.random() < 0.5 else (short, height)
    dark = rng.random() < 0.35
    if dark:
        ground = tuple(rng.randint(10, 56) for _ in range(3))
    else:
        tint = rng.randint(214, 255)
        ground = tuple(min(255, max(0, tint + rng.randint(-12, 12))) for _ in range(3))
    # Small pictures are drawn at twice their size and halved: their edges are then soft, as in a scaled-down
    # photograph.
    soft = max(width, height) <= 160 and rng.random() < 0.5
    scale = 2 if soft else 1
    image = Image.new("RGB", (width * scale, height * scale), ground)
    colors = {name: level for name, level in palette.colors.items() if not (dark and name == "black")}
    if rng.random() < 0.25 if number is None else number:
        things, text = _draw_number(image, colors, rng, held_out)
    else:
        things, text = _draw_shapes(image, colors, palette.shapes, rng), ""
    if soft:
        image = image.resize((width, height), Image.Resampling.BOX)
    things.sort(key=lambda thing: thing.x)
    return Scene(image=image, things=tuple(things), number=text, palette=palette)


def _paint(color: Levels, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, level + rng.randint(-14, 14))) for level in color)


def _draw_shapes(
    image: Image.Image, colors: Mapping[str, Levels], shapes: tuple[str, ...], rng: random.Random
) -> list[Thing]:
    width, height = image.size
    short = min(width, height)
    placed: list[tuple[float, float, float]] = []
    things: list[Thing] = []
    draw = ImageDraw.Draw(image)
    for _ in range(rng.choices(range(1, MAX_SHAPES + 1), (18, 24, 24, 24, 10))[0]):
        for _attempt in range(60):
            radius = short * rng.uniform(0.105, 0.23)
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            if all(math.hypot(x - px, y - py) > (radius + pr) * 1.08 for px, py, pr in placed):
                break
        else:
            continue
        placed.append((x, y, radius))
        kind, color = rng.choice(shapes), rng.choice(list(colors))
        if things and rng.random() < 0.3:  # repeats make counting by colour or shape a real question
            kind, color = rng.choice(((things[-1].kind, color), (kind, things[-1].color)))
        _draw_shape(draw, kind, x, y, radius, _paint(colors[color], rng), rng)
        things.append(Thing(kind=kind, color=color, x=x / width, y=y / height))
    return things


# How often the outline is repeated around the middle, from which angle on, and its points: degrees and share of radius.
_OUTLINES: Mapping[str, tuple[int, float, tuple[tuple[float, float], ...]]] = {
    "square": (4, 45.0, ((0.0, 1.0),)),
    "triangle": (3, -90.0, ((0.0, 1.0),)),
    "star": (5, -90.0, ((0.0, 1.0), (36.0, 0.42))),
    "cross": (4, 0.0, ((-18.4, 1.0), (18.4, 1.0), (45.0, 0.446))),
}


def _draw_shape(
    draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, fill: tuple[int, ...], rng: random.Random
) -> None:
    if kind == "circle":
        radius *= 0.92
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    corners, turn, outline = _OUTLINES[kind]
    turn += rng.uniform(-14, 14)
    points = []
    for corner in range(corners):
        for degrees, share in outline:
            angle = math.radians(turn + 360 * corner / corners + degrees)
            points.append((x + radius * share * math.cos(angle), y + radius * share * math.sin(angle)))
    draw.polygon(points, fill=fill)


@lru_cache(maxsize=512)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _draw_number(
    image: Image.Image, colors: Mapping[str, Levels], rng: random.Random, held_out: bool
) -> tuple[list[Thing], str]:
    while True:
        text = str(rng.randint(0, 10 ** rng.randint(1, 3) - 1))
        if is_held_out_number(text) == held_out:
            break
    width, height = image.size
    font = _font(int(rng.uniform(0.34, 0.62) * height))
    while font.getlength(text) > 0.92 * width:
        font = _font(int(font.size * 0.9))
    left, top, right, bottom = font.getbbox(text)
    x = rng.uniform(0.03 * width, 0.97 * width - (right - left)) - left
    y = rng.uniform(0.03 * height, 0.97 * height - (bottom - top)) - top
    color = rng.choice(list(colors))
    ImageDraw.Draw(image).text((x, y), text, fill=_paint(colors[color], rng), font=font)
    things = []
    for index, digit in enumerate(text):
        middle = x + font.getlength(text[:index]) + font.getlength(digit) / 2
        things.append(Thing(kind=digit, color=color, x=middle / width, y=(y + (top + bottom) / 2) / height))
    return things, text


# Each row: phrasings seen in training, then one that only the held-out `unseen phrasing` rows ask.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "color of shape": (
        "What color is the {shape}?",
        "What colour is the {shape}?",
        "Which color does the {shape} have?",
        "Tell me the color of the {shape}.",
        "Name the {shape}'s colour.",
        "What is the color of the {shape}?",
        "The {shape} is which color?",
        "In which colour is the {shape} drawn?",
        "Which colour is the {shape}?",
    ),
    "shape of color": (
        "Which shape is {color}?",
        "What shape is {color}?",
        "What is the {color} shape?",
        "Name the {color} shape.",
        "What kind of shape is the {color} one?",
        "Which {color} shape do you see?",
        "Tell me which shape is {color}.",
        "What shape has the color {color}?",
        "What is the shape that is {color}?",
    ),
    "count": (
        "How many shapes are there?",
        "How many shapes do you see?",
        "Count the shapes.",
        "How many objects are in the picture?",
        "What is the number of shapes?",
        "How many shapes are in the image?",
        "How many things are there?",
        "Tell me how many shapes there are.",
        "How many shapes does the picture show?",
    ),
    "count some": (
        "How many {some} are there?",
        "How many {some} do you see?",
        "Count the {some}.",
        "How many {some} are in the picture?",
        "What is the number of {some}?",
        "How many {some} are in the image?",
        "How many {some} can you count?",
        "Tell me how many {some} there are.",
        "How many {some} does the picture show?",
    ),
    "presence": (
        "Is there a {thing}?",
        "Is there a {thing} in the picture?",
        "Do you see a {thing}?",
        "Can you see a {thing}?",
        "Does the picture show a {thing}?",
        "Is a {thing} in the image?",
        "Is there any {thing}?",
        "Tell me if there is a {thing}.",
        "Can you see any {thing} in the picture?",
    ),
    "is position": (
        "Is the {one} {side} the {other}?",
        "Is the {one} placed {side} the {other}?",
        "Do you see the {one} {side} the {other}?",
        "Tell me if the {one} is {side} the {other}.",
        "In the picture, is the {one} {side} the {other}?",
        "Is the {one} drawn {side} the {other}?",
    ),
    "where": (
        "Where is the {one}: {choice} the {other}?",
        "Is the {one} {choice} the {other}?",
        "Tell me where the {one} is, {choice} the {other}?",
        "The {one} is {choice} the {other}?",
        "Where do you see the {one}, {choice} the {other}?",
    ),
    "number": (
        "What number is written?",
        "Which number do you see?",
        "Read the number.",
        "What number is this?",
        "What is the number in the picture?",
        "Which number is shown?",
        "Tell me the number.",
        "What is written?",
        "Read the text in the image.",
        "Which number is in the image?",
    ),
    "caption": (
        "Describe the image.",
        "Describe the picture.",
        "What do you see?",
        "What is in the picture?",
        "Caption this image.",
        "List everything in the picture.",
        "Describe what you see.",
    ),
    "whole": (
        "What is in the picture?",
        "What do you see?",
        "What is this?",
        "Which shape is it, and in which color?",
        "What is shown?",
    ),
}
SIDES = {"left of": (-1, 0), "to the left of": (-1, 0), "right of": (1, 0), "to the right of": (1, 0),
         "above": (0, -1), "below": (0, 1)}  # fmt: skip
CHOICES = {"left or right of": ("left", "right", 0), "above or below": ("above", "below", 1)}
JSON_SUFFIXES = ("Answer as JSON.", "Answer in JSON.", "Reply with JSON.", "Give JSON.")


def phrase(kind: str, rng: random.Random, unseen: bool = False, **words: str) -> str:
    """A question of that kind in one of the trained phrasings, or in the one that training never sees."""
    options = PHRASINGS[kind]
    text = options[-1] if unseen else rng.choice(options[:-1])
    return text.format(**words)


def caption(scene: Scene) -> str:
    """Everything on the picture, from left to right."""
    if scene.number:
        return f"the number {scene.number} in {scene.things[0].color}"
    listed = ", ".join(f"{thing.color} {thing.kind}" for thing in scene.things)
    count = len(scene.things)
    return f"{count} shape{'s' if count > 1 else ''}: {listed}"


def ask_color(scene: Scene, rng: random.Random, unseen: bool = False) -> Question | None:
    kinds = [thing.kind for thing in scene.things]
    single = [thing for thing in scene.things if kinds.count(thing.kind) == 1]
    if scene.number or not single:
        return None
    thing = rng.choice(single)
    name = "shape" if len(kinds) == 1 and rng.random() < 0.3 else thing.kind
    return phrase("color of shape", rng, unseen, shape=name), thing.color


def ask_shape(scene: Scene, rng: random.Random, unseen: bool = False) -> Question | None:
    colors = [thing.color for thing in scene.things]
    single = [thing for thing in scene.things if colors.count(thing.color) == 1]
    if scene.number or not single:
        return None
    thing = rng.choice(single)
    return phrase("shape of color", rng, unseen, color=thing.color), thing.kind


def ask_count(scene: Scene, rng: random.Random, unseen: bool = False) -> Question | None:
    """All shapes, those of one colour, or those of one kind; mostly of colours and kinds that are there."""
    if scene.number:
        return None
    how = rng.random()
    if how < 0.35:
        return phrase("count", rng, unseen), str(len(scene.things))
    present = rng.random() < 0.85
    if how < 0.6:
        color = rng.choice(scene.things).color if present else rng.choice(list(scene.palette.colors))
        some, count = f"{color} shapes", sum(thing.color == color for thing in scene.things)
    else:
        kind = rng.choice(scene.things).kind if present else rng.choice(scene.palette.shapes)
        plural = f"{kind}es" if kind.endswith("s") else f"{kind}s"
        some, count = plural, sum(thing.kind == kind for thing in scene.things)
    return phrase("count some", rng, unseen, some=some), str(count)


def ask_presence(scene: Scene, rng: random.Random, unseen: bool = False) -> Question | None:
    """Half yes, half no; many of the no-questions name a colour and a kind that are both there, but not together."""
    if scene.number:
        return None
    there = {(thing.color, thing.kind) for thing in scene.things}
    if rng.random() < 0.5:
        color, kind = rng.choice(sorted(there))
        answer = "yes"
    else:
        palette = scene.palette
        absent = [(color, kind) for color in palette.colors for kind in palette.shapes if (color, kind) not in there]
        near = [pair for pair in absent if pair[0] in {c for c, _ in there} or pair[1] in {k for _, k in there}]
        crossed = [pair for pair in near if pair[0] in {c for c, _ in there} and pair[1] in {k for _, k in there}]
        pool = crossed if crossed and rng.random() < 0.5 else near if rng.random() < 0.6 else absent
        color, kind = rng.choice(pool)
        answer = "no"
    if rng.random() < 0.2:  # a kind or a colour alone
        if rng.random() < 0.5:
            return phrase("presence", rng, unseen, thing=kind), "yes" if kind in {k for _, k in there} else "no"
        name = f"{color} shape"
        return phrase("presence", rng, unseen, thing=name), "yes" if color in {c for c, _ in there} else "no"
    return phrase("presence", rng, unseen, thing=f"{color} {kind}"), answer


def _pair(scene: Scene, rng: random.Random, axis: int) -> tuple[Thing, str, Thing, str] | None:
    """Two things whose names are unique and which are clearly apart on that axis."""
    kinds = [thing.kind for thing in scene.things]
    names = {}
    for thing in scene.things:
        full = f"{thing.color} {thing.kind}"
        if sum(f"{other.color} {other.kind}" == full for other in scene.things) == 1:
            names[thing] = thing.kind if kinds.count(thing.kind) == 1 and rng.random() < 0.5 else full
    pairs = [
        (one, other)
        for one in names
        for other in names
        if one is not other and abs((one.x - other.x) if axis == 0 else (one.y - other.y)) > 0.12
    ]
    if not pairs:
        return None
    one, other = rng.choice(pairs)
    return one, names[one], other, names[other]


def ask_position(scene: Scene, rng: random.Random, unseen: bool = False) -> Question | None:
    if scene.number:
        return None
    axis = rng.randrange(2)
    found = _pair(scene, rng, axis)
    if found is None:
        return None
    one, one_name, other, other_name = found
    delta = (one.x - other.x) if axis == 0 else (one.y - other.y)
    if rng.random() < 0.5:
        side = rng.choice([name for name, step in SIDES.items() if step[axis]])
        right = delta * SIDES[side][axis] > 0
        return phrase("is position", rng, unseen, one=one_name, side=side, other=other_name), "yes" if right else "no"
    choice, (low, high, _) = next(item for item in CHOICES.items() if item[1][2] == axis)
    return phrase("where", rng, unseen, one=one_name, choice=choice, other=other_name), low if delta < 0 else high


def ask_number(scene: Scene, rng: random.Random, unseen: bool = False) -> Question | None:
    if not scene.number:
        return (phrase("number", rng, unseen), "none") if rng.random() < 0.04 else None
    if not unseen and rng.random() < 0.12:
        return rng.choice(("What color is the number?", "What colour is the number?")), scene.things[0].color
    return phrase("number", rng, unseen), scene.number


def ask_json(scene: Scene, rng: random.Random, unseen: bool = False) -> Question | None:
    """A question that wants a small JSON object."""
    suffix = rng.choice(JSON_SUFFIXES)
    if scene.number:
        return f"{phrase('number', rng, unseen)} {suffix}", json.dumps({"number": int(scene.number)})
    if len(scene.things) == 1:
        thing = scene.things[0]
        return f"{phrase('whole', rng, unseen)} {suffix}", json.dumps({"color": thing.color, "shape": thing.kind})
    return f"{phrase('count', rng, unseen)} {suffix}", json.dumps({"count": len(scene.things)})


def ask_caption(scene: Scene, rng: random.Random, unseen: bool = False) -> Question:
    return phrase("caption", rng, unseen), caption(scene)


ASKERS = {
    "color": ask_color,
    "shape": ask_shape,
    "count": ask_count,
    "presence": ask_presence,
    "position": ask_position,
    "number": ask_number,
    "json": ask_json,
    "caption": ask_caption,
}
