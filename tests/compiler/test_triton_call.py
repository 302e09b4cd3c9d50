import jax
import jax.numpy as jnp
import jax_triton
import pytest
import triton
import triton.language as tl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from jtile import TileOp
from jtile.compiler import launch
from jtile.compiler.target import Target
from jtile.compiler.triton_call import triton_call
from tests.compiler.messages import call_fields, fields, kernel_fields

H200 = Target.named("NVIDIA H200")
X = jax.ShapeDtypeStruct((1000,), jnp.float32)


@triton.jit
def add(x, y, size, scale, out, BLOCK: tl.constexpr = 128):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    tl.store(out + i, tl.load(x + i, inside) + scale * tl.load(y + i, inside), inside)


def scaled_sum(x, y, **options):
    """x + 2.5 y"""
    return triton_call(
        x,
        y,
        x.size,
        2.5,
        kernel=add,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=lambda meta: triton.cdiv(x.size, meta["BLOCK"]),
        **options,
    )


def lower(function, *shapes):
    """The kernels that a function launches on an H200, and its program."""
    with jax.sharding.use_abstract_mesh(H200.abstract_mesh), launch.recording() as launches:
        program = jax.jit(lambda *args: function(*args)).trace(*shapes).lower(lowering_platforms=("cuda",))
    return [one.compiled for one in launches], program.as_text()


@pytest.fixture
def messages(monkeypatch):
    """The launch messages made during a test."""
    made = []

    def payload(*args, make=launch.payload):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(launch, "payload", payload)
    return made


def parameters(payload):
    """Each launch parameter: its kind (1 array, 2 bool, 3 i32, 5 i64, 7 f32, 9 descriptor) and its value."""
    return [fields(value)[0] for number, value in call_fields(payload) if number == 5]


def test_triton_kernel(messages):
    [kernel], program = lower(scaled_sum, X, X)
    assert program.count("@triton_kernel_call_ffi") == 1
    assert (kernel.name, kernel.threads, kernel.spill_bytes) == ("add", 128, 0)
    assert "def add(x, y, size, scale, out" in kernel.source
    [message] = messages
    assert dict(call_fields(message))[2] == 8  # programs of 128 for 1000 elements
    array = (1, b"\x10\x10")  # aligned to 16 bytes, nothing to zero
    assert parameters(message) == [array, array, (3, 1000), (7, 2.5), array]


def test_options_and_metaparams(messages):
    [kernel], _ = lower(lambda x, y: scaled_sum(x, y, num_warps=8, BLOCK=512), X, X)
    assert kernel.threads == 256
    assert dict(call_fields(messages[0]))[2] == 2
    assert kernel_fields(messages[0])[2] == 8


def test_compiles_to_an_executable_for_absent_gpus():
    mesh = H200.make_mesh((2,), ("x",), (AxisType.Auto,))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh, P("x")))
    shared = jax.shard_map(scaled_sum, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    text = jax.jit(shared).lower(x, x).compile().as_text()
    assert text.count('custom_call_target="triton_kernel_call_ffi"') == 1
    assert "all-gather" not in text


@triton.jit
def shift(counts, x, step, flag, big, nothing, total, y, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i) + step
    if flag:
        value += big.to(tl.int32)
    if nothing is None:
        tl.store(y + i, value)
    tl.atomic_add(total, tl.sum(value))
    tl.atomic_add(counts, 1)


def test_every_kind_of_argument(messages):
    """Scalars in their types, a 1 and a None compiled in, results aliased and zeroed, an argument by name."""

    def call(counts, x):
        y = jax.ShapeDtypeStruct((64,), jnp.int32)
        total, counted = (jax.ShapeDtypeStruct((), jnp.int32) for _ in range(2))
        return triton_call(
            counts,
            x,
            1,
            nothing=None,
            flag=True,
            big=2**40,
            N=64,
            kernel=shift,
            out_shape={"counted": counted, "total": total, "y": y},
            grid=1,
            input_output_aliases={0: 0},
            zeroed_outputs=(0, 1),
        )

    shapes = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((), (64,))]
    with pytest.raises(TypeError, match="parameter total of kernel shift"):
        jax.eval_shape(
            lambda *args: triton_call(*args, 1, True, 3, None, kernel=shift, out_shape=[], grid=1, N=64), *shapes
        )
    assert jax.tree.map(lambda a: a.shape, jax.eval_shape(call, *shapes)) == {"counted": (), "total": (), "y": (64,)}
    [_], program = lower(call, *shapes)
    # The aliased result comes last: the array parameters take operands, then the results with parameters of their own.
    assert "output_tuple_indices = [2], operand_index = 0" in program
    zeroed, plain = (1, b"\x08\x04\x10\x10"), (1, b"\x10\x10")
    assert parameters(messages[0]) == [zeroed, plain, (2, 1), (5, 2**40), zeroed, plain]


