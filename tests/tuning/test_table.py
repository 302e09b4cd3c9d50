"""The choice of tiles: what is known, where it is looked for, and when it is in force."""

import json
import subprocess
import sys
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

import jtile
from jtile import tuning
from jtile.compiler.interpret import interpret_pallas
from jtile.compiler.target import Target
from jtile.tuning import Entry, Tuning, search, table
from jtile.tuning.table import Problem

H200, H100, A100 = map(Target.named, ("NVIDIA H200", "NVIDIA H100", "NVIDIA A100"))


class Tile(NamedTuple):
    rows: int
    num_warps: int


double = jtile.TileOp("double", "x: ... d -> y: ... d", whole="d")


@double.reference
def _(x, *, factor):
    return (factor * x,)


@double.tiles
def _(x, *, target, factor):
    yield Tile(8, 4)
    yield from (Tile(rows, warps) for rows in (1, 4, 8) for warps in (4, 8) if rows <= x.shape[0])


@double.kernel
def _(x, *, tile, factor):
    rows, d = x.shape
    block = pl.BlockSpec((tile.rows, d), lambda i: (i, 0))

    def double_kernel(x_ref, y_ref):
        y_ref[...] = factor * x_ref[...]

    params = jtile.CompilerParams(num_warps=tile.num_warps)
    grid = (pl.cdiv(rows, tile.rows),)
    call = pl.pallas_call(
        double_kernel, grid=grid, in_specs=[block], out_specs=block, out_shape=x, compiler_params=params
    )
    return (call(x),)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def entry(tile, *dims, chip=H200, dtype=jnp.float32, seconds=1e-6):
    problem = Problem.of(double, [shape(*dims, dtype=dtype)], (("factor", 2.0),))
    return Entry(problem, chip.name, chip.compute_capability, table.encoded(tile), seconds, 2e-6)


def choice(*dims, target=H200, dtype=jnp.float32):
    return tuning.choose(double, [shape(*dims, dtype=dtype)], (("factor", 2.0),), target)


def threads_of():
    [report] = jtile.inspect(lambda x: double(x, factor=2.0), shape(64, 128))
    return report.threads


# The choice


def test_untuned_it_is_the_first_that_the_op_offers_on_any_chip():
    unknown = Target("NVIDIA Unheard-of", 97, 1, 1 << 17)
    for target in (H200, A100, unknown, None):
        assert choice(64, 128, target=target) == (Tile(8, 4), "heuristic")


def test_sizes_up_to_the_next_power_of_two_share_a_tile_and_others_take_the_nearest():
    with Tuning([entry(Tile(4, 8), 64, 128), entry(Tile(1, 8), 1024, 128)]):
        assert choice(64, 128) == choice(33, 65) == (Tile(4, 8), "tuned")
        assert choice(100, 128) == (Tile(4, 8), "tuned for the nearest sizes, ... 64, d 128")
        assert choice(600, 128) == (Tile(1, 8), "tuned")
        assert choice(3000, 128) == (Tile(1, 8), "tuned for the nearest sizes, ... 1024, d 128")
        assert choice(64, 128 << 7).source == "heuristic"  # too far to tell


def test_where_the_heuristic_was_best_it_serves_other_sizes_too():
    with Tuning([entry(Tile(4, 8), 64, 128, seconds=2e-6)]):
        assert choice(64, 128) == (Tile(4, 8), "tuned")
        assert choice(100, 128).source == "heuristic"


def test_another_chip_serves_if_it_is_of_the_family_and_nothing_nearer_is_known():
    with Tuning([entry(Tile(4, 8), 64, 128)]):
        assert choice(64, 128, target=H100) == (Tile(4, 8), "tuned on NVIDIA H200")
        assert choice(64, 128, target=A100).source == "heuristic"
        with Tuning([entry(Tile(1, 8), 256, 128, chip=H100)]):
            assert choice(64, 128, target=H100).tile == Tile(1, 8)
            assert choice(64, 128, target=H200).tile == Tile(4, 8)


def test_dtypes_and_options_that_are_no_floats_must_be_the_same():
    with Tuning([entry(Tile(4, 8), 64, 128)]):
        assert choice(64, 128, dtype=jnp.bfloat16).source == "heuristic"
        options = (("factor", 3.0),)
        assert tuning.choose(double, [shape(64, 128)], options, H200).source == "tuned"
    problem = Problem.of(double, [shape(2, 2)], (("causal", True), ("factor", 2.0), ("mask", None), ("name", "x")))
    assert problem.options == (("causal", True), ("mask", None), ("name", "x"))


