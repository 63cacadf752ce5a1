"""The places of objects in a scene of 128 × 128 pixels; centres and sizes are whole pixels."""

from __future__ import annotations

from ldm.data.emoji.draws import Draw

FRAME = 128
SMALL_SIZE = (42, 54)  # px of an object in pairs and counts
PAIR_ALONG, PAIR_ACROSS = 4, 10  # jitter along and across the line between the two
ROW_OF_THREE = (34, 40)
# In the fixed layout an object has one of two sizes, so that what is learned of it in one kind of scene serves the
# others: the middle of SMALL_SIZE on two cards too, and on one card that of a single object.
CARD_SIZE, TWO_CARDS_SIZE, CARD_SHARE = (104, 120), (52, 60), 6 / 7  # share of the card's side that its object takes

Place = tuple[int, int]  # centre: x to the right, y down


def _inside(value: int, size: int) -> int:
    half = (size + 1) // 2
    return min(max(value, half), FRAME - half)


def jittered(draw: Draw, x: int, y: int, size: int, jitter: int | Place, grid: int = 1) -> Place:
    """A centre near (x, y), in steps of `grid`, moved so that a square of `size` lies inside the frame.

    jitter: the greatest distance from (x, y), or (across, down).
    """
    across, down = (far // grid for far in (jitter if isinstance(jitter, tuple) else (jitter, jitter)))
    return (
        _inside(x + grid * draw.integer(-across, across), size),
        _inside(y + grid * draw.integer(-down, down), size),
    )


def side(draw: Draw, low_high: tuple[int, int], fixed: bool = False) -> int:
    """A side between the two, or their middle."""
    return sum(low_high) // 2 if fixed else draw.integer(*low_high)


def two(draw: Draw, relation: str, sizes: tuple[int, int], fixed: bool = False) -> tuple[Place, Place]:
    """Centres of a and b that do not overlap, a being `relation` (left, right, above, below) of b."""
    low, high, middle = FRAME // 4, FRAME - FRAME // 4, FRAME // 2
    first, second = (low, high) if relation in ("left", "above") else (high, low)
    along, across = min(PAIR_ALONG, (high - low - max(sizes)) // 2), PAIR_ACROSS
    if fixed:
        along, across = 0, 0
    points, jitter = ((first, middle), (second, middle)), (along, across)
    if relation in ("above", "below"):
        points, jitter = ((middle, first), (middle, second)), (across, along)
    a, b = (jittered(draw, *point, size, jitter) for point, size in zip(points, sizes))
    return a, b


def pair(draw: Draw, relation: str, low_high: tuple[int, int], fixed: bool = False) -> list[tuple[int, int, int]]:
    """(x, y, size) of a and b, placed as in `two`; their sizes are drawn by themselves."""
    sizes = (side(draw, low_high, fixed), side(draw, low_high, fixed))
    return [(*point, size) for point, size in zip(two(draw, relation, sizes, fixed), sizes)]


def several(draw: Draw, count: int, fixed: bool = False) -> tuple[int, list[Place]]:
    """(size, centres) of `count` equal objects that do not overlap: rows, columns, triangles, a square.

    `fixed`: one arrangement for each count, each object in the middle of its cell.
    """
    low, middle, high, gap = FRAME // 4, FRAME // 2, FRAME - FRAME // 4, FRAME // 2
    size = side(draw, SMALL_SIZE, fixed)
    if count == 2:
        points = [(low, middle), (high, middle)] if fixed or draw.chance(0.7) else [(middle, low), (middle, high)]
    elif count == 4:
        points = [(x, y) for y in (low, high) for x in (low, high)]
    elif fixed or draw.chance(0.5):
        points = [(middle, low), (low, high), (high, high)]
        if not fixed and draw.chance(0.5):
            points = [(x, FRAME - y) for x, y in points]
    else:
        size, gap = draw.integer(*ROW_OF_THREE), FRAME // 3
        points = [(middle - gap, middle), (middle, middle), (middle + gap, middle)]
    return size, [jittered(draw, x, y, size, 0 if fixed else (gap - size) // 2) for x, y in points]
