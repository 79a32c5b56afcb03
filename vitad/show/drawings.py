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


def flow(steps: Sequence[tuple[str, str, str]], alt: str, caption: str) -> HTML:
    """A row of boxes with arrows between: (words, smaller words below, `blue`, `red`, `green` or `amber`) each."""
    colours = {"blue": BLUE, "red": RED, "green": GREEN, "amber": AMBER}
    d, gap = Drawing(760, 150), 30.0
    width = (740 - gap * (len(steps) - 1)) / len(steps)
    for k, (words, below, colour) in enumerate(steps):
        x = 10 + k * (width + gap)
        d.box(x, 20, width, 64, words, below, colours[colour])
        if k:
            d.arrow([(x - gap + 2, 52), (x - 3, 52)])
    return d.show(alt, caption)


def memory_autoencoder(size: int, patch: int, width: int, depth: int, items: int) -> HTML:
    """The ViT autoencoder with memory and coordinate attention, with the shapes of its tensors."""
    g = size // patch
    d = Drawing(760, 352)
    grid = f"{width} × {g} × {g}"
    d.text(68, 30, "image x")
    d.cells(20, 40, 4, 4, 24, coloured=[6])
    d.text(68, 156, f"3 × {size} × {size}", 13)
    d.arrow([(118, 88), (146, 88)])
    d.box(150, 54, 100, 68, f"ViT\n{depth} blocks")
    d.arrow([(252, 88), (280, 88)])
    d.text(332, 30, "features F")
    d.cells(284, 40, 4, 4, 24, coloured=[6])
    d.text(332, 156, grid, 13)
    d.arrow([(382, 88), (410, 88)])
    d.box(
        414, 40, 160, 96, "memory\nfind similar items,\nmix them, forget F", f"{items} items of {width} numbers", AMBER
    )
    d.arrow([(576, 88), (604, 88)])
    d.text(656, 30, "recalled F′")
    d.cells(608, 40, 4, 4, 24)
    d.text(656, 156, grid, 13)
    d.arrow([(656, 166), (656, 234)])
    d.box(566, 238, 180, 58, "coordinate attention", "weighs rows and columns", RED)
    d.arrow([(564, 267), (506, 267)])
    d.text(536, 258, "F″")
    d.shape("M502 243L372 215V319L502 291Z", BLUE)
    d.text(434, 272, "decoder")
    d.arrow([(368, 267), (338, 267)])
    d.cells(236, 219, 4, 4, 24)
    d.text(284, 335, "rebuilt x̂")
    d.arrow([(232, 267), (202, 267)])
    d.box(20, 237, 178, 60, "compare", f"anomaly map, {size} × {size}", GREEN)
    d.arrow([(68, 166), (68, 233)])
    d.arrow([(494, 162), (494, 192), (150, 192), (150, 233)], dashed=True)
    d.text(320, 186, "entropy: are the weights spread evenly?", 13)
    alt = (
        f"An image passes a ViT of {depth} blocks and becomes features of {grid}. A memory of {items} items replaces "
        "them by mixtures of its items. Coordinate attention weighs rows and columns, a decoder draws the image, which "
        "is compared with the input."
    )
    return d.show(
        alt,
        "The whole model. The decoder never sees the features F, only mixtures of stored items. So a defect should not "
        "reach it.",
    )


def memory_variants() -> HTML:
    """The four rows of the ablation: which parts stand between encoder and decoder."""
    d = Drawing(760, 250)
    for i, (name, parts) in enumerate({"base": "", "base_ca": "C", "base_m": "M", "full": "MC"}.items()):
        y = 14.0 + 60 * i
        d.text(84, y + 25, name, 15, "end", bold=True)
        d.box(120, y, 100, 38, "ViT")
        x = 220.0
        for part, words, colour, left in (("M", "memory", AMBER, 260.0), ("C", "coordinate attention", RED, 400.0)):
            if part in parts:
                d.arrow([(x + 2, y + 19), (left - 3, y + 19)])
                x = left + (100 if part == "M" else 170)
                d.box(left, y, x - left, 38, words, colour=colour)
        d.arrow([(x + 2, y + 19), (607, y + 19)])
        d.box(610, y, 110, 38, "decoder")
    alt = (
        "Four rows. base: ViT, decoder. base_ca: ViT, coordinate attention, decoder. base_m: ViT, memory, decoder. "
        "full: ViT, memory, coordinate attention, decoder."
    )
    return d.show(alt, "The four rows of the ablation. They differ in nothing but the parts between ViT and decoder.")


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


