"""Triton source to machine code: `build` compiles a kernel for a chip, or takes it from the cache."""

import base64
import collections
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import linecache
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from jtile import borrowed
from jtile.compiler import cache
from jtile.compiler.arguments import ALIGNMENT, Array
from jtile.compiler.kernel import Source, TileTooLarge
from jtile.compiler.params import CompilerParams
from jtile.compiler.target import Target


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel in machine code.

    Attributes:
      name: its entry point in the cubin.
      source: the Triton or Gluon it was made from.
      cubin: the machine code, an ELF file; empty where `shared_bytes` are more than the chip has.
      ptx: the assembly it was made from.
      compute_capability: what it was compiled for; 90 for 9.0.
      num_warps: warps in a thread block. A warp-specialised kernel has more than its parameters ask for.
      num_ctas: thread blocks in a cluster.
      shared_bytes: shared memory of a thread block.
      scratch_bytes, scratch_align: global memory that each program needs for its own (descriptors made on the device).
      tensor_memory_columns: tensor memory of a thread block (Blackwell), in columns.
      registers: of a thread, at most.
      spill_bytes: of a thread's values that found no register, and live in its stack frame in local memory.
      descriptors: how each tensor descriptor among the arguments is to be encoded, as Triton's launcher needs it.
    """

    name: str
    source: str
    cubin: bytes = dataclasses.field(repr=False)
    ptx: str = dataclasses.field(repr=False)
    compute_capability: int
    num_warps: int
    num_ctas: int
    shared_bytes: int
    scratch_bytes: int
    scratch_align: int
    tensor_memory_columns: int
    registers: int
    spill_bytes: int
    descriptors: tuple[dict[str, Any], ...]

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.num_warps

    @functools.cached_property
    def instructions(self) -> dict[str, int]:
        """How often the assembly has each instruction that computes matrix products or moves data."""
        found = re.findall(rf"^\s*(?:@\S+\s+)?({_NOTABLE})(?![\w:])", self.ptx, re.MULTILINE)
        return dict(sorted(collections.Counter(found).items()))

    @property
    def tensor_core_instructions(self) -> int:
        """Matrix products in the assembly: `mma`, `wgmma` or `tcgen05`, by the chip's generation."""
        return sum(n for name, n in self.instructions.items() if "mma" in name)

    @property
    def tma_instructions(self) -> int:
        """Copies of tiles by the Tensor Memory Accelerator in the assembly."""
        return sum(n for name, n in self.instructions.items() if name.startswith("cp.async.bulk.tensor"))


_NOTABLE = "|".join(
    (
        r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|ldmatrix|stmatrix",
        r"cp\.async\.bulk\.tensor\.\dd\.(?:shared::cluster|global|shared::cta)\.(?:global|shared::cta)",
        r"cp\.async\.c[ag]\.shared\.global",
        r"(?:ld|st)\.global(?:\.[\w:]+)*|(?:atom|red)(?:\.[\w:]+)*\.global(?:\.[\w:]+)*",
    )
)


def build(source: Source, params: CompilerParams, target: Target) -> Compiled:
    """Compiles a generated kernel.

    Raises:
      TileTooLarge: it does not fit the chip.
      NotImplementedError: Triton does not compile for the chip.
    """
    _check_target(source.label, params.num_ctas, target)
    e4m3 = any(argument.dtype == "float8_e4m3fn" for argument in source.arguments) or "tl.float8e4nv" in source.text
    if e4m3 and target.compute_capability < 89:
        raise NotImplementedError(
            f"Arithmetic with float8_e4m3fn needs compute capability 8.9 (Ada) or later; {target.name} has "
            f"{target.compute_capability / 10}, and kernel {source.label} uses it. Use float8_e5m2 or bfloat16 there."
        )
    options = dict(
        num_warps=params.num_warps,
        num_stages=params.num_stages,
        num_ctas=params.num_ctas,
        maxnreg=params.max_registers,
    )
    if "tl.device_assert(" in source.text:  # which Triton else leaves out; integers wrap around all the same
        options |= {"debug": True, "sanitize_overflow": False}
    signature = [argument.triton_type for argument in source.arguments]

    def make():
        function = load(source)
        names = function.arg_names
        pointers = (i for i, argument in enumerate(source.arguments) if isinstance(argument, Array))
        aligned = {(i,): [["tt.divisibility", ALIGNMENT]] for i in pointers}
        types = dict(zip(names, signature, strict=True))
        try:
            return _compile(function, types, {}, aligned, options, target, source.text, source.label)
        except Exception as error:
            if line := _failed_line(error, source.text):
                error.add_note(_origin(source, line))
            raise

    key = _key(target, options, source.name, source.text, signature)
    stages = params.num_stages if "tl.range(" in source.text else 1
    return _fitting(cache.fetch(key, make, _encode, _decode), source.label, stages, target)


