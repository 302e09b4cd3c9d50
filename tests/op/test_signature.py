import re

import pytest

from jtile.op.signature import Signature, Term

ATTENTION = "query: ... s (k g) d, key: ... t k d, bias?: s t -> out: ... s (k g) d; lse: ... s (k g)"


def test_parse():
    signature = Signature.parse(ATTENTION, whole="s d")
    assert signature.operands == (
        Term("query", (("s",), ("k", "g"), ("d",)), leading=True),
        Term("key", (("t",), ("k",), ("d",)), leading=True),
        Term("bias", (("s",), ("t",)), optional=True),
    )
    assert signature.results == (
        Term("out", (("s",), ("k", "g"), ("d",)), leading=True),
        Term("lse", (("s",), ("k", "g")), leading=True, saved=True),
    )
    assert signature.whole == {"s", "d"}


def test_positions_and_reductions():
    signature = Signature.parse("x: ... v d, index[v]: ... -> logsumexp lse: ... d, picked: ...", whole="d")
    assert signature.operands[1] == Term("index", (), leading=True, indexes="v")
    assert signature.results[0] == Term("lse", (("d",),), leading=True, reduction="logsumexp")
    assert signature.results[1].reduction == "sum"
    assert signature.derivative_whole == {"v", "d"}


@pytest.mark.parametrize("dims", ["... s (k g) d", "...", "a b", "scalar"])
def test_terms_print_as_they_are_written(dims):
    [term] = Signature.parse(f"x: {'' if dims == 'scalar' else dims} -> y:").operands
    assert str(term) == dims


@pytest.mark.parametrize(
    "text, whole, message",
    [
        ("x: d", "", "a signature is 'operands -> results', got 'x: d'"),
        ("x: d -> y: d -> z: d", "", "a signature is 'operands -> results', got 'x: d -> y: d -> z: d'"),
        ("x d -> y: d", "", "cannot read 'x d' in the signature 'x d -> y: d': write 'name: ... a b (c d)'"),
        ("x: d ... -> y:", "", "cannot read 'x: d ...' in the signature 'x: d ... -> y:': write 'name: ... a b (c d)'"),
        ("x: d*2 -> y: d", "", "cannot read 'x: d*2' in the signature 'x: d*2 -> y: d': write 'name: ... a b (c d)'"),
        ("x: (d) -> y: d", "", "cannot read 'x: (d)' in the signature 'x: (d) -> y: d': write 'name: ... a b (c d)'"),
        ("x: d -> y: d", "e", "whole dimension 'e' is not one of the operands' in 'x: d -> y: d'"),
        ("x: d -> y: e", "", "dimension 'e' of `y` is not one of the operands' in 'x: d -> y: e'"),
        ("x: d -> y: ... d", "", "`y` has leading dimensions, and no operand has, in 'x: d -> y: ... d'"),
        ("x: d, x: d -> y: d", "", "`x` stands twice in 'x: d, x: d -> y: d'; every name must differ"),
        ("x: d d -> y: d", "", "`x` has dimension 'd' twice in 'x: d d -> y: d'; rename one of them"),
        ("x: d -> y[d]:", "", "`y[d]` must be an operand, and index one's dimension, in 'x: d -> y[d]:'"),
        ("x[e]: d -> y:", "", "`x[e]` must be an operand, and index one's dimension, in 'x[e]: d -> y:'"),
        (
            "x: d -> logsumexp y: d",
            "",
            "`y` must be a result that lacks a dimension to reduce over, in 'x: d -> logsumexp y: d'",
        ),
        ("-> y:", "", "there are no operands in '-> y:'"),
        ("x: d ->", "", "there are no results in 'x: d ->'"),
    ],
)
def test_parse_errors(text, whole, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Signature.parse(text, whole)


@pytest.mark.parametrize(
    "shapes, sizes, leading",
    [
        ([(2, 3, 5, 6, 7), (2, 3, 9, 2, 7), None], dict(s=5, t=9, k=2, g=3, d=7), (2, 3)),
        ([(5, 6, 7), (9, 6, 7), (5, 9)], dict(s=5, t=9, k=6, g=1, d=7), ()),
        ([(0, 5, 6, 7), (0, 9, 1, 7), None], dict(s=5, t=9, k=1, g=6, d=7), (0,)),
        ([(5, 0, 7), (9, 2, 7), None], dict(s=5, t=9, k=2, g=0, d=7), ()),
    ],
)
def test_check(shapes, sizes, leading):
    assert Signature.parse(ATTENTION).check("attention", shapes) == (sizes, leading)


@pytest.mark.parametrize(
    "shapes, message",
    [
        (
            [(6, 7), (9, 2, 7), None],
            "attention: `query` has dimensions (... s (k g) d), so at least 3 of them, but its shape is (6, 7)",
        ),
        (
            [(5, 6, 7), (9, 2, 7), (1, 5, 9)],
            "attention: `bias` has dimensions (s t), so 2 of them, but its shape is (1, 5, 9)",
        ),
        (
            [(2, 5, 6, 7), (9, 2, 7), None],
            "attention: leading dimensions must agree: they are (2,) in `query` and () in `key`; broadcast or reshape "
            "one of them",
        ),
        (
            [(5, 6, 7), (9, 2, 8), None],
            "attention: dimension `d` must agree: it is 7 in `query` and 8 in `key`, whose dimensions are (... t k d) "
            "and shape is (9, 2, 8)",
        ),
        (
            [(5, 6, 7), (9, 4, 7), None],
            "attention: (k g) of `query` must be a multiple of 4 (`k` is 4 in `key`), got 6",
        ),
        (
            [(5, 6, 7), (9, 0, 7), None],
            "attention: (k g) of `query` must be a multiple of 0 (`k` is 0 in `key`), got 6",
        ),
    ],
)
def test_check_errors(shapes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Signature.parse(ATTENTION).check("attention", shapes)


def test_compound_of_known_factors():
    signature = Signature.parse("x: (k g), y: k, z: g -> w: (k g)")
    assert signature.check("op", [(6,), (2,), (3,)]) == (dict(k=2, g=3), ())
    message = "op: (k g) of `x` must be 6 (`k` is 2 in `y`, `g` is 3 in `z`), got 8"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        signature.check("op", [(8,), (2,), (3,)])


def test_compound_of_unknown_factors():
    with pytest.raises(ValueError, match=r"^op: \(k g\) of `x` has more than one factor that no operand tells$"):
        Signature.parse("x: (k g) -> y: (k g)").check("op", [(6,)])