def test_a_tile_that_the_op_does_not_offer_is_not_taken():
    with Tuning([entry(Tile(2, 8), 64, 128), entry(Tile(4, 8), 256, 128)]):
        assert choice(64, 128).tile == Tile(4, 8)  # the next that is known
        assert choice(2, 128).tile == Tile(8, 4)  # which two rows do not offer


def test_a_variant_of_a_chip_is_that_chip():
    assert Target.named("NVIDIA H100 80GB HBM3").model == "NVIDIA H100"
    with Tuning([entry(Tile(4, 8), 64, 128, chip=H100)]):
        driver_says = H100.__class__(**{**vars(H100), "name": "NVIDIA H100 80GB HBM3"})
        assert choice(64, 128, target=driver_says) == (Tile(4, 8), "tuned")


def test_an_op_that_offers_no_tile_says_so():
    empty = jtile.TileOp("empty", "x: ... -> y: ...")
    empty.reference(lambda x: (x,))
    empty.kernel(lambda x, *, tile: (x,))
    empty.tiles(lambda x, *, target: iter(()))
    with pytest.raises(ValueError, match="empty: its @tiles function must yield at least the tile that runs untuned"):
        empty(jnp.ones(3), implementation="interpret")


def test_a_tile_of_other_things_than_numbers_is_refused():
    assert table.encoded(jtile.CompilerParams()) and table.encoded(None) is None
    with pytest.raises(TypeError, match="a tile is a NamedTuple or frozen dataclass of numbers"):
        table.encoded((jnp.sin,))


# In force


def test_the_kernel_is_compiled_with_the_tile_in_force_and_explain_tells():
    assert threads_of() == 4 * 32
    with Tuning([entry(Tile(4, 8), 64, 128)]):
        assert threads_of() == 8 * 32
        [report] = jtile.explain(lambda x: double(x, factor=2.0), shape(64, 128), target="NVIDIA H200")
        assert report.tile == "Tile(rows=4, num_warps=8) (tuned)"
    assert threads_of() == 4 * 32
    [report] = jtile.explain(lambda x: double(x, factor=2.0), shape(64, 128), target="NVIDIA H200")
    assert report.tile == "Tile(rows=8, num_warps=4) (heuristic)"
    assert "(heuristic)" in str(jtile.explain(lambda x: double(x, factor=2.0), shape(64, 128), target="NVIDIA H200"))


def test_interpreted_kernels_and_vmap_have_a_tile_too():
    x = jnp.arange(30.0).reshape(3, 5, 2)
    (y,) = jax.vmap(lambda x: double(x, factor=2.0, implementation="interpret"))(x)
    assert (y == 2 * x).all()


def test_what_jit_compiled_outside_is_compiled_anew_inside():
    traces = []

    @jax.jit
    def f(x):
        traces.append(len(tuning.current()))
        return x + 1

    f(1.0), f(1.0)
    for _ in range(2):
        with Tuning([entry(Tile(4, 8), 64, 128)]):
            f(1.0), f(1.0)
    f(1.0)
    assert traces == [0, 1]


def test_blocks_nest_and_are_a_threads_own():
    first, second = Tuning([entry(Tile(4, 8), 64, 128)]), Tuning([entry(Tile(1, 8), 64, 128)])
    with first:
        with second, first, second:
            assert choice(64, 128).tile == Tile(1, 8)
        assert choice(64, 128).tile == Tile(4, 8)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(choice(64, 128).source))
        thread.start()
        thread.join()
        assert seen == ["heuristic"]
    assert len(tuning.current()) == 0


