"""Every law for every op: `pytest tests/laws.py -k "rope and vmap"` picks one, `pytest -m gpu` runs them on a GPU."""

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jtile
from jtile.compiler.target import Target
from jtile.testing import LAWS, Case, Trial
from jtile.testing.laws import value_and_pullback

ROWS, TYPICAL_ROWS = {"b": 4, "s": 8}, {"b": 2, "s": 1024}
ATTENTION = "query: b s (k g) d, key: b t k d, value: b t k e -> out: b s (k g) e"

CASES = {
    "rms_norm": (
        jtile.rms_norm,
        Case(
            "x: b s d, scale: d -> y: b s d",
            ROWS | {"d": 100},
            split="b s",
            typical=TYPICAL_ROWS | {"d": 4096},
        ),
    ),
    "rms_norm_of_sum": (
        jtile.rms_norm,
        Case(
            "x: b s d, scale: d, residual: b s d -> y: b s d, h: b s d",
            ROWS | {"d": 72},
            options={"epsilon": 1e-5},
            split="b s",
            typical=TYPICAL_ROWS | {"d": 4096},
        ),
    ),
    "rope": (
        jtile.rope,
        Case(
            "x: b s h d, positions: b s -> y: b s h d",
            ROWS | {"h": 6, "d": 20},
            integers={"positions": (-100, 100_000)},
            split="b s h",
            fixed="d",
            typical=TYPICAL_ROWS | {"h": 32, "d": 128},
        ),
    ),
    "gated_activation": (
        jtile.gated_activation,
        Case(
            "gate: b s d, up: b s d -> y: b s d",
            ROWS | {"d": 84},
            split="b s d",
            typical=TYPICAL_ROWS | {"d": 14336},
        ),
    ),
    "softmax_cross_entropy": (
        jtile.softmax_cross_entropy,
        Case(
            "logits: b s v, labels: b s -> loss: b s",
            ROWS | {"v": 300},
            options={"ignore_index": 3, "label_smoothing": 0.1, "z_loss": 1e-3, "logits_soft_cap": 20.0},
            integers={"labels": (0, "v")},
            split="b s v",
            exchanged={"v": 3},
            axis_names={"v": "axis_name"},
            typical={"b": 1, "s": 512, "v": 128_256},
        ),
    ),
    "attention": (
        jtile.dot_product_attention,
        Case(
            ATTENTION,
            {"b": 2, "s": 40, "t": 72, "k": 2, "g": 3, "d": 16, "e": 16},
            split="b k",
            fixed="d e",
            typical={"b": 2, "s": 1024, "t": 1024, "k": 8, "g": 4, "d": 128, "e": 128},
        ),
    ),
    "causal_attention": (
        jtile.dot_product_attention,
        Case(
            f"{ATTENTION}, lse: b s (k g)",
            {"b": 2, "s": 72, "t": 72, "k": 2, "g": 1, "d": 24, "e": 16},
            options={"is_causal": True, "return_lse": True},
            split="b k",
            fixed="d e",
            typical={"b": 2, "s": 1024, "t": 1024, "k": 8, "g": 4, "d": 80, "e": 80},
        ),
    ),
    "attention_with_features": (
        jtile.dot_product_attention,
        Case(
            "query: b s (k g) d, key: b t k d, value: b t k e, bias: (k g) s t, sinks: (k g), key_value_seq_lengths: b "
            "-> out: b s (k g) e",
            {"b": 2, "s": 24, "t": 40, "k": 2, "g": 2, "d": 16, "e": 16},
            options={"is_causal": True, "logits_soft_cap": 4.0, "local_window_size": (30, None)},
            integers={"key_value_seq_lengths": (1, "t")},
            split="b k",
            fixed="d e",
            typical={"b": 2, "s": 1024, "t": 1024, "k": 8, "g": 4, "d": 64, "e": 64},
        ),
    ),
}


@functools.cache
def trial(name: str) -> Trial:
    return Trial(*CASES[name])


# The second case of attention differs from the first in arithmetic alone.
ARITHMETIC = ("kernel", "gradient", "forward_mode", "second_order", "dtypes", "shapes", "repeats", "compiles")
FEATURES = ("gradient", "second_order", "x64", "auto_sharding", "explicit_sharding", "exchanges", "shard_map")
SOME = {"causal_attention": ARITHMETIC, "attention_with_features": FEATURES}
TABLE = [(name, law) for name in CASES for law in SOME.get(name, LAWS)]


