"""Drawings of the book: SVG made here, inline in the page, so that their lines and words take the page's colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.display import HTML

BLUE, RED, GREEN, AMBER = "#4477aa", "#ee6677", "#228833", "#ccaa22"


class Drawing:
    """Boxes, arrows and words on a sheet. All lengths are in units of the sheet, which is as wide as the page."""

    def __init__(self, width: float, height: float):
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str = "",
        below: str = "",
        colour: str = BLUE,
        size: float = 15,
    ) -> None:
        """A box with its upper left corner at (x, y), words in it and smaller ones, such as a shape, below it."""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="5" fill="{colour}" '
            f'fill-opacity="0.18" stroke="{colour}" stroke-width="1.5"/>'
        )
        lines = words.split("\n") if words else []
        for i, line in enumerate(lines):
            shift = (i - (len(lines) - 1) / 2) * size * 1.2
            self.text(x + width / 2, y + height / 2 + shift + 0.35 * size, line, size)
        for i, line in enumerate(below.split("\n") if below else []):
            self.text(x + width / 2, y + height + 16 + i * 16, line, 13)

    def text(
        self, x: float, y: float, words: str, size: float = 15, anchor: str = "middle", bold: bool = False
    ) -> None:
        """Words whose base line passes through (x, y)."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def arrow(self, points: Sequence[tuple[float, float]], dashed: bool = False) -> None:
        """A line through `points` that ends in a head."""
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5 or 1.0
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        wings = [(x1 - 9 * ux + side * 4.5 * uy, y1 - 9 * uy - side * 4.5 * ux) for side in (1, -1)]
        head = f"M{x1:.1f} {y1:.1f}" + "".join(f"L{x:.1f} {y:.1f}" for x, y in wings) + "Z"
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.5"{dash}/>')
        self.parts.append(f'<path d="{head}" fill="currentColor"/>')

    def shape(self, path: str, colour: str, opacity: float = 0.18) -> None:
        """A closed path in SVG's own notation."""
        self.parts.append(
            f'<path d="{path}" fill="{colour}" fill-opacity="{opacity}" stroke="{colour}" stroke-width="1.5"/>'
        )

    def cells(self, x: float, y: float, columns: int, rows: int, side: float, coloured: Iterable[int] = ()) -> None:
        """A grid of squares; those in `coloured`, counted row by row, are filled."""
        filled = set(coloured)
        for k in range(columns * rows):
            opacity = 0.75 if k in filled else 0.12
            left, top = x + side * (k % columns), y + side * (k // columns)
            self.parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}" fill="{BLUE}" '
                f'fill-opacity="{opacity}" stroke="{BLUE}"/>'
            )

    def show(self, alt: str, caption: str) -> HTML:
        """The drawing for a cell of a notebook: `alt` says what is seen, `caption` what to conclude."""
        from IPython.display import HTML

        return HTML(
            '<figure style="margin:1em 0;overflow-x:auto">'
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(alt, quote=True)}" '
            'style="width:100%;min-width:540px;max-width:760px;font-family:inherit" fill="currentColor">'
            f"{''.join(self.parts)}</svg><figcaption>{caption}</figcaption></figure>"
        )


def vision_transformer(size: int, patch: int, width: int, depth: int) -> HTML:
    """How an image passes through a Vision Transformer, with the shapes of an encoder."""
    g = size // patch
    N = g * g
    d = Drawing(760, 330)
    d.cells(20, 40, 4, 4, 26, coloured=[6])
    d.text(72, 30, "image, cut up")
    d.text(72, 164, f"3 × {size} × {size}", 13)
    d.text(72, 180, f"{g} × {g} patches", 13)
    d.arrow([(130, 92), (168, 92)])
    d.cells(176, 46, 1, 7, 13, coloured=[3])
    d.text(182, 30, "vectors")
    d.text(184, 164, f"{N} × {3 * patch**2}", 13)
    d.arrow([(196, 92), (226, 92)])
    d.box(230, 62, 84, 60, "linear\nlayer")
    d.arrow([(314, 92), (344, 92)])
    d.cells(350, 46, 2, 7, 13, coloured=[6, 7])
    d.text(363, 30, "tokens")
    d.text(364, 164, f"{N} × {width}", 13)
    d.arrow([(378, 92), (408, 92)])
    d.box(412, 40, 150, 46, "+ class token", colour=AMBER)
    d.box(412, 96, 150, 46, "+ positions", colour=AMBER)
    d.text(487, 164, f"{N + 1} × {width}", 13)
    d.arrow([(564, 92), (596, 92)])
    d.box(600, 34, 140, 116, f"block\nblock\n… {depth} of them\nblock", colour=RED)
    d.text(670, 168, f"{N + 1} × {width}", 13)
    d.arrow([(670, 176), (670, 214)])
    d.box(560, 218, 180, 46, "class token", "one vector for the image", colour=AMBER)
    d.arrow([(670, 196), (470, 196), (470, 214)])
    d.box(330, 218, 200, 46, "patch tokens, on their grid", f"{width} × {g} × {g}", size=14)
    d.arrow([(330, 241), (250, 241)])
    d.box(60, 218, 186, 46, "compare or rebuild", "anomaly map", colour=GREEN)
    alt = (
        f"An image of {size} by {size} pixels is cut into {N} patches. A linear layer makes of each a token of "
        f"{width} numbers. The class token and the positions are added, {depth} blocks follow. The patch tokens go "
        f"back on a grid of {g} by {g} and become an anomaly map."
    )
    return d.show(
        alt, "A Vision Transformer. An image becomes a list of tokens, and the list keeps its length to the end."
    )


