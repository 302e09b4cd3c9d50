"""`python -m jtile`."""

import html.parser
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

from jtile.__main__ import UsageError, main, parse

KERNELS = '''
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import triton, triton.language as tl
import jtile


def scale_kernel(x_ref, factor_ref, y_ref):
    x = x_ref[...] * factor_ref[...]
    y_ref[...] = x


def scale(x, factor, *, block=128, warps=4):
    """By blocks of rows."""
    rows = pl.BlockSpec((block, x.shape[1]), lambda i: (i, 0))
    columns = pl.BlockSpec((x.shape[1],), lambda i: (0,))
    return pl.pallas_call(
        scale_kernel,
        grid=(pl.cdiv(x.shape[0], block),),
        in_specs=[rows, columns],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=jtile.CompilerParams(num_warps=warps),
    )(x, factor)


def product(a, b, tma=None):
    def kernel(a_ref, b_ref, c_ref):
        c_ref[...] = jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32).astype(c_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(a.shape[0] // 128,),
        in_specs=[pl.BlockSpec((128, a.shape[1]), lambda i: (i, 0)), pl.BlockSpec(b.shape, lambda i: (0, 0))],
        out_specs=pl.BlockSpec((128, b.shape[1]), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), a.dtype),
        compiler_params=jtile.CompilerParams(tma=tma),
    )(a, b)


def chosen(order, x):
    """Blocks in an order that is read from memory, in an array whose results are written twice."""

    def kernel(order_ref, x_ref, whole_ref, y_ref):
        y_ref[...] = x_ref[...]
        y_ref[...] = y_ref[...] + 1

    in_specs = [pl.BlockSpec((16,), lambda i, order: (order[i],)), pl.BlockSpec(x.shape, lambda i, order: (0,))]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(4,), in_specs=in_specs, out_specs=pl.BlockSpec((16,), lambda i, order: (3 - i,))
    )
    shape = jax.ShapeDtypeStruct((64,), x.dtype)
    return pl.pallas_call(kernel, shape, grid_spec=grid_spec, compiler_params=jtile.CompilerParams())(order, x, x)


@triton.jit
def negate_kernel(x, y):
    i = tl.arange(0, 64)
    tl.store(y + i, -tl.load(x + i))


def by_hand(x):
    return jtile.triton_call(x, kernel=negate_kernel, out_shape=x, grid=1)


def tree(pair, options):
    assert options == {"name": "x", "sizes": [1, 2]}
    return scale(*pair)


def for_jax(x):
    def ours(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    return pl.pallas_call(ours, out_shape=x)(x)


def plain(x):
    return jnp.sin(x)


number = 3
'''


@pytest.fixture(scope="module", autouse=True)
def cold_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JTILE_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "users_kernels.py"
    path.write_text(KERNELS)
    return path


@pytest.fixture
def run(file, capsys):
    def run(function, *arguments):
        code = main(["inspect", f"{file}:{function}", *arguments])
        return code, *capsys.readouterr()

    return run


def line_of(text: str) -> int:
    [number] = [i for i, line in enumerate(KERNELS.splitlines(keepends=True), 1) if text in line]
    return number


# What it prints


def test_source_with_lines_and_resources_of_every_generation(run):
    code, out, err = run("scale", "--args", "f32[1000, 512], f32[512]", "--target", "NVIDIA H200")
    assert (code, err) == (0, "")
    load, store = line_of("x = x_ref"), line_of("    y_ref[...] = x\n")
    assert f"# users_kernels.py:{load}: x = x_ref[...] * factor_ref[...]\n    x_1 = tl.load(" in out
    assert f"# users_kernels.py:{store}: y_ref[...] = x\n    tl.store(" in out
    assert out.count("def scale_kernel(") == 1
    rows = [line for line in out.splitlines() if line.startswith("scale_kernel")]
    assert [re.search(r"sm_\d+", row)[0] for row in rows] == ["sm_80", "sm_89", "sm_90", "sm_100"]
    assert all(re.search(r"\d+ +[\d,]+ B +[\d,]+ B +128 +\d+% \(\d+ of \d+ warps: [a-z ]+\)", row) for row in rows)
    assert re.search(r"^ld\.global\.v4\.b32 +\d+ +\d+ +\d+ +\d+$", out, re.MULTILINE)