@gluon.jit
def product(a, b, c, layout: gl.constexpr):
    """c = a @ b for 64 x 64 matrices: a arrives by a descriptor, b by pointers."""
    in_registers: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    a_shared = gl.allocate_shared_memory(gl.bfloat16, [64, 64], layout)
    arrived = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(arrived, count=1)
    mbarrier.expect(arrived, a.nbytes_per_cta)
    tma.async_load(a, [0, 0], arrived, a_shared)
    i = gl.arange(0, 64, layout=gl.SliceLayout(1, loaded))
    j = gl.arange(0, 64, layout=gl.SliceLayout(0, loaded))
    b_shared = gl.allocate_shared_memory(gl.bfloat16, [64, 64], layout, gl.load(b + i[:, None] * 64 + j[None, :]))
    fence_async_shared()
    mbarrier.wait(arrived, 0)
    total = warpgroup_mma(a_shared, b_shared, gl.zeros([64, 64], gl.float32, in_registers))
    i = gl.arange(0, 64, layout=gl.SliceLayout(1, in_registers))
    j = gl.arange(0, 64, layout=gl.SliceLayout(0, in_registers))
    gl.store(c + i[:, None] * 64 + j[None, :], total)


def call_product(a, b):
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    a = jax_triton.TensorDescriptor.from_array(a, [64, 64], layout)
    c = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return triton_call(a, b, kernel=product, out_shape=c, grid=(1,), layout=layout)


def test_gluon_kernel_with_a_tensor_descriptor(messages):
    matrix = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    [kernel], _ = lower(call_product, matrix, matrix)
    assert kernel.tensor_core_instructions == 64 // 16
    assert kernel.shared_bytes >= 2 * 64 * 64 * 2
    kinds, values = zip(*parameters(messages[0]), strict=True)
    assert kinds == (9, 3, 3, 5, 5, 1, 1)  # the descriptor, its sizes and strides, b, c
    assert values[1:5] == (64, 64, 64, 1)
    encoded = dict(fields(dict(fields(values[0]))[1]))
    assert encoded[1] == 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    assert encoded[2] == 3  # CU_TENSOR_MAP_SWIZZLE_128B


@gluon.jit
def two_roles(x, y, SIZE: gl.constexpr):
    gl.warp_specialize([(copy, (x, y, SIZE)), (copy, (x + SIZE, y + SIZE, SIZE))], [4], [64])


@gluon.jit
def copy(x, y, SIZE: gl.constexpr):
    i = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(y + i, gl.load(x + i))


def call_two_roles(x):
    return triton_call(x, kernel=two_roles, out_shape=x, grid=(1,), SIZE=128)


def test_warp_specialised_kernels_are_launched_with_all_their_warps(messages):
    [kernel], _ = lower(call_two_roles, jax.ShapeDtypeStruct((256,), jnp.float32))
    assert kernel.threads == 256
    assert kernel_fields(messages[0])[2] == 8


def test_vmap_launches_once_for_each_element():
    kernels, program = lower(jax.vmap(scaled_sum, (0, None)), jax.ShapeDtypeStruct((3, 1000), jnp.float32), X)
    assert len(kernels) == 1
    assert "stablehlo.while" in program
    nested = jax.vmap(jax.vmap(scaled_sum, (1, 1), 1), (None, 0))
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 3), (2, 4, 3))]
    assert jax.eval_shape(nested, *shapes).shape == (2, 4, 3)


def test_values_that_python_calls_equal_stay_apart(messages):
    """1 == 1.0 == True, but they are three kernels."""

    @triton.jit
    def fill(value, y):
        tl.store(y, value)

    def call(value):
        return triton_call(value, kernel=fill, out_shape=jax.ShapeDtypeStruct((), jnp.float32), grid=1)

    kernels, _ = lower(lambda: [call(1), call(1.0), call(True)])
    assert len(kernels) == 3
    assert [len(parameters(m)) for m in messages] == [1, 2, 2]