def build_function(
    function,
    signature: Mapping[str, Any],
    constants: Mapping[Any, Any],
    attributes: Mapping[tuple[int, ...], list],
    options: Mapping[str, Any],
    target: Target,
) -> Compiled:
    """Compiles a hand-written `@triton.jit` or `@gluon.jit` function.

    Args:
      signature: for each parameter its type as Triton writes it (`"*bf16"`, `"i32"`), or `"constexpr"`.
      constants: values of the `constexpr` parameters, by name.
      attributes: what is known of each argument, as Triton's `ASTSource` takes it.
      options: Triton's compiler options.

    Raises: as `build` does.
    """
    code = function.fn.__code__
    label = f"{function.fn.__name__} ({code.co_filename}:{code.co_firstlineno})"
    _check_target(label, options.get("num_ctas", 1), target)
    spelt = {name: _spelt(value) for name, value in constants.items()}
    # Triton's own hash of the function covers its source, less the decorator, and every function and global it uses.
    what = type(function).__name__, code.co_filename, function.cache_key
    key = _key(target, options, *what, dict(signature), spelt, sorted(attributes.items()))

    def make():
        return _compile(function, signature, constants, attributes, options, target, function.src, label)

    return _fitting(cache.fetch(key, make, _encode, _decode), label, options.get("num_stages", 3), target)


def _spelt(constant) -> str:
    """A compile-time value as text that means the same in every process."""
    text = constant.cache_key if hasattr(constant, "cache_key") else repr(constant)
    if " at 0x" in text:
        raise TypeError(f"A constexpr value is known to the cache by its repr; {text} does not tell what it is.")
    return text


def _compile(function, signature, constants, attributes, options, target, text, label) -> Compiled:
    # What `triton.compile` does, less its own cache on disk, which would hold everything a second time.
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptx_version_from_options
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    gpu = GPUTarget("cuda", target.compute_capability, 32)
    make_source = GluonASTSource if isinstance(function, GluonJITFunction) else ASTSource
    source = make_source(function, dict(signature), dict(constants), dict(attributes))
    backend = make_backend(gpu)
    try:
        # Triton 3.10 changes this option's default.
        options = {"enable_fp_fusion": True, **options}
        parsed = backend.parse_options(dict(options))
        if not borrowed.custom_call_takes_cubin() and get_ptx_version_from_options(parsed, gpu.arch) > _READABLE_PTX:
            parsed = backend.parse_options({"ptx_version": _READABLE_PTX, **options})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        stages: dict[str, Any] = {}
        assembly, metadata = {}, {"target": gpu, **vars(parsed)}
        backend.add_stages(stages, parsed, source.language)
        codegen = backend.get_codegen_implementation(parsed)
        module = source.make_ir(gpu, parsed, codegen, backend.get_module_map(), context)
        for stage, run in stages.items():
            module = assembly[stage] = run(module, metadata)
            if metadata.get("shared", 0) > target.shared_bytes_per_block:
                break  # `_fitting` refuses it: of tiles far too large, the stages left would take minutes
    except Exception as error:
        error.add_note(f"jtile was compiling kernel {label} for {target.name}.")
        if "Cannot find ptxas" in str(error):
            error.add_note(
                "This build of Triton has no assembler of its own. Set TRITON_PTXAS_PATH and "
                "TRITON_PTXAS_BLACKWELL_PATH to the ptxas of a CUDA toolkit, 12.8 or later (nvidia-cuda-nvcc on PyPI)."
            )
        raise
    cubin = assembly.get("cubin", b"")
    registers, spill_bytes = _resources(cubin) if cubin else (0, 0)
    return Compiled(
        name=metadata.get("name", function.fn.__name__),
        source=text,
        cubin=cubin,
        ptx=assembly.get("ptx", ""),
        compute_capability=target.compute_capability,
        num_warps=metadata["num_warps"],
        num_ctas=metadata["num_ctas"],
        shared_bytes=metadata["shared"],
        scratch_bytes=metadata.get("global_scratch_size") or 0,
        scratch_align=metadata.get("global_scratch_align") or 1,
        tensor_memory_columns=metadata.get("tmem_size") or 0,
        registers=registers,
        spill_bytes=spill_bytes,
        descriptors=tuple(metadata.get("tensordesc_meta") or ()),
    )


def load(source: Source):
    """Runs the generated module; returns the function that is decorated with `@triton.jit`."""
    # No real path: it would end up in the cubin, which must be the same for every user. The digest keeps kernels of one
    # name apart.
    return load_text(source.name, source.text, f"<jtile {source.name} {source.digest}>")


def load_text(name: str, text: str, file: str):
    """Runs a module and returns a function of it. Python's line cache holds its text, for Triton and tracebacks."""
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module: dict[str, Any] = {"__name__": f"jtile.generated.{name}"}
    exec(compile(text, file, "exec"), module)
    return module[name]


def _failed_line(error: BaseException, text: str) -> int | None:
    """The line of a module, counted from 1, that Triton could not compile, if it says."""
    from triton import CompilationError

    if not isinstance(error, CompilationError) or error.node is None or error.src not in text:
        return None
    # Triton counts the lines of the function that it was compiling.
    return text[: text.index(error.src)].count("\n") + error.node.lineno


