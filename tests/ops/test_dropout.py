"""Dropout: its statistics, its bits on any tile and any number of devices, and its gradient."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jtile
from jtile.compiler.interpret import interpret_pallas
from jtile.ops import dropout as op
from jtile.ops import random_bits as generator

IMPLEMENTATIONS = ["interpret", "xla"]
KEY = jax.random.key(7)


def kept(shape, rate, key=KEY, implementation=None, **options):
    return np.asarray(jtile.dropout(jnp.ones(shape), rate, key, implementation=implementation, **options)) != 0


# The generator.


def philox(key, counter, rounds=7):
    """As the paper has it (section 3.3, table 2), in Python's integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(rounds):
        (high0, low0), (high1, low1) = divmod(c0 * 0xD2511F53, 2**32), divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def test_known_answers():
    """Those of Random123, the authors' library, and of the formula at random."""
    full = 2**32 - 1
    assert philox((0, 0), (0,) * 4, 10) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    draws = [tuple(map(int, row)) for row in np.random.default_rng(0).integers(0, 2**32, (20, 6), np.uint64)]
    for row in [(0,) * 6, (full,) * 6, *draws]:
        assert tuple(map(int, generator.philox(row[:2], row[2:]))) == philox(row[:2], row[2:])
    assert tuple(map(int, generator.philox((0, 0), (0,) * 4)))[0] == 0x5F6FB709


def test_order_of_the_bits():
    key, rows, groups = (1, 2), np.array([[3], [2**32 - 1]], np.uint32), np.array([[0, 5, 2**31]], np.uint32)
    bits = generator.random_bits(key, rows, groups, plane=9)
    for (i, row), (j, group) in itertools.product(enumerate(rows[:, 0]), enumerate(groups[0])):
        words = philox(key, (int(group), 9, int(row), 0))
        halves = [half for word in words for half in (word % 2**16, word >> 16)]
        np.testing.assert_array_equal(bits[i, 8 * j : 8 * j + 8], halves)


@functools.cache
def many_bits(seed=0, plane=0, rows=1024, groups=128):
    key = jax.random.key_data(jax.random.key(seed))
    numbers = jnp.arange(rows)[:, None], jnp.arange(groups)[None]
    return np.asarray(jax.jit(generator.random_bits)((key[0], key[1]), *numbers, plane))


def assert_uniform(counts):
    """Chi-squared of equally likely cells, as a standard normal."""
    expected = counts.sum() / counts.size
    chi2, freedom = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    assert abs(chi2 - freedom) / math.sqrt(2 * freedom) < 4


@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_equally_likely(seed):
    bits = many_bits(seed)
    assert_uniform(np.bincount(bits.ravel(), minlength=2**16))
    for lane in range(8):  # of a counter
        assert_uniform(np.bincount(bits[:, lane::8].ravel() >> 8, minlength=256))


NEIGHBOURS = {
    "columns": lambda: (many_bits()[:, :-1], many_bits()[:, 1:]),
    "lanes of two counters": lambda: (many_bits()[:, :-8], many_bits()[:, 8:]),
    "rows": lambda: (many_bits()[:-1], many_bits()[1:]),
    "diagonals": lambda: (many_bits()[1:, :-8], many_bits()[:-1, 8:]),
    "far rows": lambda: (many_bits()[:512], many_bits()[512:]),
    "keys": lambda: (many_bits(0), many_bits(1)),
    "planes": lambda: (many_bits(0, 0), many_bits(0, 1)),
    "row and group exchanged": lambda: (many_bits()[:128, ::8], many_bits()[:128, ::8].T),
}