def mala(size: int, patch: int, width: int, depth: int, decoder_width: int, visible: int) -> HTML:
    """The two stages of MALA, with the shapes of a model; `visible` patches stay in stage 1."""
    N = (size // patch) ** 2
    d = Drawing(760, 454)
    d.text(10, 22, "Stage 1: rebuild what is hidden", 16, anchor="start", bold=True)
    d.cells(10, 46, 4, 4, 24, coloured=[2, 5, 8, 15])
    d.text(58, 160, "visible patches", 13)
    d.text(58, 176, f"{visible} of {N}", 13)
    d.arrow([(110, 94), (138, 94)])
    d.box(142, 60, 108, 68, f"encoder\n{depth} blocks", f"{visible} × {width}")
    d.arrow([(250, 94), (278, 94)])
    d.box(282, 60, 108, 68, "zeros for the\nhidden ones", f"{N} × {decoder_width}", colour=AMBER, size=14)
    d.arrow([(390, 94), (418, 94)])
    d.box(422, 60, 96, 68, "decoder", f"{N} × {decoder_width}", colour=RED)
    d.arrow([(518, 94), (546, 94)])
    d.cells(550, 46, 4, 4, 24, coloured=range(16))
    d.text(598, 160, "rebuilt image", 13)
    d.text(598, 176, f"3 × {size} × {size}", 13)
    d.arrow([(648, 94), (672, 94)])
    d.box(676, 60, 76, 68, "PLPM", "real or\nrebuilt?", colour=GREEN)

    d.text(10, 240, "Stage 2: paint the damage", 16, anchor="start", bold=True)
    d.cells(10, 264, 4, 4, 24, coloured=range(16))
    d.shape("M38 312Q44 284 66 296T84 330Q58 344 38 312Z", RED, 0.9)
    d.text(58, 378, "damaged image", 13)
    d.text(58, 394, f"3 × {size} × {size}", 13)
    d.arrow([(110, 312), (138, 312)])
    d.box(142, 278, 108, 68, "encoder,\nfrozen")
    d.arrow([(250, 312), (418, 312)])
    d.text(334, 304, "last block", 13)
    d.text(334, 330, f"{N} × {width}", 13)
    d.box(422, 278, 96, 68, "decoder", colour=RED)
    d.arrow([(518, 312), (546, 312)])
    d.text(470, 364, f"{N} × {decoder_width}", 13)
    d.arrow([(196, 346), (196, 420), (584, 420), (584, 350)])
    d.text(390, 412, f"first and last block: {N} × {2 * width}", 13)
    d.box(550, 278, 68, 68, "TBM", colour=AMBER)
    d.arrow([(618, 312), (646, 312)])
    d.cells(650, 264, 4, 4, 24, coloured=[5, 6, 9, 10, 14])
    d.text(698, 378, "its mask", 13)
    d.text(698, 394, f"2 × {size} × {size}", 13)
    for x in (236, 436):
        d.arrow([(x, 148), (x, 274)], dashed=True)
    d.text(336, 216, "the weights go on to stage 2", 13)
    alt = (
        f"Stage 1: {visible} of {N} patches pass through the encoder. Zeros stand for the hidden ones, the decoder "
        "rebuilds the image, and PLPM judges whether an image is real. Stage 2: a damaged image passes through the "
        "frozen encoder and the decoder. TBM joins the tokens of its first and last block with those of the decoder "
        "and gives the mask of the damage."
    )
    return d.show(
        alt,
        "MALA. Stage 1 learns what normal images look like. Stage 2 keeps the encoder and learns to paint the damage. "
        "Only the lower row is used on new images.",
    )


def painted_damage() -> HTML:
    """How a mask of noise and a texture become damage on a good image."""
    d = Drawing(760, 250)
    top, below = 20, 150
    d.box(10, top, 104, 56, "Perlin noise", colour=BLUE)
    d.arrow([(114, top + 28), (140, top + 28)])
    d.box(144, top, 104, 56, "threshold", colour=AMBER)
    d.arrow([(248, top + 28), (274, top + 28)])
    d.box(278, top, 82, 56, "turn", colour=AMBER)
    d.arrow([(360, top + 28), (386, top + 28)])
    d.box(390, top, 118, 56, "keep to\nthe object", colour=AMBER)
    d.arrow([(508, top + 28), (620, top + 28), (620, 92)])
    d.text(566, top + 20, "mask M", 14)
    d.box(10, below, 104, 56, "texture", colour=BLUE)
    d.arrow([(114, below + 28), (140, below + 28)])
    d.box(144, below, 104, 56, "recolour", colour=AMBER)
    d.arrow([(248, below + 28), (440, below + 28), (440, 124), (546, 124)])
    d.text(300, below + 20, "T", 14)
    d.box(300, below + 42, 104, 48, "good image", colour=BLUE, size=14)
    d.arrow([(404, below + 66), (570, below + 66), (570, 156)])
    d.text(486, below + 60, "I", 14)
    d.box(550, 96, 90, 56, "blend", colour=RED)
    d.arrow([(640, 124), (664, 124)])
    d.box(668, 96, 86, 56, "damaged\nimage", colour=GREEN, size=14)
    alt = (
        "Perlin noise passes a threshold, is turned and kept to the object: the mask. A texture is recoloured. Mask, "
        "texture and good image are blended into the damaged image."
    )
    return d.show(alt, "The recipe. Noise decides where, a texture decides what, and the mask is known exactly.")


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
