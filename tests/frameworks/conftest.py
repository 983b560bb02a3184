"""Leaves out the tests of frameworks that this environment lacks."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec

_FRAMEWORKS = ["chainer", "jax", "torch"]
collect_ignore_glob = [f"test_{name}*.py" for name in _FRAMEWORKS if not find_spec(name)]
if not any(map(find_spec, _FRAMEWORKS)):
    collect_ignore_glob.append("test_benchmark.py")  # of any framework

_CHAINER_WARNINGS = [
    r"\s*`numpy.distutils` is deprecated",
    "msvccompiler is deprecated",
    "pkg_resources is deprecated",
]
"""What is said of the packages that Chainer imports. It is of 2022, and no newer release will come."""

if find_spec("chainer"):
    with warnings.catch_warnings(action="error"):
        for message in _CHAINER_WARNINGS:
            warnings.filterwarnings("ignore", message, DeprecationWarning)
        import_module("chainer")