def test_tensor_cores_and_tma(run):
    _, out, _ = run("product", "--args", "bf16[512, 64], bf16[64, 128]")
    rows = [re.split(r"  +", line) for line in out.splitlines() if line.startswith("kernel  ")]
    head, *rows = rows
    used = {row[2]: [int(n) for n in row[-2:]] for row in rows}
    assert head[-2:] == ["tensor core", "TMA"]
    assert all(tensor_core > 0 for tensor_core, _ in used.values())
    assert used["sm_80"][1] == used["sm_89"][1] == 0
    assert re.search(r"wgmma\.mma_async +0 +0 +\d+ +0", out) and re.search(r"tcgen05\.mma +0 +0 +0 +[1-9]", out)
    _, out, _ = run("product", "--args", "bf16[512, 64], bf16[64, 128], tma=True", "--only")
    [row] = [re.split(r"  +", line) for line in out.splitlines() if re.search("^kernel .*sm_90", line)]
    assert int(row[-1]) > 0 and re.search(r"^cp\.async\.bulk\.tensor\.2d\.\S+ +[1-9]", out, re.MULTILINE)


def test_targets_chosen(run):
    chips = ["--target", "NVIDIA A100", "--target", "NVIDIA GeForce RTX 4090", "--only"]
    _, out, _ = run("scale", "--args", "f32[1024, 512], f32[512]", *chips)
    rows = [line for line in out.splitlines() if line.startswith("scale_kernel")]
    assert [re.search(r"sm_\d+", row)[0] for row in rows] == ["sm_80", "sm_89"]
    assert "Kernel scale_kernel for NVIDIA A100, NVIDIA GeForce RTX 4090:" in out


def test_static_and_nested_arguments(run):
    _, wide, _ = run("scale", "--args", "f32[1024, 512], f32[512], block=64, warps=8", "--only")
    assert "pid_0 * 32768" in wide and " 256 " in wide
    code, out, _ = run(
        "tree",
        "--args",
        "(f32[1024, 512], f32[512]), {'name': 'x', 'sizes': [1, 2]}",
        "--only",
        "--target",
        "NVIDIA L4",
    )
    assert code == 0 and "scale_kernel" in out


def test_gradient(capsys):
    arguments = ["inspect", "jtile:rms_norm", "--args", "bf16[64, 256], f32[256]", "--only"]
    assert main([*arguments, "--grad"]) == 0
    with_gradient = set(re.findall(r"^Kernel (\w+)", capsys.readouterr().out, re.MULTILINE))
    assert main(arguments) == 0
    assert set(re.findall(r"^Kernel (\w+)", capsys.readouterr().out, re.MULTILINE)) == {"rms_norm"} < with_gradient


def test_kernels_written_by_hand(run):
    code, out, _ = run("by_hand", "--args", "f32[64]", "--only")
    assert code == 0 and "tl.store(y + i, -tl.load(x + i))" in out


def test_a_chip_that_it_does_not_fit(run, monkeypatch):
    arguments = ["--args", "bf16[512, 256], bf16[256, 128]"]  # blocks of 64 KiB each
    code, out, err = run("product", *arguments, "--target", "NVIDIA L4", "--target", "NVIDIA H200", "--only")
    assert code == 1 and re.search(r"^NVIDIA L4: Kernel kernel .*needs [\d,]+ bytes of shared memory", err)
    assert "sm_89" not in out and "sm_90" in out
    monkeypatch.setattr("jtile.__main__.GENERATIONS", ("NVIDIA L4", "NVIDIA H200"))
    code, out, again = run("product", *arguments)  # where it is compiled for comparison alone, that is no failure
    assert code == 0 and again == err and "sm_90" in out


def test_kernels_written_for_jax(run):
    """They are shown as jtile has them, 48 elements and all, which JAX's backend refuses."""
    code, out, _ = run("for_jax", "--args", "f32[48]", "--only")
    assert code == 0 and "def ours(x_ref, y_ref):" in out
    assert re.search(r"^Shown of ours .*once .*:for_jax is wrapped in jtile.retarget_pallas", out, re.MULTILINE)
    assert "Shown of" not in run("scale", "--args", "f32[128, 64], f32[64]", "--only")[1]


def test_no_kernels(run, capsys):
    code, out, _ = run("plain", "--args", "f32[8]")
    assert code == 1 and "plain launches no kernels, and has no ops." in out
    main(["inspect", "jtile:rms_norm", "--args", "f32[8, 16], f32[16], implementation='xla'"])
    assert re.search(
        r"rms_norm +float32\[8,16\], float32\[16\] +reference +implementation='xla'", capsys.readouterr().out
    )


def test_as_a_program(file):
    """From the command line, as a module named, in the folder where it is."""
    command = [
        sys.executable,
        "-m",
        "jtile",
        "inspect",
        "users_kernels:scale",
        "--args",
        "f32[128,64],f32[64]",
        "--only",
    ]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Kernel scale_kernel for NVIDIA H200" in done.stdout


def test_help(capsys):
    assert main([]) == 0
    assert "inspect" in capsys.readouterr().out


# What it refuses