def block() -> HTML:
    """One block of a Vision Transformer."""
    d = Drawing(760, 200)
    d.text(30, 96, "Z", 18)
    x = 48.0
    d.arrow([(x, 90), (80, 90)])
    d.box(82, 65, 74, 50, "norm")
    d.arrow([(156, 90), (184, 90)])
    d.box(186, 65, 108, 50, "attention", colour=RED)
    d.arrow([(294, 90), (330, 90)])
    d.text(346, 97, "+", 22)
    d.arrow([(62, 90), (62, 30), (346, 30), (346, 76)])
    d.text(204, 22, "the token itself goes on", 13)
    d.arrow([(360, 90), (412, 90)])
    d.text(386, 82, "Z′", 15)
    d.box(414, 65, 74, 50, "norm")
    d.arrow([(488, 90), (516, 90)])
    d.box(518, 65, 108, 50, "MLP", colour=GREEN)
    d.arrow([(626, 90), (660, 90)])
    d.text(676, 97, "+", 22)
    d.arrow([(394, 96), (394, 150), (676, 150), (676, 106)])
    d.arrow([(690, 90), (728, 90)])
    d.text(744, 96, "Z", 18)
    d.text(240, 138, "mixes tokens", 13)
    d.text(572, 138, "works on each token alone", 13)
    alt = (
        "Tokens pass through a norm and attention, and are added to themselves; then through a norm and an MLP, and "
        "are added again."
    )
    return d.show(
        alt, "One block. Only attention lets a token see the others. The two sums keep what was there before."
    )


def autoencoder(pixels: int, bottleneck: int) -> HTML:
    """An image through a narrow passage and back, and the difference."""
    d = Drawing(760, 230)
    d.cells(20, 50, 4, 4, 26, coloured=[9])
    d.text(72, 40, "image x")
    d.text(72, 176, f"{pixels:,} numbers", 13)
    d.arrow([(130, 102), (160, 102)])
    d.shape("M164 42L290 82V122L164 162Z", BLUE)
    d.text(226, 107, "encoder")
    d.arrow([(292, 102), (322, 102)])
    d.box(326, 82, 60, 40, "z", colour=RED)
    d.text(356, 144, f"{bottleneck:,} numbers", 13)
    d.text(356, 70, "bottleneck", 13)
    d.arrow([(388, 102), (418, 102)])
    d.shape("M422 82L548 42V162L422 122Z", BLUE)
    d.text(486, 107, "decoder")
    d.arrow([(550, 102), (580, 102)])
    d.cells(588, 50, 4, 4, 26)
    d.text(640, 40, "rebuilt x̂")
    d.arrow([(72, 182), (72, 206), (300, 206)])
    d.arrow([(640, 158), (640, 206), (460, 206)])
    d.box(304, 186, 152, 40, "difference", colour=GREEN)
    alt = (
        f"An image of {pixels:,} numbers is encoded into {bottleneck:,}, decoded again, and compared with itself. The "
        "marked square is missing in the rebuilt image."
    )
    return d.show(
        alt,
        "An autoencoder. What does not fit through the bottleneck is missing on the right. The difference shows it.",
    )


