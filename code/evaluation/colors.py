"""One look per run, the same in plots, contours and legends of a report; where there are classes, one for each."""

# Chosen by computer: of 14 saturated colours the closest two, the label's orange among them, differ by 11 in CIEDE2000,
# for normal vision and without any one kind of cones; the seven of Okabe & Ito's palette by 10.9. In the order of use:
# the first are of middle lightness, seen on paper and on a scan alike, and the farthest apart.
COLORS = (
    "#7F65F6", "#D60C57", "#19AF8E", "#C37EB3", "#EBAEE9", "#1DDFB9", "#9A7D0B",
    "#9ECD7A", "#EB6378", "#B590FB", "#7B4882", "#983F04", "#6C2EE1", "#197044",
)  # fmt: skip
DASHES = ("solid", "dash", "dot")  # of curves: the second seven are not told apart by colour alone


def look(index: int) -> dict[str, str]:
    """Colour and dash of a run, or of a class, by its place; beyond 14 a colour returns with another dash."""
    count = len(COLORS)
    return {"color": COLORS[index % count], "dash": DASHES[index // (count // 2) % len(DASHES)]}


def pale(color: str) -> str:
    """A colour, half way to white."""
    return "#" + "".join(f"{(int(color[at : at + 2], 16) + 255) // 2:02X}" for at in (1, 3, 5))
