"""The search for tiles, with pretended programs in place of a GPU's: compiling and refusing are real."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

import jtile
from jtile import tuning
from jtile.__main__ import main
from jtile.tuning import search, table


class Tile(NamedTuple):
    rows: int
    num_warps: int


class Tiles(NamedTuple):
    first: Tile
    second: Tile


scale = jtile.TileOp("scale", "x: ... d, index[d]: ... -> y: ... d", whole="d")


@scale.reference
def _(x, index, *, factor):
    return (x * factor,)


@scale.tiles
def _(x, *_, target, **options):
    yield Tile(8, 4)
    yield from (Tile(rows, 4) for rows in (1, 2, 8, 16, 512))


@scale.kernel
def _(x, index, *, tile, factor):
    rows, d = x.shape
    block = pl.BlockSpec((tile.rows, d), lambda i: (i, 0))

    def scale_kernel(x_ref, y_ref):
        y_ref[...] = factor * x_ref[...]

    grid, params = (pl.cdiv(rows, tile.rows),), jtile.CompilerParams(num_warps=tile.num_warps)
    call = pl.pallas_call(
        scale_kernel, grid=grid, in_specs=[block], out_specs=block, out_shape=x, compiler_params=params
    )
    return (call(x),)


def function(x, index):
    return scale(x, index, factor=2.0)


ARGUMENTS = jax.ShapeDtypeStruct((64, 512), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)


@pytest.fixture
def calls():
    with tuning.recording() as found:
        jtile.inspect(function, *ARGUMENTS)
    return found


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Milliseconds for each number of rows; 1 row computes something else. Collects what ran."""
    milliseconds, ran = {8: 20, 1: 5, 2: 10, 16: 40}, set()
    monkeypatch.setenv("JTILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(search, "CACHE", 1 << 10)

    def program(self, tile):
        def run():
            ran.add(tile.rows)
            time.sleep(milliseconds[tile.rows] * 1e-3)
            return [[operands[0] * (3 if tile.rows == 1 else 2)] for operands in self.sets]

        return run

    monkeypatch.setattr(search._Trial, "_program", program)
    return ran


def test_the_fastest_that_is_right_fits_and_does_not_spill(calls, measured):
    steps = []
    [found] = search.search(calls, lambda call, done, of: steps.append((call.op.name, done, of)))
    assert found.entry.tile == table.encoded(Tile(2, 4))
    assert found.entry.untuned_seconds > 1.2 * found.entry.seconds
    assert "differs by 5.0e-01" in found.refused[str(Tile(1, 4))]
    assert str(Tile(512, 4)) in found.refused  # of 2,048 values a thread
    assert measured == {1, 2, 8, 16} and found.tried == 5
    assert steps == [("scale", i + 1, 5) for i in range(5)]
    with tuning.Tuning([found.entry]):
        assert tuning.choose(*calls[0]) == (Tile(2, 4), "tuned")


class Other(NamedTuple):
    rows: int
    num_warps: int
    of_another_kernel: bool = True


def test_of_another_kind_of_tile_the_first_is_looked_at(calls, measured):
    kinds = jtile.TileOp("kinds", scale.signature)
    kinds.reference(lambda x, index, *, factor: (x * factor,))
    kinds.tiles(lambda x, *_, target, **options: iter([Tile(8, 4), Tile(2, 4), Other(16, 4), Other(4, 4)]))
    kinds.kernel(scale.kernel_function)
    [found] = search.search([calls[0]._replace(op=kinds)])
    assert measured == {2, 8, 16} and found.entry.tile == table.encoded(Tile(2, 4))
    assert found.refused == {str(Other(4, 4)): "its kind is far from the best"}


def test_what_was_measured_is_not_measured_again(calls, measured):
    [first] = search.search(calls)
    measured.clear()
    [second] = search.search(calls)
    assert not measured and second.entry == first.entry


def test_an_untuned_tile_that_is_wrong_is_an_error(calls, measured, monkeypatch):
    wrong = jtile.TileOp("wrong", scale.signature)
    wrong.reference(lambda x, index, *, factor: (x * 5,))
    wrong.tiles(scale.tiles_function)
    wrong.kernel(scale.kernel_function)
    with pytest.raises(RuntimeError, match=r"wrong: Tile\(rows=8, num_warps=4\), which runs untuned, is wrong"):
        list(search.search([calls[0]._replace(op=wrong)]))


def test_a_float32_result_of_bfloat16_operands_may_differ_by_their_rounding():
    got, expected = [jnp.full(8, 1.004)], [jnp.ones(8)]
    assert search._difference(got, expected, narrowest=2) is None
    assert "differs by 4.0e-03 of its norm, and 1e-03 is allowed" in search._difference(got, expected, narrowest=4)


def test_the_best_of_several_kernels_are_put_together():
    slow, fast = Tile(8, 4), Tile(2, 4)
    untuned = Tiles(slow, slow)
    times = {untuned: 4.0, Tiles(fast, slow): 3.0, Tiles(slow, fast): 3.5, Tiles(slow, Tile(1, 4)): 5.0}
    assert search._combined(untuned, times) == Tiles(fast, fast)
    assert search._combined(slow, {slow: 1.0}) is None


def test_operands_are_such_as_the_signature_says(calls):
    x, index = search._operands(calls[0], 0)
    assert x.shape == (64, 512) and index.dtype == jnp.int32
    assert 0 <= index.min() and 100 < index.max() < 512


def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match="JAX finds none here"):
        jtile.autotune(function, *ARGUMENTS)


