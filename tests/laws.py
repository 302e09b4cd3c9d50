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


def dropout(x, key, *, rate, implementation, **axes):
    """With the mesh axis of each dimension by its name."""
    split = {dim: axes[name] for dim, name in enumerate("bsd") if name in axes}
    return jtile.dropout(x, rate, key.astype("uint32"), split=split, implementation=implementation)


def softmax(x, mask, **options):
    """Masked as attention's scores are: for each batch its keys."""
    return jtile.softmax(x, mask=mask[:, None, :] != 0, **options)


def qk_norm_rope(q, scale, positions, **options):
    """Keys that are the queries."""
    return jtile.qk_norm_rope(q, q, scale, scale, positions, **options)


def flex_attention(query, slopes, **options):
    """ALiBi and a causal mask, of keys and values that are the queries."""

    def alibi(score, batch, head, query, key):
        return score + (slopes[head] * (key - query).astype(slopes.dtype) / 8).astype(score.dtype)

    mods = dict(score_mod=alibi, mask_mod=lambda batch, head, query, key: key <= query)
    return jtile.flex_attention(query, query, query, **mods, **options)


def norm(signature: str, d: int, **more) -> Case:
    return Case(signature, ROWS | {"d": d}, split="b s", typical=TYPICAL_ROWS | {"d": 4096}, **more)


CASES = {
    "rms_norm": (jtile.rms_norm, norm("x: b s d, scale: d -> y: b s d", 100)),
    "rms_norm_of_sum": (
        jtile.rms_norm,
        norm("x: b s d, scale: d, residual: b s d -> y: b s d, h: b s d", 72, options={"epsilon": 1e-5}),
    ),
    "layer_norm": (jtile.layer_norm, norm("x: b s d, scale: d, bias: d -> y: b s d", 84)),
    "layer_norm_of_sum": (
        jtile.layer_norm,
        norm("x: b s d, scale: d, residual: b s d -> y: b s d, h: b s d", 72, options={"epsilon": 1e-5}),
    ),
    "gated_rms_norm": (jtile.gated_rms_norm, norm("x: b s d, gate: b s d, scale: d -> y: b s d", 76)),
    "rms_norm_gated": (
        jtile.gated_rms_norm,
        norm("x: b s d, gate: b s d, scale: d -> y: b s d", 68, options={"norm_before_gate": True}),
    ),
    "group_norm": (
        jtile.group_norm,
        Case(
            "x: b h w c, scale: c -> y: b h w c",
            {"b": 4, "h": 4, "w": 2, "c": 24},
            options={"groups": 4},
            split="b",
            fixed="c",
            typical={"b": 4, "h": 32, "w": 32, "c": 640},
        ),
    ),
    "group_norm_with_bias": (
        jtile.group_norm,
        Case(
            "x: b s c, scale: c, bias: c -> y: b s c",
            {"b": 4, "s": 9, "c": 12},
            options={"groups": 3, "epsilon": 1e-5},
            split="b",
            fixed="c",
            typical={"b": 4, "s": 1024, "c": 480},
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
    "qk_norm_rope": (
        qk_norm_rope,
        Case(
            "q: b s h d, scale: d, positions: b s -> y: b s h d, z: b s h d",
            ROWS | {"h": 4, "d": 20},
            options={"epsilon": 1e-5},
            integers={"positions": (-100, 100_000)},
            split="b s",
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
    "dropout": (
        dropout,
        Case(
            "x: b s d, key: two -> y: b s d",
            ROWS | {"d": 64, "two": 2},
            options={"rate": 0.3},
            integers={"key": (0, 2**31 - 1)},
            split="b s d",
            axis_names={"b": "b", "s": "s", "d": "d"},
            fixed="two",
            typical=TYPICAL_ROWS | {"d": 4096, "two": 2},
        ),
    ),
    "softmax": (
        softmax,
        Case(
            "x: b s t, mask: b t -> y: b s t",
            ROWS | {"t": 36},
            options={"scale": 0.5, "is_causal": True},
            integers={"mask": (0, 2)},
            split="b",
            typical=TYPICAL_ROWS | {"t": 4096},
        ),
    ),
    "log_softmax": (
        jtile.log_softmax,
        Case(
            "x: b s t -> y: b s t",
            ROWS | {"t": 100},
            split="b s",
            typical=TYPICAL_ROWS | {"t": 4096},
        ),
    ),
    "linear_cross_entropy": (
        jtile.linear_cross_entropy,
        Case(
            "x: b d, weight: d v, labels: b -> loss: b",
            {"b": 32, "d": 20, "v": 132},
            options={"ignore_index": 3, "label_smoothing": 0.1, "z_loss": 1e-3, "logits_soft_cap": 20.0},
            integers={"labels": (0, "v")},
            split="b v",
            exchanged={"v": 3},
            axis_names={"v": "axis_name"},
            typical={"b": 512, "d": 1024, "v": 128_256},
        ),
    ),
    "weighted_linear_cross_entropy": (
        jtile.linear_cross_entropy,
        Case(
            "x: b s d, weight: d v, labels: b s, token_weights: b s -> loss:",
            ROWS | {"d": 20, "v": 132},
            options={"ignore_index": 3, "label_smoothing": 0.1, "z_loss": 1e-3, "logits_soft_cap": 20.0},
            integers={"labels": (0, "v")},
            split="b s v",
            exchanged={"v": 3 * 4 * 8},  # of each token of the one sum
            axis_names={"v": "axis_name"},
            typical={"b": 1, "s": 512, "d": 1024, "v": 128_256},
        ),
    ),
    "attention": (
        jtile.dot_product_attention,
        Case(
            ATTENTION,
            {"b": 2, "s": 40, "t": 72, "k": 2, "g": 3, "d": 16, "e": 16},
            split="b s k",
            axis_names={"s": "axis_name"},
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
            split="s",
            axis_names={"s": "axis_name"},
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
            integers={"key_value_seq_lengths": (0, "t")},
            split="b s k",
            axis_names={"s": "axis_name"},
            fixed="d e",
            typical={"b": 2, "s": 1024, "t": 1024, "k": 8, "g": 4, "d": 64, "e": 64},
        ),
    ),
    "flex_attention": (
        flex_attention,
        Case(
            "query: b s h d, slopes: n -> out: b s h d",
            {"b": 4, "s": 40, "h": 2, "n": 2, "d": 16},
            split="b",
            fixed="d",
            typical={"b": 2, "s": 1024, "h": 16, "n": 16, "d": 64},
        ),
    ),
}


@functools.cache
def trial(name: str) -> Trial:
    return Trial(*CASES[name])


# What these cases, beside another of their op, differ in: arithmetic, and what a part of the queries needs to know.
ARITHMETIC = ("kernel", "gradient", "forward_mode", "second_order", "dtypes", "shapes", "repeats", "compiles")
SHARDING = ("auto_sharding", "explicit_sharding", "shard_map")
SOME = dict.fromkeys(("layer_norm_of_sum", "rms_norm_gated", "group_norm_with_bias"), ARITHMETIC)
SOME |= {"causal_attention": ARITHMETIC + SHARDING}
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
@pytest.mark.parametrize("name", ["rms_norm", "rope", "gated_activation", "log_softmax", "softmax_cross_entropy"])
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