def _origin(source: Source, line: int) -> str:
    """A line of the source, and the user's line that it came from."""
    place = source.origins[line - 1] if line <= len(source.origins) else None
    note = f"The line of the generated source is {line}: {source.text.splitlines()[line - 1].strip()}"
    return note + (f"\nIt came from {place.file}:{place.line}: {place.text}" if place else "")


def _check_target(label: str, num_ctas: int, target: Target) -> None:
    if target.compute_capability < 80:
        raise NotImplementedError(
            f"Triton compiles for compute capability 8.0 (Ampere) and later; {target.name} has "
            f"{target.compute_capability / 10}, so kernel {label} cannot run there. Use implementation='xla'."
        )
    if num_ctas > 1 and target.compute_capability < 90:
        raise NotImplementedError(
            f"Clusters of thread blocks need compute capability 9.0 (Hopper) or later; {target.name} has "
            f"{target.compute_capability / 10}, and kernel {label} asks for num_ctas={num_ctas}. Use num_ctas=1."
        )


# Of every chip since Ampere: threads and registers of a block, columns of a multiprocessor's tensor memory.
MOST_THREADS, MOST_REGISTERS, MOST_COLUMNS = 1024, 65_536, 512


def _fitting(compiled: Compiled, label: str, num_stages: int, target: Target) -> Compiled:
    """The kernel itself, if the chip can launch it."""
    if compiled.shared_bytes > target.shared_bytes_per_block:
        fewer = f", or num_stages (now {num_stages})" if num_stages > 1 else ""
        raise TileTooLarge(
            f"Kernel {label} needs {compiled.shared_bytes:,} bytes of shared memory; a thread block on {target.name} "
            f"has {target.shared_bytes_per_block:,}. Shrink its blocks{fewer}."
        )
    if compiled.threads > MOST_THREADS:
        raise TileTooLarge(
            f"Kernel {label} needs {compiled.threads:,} threads; a thread block has at most {MOST_THREADS:,}. "
            "Lower num_warps."
        )
    registers = -(-compiled.registers // 8) * 8  # as they are handed out
    if registers * compiled.threads > MOST_REGISTERS:
        raise TileTooLarge(
            f"Kernel {label} needs {registers} registers for each of {compiled.threads:,} threads; a thread block has "
            f"{MOST_REGISTERS:,}. Lower max_registers to {MOST_REGISTERS // compiled.threads // 8 * 8}, or num_warps."
        )
    if compiled.tensor_memory_columns > MOST_COLUMNS:
        raise TileTooLarge(
            f"Kernel {label} needs {compiled.tensor_memory_columns} columns of tensor memory; a multiprocessor of "
            f"{target.name} has {MOST_COLUMNS}. Shrink its blocks."
        )
    return compiled


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, from the ELF section `.nv.info` that the CUDA driver itself reads.

    The section is a list of attributes: a byte of format, a byte of attribute, two bytes that are the value, or its
    size where the format is 4. Of interest are REGCOUNT (0x2f) and FRAME_SIZE (0x11), each (symbol, value). Triton's
    kernels keep nothing but spilled registers in their stack frame.
    """
    (sections_at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, sections_at + i * size) for i in range(count)]
    names_at = sections[names][4]
    found = {}
    for name, _, _, _, at, length in sections:
        if cubin[names_at + name :].startswith(b".nv.info\0"):
            end = at + length
            while at < end:
                form, attribute, value = struct.unpack_from("<BBH", cubin, at)
                if attribute in (0x2F, 0x11):
                    _, found[attribute] = struct.unpack_from("<II", cubin, at + 4)
                at += 4 + (value if form == 4 else 0)
    return found[0x2F], found[0x11]


# Where JAX, not Triton, assembles the kernel, its assembler may be as old as CUDA 13.0's, which reads PTX 9.0.
_READABLE_PTX = 90


def _key(target: Target, *parts) -> str:
    compiler = triton_version(), _triton_file()
    chip = target.compute_capability, target.shared_bytes_per_block
    return cache.key_of(*compiler, borrowed.custom_call_takes_cubin(), *chip, *parts)


@functools.cache
def _triton_file() -> str | None:
    """Where Triton is: machine code names the files of its lines, some of Triton's among them."""
    spec = importlib.util.find_spec("triton")
    return None if spec is None else spec.origin


@functools.cache
def triton_version() -> str:
    """The version installed.

    Raises:
      ImportError: none is.
    """
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            "jtile compiles kernels with Triton, which is not installed: pip install 'jtile[cuda13]' on a machine with "
            "a GPU, 'jtile[offline]' on one without."
        ) from None


def _encode(compiled: Compiled) -> bytes:
    fields = dataclasses.asdict(compiled) | {"cubin": base64.b64encode(compiled.cubin).decode()}
    return zlib.compress(json.dumps(fields).encode())


def _decode(body: bytes) -> Compiled:
    fields = json.loads(zlib.decompress(body))
    fields["cubin"] = base64.b64decode(fields["cubin"])
    fields["descriptors"] = tuple(fields["descriptors"])
    return Compiled(**fields)
