"""Launch shapes of latent decoding: plain numbers, chosen from shapes alone, so that a captured graph keeps them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

WIDEST = 512
"""Widest latent of the kernels."""
SHARED_MEMORY = 227 * 1024
"""Bytes of a program on Hopper."""
MULTIPROCESSORS = 132
"""Of an H100 or H200. On another card only the choice of splits is less even."""
PROGRAM_TILES = 1.5
"""What a program costs before its first and after its last tile (query, first load, result), in tiles."""
COMBINE_TILES = 2.0
"""What the second kernel costs, in tiles; and in SPLITS_PER_TILE, how many parts it reads in the time of one."""
SPLITS_PER_TILE = 48
MOST_SPLITS = 256


@dataclass(frozen=True)
class Tile:
    """How one program works.

    Attributes:
        heads: query heads of a program, a power of two, 16 at least.
        slots: cache slots of an iteration, a power of two; 64 at least for Hopper's matrix instructions.
        warps: of a program of the Triton kernel; stages: tiles in flight.
        slots_first: transposed products, for few heads (see `kernels.py`).
        tma: tiles come through the bulk copy engine where the caches' strides allow it.
        gluon: a Gluon kernel on Hopper, with `tma`: 64 or 128 heads; see `halves`.
        halves: which one: `gluon_wide.py`, 64 heads, 64 slots and 2 stages, or `gluon_narrow.py`.
        resident: programs that share a multiprocessor, by registers and shared memory.
    """

    heads: int
    slots: int
    warps: int
    stages: int
    slots_first: bool = False
    tma: bool = False
    gluon: bool = False
    halves: bool = False
    resident: int = 1

    def plain(self) -> Tile:
        """What the Triton kernel runs in place of a Gluon tile."""
        return replace(self, gluon=False, halves=False, slots=64, stages=min(3, self.stages)) if self.gluon else self

    def shared_memory(self, latent: int, rope: int) -> int:
        """Bytes of a program at most, for rows of `latent` and `rope` bytes: tiles in flight, queries, small change."""
        # The wide Gluon kernel has its rotary queries in registers, and the weights of two tiles in shared memory.
        beside = 4 * self.slots if self.halves else rope
        return (latent + rope) * self.slots * self.stages + self.heads * (latent + beside) + 2048

    def fitted(self, latent: int, rope: int) -> Tile:
        """Fewer stages, and then fewer slots, where such rows need more shared memory than there is."""
        tile = self
        while tile.shared_memory(latent, rope) > SHARED_MEMORY:
            if tile.stages > 2:
                tile = replace(tile, stages=tile.stages - 1)
            elif tile.gluon:
                tile = tile.plain()
            elif tile.slots > 16:
                tile = replace(tile, slots=tile.slots // 2)
            else:
                break
        return tile


TILES: dict[tuple[int, int], Tile] = {
    (128, 16): Tile(16, 128, 4, 3),
    (128, 64): Tile(64, 64, 4, 4, tma=True, gluon=True),
    (128, 128): Tile(128, 128, 8, 4, tma=True, gluon=True),
    (256, 16): Tile(16, 64, 4, 3, slots_first=True, tma=True),
    (256, 32): Tile(32, 64, 4, 3, slots_first=True, tma=True),
    (256, 64): Tile(64, 64, 4, 3, tma=True),
    (512, 16): Tile(16, 32, 4, 3),
    (512, 64): Tile(64, 64, 8, 2, tma=True, gluon=True, halves=True),
}
"""By padded latent width (at most) and by query heads (at most; more heads are several programs). 16-bit caches.

128 and 512 are the fastest of `scripts/tune_mla_decode.py` over batches 1 to 64 on an H100; 256 is by analogy."""
WIDE_ELEMENTS = Tile(16, 16, 8, 1)
"""Of fp32 caches: right, not fast."""


def choose_tile(heads: int, rank: int, itemsize: int = 2) -> Tile:
    """The tile for `heads` query heads and latents `rank` wide, of `itemsize` bytes an element.

    Raises:
        ValueError: latents wider than WIDEST.
    """
    if rank > WIDEST:
        raise ValueError(f"latents {rank} wide; the kernels go up to {WIDEST}")
    if itemsize > 2:
        return WIDE_ELEMENTS
    width = next(limit for limit in (128, 256, 512) if rank <= limit)
    offered = sorted(most for limit, most in TILES if limit == width)
    return TILES[width, next((most for most in offered if heads <= most), offered[-1])]


@cache
def choose_splits(programs: int, capacity: int, tile: Tile) -> int:
    """Programs that share one row's slots, for `programs` unsplit ones and a cache of `capacity` slots.

    The number that ends first when programs run in waves: tiles of the longest program times waves, and the combination
    of the parts. The fewer among equals.
    """
    tiles = max(1, -(-capacity // tile.slots))
    return min(range(1, min(tiles, MOST_SPLITS) + 1), key=lambda splits: (_cost(programs, tiles, splits, tile), splits))


def _cost(programs: int, tiles: int, splits: int, tile: Tile) -> float:
    """Time in tiles of one program that has its multiprocessor for itself."""
    busy = MULTIPROCESSORS * tile.resident
    full, rest = divmod(programs * splits, busy)
    # In the last wave fewer programs share a multiprocessor, and each is so much faster.
    waves = full * tile.resident + -(-rest // MULTIPROCESSORS)
    parts = 0.0 if splits == 1 else COMBINE_TILES + splits / SPLITS_PER_TILE
    return waves * (-(-tiles // splits) + PROGRAM_TILES) + parts