def anovit(size: int, patch: int, width: int, depth: int, sides: Sequence[int]) -> HTML:
    """The way of an image through AnoViT; `sides` are those of the feature map before and after each decoder layer."""
    g = size // patch
    N = g * g
    d = Drawing(760, 336)
    d.text(68, 30, "image x")
    d.cells(20, 42, 4, 4, 24, coloured=[9])
    d.text(68, 158, f"3 × {size} × {size}", 13)
    d.arrow([(120, 90), (146, 90)])
    d.box(150, 48, 138, 84, f"Vision\nTransformer,\n{depth} blocks", colour=RED)
    d.arrow([(290, 90), (318, 90)])
    d.text(340, 30, "tokens")
    d.cells(324, 42, 2, 1, 15)
    d.cells(324, 59, 2, 5, 15, coloured=range(10))
    d.text(342, 158, f"{N + 1} × {width}", 13)
    d.arrow([(358, 50), (386, 50)], dashed=True)
    d.text(392, 54, "class token: left out", 12, "start")
    d.arrow([(358, 100), (404, 100)])
    d.cells(412, 62, 4, 4, 19, coloured=range(16))
    d.text(450, 158, f"{width} × {g} × {g}", 13)
    d.text(450, 174, "feature map F", 13)
    d.arrow([(492, 100), (520, 100)])
    d.shape("M524 76L716 44V152L524 120Z", BLUE)
    d.text(624, 94, "decoder,")
    d.text(624, 113, f"{len(sides) - 1} layers")
    d.text(632, 30, f"side {sides[0]} → {sides[-1]}, then {size}", 13)
    d.arrow([(654, 150), (654, 206)])
    d.text(654, 224, "rebuilt x̂")
    d.cells(606, 232, 4, 4, 24)
    d.arrow([(602, 280), (556, 280)])
    d.arrow([(20, 164), (20, 208), (480, 208), (480, 246)])
    d.text(250, 200, "the image itself", 13)
    d.box(404, 250, 150, 60, "squared\ndifference", colour=GREEN)
    d.arrow([(402, 280), (366, 280)])
    d.box(222, 250, 142, 60, "blur", f"anomaly map, {size} × {size}", colour=GREEN)
    d.arrow([(220, 280), (184, 280)])
    d.box(30, 250, 152, 60, "blur again,\nmaximum", "image score", colour=GREEN)
    alt = (
        f"An image of {size} by {size} pixels passes through {depth} blocks of a Vision Transformer and becomes "
        f"{N + 1} tokens of {width} numbers. The class token is left out, the others go back on a grid of {g} by {g}. "
        f"A decoder of {len(sides) - 1} layers rebuilds the image. The squared difference to the input is blurred: the "
        "anomaly map. Blurred again, its maximum is the image score."
    )
    return d.show(
        alt, "AnoViT. All patch tokens reach the decoder, each at the place of its patch. The error is the map."
    )


def ssltok(size: int, patch: int, width: int) -> HTML:
    """From tokens to a map: what a token is, what it should be, and what marks the difference."""
    g = size // patch
    N = g * g
    d = Drawing(760, 372)
    d.text(68, 102, "image x")
    d.cells(20, 114, 4, 4, 24, coloured=[9])
    d.text(68, 230, f"3 × {size} × {size}", 13)
    d.arrow([(120, 162), (144, 162)])
    d.box(148, 132, 110, 60, "tokenizer T", "frozen", colour=AMBER)
    d.arrow([(260, 162), (284, 162)])
    d.cells(290, 110, 2, 7, 15, coloured=[6, 7])
    d.text(305, 98, "tokens tₐ")
    d.text(305, 234, f"{N} × {width}", 13)
    for y in (48, 118, 188):
        d.arrow([(324, 162), (342, 162), (342, y), (366, y)])
    d.box(370, 24, 170, 48, "R, all seen", colour=RED)
    d.box(370, 94, 170, 48, "R, token hidden", colour=RED)
    d.box(370, 164, 170, 48, "memory: the nearest", colour=AMBER)
    for y, name in ((48, "t̂"), (118, "t̃"), (188, "tₘ")):
        d.text(556, y + 5, name)
        d.arrow([(570, y), (596, y), (596, 118), (616, 118)])
    d.box(620, 88, 126, 60, "distance\nfrom tₐ", f"d, {g} × {g}", colour=GREEN)
    d.arrow([(305, 242), (305, 300), (366, 300)])
    d.text(336, 290, "tₐ", 13)
    d.arrow([(556, 200), (556, 240), (455, 240), (455, 268)])
    d.text(506, 256, "t̂, tₘ", 13)
    d.box(370, 272, 170, 56, "segmentation G", f"p, {size} × {size}", colour=RED)
    d.arrow([(542, 300), (616, 300)])
    d.arrow([(683, 172), (683, 268)])
    d.box(620, 272, 126, 56, "p · d", f"map, {size} × {size}", colour=GREEN)
    d.text(148, 348, "R and G are trained.", 13, "start")
    alt = (
        f"A frozen tokenizer turns an image of {size} by {size} pixels into {N} tokens of {width} numbers. There are "
        "three answers to what a token should be: R predicts it with all tokens seen, R predicts it with the token "
        "hidden, and the memory gives the nearest normal token. Their distances from the given token are multiplied "
        "with the probability of damage that the segmentation G draws. The product is the map."
    )
    return d.show(
        alt,
        "Three answers to the question what belongs here. The map is bright where the token is far from these answers "
        "and the segmentation marks damage.",
    )
