"""Where things stand in a scene, in a frame of 128 × 128 pixels; centres and sizes are whole pixels."""

from __future__ import annotations

from ldm.data.emoji.draws import Draw

FRAME = 128
PAIR_SIZE, PAIR_ALONG, PAIR_ACROSS = (46, 60), 4, 10  # jitter along and across the line from one to the other
COUNT_SIZE = {2: (46, 60), 3: (42, 56), 4: (42, 56)}  # px; a row of three is drawn smaller
ROW_OF_THREE = (34, 40)
CARD_SIZE, TWO_CARDS_SIZE, CARD_SHARE = (92, 112), (54, 60), 0.72  # share of the card's side that its object takes

Place = tuple[int, int]  # centre: x to the right, y down


def _inside(value: int, size: int) -> int:
    half = (size + 1) // 2
    return min(max(value, half), FRAME - half)


def jittered(draw: Draw, x: int, y: int, size: int, jitter: int | Place, grid: int = 1) -> Place:
    """A centre near (x, y), by steps of `grid`, moved back so far that a square of `size` lies inside the frame.

    jitter: how far it may lie from (x, y), or how far across and how far down.
    """
    across, down = (far // grid for far in (jitter if isinstance(jitter, tuple) else (jitter, jitter)))
    return (
        _inside(x + grid * draw.integer(-across, across), size),
        _inside(y + grid * draw.integer(-down, down), size),
    )


def side(draw: Draw, low_high: tuple[int, int], still: bool = False) -> int:
    """A side between the two, or their middle."""
    return sum(low_high) // 2 if still else draw.integer(*low_high)


def two(draw: Draw, relation: str, sizes: tuple[int, int], still: bool = False) -> tuple[Place, Place]:
    """Centres of a and b so that a stands `relation` b (left, right, above, below), without overlap."""
    near, far, middle = FRAME // 4, FRAME - FRAME // 4, FRAME // 2
    first, second = (near, far) if relation in ("left", "above") else (far, near)
    along, across = min(PAIR_ALONG, (far - near - max(sizes)) // 2), PAIR_ACROSS
    if still:
        along, across = 0, 0
    points, jitter = ((first, middle), (second, middle)), (along, across)
    if relation in ("above", "below"):
        points, jitter = ((middle, first), (middle, second)), (across, along)
    a, b = (jittered(draw, *point, size, jitter) for point, size in zip(points, sizes))
    return a, b


def several(draw: Draw, count: int, still: bool = False) -> tuple[int, list[Place]]:
    """(size, centres) of `count` equal objects that do not overlap: rows, columns, triangles, a square.

    `still`: in one way for each count, in the middle of its cell.
    """
    near, middle, far, gap = FRAME // 4, FRAME // 2, FRAME - FRAME // 4, FRAME // 2
    size = side(draw, COUNT_SIZE[count], still)
    if count == 2:
        points = [(near, middle), (far, middle)] if still or draw.chance(0.7) else [(middle, near), (middle, far)]
    elif count == 4:
        points = [(x, y) for y in (near, far) for x in (near, far)]
    elif still or draw.chance(0.5):
        points = [(middle, near), (near, far), (far, far)]
        if not still and draw.chance(0.5):
            points = [(x, FRAME - y) for x, y in points]
    else:
        size, gap = draw.integer(*ROW_OF_THREE), FRAME // 3
        points = [(middle - gap, middle), (middle, middle), (middle + gap, middle)]
    return size, [jittered(draw, x, y, size, 0 if still else (gap - size) // 2) for x, y in points]