@pytest.mark.parametrize(
    "function, message",
    [
        ("jtile", "name a function as MODULE:FUNCTION"),
        ("jtile:", "name a function as MODULE:FUNCTION"),
        ("nowhere.at_all:f", "No module named 'nowhere'"),
        ("/nowhere/kernels.py:f", "there is no file /nowhere/kernels.py"),
        ("jtile:rms_nrom", "has no attribute 'rms_nrom'. jtile has .*rms_norm"),
        ("jtile:__name__", "is no function; it is 'jtile'"),
    ],
)
def test_functions_that_are_not_there(function, message, capsys):
    assert main(["inspect", function]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_module_that_fails_to_import_says_so(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        main(["inspect", "needs_more:f"])


def test_chips_that_are_not_known(run):
    code, _, err = run("scale", "--args", "f32[8,8], f32[8]", "--target", "H2000")
    assert code == 2 and "--target: jtile knows no chip named 'H2000'. It knows: NVIDIA A100" in err


def test_calls_that_do_not_fit(run, tmp_path):
    code, _, err = run("scale", "--args", "f32[8,8], blocks=8")
    assert code == 2 and re.search(
        r"--args: missing a required argument: 'factor'. It is .*\(x, factor, \*, block", err
    )
    code, _, err = run("scale", "--args", "f32[8,8], f32[8]", "--html", f"{tmp_path}/nowhere/page.html")
    assert code == 2 and f"--html: there is no folder {tmp_path}/nowhere to write page.html to." in err


def test_nothing_to_differentiate(run):
    code, _, err = run("plain", "--args", "i32[8]", "--grad")
    assert code == 2 and "--grad: no argument is an array of floats" in err


def test_arguments_parsed():
    found = parse("bf16[8, 128], f32[], [i8[3], None], (bool[2,], -1.5), name='f32[]', flag=True")
    s = jax.ShapeDtypeStruct
    args = [s((8, 128), jnp.bfloat16), s((), jnp.float32), [s((3,), jnp.int8), None], (s((2,), jnp.bool_), -1.5)]
    assert found == (args, {"name": "f32[]", "flag": True})
    assert parse("") == ([], {})


@pytest.mark.parametrize(
    "text, message",
    [
        ("f32[8", "does not read as the arguments of a call"),
        ("f32[8]) + g(", "does not read as the arguments of a call"),
        ("**{'a': 1}", "does not read as the arguments of a call"),
        ("x", "'x' is neither an array, such as f32.8, 128. or i32.., nor a Python literal"),
        ("f33[8]", "there is no type 'f33'. There are .*bf16"),
        ("f32[n]", "the shape of 'n' must be numbers"),
        ("f32[-1]", "the shape of '-1' must be numbers"),
        ("f32[2.0]", "the shape of '2.0' must be numbers"),
        ("f64[8]", "f64 has 64 bits, which JAX has with JAX_ENABLE_X64=1"),
    ],
)
def test_arguments_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)


# The page


class Checked(html.parser.HTMLParser):
    """Every element is closed in order; keeps the elements, and the text of each."""

    VOID = {"meta", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.elements = [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in self.VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def find(self, tag, **attributes):
        names = {k.replace("_", "-"): v for k, v in attributes.items()}
        return [(a, "".join(text)) for t, a, text in self.elements if t == tag and names.items() <= a.items()]


@pytest.fixture(scope="module")
def written(file, tmp_path_factory):
    """The page of each of some functions, read back."""
    pages = {}

    def written(function, arguments, *options):
        key = function, arguments, options
        if key not in pages:
            path = tmp_path_factory.mktemp("pages") / "page.html"
            main(["inspect", f"{file}:{function}", "--args", arguments, "--html", str(path), *options])
            parser = Checked()
            parser.feed(path.read_text())
            parser.close()
            assert not parser.open
            pages[key] = parser, path.read_text()
        return pages[key]

    return written


def test_the_page_needs_nothing_else(written):
    _, text = written("scale", "f32[1000, 512], f32[512]")
    assert not re.search(r"""(src|href)=|@import|url\(|https?://""", text)


def test_the_page_has_resources_for_each_chip(written):
    page, _ = written("scale", "f32[1000, 512], f32[512]")
    cells = [text for _, text in page.find("td")]
    for chip in ("NVIDIA A100 (sm_80)", "NVIDIA L4 (sm_89)", "NVIDIA H200 (sm_90)", "NVIDIA B200 (sm_100)"):
        assert chip in cells
    assert [a["data-view"] for a, _ in page.find("button")] == [
        a["id"] for a, _ in page.find("div", **{"class": "view"})
    ]
    assert [text for a, text in page.find("button") if a["aria-pressed"] == "true"] == ["NVIDIA H200"]  # the default


def test_lines_belong_together(written):
    """A line of Pallas, those of Triton that it became, and their instructions."""
    page, text = written("scale", "f32[1000, 512], f32[512]", "--only")
    panes = dict(zip(("Pallas", "Triton", "PTX"), re.split(r'<div class="pane"', text)[1:], strict=True))
    spans = {
        name: re.findall(r'<span data-(?:t="(\d+)" data-)?p="(\d+)">(.*?)</span>', pane) for name, pane in panes.items()
    }
    [loaded] = [p for _, p, line in spans["Pallas"] if "x = x_ref[...]" in line]
    [stored] = [p for _, p, line in spans["Pallas"] if "    y_ref[...] = x" in line]
    triton = {p: [t for t, q, _ in spans["Triton"] if q == p] for p in (loaded, stored)}
    assert any("tl.load(x_ref" in line for _, p, line in spans["Triton"] if p == loaded)
    [store] = triton[stored]
    instructions = {p: [line for t, q, line in spans["PTX"] if q == p] for p in (loaded, stored)}
    assert any("ld.global" in line for line in instructions[loaded])
    assert any("st.global" in line for line in instructions[stored])
    assert not any("st.global" in line for line in instructions[loaded])
    assert {t for t, q, _ in spans["PTX"] if q == stored} == {store}


def test_the_picture_of_tiles(written):
    """Eight programs, each of which reads and writes its own rows, and all of which read the factors."""
    page, _ = written("scale", "f32[1000, 512], f32[512]", "--only")
    tiles = [a["data-programs"].split() for a, _ in page.find("rect") if "data-programs" in a]
    own, all_ = [[str(i)] for i in range(8)], [str(i) for i in range(8)]
    assert tiles == [*own, *own, all_, *own]  # programs, x, factor, y
    titles = [text for _, text in page.find("title")]
    assert "[0:128, 0:512]" in titles and "[896:1024, 0:512]" in titles and "[0:512]" in titles
    assert titles.count("past the edge: 0 is read, nothing written") == 2  # 1000 rows in blocks of 128
    captions = [text for _, text in page.find("figcaption")]
    assert captions == ["programs 8", "x_ref float32[1000, 512], read", "factor_ref float32[512], read",
                        "y_ref float32[1000, 512], written"]  # fmt: skip


def test_the_picture_has_the_dimensions_that_programs_share_out(tmp_path, capsys):
    path = tmp_path / "page.html"
    query = "bf16[2, 256, 4, 64]"
    given = ["--args", ", ".join([query] * 3), "--target", "NVIDIA A100", "--only", "--html", str(path)]
    main(["inspect", "jtile:dot_product_attention", *given])
    parser = Checked()
    parser.feed(path.read_text())
    places = [text.strip() for _, text in parser.find("small")]
    assert places[:2] == ["[0, :, :, 0:64]", "[1, :, :, 0:64]"]  # of the query: blocks of queries and heads
    assert places[2] == "[:, 0:256, :, 0:64]"  # of the key: batch and heads


def test_what_programs_do_to_arrays(written):
    page, _ = written("chosen", "i32[4], f32[64]", "--only")
    assert [text for _, text in page.find("figcaption")] == [
        "programs 4",
        "order_ref int32[4], prefetched",
        "x_ref float32[64], read: blocks that operands choose",
        "whole_ref float32[64], unused",
        "y_ref float32[64], read and written",
    ]
    starts = [text for _, text in page.find("title") if re.fullmatch(r"\[\d+:\d+\]", text)]
    assert starts == ["[0:4]", "[0:64]", "[48:64]", "[32:48]", "[16:32]", "[0:16]"]


def test_large_grids_are_drawn_in_part(written):
    page, text = written("scale", "f32[100000, 512], f32[512]", "--only")
    assert "The first 128 of 782 are drawn." in text and "rows 0 to 16384 of 100000" in text


def test_the_page_of_a_kernel_written_by_hand(written):
    page, text = written("by_hand", "f32[64]", "--only")
    assert "written by hand" in text and not page.find("div", data_pane="Pallas")
    [store] = re.findall(r'<span data-t="(\d+)"><i>\d+</i>\s*tl.store', text)
    assert int(store) == line_of("tl.store(y + i, -tl.load(x + i))")
    assert re.search(rf'<span data-t="{store}">[^<]*st\.global', text)


def test_names_are_escaped(tmp_path):
    (tmp_path / "odd.py").write_text(KERNELS + textwrap.dedent("""
        def odd(x, *, name):
            return scale(x, x[0])
        """))  # fmt: skip
    path = tmp_path / "page.html"
    main(
        ["inspect", f"{tmp_path}/odd.py:odd", "--args", "f32[64, 64], name='<script>&'", "--only", "--html", str(path)]
    )
    assert "<title>" in path.read_text() and "name='<script>" not in path.read_text()
