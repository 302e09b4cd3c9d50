"""GroupNorm: channels in groups, each normalised over all places and its own channels.

With x of places s, groups g and k channels a group, μ and rstd = 1 / √(var + ε) of every group:

    n = (x − μ) · rstd    y = n · scale + bias    x̄ = rstd · (ȳ · scale − mean(ȳ · scale) − n · mean(ȳ · scale · n))

A group's values lie far apart, and all channels of a place together. So kernels read whole places: one takes sums for
every channel, from which few operations make the groups' means, and a second applies what follows to every element. The
second goes backwards, since what was read last is still in the level-2 cache.
"""

import math
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jtile import borrowed
from jtile.compiler.params import CompilerParams
from jtile.op import Implementation, TileOp, check_known
from jtile.ops.norm.common import check_dtypes, combined, moments, totals, wide

# Spec.

forward = TileOp("group_norm", "x: ... s c, scale: c, bias?: c -> y: ... s c; mean: ... c, rstd: ... c", whole="s c")
backward = TileOp(
    "group_norm_backward",
    "x: ... s c, scale: c, mean: ... c, rstd: ... c, dy: ... s c -> dx: ... s c, dscale: c, dbias?: c",
    whole="s c",
)


def _averaged(of_channels, groups: int):
    """The mean over each group's channels, for each of them."""
    *batch, channels = of_channels.shape
    of_groups = of_channels.reshape(*batch, groups, channels // groups)
    mean = jnp.broadcast_to(jnp.mean(of_groups, axis=-1, keepdims=True), of_groups.shape)
    return mean.reshape(of_channels.shape)


# Reference.


@forward.reference
def forward_reference(x, scale, bias, *, groups, epsilon):
    u = wide(x)
    mean = _averaged(jnp.mean(u, axis=-2), groups)
    u = u - mean[..., None, :]
    rstd = jax.lax.rsqrt(_averaged(jnp.mean(u * u, axis=-2), groups) + epsilon)
    y = u * rstd[..., None, :] * wide(scale)
    return (y if bias is None else y + wide(bias)).astype(x.dtype), mean, rstd


@backward.reference
def backward_reference(x, scale, mean, rstd, dy, *, groups, biased):
    rstd, dy = rstd[..., None, :], wide(dy)
    n = (wide(x) - mean[..., None, :]) * rstd
    g = dy * wide(scale)

    def of_group(values):
        return _averaged(jnp.mean(values, axis=-2), groups)[..., None, :]

    dx = rstd * (g - of_group(g) - n * of_group(g * n))
    rows = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), jnp.sum(dy * n, axis=rows), jnp.sum(dy, axis=rows) if biased else None


# Kernel. Arrays are (batch, places, channels), and per channel (batch, channels).

ELEMENTS, WARPS = 4096, 4  # of a block: places by channels, at most CHANNELS of them
CHANNELS = 1024
PROGRAMS = 528  # that share the places in the kernels that take sums: four for each multiprocessor of the largest chips
TURNS = 8  # blocks for which a program of the others reads what belongs to the channels


class Grid:
    """Programs that take `turns` blocks of places after the other, for every batch and span of channels."""

    def __init__(self, x, turns: int | None):
        self.batch, self.places, self.channels = x.shape
        self.lanes = min(CHANNELS, pl.next_power_of_2(self.channels))
        self.rows = min(ELEMENTS // self.lanes, pl.next_power_of_2(self.places))
        blocks, spans = pl.cdiv(self.places, self.rows), pl.cdiv(self.channels, self.lanes)
        self.turns = turns or pl.cdiv(blocks, pl.cdiv(PROGRAMS, self.batch * spans))
        self.parts = pl.cdiv(blocks, self.turns)
        self.grid = self.batch, self.parts, spans

    @property
    def counts(self) -> jax.Array:
        """The places in each part, beside (batch, parts, channels)."""
        part = self.turns * self.rows
        return jnp.minimum(part, self.places - part * jnp.arange(self.parts)).astype(jnp.float32)[:, None]

    def over_blocks(self, step, start=None):
        """`step(places of the part, turn, carried)` for each block of a program."""

        def turn(i, carried):
            return step(pl.ds(i * self.rows, self.rows), i, carried)

        return jax.lax.fori_loop(0, self.turns, turn, start)

    def call(self, kernel, given, out_shape, name, *, backwards: bool):
        def part(p):
            return self.parts - 1 - p if backwards else p

        def spec(x):
            if x.ndim == 2:  # of the channels of a batch
                return pl.BlockSpec((1, self.lanes), lambda b, p, c: (b, c))
            rows = 1 if x.shape[1] == self.parts != self.places else self.turns * self.rows
            return pl.BlockSpec((None, rows, self.lanes), lambda b, p, c: (b, part(p), c))

        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=[jax.tree.map(spec, given)],
            out_specs=jax.tree.map(spec, out_shape),
            out_shape=out_shape,
            compiler_params=CompilerParams(num_warps=WARPS, num_stages=1),
            name=name,
        )(given)