@pytest.mark.parametrize("which", NEIGHBOURS)
def test_neighbours_are_independent(which):
    """Pairs of the first four bits, pairs of all sixteen with each other, and the correlation of values."""
    a, b = (x.ravel() for x in NEIGHBOURS[which]())
    if "exchanged" in which:
        a, b = (x[np.arange(x.size) // 128 < np.arange(x.size) % 128] for x in (a, b))
    assert_uniform(np.bincount((a >> 12) * 16 + (b >> 12), minlength=256))
    signs = [((x[:, None] >> np.arange(16)) & 1) * 2.0 - 1 for x in (a[:200_000], b[:200_000])]
    assert np.abs(signs[0].T @ signs[1]).max() < 5 * math.sqrt(len(signs[0]))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(a.size)


def test_each_bit_of_key_and_counter_changes_half_of_the_result():
    random = np.random.default_rng(0)
    words = random.integers(0, 2**32, (6, 500), np.uint32)
    base = np.stack(generator.philox(words[:2], words[2:]))
    for word, bit in itertools.product(range(6), range(0, 32, 5)):
        flipped = words.copy()
        flipped[word] ^= np.uint32(1 << bit)
        changed = np.bitwise_count(base ^ np.stack(generator.philox(flipped[:2], flipped[2:]))).sum()
        assert abs(int(changed) - 32_000) < 5 * math.sqrt(16_000)


# What is dropped.


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_rate(rate):
    """Of all, of each row and of each column within what all but one in 10⁸ of binomial numbers are."""
    dropped = ~kept((1000, 800), rate)
    for count in dropped.sum(), dropped.sum(0), dropped.sum(1):
        low, high = scipy.stats.binom.interval(1 - 1e-8, dropped.size // count.size, rate)
        assert ((low <= count) & (count <= high)).all()


@pytest.mark.parametrize("shape", [(1,), (17,), (257,), (5, 8), (3, 5, 24), (1000, 1), (2, 4104)])
def test_kernel_and_reference_agree_to_the_bit(shape):
    dtype = "bfloat16" if len(shape) == 2 else "float32"
    x, residual = jnp.asarray(np.random.default_rng(0).standard_normal((2, *shape)), dtype)
    for r in None, residual:
        run = lambda x, i: jtile.dropout(x, 0.3, KEY, residual=r, implementation=i)  # noqa: E731, B023
        kernel, reference = (jax.jit(run, static_argnums=1)(x, i) for i in IMPLEMENTATIONS)
        assert kernel.dtype == x.dtype
        np.testing.assert_array_equal(kernel, reference)


def test_means_what_flax_does():
    """Either zero, or the element over the probability that it is kept: sixteen bits tell that."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((40, 200)))
    for rate in 0.25, 0.1:
        ours = jtile.dropout(x, rate, KEY)
        flax = nnx.Dropout(rate, rngs=nnx.Rngs(0), deterministic=False)(x)
        both = (ours != 0) & (flax != 0)
        np.testing.assert_allclose(ours[both], flax[both], rtol=2e-5)
        assert ((ours == 0) | (jnp.abs(ours / x * (1 - rate) - 1) < 2e-5)).all() and both.mean() > 0.5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ends_of_the_rate(implementation):
    x, residual = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 40)))
    run = functools.partial(jtile.dropout, key=KEY, implementation=implementation)
    np.testing.assert_array_equal(run(x, 0.0), x)
    np.testing.assert_array_equal(run(x, 0.0, residual=residual), x + residual)
    np.testing.assert_array_equal(run(x, 1), jnp.zeros_like(x))
    np.testing.assert_array_equal(run(x, 1.0, residual=residual), residual)
    np.testing.assert_array_equal(jax.grad(lambda x: run(x, 1.0).sum())(x), jnp.zeros_like(x))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_drops_the_same(implementation):
    x, residual, dy = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 50)))
    run = lambda x, r: jtile.dropout(x, 0.4, KEY, residual=r, implementation=implementation)  # noqa: E731
    _, pullback = jax.vjp(run, x, residual)
    dx, dresidual = pullback(dy)
    np.testing.assert_array_equal(dx, run(dy, None))
    np.testing.assert_array_equal(dresidual, dy)


def test_dropped_values_do_not_leak():
    keep = kept((8, 64), 0.5)
    x = jnp.where(keep, 1.0, jnp.nan)
    assert np.isfinite(jtile.dropout(x, 0.5, KEY)).all()
    assert np.isfinite(jax.grad(lambda x: jtile.dropout(x, 0.5, KEY).sum())(x)).all()


def test_place_decides_and_not_size():
    """A row's and a column's number, whatever dtypes are and whatever comes after them."""
    whole = kept((40, 96), 0.5)
    np.testing.assert_array_equal(kept((7, 96), 0.5), whole[:7])
    np.testing.assert_array_equal(kept((40, 29), 0.5), whole[:, :29])
    np.testing.assert_array_equal(kept((5, 8, 96), 0.5).reshape(40, 96), whole)


# Keys.


def test_keys_of_every_kind():
    raw, shape = jax.random.PRNGKey(3), (20, 64)
    np.testing.assert_array_equal(kept(shape, 0.5, raw), kept(shape, 0.5, jax.random.key(3)))
    seen = {kept(shape, 0.5, jax.random.key(i)).tobytes() for i in range(5)}
    for impl in "rbg", "unsafe_rbg":
        seen |= {kept(shape, 0.5, jax.random.key(i, impl=impl)).tobytes() for i in range(5)}
    assert len(seen) == 10  # the two have the same words in their keys
    for word in range(4):  # every one counts
        changed = jnp.arange(4, dtype=jnp.uint32).at[word].add(1)
        assert (kept(shape, 0.5, changed) != kept(shape, 0.5, jnp.arange(4, dtype=jnp.uint32))).mean() > 0.3


def test_vmap_means_what_it_does_with_jax_random():
    """One key for all drops the same for all; keys that are mapped over drop what each does alone."""
    x, keys = jnp.ones((3, 5, 40)), jax.random.split(KEY, 3)
    drop = functools.partial(jtile.dropout, rate=0.5, implementation="interpret")
    same = jax.vmap(lambda x: drop(x, key=KEY))(x)
    np.testing.assert_array_equal(same[0], same[2])
    np.testing.assert_array_equal(same[0], drop(x[0], key=KEY))
    each = jax.jit(jax.vmap(lambda x, k: drop(x, key=k)))(x, keys)
    np.testing.assert_array_equal(each, jnp.stack([drop(a, key=k) for a, k in zip(x, keys, strict=True)]))


# Devices.


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("i"), P(None, "i"), P(None, None, "i"), P("j", None, "i"), P(("i", "j"))], ids=str)
def test_the_same_on_any_devices(spec, kind):
    shape = (8, 4, 64)
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(kind,) * 2)
    drop = functools.partial(jtile.dropout, rate=0.3, key=KEY, implementation="interpret")
    with jax.set_mesh(mesh):
        y = jax.jit(drop)(jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec)))
    np.testing.assert_array_equal(np.asarray(y) != 0, kept(shape, 0.3))


@pytest.mark.parametrize("split", [{0: "i"}, {1: "j", -1: "i"}, {0: ("i", "j")}], ids=str)
def test_the_same_under_shard_map(split):
    shape = (8, 4, 64)
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    spec = P(*(split.get(dim, split.get(dim - 3)) for dim in range(3)))
    drop = functools.partial(jtile.dropout, rate=0.3, key=KEY, split=split)
    y = jax.jit(jax.shard_map(drop, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.ones(shape))
    np.testing.assert_array_equal(np.asarray(y) != 0, kept(shape, 0.3))


def test_columns_that_devices_cannot_split_are_gathered():
    """Eight neighbours share a counter: 24 columns make three such groups, which four devices cannot share."""
    mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((3, 24)), NamedSharding(mesh, P(None, "i")))
    y = jax.jit(lambda x: jtile.dropout(x, 0.3, KEY))(x)
    np.testing.assert_array_equal(np.asarray(y) != 0, kept((3, 24), 0.3))


@pytest.mark.parametrize("tile", [op.Tile(4, 16, 1), op.Tile(1, 64, 4), op.Tile(2, 512, 2)])
def test_blocks_of_any_size(tile):
    rows, columns, words = jnp.arange(9), jnp.arange(0, 264, 8), jax.random.key_data(KEY)
    kernel = interpret_pallas(functools.partial(op.forward_kernel, tile=tile, threshold=round(0.4 * 2**16)))
    (y,) = jax.jit(kernel)(jnp.ones((9, 264)), None, rows, columns, words)
    np.testing.assert_array_equal(y != 0, kept((9, 264), 0.4))


def test_what_is_refused():
    x = jnp.zeros((3, 4))
    for rate in -0.1, 1.5, float("nan"):
        with pytest.raises(ValueError, match="^dropout: `rate` must be from 0 to 1, .* got"):
            jtile.dropout(x, rate, KEY)
    with pytest.raises(ValueError, match="^dropout: `rate` must be known when tracing"):
        jax.jit(lambda rate: jtile.dropout(x, rate, KEY))(0.1)
    words = jnp.zeros((2, 2), jnp.uint32)
    for wrong in jax.random.split(KEY, 2), jnp.zeros(2), words, words[0, :1], None, 0:
        with pytest.raises(ValueError, match="^dropout: `key` must be one key, .* got"):
            jtile.dropout(x, 0.1, wrong)
    for residual in x[0], x.astype(jnp.bfloat16):
        with pytest.raises(ValueError, match="^dropout: `residual` must be like `x`, float32 of shape"):
            jtile.dropout(x, 0.1, KEY, residual=residual)
    for wrong in x.astype(int), x[0, 0]:
        with pytest.raises(ValueError, match="^dropout: `x` must be floating point and have a dimension"):
            jtile.dropout(wrong, 0.1, KEY)
    with pytest.raises(ValueError, match="^dropout: `split` names dimension 2, and `x` has 2"):
        jtile.dropout(x, 0.1, KEY, split={2: "i"})
    with pytest.raises(ValueError, match="^dropout: parts of a last dimension that is split are multiples of 8"):
        jtile.dropout(x, 0.1, KEY, split={-1: "i"})
    with pytest.raises(ValueError, match="^dropout: `implementation` must be one of"):
        jtile.dropout(x, 0.1, KEY, implementation="cuda")
