"""Tiles: how large a kernel's blocks are, how many warps work on one, chosen for the shapes of a call and the chip.

An op declares its tile in its own file, by a generator that gets the kernel's operands as `jax.ShapeDtypeStruct`s, the
chip as a `Target` (`None` where the kernel is interpreted) and the op's options:

    class Tile(NamedTuple):
        rows: int
        num_warps: int

    @forward.tiles
    def forward_tiles(x, *_, target, **options):
        yield Tile(8, 4)  # the heuristic: what runs untuned
        yield from (Tile(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in (4, 8))  # what else to try

    @forward.kernel
    def forward_kernel(x, scale, residual, *, tile, epsilon):
        ...

A tile is a NamedTuple or frozen dataclass of numbers, or of such tiles where one op launches several kernels; None
where a call leaves no choice. When the op is lowered for a chip, `choose` looks for what was found best there for the
same op, dtypes, options and sizes of dimensions, each up to the next power of two; then for the nearest sizes; then on
another chip of the same compute capability; and takes the heuristic where there is nothing. It takes only what the
generator yields for this very call. So a choice never fails, and one that a changed op no longer offers is as good as
none.

What is known comes from `data/`, which is shipped, under what `jtile.autotune` found or `load` read, where it is in
force. Nothing is ever measured unless `jtile.autotune` or `python -m jtile tune` asks for it.
"""

from jtile.tuning.table import Choice, Entry, Tuning, choose, current, load, recording, save

__all__ = ["Choice", "Entry", "Tuning", "choose", "current", "load", "recording", "save"]