@forward.kernel
def forward_kernel(x, scale, bias, *, groups, epsilon):
    batch, places, channels = x.shape
    # Of parts and a group's channels together: (batch, 1, groups, 1).
    per_group = channels // groups
    means, squares = (a.reshape(batch, -1, groups, per_group) for a in _moments(x))
    counts = Grid(x, None).counts[..., None]
    mean, squares = combined(counts, means, squares, axis=(1, 3), size=places * per_group)
    rstd = jax.lax.rsqrt(squares / (places * per_group) + epsilon)
    mean, rstd = (jnp.repeat(a.reshape(batch, groups), per_group, axis=1) for a in (mean, rstd))
    given = {"x": x, "mean": mean, "factor": rstd * wide(scale)}
    if bias is not None:
        given["bias"] = jnp.broadcast_to(wide(bias), (batch, channels))
    return _applied(given), mean, rstd


def _moments(x):
    """Mean and sum of squared differences to it of each channel, (batch, parts, channels)."""
    grid = Grid(x, None)

    def group_norm_moments_kernel(refs, out):
        lanes = jax.lax.broadcasted_iota(jnp.int32, (grid.rows, 1), 0)
        # Places from the part's first on.
        there = jnp.minimum(grid.places - pl.program_id(1) * grid.turns * grid.rows, grid.turns * grid.rows)
        near = sum(wide(refs["x"][pl.ds(i * there // 4, 1), :]) for i in range(4)) / 4

        def step(places, turn, sums):
            u = jnp.where(turn * grid.rows + lanes < there, wide(refs["x"][places, :]) - near, 0.0)
            return sums[0] + u, sums[1] + u * u

        zeros = jnp.zeros((grid.rows, grid.lanes), jnp.float32)
        total, squares = totals(grid.over_blocks(step, (zeros, zeros)), axis=0)
        mean, out["squares"][...] = moments(total, squares, there.astype(jnp.float32))
        out["mean"][...] = near + mean

    sums = jax.ShapeDtypeStruct((grid.batch, grid.parts, grid.channels), jnp.float32)
    out = grid.call(
        group_norm_moments_kernel, {"x": x}, {"mean": sums, "squares": sums}, "group_norm_moments", backwards=False
    )
    return out["mean"], out["squares"]


def _applied(given):
    grid = Grid(given["x"], TURNS)

    def group_norm_kernel(refs, out):
        of_channels = {name: refs[name][...] for name in refs if name != "x"}

        def step(places, *_):
            y = (wide(refs["x"][places, :]) - of_channels["mean"]) * of_channels["factor"]
            y = y + of_channels["bias"] if "bias" in refs else y
            out["y"][places, :] = y.astype(out["y"].dtype)

        grid.over_blocks(step)

    return grid.call(group_norm_kernel, given, {"y": given["x"]}, "group_norm", backwards=True)["y"]


@backward.kernel
def backward_kernel(x, scale, mean, rstd, dy, *, groups, biased):
    dscale, dbias = (a.sum(axis=1) for a in _gradient_sums({"x": x, "dy": dy, "mean": mean, "rstd": rstd}))
    mean_gn, mean_g = (_averaged(wide(scale) * a, groups) / x.shape[1] for a in (dscale, dbias))
    # x̄ = factor · ȳ − slope · (x − μ) − level
    of_channels = {"mean": mean, "factor": rstd * wide(scale), "slope": rstd * rstd * mean_gn, "level": rstd * mean_g}
    dx = _applied_gradient({"x": x, "dy": dy, **of_channels})
    return dx, dscale.sum(axis=0), dbias.sum(axis=0) if biased else None


def _gradient_sums(given):
    """Of ȳ · n and of ȳ, for each channel, (batch, parts, channels)."""
    grid = Grid(given["x"], None)

    def group_norm_sums_kernel(refs, out):
        mean, rstd = refs["mean"][...], refs["rstd"][...]

        def step(places, _, sums):
            dy = wide(refs["dy"][places, :])
            return sums[0] + dy * ((wide(refs["x"][places, :]) - mean) * rstd), sums[1] + dy

        zeros = jnp.zeros((grid.rows, grid.lanes), jnp.float32)
        for name, total in zip(("dscale", "dbias"), grid.over_blocks(step, (zeros, zeros)), strict=True):
            out[name][...] = jnp.sum(total, axis=0, keepdims=True)

    sums = jax.ShapeDtypeStruct((grid.batch, grid.parts, grid.channels), jnp.float32)
    out = grid.call(
        group_norm_sums_kernel, given, {"dscale": sums, "dbias": sums}, "group_norm_backward_sums", backwards=False
    )
    return out["dscale"], out["dbias"]


def _applied_gradient(given):
    grid = Grid(given["x"], TURNS)

    def group_norm_backward_kernel(refs, out):
        mean, factor, slope, level = (refs[name][...] for name in ("mean", "factor", "slope", "level"))

        def step(places, *_):
            dx = wide(refs["dy"][places, :]) * factor - (wide(refs["x"][places, :]) - mean) * slope - level
            out["dx"][places, :] = dx.astype(out["dx"].dtype)

        grid.over_blocks(step)

    return grid.call(group_norm_backward_kernel, given, {"dx": given["x"]}, "group_norm_backward", backwards=True)["dx"]


# Derivative.


@forward.transpose
def forward_transpose(operands, results, cotangents, *, epsilon, **options):
    del epsilon  # it is in rstd
    x, scale, bias = operands
    _, mean, rstd = results
    return backward(x, scale, mean, rstd, cotangents[0], biased=bias is not None, **options)


# Public name.


def _with_places_as_one(x):
    """All places along one dimension, which a kernel needs whole: explicit axes that split one of them do no more."""
    explicit = borrowed.explicit_mesh([jax.typeof(x)])
    kept = None if explicit is None else PartitionSpec(*jax.typeof(x).sharding.spec[:1])
    return jnp.reshape(x, (x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]), out_sharding=kept)


def group_norm(
    x: Float[Array, "batch *places channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"] | None = None,
    *,
    groups: int,
    epsilon: float = 1e-6,
    implementation: Implementation = None,
) -> Float[Array, "batch *places channels"]:
    """Normalisation of groups of channels, as `flax.nnx.GroupNorm` does it: channels come last.

    The first dimension is the batch, and each of its entries is normalised on its own; mean and variance of a group are
    taken over all dimensions between the first and the last, and over the group's channels. (Several batch dimensions:
    `jax.vmap`.) Sums are taken in float32, the variance from differences to the mean; the result has the dtype of `x`.

    Args:
        x: batch, any number of spatial dimensions, channels.
        scale: one factor for each channel.
        bias: one summand for each channel.
        groups: how many groups the channels are divided into, neighbours together.
        epsilon: added to the variance.
        implementation: `None`, `"triton"`, `"xla"` or `"interpret"`, see `jtile.TileOp`.

    Returns:
        An array of the shape and dtype of `x`.

    Raises:
        ValueError: `x` is not floating point or has fewer than two dimensions, `groups` does not divide the channels,
            or `scale` or `bias` does not match them.
        NotImplementedError: the named implementation cannot serve the call.

    Source: Wu and He, Group Normalization, 2018 (arXiv:1803.08494), section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> import jtile
        >>> print(jtile.group_norm(jnp.array([[1.0, 3.0, 5.0, 5.0]]), jnp.ones(4), groups=2).round())
        [[-1.  1.  0.  0.]]
    """
    check_known("group_norm", groups=groups, epsilon=epsilon)
    x, scale = jnp.asarray(x), jnp.asarray(scale)
    check_dtypes("group_norm", x)
    if x.ndim < 2:
        raise ValueError(
            f"group_norm: `x` has dimensions (batch ... channels), so at least 2, but its shape is {x.shape}"
        )
    groups = operator.index(groups)
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"group_norm: `groups` must divide the {x.shape[-1]} channels of `x`, got {groups}")
    y, *_ = forward(
        _with_places_as_one(x), scale, bias, groups=groups, epsilon=float(epsilon), implementation=implementation
    )
    return y.reshape(x.shape)