def test_autotune_returns_what_is_then_in_force(calls, measured, monkeypatch):
    monkeypatch.setattr(search, "calls_of", lambda fn, *args: calls)
    lines = []
    with jtile.autotune(function, *ARGUMENTS, report=lines.append) as found:
        assert tuning.choose(*calls[0]).tile == Tile(2, 4) and tuning.current() == found
    assert len(lines) == 1 and "scale" in lines[0] and "times as fast as untuned" in lines[0]


# On the command line


def test_tune_goes_on_where_it_was_interrupted(calls, measured, monkeypatch, tmp_path, capsys):
    wider = calls[0]._replace(operands=(jax.ShapeDtypeStruct((64, 1024), jnp.float32), calls[0].operands[1]))
    monkeypatch.setattr(search, "calls_of", lambda fn, *args: [calls[0], wider])
    tuned = search._tuned
    monkeypatch.setattr(search, "_tuned", lambda call, step: interrupt() if call is wider else tuned(call, step))

    def interrupt():
        raise KeyboardInterrupt

    command = ["tune", "--function", "jtile:rms_norm", "--args", "f32[8, 8], f32[8]", "--output", str(tmp_path / "t")]
    command += ["--processes", "1"]
    assert main(command) == 130
    assert "[1/2]" in capsys.readouterr().out and len(tuning.load(tmp_path / "t")) == 1
    monkeypatch.setattr(search, "_tuned", tuned)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "2 calls have tiles to choose, 1 of them known" in printed and "[1/1]" in printed and "0 s left" in printed
    assert len(tuning.load(tmp_path / "t")) == 2


def test_processes_compile_a_part_of_the_tiles_each(calls, measured, monkeypatch):
    compiled = []
    monkeypatch.setattr(search._Trial, "built", lambda self, tile: compiled.append(tile))
    for part in range(2):
        search.prepare(calls, part, 2)
    assert sorted(compiled) == sorted(table.candidates(calls[0])) and compiled[:3] == table.candidates(calls[0])[::2]


def test_a_process_that_fails_to_compile_is_an_error(calls, monkeypatch, tmp_path):
    """Each of them finds no GPU."""
    monkeypatch.setattr(search, "calls_of", lambda fn, *args: calls)
    command = ["tune", "--function", "jtile:rms_norm", "--args", "f32[8, 8], f32[8]", "--output", str(tmp_path / "t")]
    with pytest.raises(RuntimeError, match="a process that compiles tiles ended with exit code 2"):
        main([*command, "--processes", "2"])


def test_a_model_is_found_by_name_and_size(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(search, "calls_of", lambda fn, *args: seen.append(jax.eval_shape(fn, *args)) or [])
    assert main(["tune", "--model", "llama:tiny", "--batch", "2", "--seq", "16", "--output", str(tmp_path / "t")]) == 0
    loss, gradient = seen[0]
    assert loss.shape == () and jax.tree.leaves(gradient)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--model", "llama"], "name a model and its size, such as llama:1b"),
        (["--model", "llama:3b"], "llama has no size '3b'. It has tiny, 125m, 1b, 8b"),
        (["--model", "lama:1b"], "No module named 'models.lama'"),
        (["--model", "llama:tiny", "--seq", "16", "--batch", "1"], "JAX finds none here"),
        (["--model", "llama:tiny", "--output", "/no/such/t"], "there is no folder /no/such"),
    ],
)
def test_what_cannot_be_tuned_is_said(arguments, reason, capsys):
    assert main(["tune", *arguments]) == 2
    assert reason in capsys.readouterr().err