def test_a_device_knows_its_part_under_a_sharding():
    """The sizes that count are those of one device's part."""
    mesh = H200.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    x = shape(128, 128).update(sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows", None)))
    with tuning.recording() as calls:
        jax.jit(lambda x: double(x, factor=2.0)).trace(x).lower(lowering_platforms=("cuda",)).compile()
    assert (64, 128) in {call.operands[0].shape for call in calls}
    assert all(call.target.model == "NVIDIA H200" for call in calls)


# Files


def test_files_are_read_back_merged_and_readable(tmp_path):
    one, two = Tuning([entry(Tile(4, 8), 64, 128)]), Tuning([entry(Tile(1, 4), 64, 128), entry(Tile(8, 8), 512, 128)])
    both = one | two
    assert len(both) == 2 and both.find(one.entries[0].problem, H200)[0].tile == table.encoded(Tile(1, 4))
    both.save(tmp_path / "tiles.json")
    assert tuning.load(tmp_path / "tiles.json") == both and tuning.load(str(tmp_path / "tiles.json")) == both
    content = json.loads((tmp_path / "tiles.json").read_text())
    assert {"rows": 8, "num_warps": 8} in [found["tile"] for found in content["tiles"]]
    assert content["tiles"][0]["sizes"].keys() == {"...", "d"} and content["tiles"][0]["op"] == "double"
    assert len((tmp_path / "tiles.json").read_text().splitlines()) == 2 + len(both)
    with both:
        tuning.save(tmp_path / "again.json")
    assert tuning.load(tmp_path / "again.json") == both
    assert "2.00 times as fast" in str(both)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_tiles_of_several_kernels_are_kept():
    class Both(NamedTuple):
        first: Tile
        second: Tile

    text = table.encoded(Both(Tile(1, 2), Tile(3, 4)))
    stored = Tuning([entry(Tile(4, 8), 64, 128)._replace(tile=text)])
    assert Tuning.from_text(stored.as_text(), "here").entries[0].tile == text


@pytest.mark.parametrize(
    "text, reason",
    [
        ("no JSON", "no file of tiles"),
        ('{"format": 99, "tiles": []}', "its format is 99, and this version of jtile reads 1"),
        ('{"format": 1, "tiles": [{"op": "double"}]}', "it lacks 'dtypes'"),
    ],
)
def test_what_is_no_file_of_tiles_is_refused(tmp_path, text, reason):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        tuning.load(tmp_path / "bad.json")


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        tuning.load(tmp_path / "none.json")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    Tuning([entry(Tile(4, 8), 64, 128)]).save(path)
    old = path.read_text()
    monkeypatch.setattr(Tuning, "as_text", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Tuning().save(path)
    assert path.read_text() == old and len(list(tmp_path.iterdir())) == 1


def test_what_is_shipped_is_read_and_offered_by_its_ops():
    for one in table.shipped():
        assert one.shipped and one.seconds <= one.untuned_seconds and one.compute_capability >= 80


TWO_PROCESSES = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
from jtile.tuning.table import agreed
print(agreed(lambda: "x" * 1000 + f"process {{jax.process_index()}}")[-9:])
"""


def test_the_first_process_decides_for_all(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        script = TWO_PROCESSES.format(port=free.getsockname()[1])
    runs = [
        subprocess.Popen([sys.executable, "-c", script, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [out.decode().splitlines()[-1] for out, _ in outputs] == ["process 0"] * 2, outputs


# The ops that declare tiles


def offered():
    """Of each op of jtile with tiles some call, and the tiles that it offers."""
    q, k = jax.random.normal(jax.random.key(0), (2, 2, 64, 2, 32), jnp.bfloat16)

    def everything(q, k):
        attended = jtile.dot_product_attention(q, k, k, is_causal=True)
        normalised = jtile.rms_norm(attended.reshape(8, -1), jnp.ones(1024))
        losses = jtile.softmax_cross_entropy(normalised, jnp.arange(8))
        return losses.sum()

    with tuning.recording() as calls:
        jtile.inspect(jax.grad(everything, (0, 1)), q, k)
    return [pytest.param(call, id=call.op.name) for call in calls]


@pytest.mark.parametrize("call", offered())
def test_no_tile_changes_what_a_kernel_computes(call):
    """The first offered, one between and the last: the results differ by rounding alone."""
    given = search._operands(call, 0)
    tiles = table.candidates(call)
    options = dict(call.options)

    def results(tile):
        def kernel(*operands):
            rest = iter(operands)
            full = [None if x is None else next(rest) for x in call.operands]
            return call.op.kernel_function(*full, tile=tile, **options)

        return [r for r in jax.jit(interpret_pallas(kernel))(*given) if r is not None]

    expected = results(tiles[0])
    for tile in {tiles[len(tiles) // 2], tiles[-1]}:
        assert search._difference(results(tile), expected) is None, tile
