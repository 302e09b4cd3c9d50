"""Random bits that kernels draw and draw again: functions of a key and of an element's place, and of nothing else.

The generator is Philox-4x32 of 7 rounds (Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3,
2011, section 4: 7 rounds pass every test of BigCrush, 6 do not). From a counter of 128 bits it makes as many random
ones, 16 for each of 8 neighbours in a row: about three instructions an element. Kernel and reference call the same
functions, so their bits are the same, whatever the tile and however devices share out the array.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt

COLUMNS = 8  # neighbours in a row that one counter serves
BITS = 16  # for each of them

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key after every round


def philox(key, counter):
    """The four random words of a counter of four words; arrays broadcast, and are no larger than they must be."""
    k0, k1 = (jnp.asarray(k, jnp.uint32) for k in key)
    c0, c1, c2, c3 = (jnp.asarray(c, jnp.uint32) for c in counter)
    for i in range(ROUNDS):
        if i:
            k0, k1 = k0 + jnp.uint32(WEYL[0]), k1 + jnp.uint32(WEYL[1])
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _product(x, multiplier):
    """The upper and the lower word: one instruction of a GPU. XLA cannot split `jax.lax.mulhi` over devices."""
    with jax.enable_x64(True):
        wide = lambda x: jax.lax.convert_element_type(x, jnp.uint64)  # noqa: E731
        product = wide(x) * wide(jnp.uint32(multiplier))
        return (product >> wide(jnp.uint32(32))).astype(jnp.uint32), product.astype(jnp.uint32)


def random_bits(key, rows, groups, plane=0):
    """Sixteen random bits for every element of a tile, as uint32 from 0 to 65,535.

    Args:
        key: two uint32 words, see `key_words`.
        rows: (m, 1) integers: each row's number in the whole array.
        groups: (1, n) integers: `column // COLUMNS` of the first of each 8 columns. A tile begins at a multiple of 8.
        plane: a scalar, or an array that broadcasts with `rows`, to number what rows and columns do not: a head's
            number among all those of a batch.

    Returns:
        (m, 8 n) random numbers.
    """
    w0, w1, w2, w3 = philox(key, (groups, plane, rows, 0))
    words = jnp.stack([jnp.stack([w0, w2], -1), jnp.stack([w1, w3], -1)], -1)  # ends with w0, w1, w2, w3 in that order
    halves = jnp.stack([words & jnp.uint32(2**BITS - 1), words >> jnp.uint32(BITS)], -1)
    return halves.reshape(w0.shape[0], COLUMNS * w0.shape[1])


def key_words(key: Key[Array, ""] | UInt[Array, " words"]) -> UInt[Array, "2"]:
    """Two words for the generator from a JAX key, typed or raw, of two words or any more."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    first, *others = [data[i : i + 2] for i in range(0, data.size, 2)]
    for more in others:  # of longer keys every word counts
        first = jnp.stack(philox(first, (*more, *[0] * (4 - more.size)))[:2])
    return first
