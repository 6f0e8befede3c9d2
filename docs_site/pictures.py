"""Pictures of the methods as SVG: `python -m docs_site.pictures` writes them to docs/images/. A test keeps the files equal."""

from collections.abc import Callable, Mapping
from pathlib import Path

from docs_site.repository import DOCS, ROOT

FOLDER = ROOT / DOCS / "images"
_COLOURS = ("#8ecae6", "#ffb703", "#b5e48c", "#f4a6c0", "#cdb4db", "#ffd6a5", "#a8dadc", "#e5989b")
_PLAIN, _LINE, _FAINT = "#ffffff", "#333333", "#bbbbbb"


class Drawing:
    """A picture on a light card, so that it reads the same on a light and on a dark page."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="sans-serif" '
            'font-size="13">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{_LINE}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#f7f7f5"/>',
        ]

    def box(
        self, x: float, y: float, width: float, height: float, text: str = "", fill: str = _PLAIN, line: str = _LINE
    ) -> None:
        """A rectangle with a text in its middle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{line}"/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 4.5, text)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", weight: str = "normal") -> None:
        """A line of text."""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" fill="{_LINE}">{text}</text>'
        )

    def line(self, *points: tuple[float, float], tip: bool = False, dash: bool = False, colour: str = _LINE) -> None:
        """A line through points. tip: with an arrow's tip."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        more = (' marker-end="url(#tip)"' if tip else "") + (' stroke-dasharray="5 4"' if dash else "")
        self._parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.4"{more}/>')

    @property
    def svg(self) -> str:
        """The picture."""
        return "\n".join((*self._parts, "</svg>", ""))


def layer() -> str:
    """What a Mixture-of-Experts layer does with a token."""
    drawing = Drawing(700, 190, "A Mixture-of-Experts layer: the router sends each token to two of eight experts")
    drawing.box(15, 75, 90, 40, "token")
    drawing.box(150, 75, 100, 40, "router")
    drawing.line((105, 95), (148, 95), tip=True)
    for number, colour in enumerate(_COLOURS):
        y = 8 + 22 * number
        is_picked = number in (1, 5)
        drawing.box(370, y, 110, 18, f"expert {number}", colour if is_picked else _PLAIN)
        drawing.line((250, 95), (368, y + 9), tip=is_picked, colour=_LINE if is_picked else _FAINT)
        if is_picked:
            drawing.line((480, y + 9), (548, 95), tip=True)
    drawing.text(300, 36, "gate 0.7")
    drawing.text(300, 168, "gate 0.3")
    drawing.box(550, 70, 135, 50, "sum of gate x output")
    return drawing.svg


def merging() -> str:
    """HC-SMoE: experts, dendrogram, cut, and what the two formats make of the clusters."""
    drawing = Drawing(700, 330, "Merging: experts with similar outputs are clustered, and each cluster becomes one expert")
    clusters = ((0, 3), (1, 2, 6), (4,), (5, 7))
    order = [expert for cluster in clusters for expert in cluster]
    place = {expert: 60 + 60 * number for number, expert in enumerate(order)}
    colour = {expert: _COLOURS[number] for number, cluster in enumerate(clusters) for expert in cluster}
    x: float
    for expert, x in place.items():
        drawing.box(x - 24, 130, 48, 26, f"E{expert}", colour[expert])
    joins = (
        ((place[0], 130), (place[3], 130), 100),
        ((place[1], 130), (place[2], 130), 108),
        ((place[5], 130), (place[7], 130), 90),
    )
    tops = {}
    for (x1, y1), (x2, y2), top in joins:
        drawing.line((x1, y1), (x1, top), (x2, top), (x2, y2))
        tops[x1] = ((x1 + x2) / 2, top)
    middle, top = tops[place[1]]
    drawing.line((middle, top), (middle, 84), (place[6], 84), (place[6], 130))
    second = ((middle + place[6]) / 2, 84.0)
    drawing.line(tops[place[0]], (tops[place[0]][0], 50), (second[0], 50), second)
    third = ((tops[place[0]][0] + second[0]) / 2, 50.0)
    drawing.line((place[4], 130), (place[4], 58), (tops[place[5]][0], 58), tops[place[5]])
    fourth = ((place[4] + tops[place[5]][0]) / 2, 58.0)
    drawing.line(third, (third[0], 30), (fourth[0], 30), fourth)
    drawing.line((25, 70), (520, 70), dash=True, colour="#c1121f")
    drawing.text(530, 74, "the cut: 4 clusters", "start")
    drawing.text(530, 135, "height: distance of", "start")
    drawing.text(530, 152, "mean outputs", "start")
    for number, cluster in enumerate(clusters):
        x = sum(place[expert] for expert in cluster) / len(cluster)
        drawing.box(x - 30, 215, 60, 28, f"slot {number}", _COLOURS[number])
        for expert in cluster:
            drawing.line((place[expert], 156), (x, 213), tip=True)
    drawing.text(530, 190, "average of weights,", "start")
    drawing.text(530, 207, "by how often each is used", "start")
    drawing.text(20, 280, "stock: the router has 4 rows, one for each slot. Any engine runs it.", "start")
    drawing.text(
        20, 305, "tied: the router keeps 8 rows; a map sends E0 and E3 to slot 0, and so on. Closer to the source.", "start"
    )
    return drawing.svg


def pruning() -> str:
    """REAP and its like: some experts stay as they are, the others go."""
    drawing = Drawing(700, 150, "Pruning: the most important experts stay as they are, the others are dropped")
    heights = (44, 18, 60, 12, 30, 52, 8, 22)
    for expert, height in enumerate(heights):
        x, stays = 40 + 80 * expert, height >= 30
        drawing.box(x, 80 - height, 34, height, fill=_COLOURS[expert] if stays else _FAINT)
        drawing.box(x - 8, 88, 50, 26, f"E{expert}", _COLOURS[expert] if stays else _PLAIN, _LINE if stays else _FAINT)
        drawing.text(x + 17, 134, "stays" if stays else "goes")
    return drawing.svg


def recombining() -> str:
    """Recombine: whole neurons of two experts, and W_down solved anew."""
    drawing = Drawing(700, 205, "Recombine: a slot keeps whole neurons of two experts; what they feed is solved anew")
    kept = {0: (0, 2, 5), 1: (1, 3, 4)}
    for expert in (0, 1):
        drawing.text(20, 52 + 100 * expert, f"E{expert}", "start", "bold")
        for neuron in range(6):
            stays = neuron in kept[expert]
            drawing.box(
                60 + 38 * neuron,
                30 + 100 * expert,
                30,
                38,
                fill=_COLOURS[expert] if stays else _PLAIN,
                line=_LINE if stays else _FAINT,
            )
        drawing.text(60, 88 + 100 * expert, "neurons: a row of W_gate, a row of W_up", "start")
        drawing.line((292, 49 + 100 * expert), (352, 100), tip=True)
    for place, expert in enumerate((0, 0, 0, 1, 1, 1)):
        drawing.box(360 + 30 * place, 80, 26, 40, fill=_COLOURS[expert])
    drawing.text(450, 66, "slot: as many neurons as an expert has")
    drawing.line((545, 100), (580, 100), tip=True)
    drawing.box(585, 70, 100, 60, "W_down, new", _COLOURS[2])
    return drawing.svg


PICTURES: Mapping[str, Callable[[], str]] = {
    "layer.svg": layer,
    "merging.svg": merging,
    "pruning.svg": pruning,
    "recombining.svg": recombining,
}


def main(folder: Path = FOLDER) -> None:
    """Write all pictures."""
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
