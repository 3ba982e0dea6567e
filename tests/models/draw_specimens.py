"""Makes the pictures of models/specimens: six photographs, brought to size, and four that are drawn here.

pip download --no-deps scikit-image==0.26.0 && unzip scikit_image-0.26.0-*.whl 'skimage/data/*'
python tests/models/draw_specimens.py skimage/data
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

SPECIMENS = Path(__file__).resolve().parents[2] / "models" / "specimens"
# Of scikit-image's own samples only those whose photographer gave them away: models/specimens/README.md has the words.
PHOTOGRAPHS = {
    "cat.jpg": "chelsea.png",
    "coffee.jpg": "coffee.png",
    "photographer.jpg": "camera.png",
    "rocket.jpg": "rocket.jpg",
    "galaxies.jpg": "hubble_deep_field.jpg",
    "writing.png": "text.png",
}
RECEIPT = (
    ("CORNER BAKERY", ""), ("12 Mill Lane", ""), ("", ""), ("2 Rye bread", "7.80"), ("1 Apple cake", "4.50"),
    ("3 Rolls", "2.70"), ("1 Coffee", "3.20"), ("1 Orange juice", "3.90"), ("6 Eggs", "3.40"), ("1 Butter", "2.95"),
    ("", ""), ("Sum", "28.45"), ("Discount", "-2.45"), ("TOTAL", "26.00"), ("", ""), ("Cash", "30.00"),
    ("Change", "4.00"), ("", ""), ("Thank you!", ""),
)  # fmt: skip
LETTER = (
    "14 March 1962", "", "Dear Mr Holm,", "", "the three clocks that you sent us have arrived.",
    "Two of them keep time; the third, the small one", "from the harbour office, stops every night at",
    "ten past four. Our workshop will need a week", "to find out why. The repair costs 45 crowns.", "",
    "Yours sincerely,", "Ada Berg",
)  # fmt: skip
SALES = (("Jan", 34), ("Feb", 28), ("Mar", 47), ("Apr", 61), ("May", 52), ("Jun", 39))


def font(size: int) -> ImageFont.FreeTypeFont:
    loaded = ImageFont.load_default(size)  # the face that Pillow carries: the same everywhere
    assert isinstance(loaded, ImageFont.FreeTypeFont)
    return loaded


def receipt() -> Image.Image:
    """A strip of paper, three times as tall as wide, in black and white."""
    image = Image.new("L", (360, 1080), 255)
    draw = ImageDraw.Draw(image)
    for row, (left, right) in enumerate(RECEIPT):
        place = 40 + row * 53
        draw.text((30, place), left, 20, font(30))
        draw.text((330, place), right, 20, font(30), anchor="ra")
    return image.convert("1")


def letter() -> Image.Image:
    """A typed page as an old scanner gives it: tilted, soft, grey and grainy."""
    image = Image.new("L", (720, 940), 238)
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(LETTER):
        draw.text((70, 90 + row * 58), line, 40, font(27))
    image = image.rotate(1.4, Image.Resampling.BICUBIC, fillcolor=225).filter(ImageFilter.GaussianBlur(0.8))
    rng = random.Random(4)
    grainy = bytes(max(0, min(255, level + rng.randint(-9, 9))) for level in image.tobytes())
    return Image.frombytes("L", image.size, grainy)


def chart() -> Image.Image:
    """Six bars with their values, in a palette of few colours."""
    image = Image.new("RGB", (640, 420), "white")
    draw = ImageDraw.Draw(image)
    draw.text((320, 16), "Bicycles sold, 2021", "black", font(26), anchor="ma")
    draw.line([(60, 370), (610, 370)], "black", 2)
    for column, (month, sold) in enumerate(SALES):
        left, top = 80 + column * 88, 370 - sold * 4.6
        draw.rectangle([left, top, left + 58, 369], "#d9534f" if sold == 61 else "#4a7ab5")
        draw.text((left + 29, top - 26), str(sold), "black", font(20), anchor="ma")
        draw.text((left + 29, 378), month, "black", font(20), anchor="ma")
    return image.quantize(32)


def sign() -> Image.Image:
    """A round sign on nothing: an alpha channel."""
    image = Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse([10, 10, 290, 290], (200, 30, 40, 255))
    draw.ellipse([45, 45, 255, 255], (255, 255, 255, 255))
    draw.text((150, 150), "30", (0, 0, 0, 255), font(120), anchor="mm")
    return image


def main(photographs: Path) -> None:
    for name, source in PHOTOGRAPHS.items():
        image = Image.open(photographs / source)
        image.thumbnail((640, 640), Image.Resampling.LANCZOS)
        image.save(SPECIMENS / name, quality=80, optimize=True)
    receipt().save(SPECIMENS / "receipt.png", optimize=True)
    letter().save(SPECIMENS / "letter.jpg", quality=60, optimize=True)
    chart().save(SPECIMENS / "chart.png", optimize=True)
    sign().save(SPECIMENS / "sign.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