@pytest.mark.parametrize("name, law", TABLE)
def test_law(name, law):
    trial(name).check(law)


# The README shows the table. `python tests/laws.py` writes it there.

README = pathlib.Path(__file__).parent.parent / "README.md"
MARKS = "<!-- the laws: python tests/laws.py -->\n", "<!-- end of the laws -->"


def table() -> str:
    """Laws and ops, with a ✓ where some case of the op is held to the law by a test above."""
    ops = list(dict.fromkeys(op for op, _ in CASES.values()))
    checked = {(CASES[name][0], law) for name, law in TABLE}
    rows = [[f"`{law}`", LAWS[law].__doc__, *("✓" if (op, law) in checked else "" for op in ops)] for law in LAWS]
    header = ["law", "holds for", *(f"`{op.__name__}`" for op in ops)]
    lines = [header, ["---", "---", *[":-:"] * len(ops)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_readme_shows_the_table():
    _, _, rest = README.read_text().partition(MARKS[0])
    assert rest.partition(MARKS[1])[0] == table(), "python tests/laws.py writes it"
    assert all((op, law) in {(CASES[name][0], law) for name, law in TABLE} for op, _ in CASES.values() for law in LAWS)


# On a GPU the same laws bind the compiled kernels, and so do sizes that are met in practice.

SEVERAL_DEVICES = ("auto_sharding", "explicit_sharding", "gathering", "shard_map", "pmap")
WITHOUT = ("exchanges", *(SEVERAL_DEVICES if jax.device_count() == 1 else ()))  # the first needs no GPU anywhere
ON_GPU = [(name, law) for name, law in TABLE if law not in WITHOUT]


@pytest.mark.gpu
@pytest.mark.parametrize("name, law", ON_GPU)
def test_law_on_gpu(name, law):
    trial(name).check(law)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("law", ["gradient", "repeats"])
@pytest.mark.parametrize("name", CASES)
def test_typical_sizes_on_gpu(name, law, dtype):
    op, case = CASES[name]
    Trial(op, dataclasses.replace(case, sizes=case.typical, dtype=dtype)).check(law)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rms_norm", "rope", "gated_activation", "softmax_cross_entropy"])
def test_past_two_to_the_31_elements_on_gpu(name):
    """Four rows repeated until they fill it: the last four come out as they do alone."""
    op, case = CASES[name]
    few = Trial(op, dataclasses.replace(case, sizes=case.typical | {"b": 1, "s": 4}, dtype="bfloat16"))
    times = 2**31 // math.prod(few.case.sizes.values()) + 1

    def on_rows(change, arrays):
        return {n: change(x) if x.ndim > 1 else x for n, x in arrays.items()}

    @jax.jit
    def last_rows(*inputs):
        many = [on_rows(lambda x: jnp.tile(x, (1, times) + (1,) * (x.ndim - 2)), arrays) for arrays in inputs]
        found = value_and_pullback(few.kernel)(*many)
        return {kind: on_rows(lambda x: x[:, -4:], arrays) for kind, arrays in found.items()}

    inputs = few.operands(), few.cotangents()
    actual, (own, truth) = last_rows(*inputs), few.expected(value_and_pullback, *inputs)
    for tree in actual, own, truth:
        tree["gradient"].pop("scale", None)  # a sum over all rows
    few.agree(actual, (own, truth))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", "bk")
def test_grids_past_65535_in_y_and_z_on_gpu(dim):
    op, case = CASES["attention"]
    small = {"b": 1, "s": 2, "t": 3, "k": 1, "g": 1, "d": 16, "e": 16}
    Trial(op, dataclasses.replace(case, sizes=small | {dim: 65_540})).check("gradient")


# Two processes lower every op to the same program, so that one finds what the other has compiled.


def lowered(name: str) -> str:
    sound = trial(name)
    with jax.sharding.use_abstract_mesh(Target.named("NVIDIA H200").abstract_mesh):
        program = jax.jit(value_and_pullback(sound.function("triton")))
        text = program.trace(sound.operands(), sound.cotangents()).lower(lowering_platforms=("cuda",)).as_text()
    return hashlib.sha256(text.encode()).hexdigest()


def test_two_processes_lower_alike():
    script = f"import runpy; laws = runpy.run_path({__file__!r}); print(*map(laws['lowered'], laws['CASES']))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == [lowered(name) for name in CASES], run.stderr


if __name__ == "__main__":
    before, _, rest = README.read_text().partition(MARKS[0])
    README.write_text(before + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2])