def test_no_programs():
    kernels, program = lower(scaled_sum, *[jax.ShapeDtypeStruct((0,), jnp.float32)] * 2)
    assert kernels == [] and "custom_call" not in program


def test_derivatives_are_not_guessed():
    with pytest.raises(NotImplementedError, match="derivative of kernel add.*TileOp"):
        jax.eval_shape(jax.grad(lambda x: scaled_sum(x, x).sum()), X)


def test_other_platforms():
    with pytest.raises(NotImplementedError, match="kernel add runs on NVIDIA GPUs.*lowered for cpu"):
        scaled_sum(jnp.ones(8), jnp.ones(8))


def test_explicit_sharding():
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="jax.shard_map"):
        jax.eval_shape(scaled_sum, *[jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P("x")))] * 2)


OUT = jax.ShapeDtypeStruct((1000,), jnp.float32)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (2, {"kernel": lambda x: x}, "decorated with @triton.jit or @gluon.jit"),
        (2, {"blok": 128}, "unexpected keyword argument 'blok'.*x, y, size, scale, out, BLOCK"),
        (7, {}, "too many positional arguments"),
        (2, {"size": 1000, "scale": 1.0, "out_shape": (OUT, OUT)}, "no parameter left for result 1"),
        (2, {"size": 1000, "out_shape": OUT, "scale": "2"}, "parameter scale.*got '2'"),
        (2, {"size": 1000, "out_shape": ()}, "parameter scale.*left without an argument: the call gives 3"),
        (
            1,
            {"size": 1000, "scale": 1.0, "out": OUT},
            "parameter out .*is an array after one that is left for a result",
        ),
        (2, {"size": 2**65, "scale": 1.0}, "parameter size .*a number of at most 64 bits"),
        (2, {"size": 1000, "scale": 1.0, "zeroed_outputs": (1,)}, "zeroed_outputs names results \\[1\\]"),
        (
            2,
            {"size": 1000, "scale": 1.0, "out": OUT, "input_output_aliases": {2: 0}},
            "these operands of add are no arrays",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, options, message):
    def call(*args):
        arrays = {k: v for k, v in options.items() if k != "out_shape" and hasattr(v, "shape")}
        given = {**options, **dict.fromkeys(arrays, args[0])}
        return triton_call(*args, **{"kernel": add, "out_shape": OUT, "grid": 8, **given})

    with pytest.raises(TypeError, match=message):
        jax.eval_shape(call, *[X] * arguments)


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), 2**31, (1, 1, 1, 1), -1])
def test_grids_outside_the_limits(grid):
    with pytest.raises(ValueError, match="2147483647, 65535, 65535"):
        jax.eval_shape(lambda x: triton_call(x, x, 1, 1.0, kernel=add, out_shape=x, grid=grid), X)


def test_as_the_kernel_of_an_op():
    """Differentiated, mapped and split over devices like any other op; elsewhere its reference runs."""
    forward = TileOp("scaled_sum", "x: ..., y: ... -> z: ...")

    @forward.reference
    def forward_reference(x, y):
        return (x + 2.5 * y,)

    @forward.kernel
    def forward_kernel(x, y):
        return (scaled_sum(x, y),)

    @forward.transpose
    def forward_transpose(operands, results, cotangents, **static):
        return cotangents[0], 2.5 * cotangents[0]

    def loss(x, y):
        return jnp.sum(forward(x, y)[0] ** 2)

    gradient = jax.grad(loss, (0, 1))
    x, y = jnp.arange(8.0), jnp.ones(8)
    assert gradient(x, y)[1].tolist() == [5 * (i + 2.5) for i in range(8)]
    kernels, _ = lower(gradient, X, X)
    assert [k.name for k in kernels] == ["add"]
    kernels, _ = lower(jax.vmap(lambda x, y: forward(x, y)[0]), *[jax.ShapeDtypeStruct((3, 1000), jnp.float32)] * 2)
    assert [k.name for k in kernels] == ["add"]

    mesh = H200.make_mesh((2,), ("x",), (AxisType.Auto,))
    split = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh, P("x")))
    text = jax.jit(gradient).lower(split, split).compile().as_text()
    assert text.count('custom_call_target="triton_kernel_call_ffi"') == 1
    assert "all-gather" not in text
