"""Every public function has a docstring, and its example is true."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import jtile
from jtile import CompilerParams

SCOPE = {"jax": jax, "jnp": jnp, "np": np, "pl": pl, "jtile": jtile, "CompilerParams": CompilerParams}


def test_every_public_name_is_documented_with_an_example():
    functions = {name: value for name in jtile.__all__ if callable(value := getattr(jtile, name))}
    without = [name for name, value in functions.items() if ">>>" not in (inspect.getdoc(value) or "")]
    assert not without


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.walk_packages(jtile.__path__, "jtile.")))
def test_examples(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs=SCOPE, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert results.failed == 0
