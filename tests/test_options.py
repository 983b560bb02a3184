"""Options: Chainer's names and values, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from deconvd.errors import InvalidArgumentError
from deconvd.model.options import Options, UseCudnn, UseCudnnTensorCore


def test_options_left_out_have_chainers_defaults() -> None:
    options = Options()

    assert (options.cudnn_deterministic, options.autotune, options.allow_tf32) == (False,) * 3
    assert (options.use_cudnn, options.use_cudnn_tensor_core) == ("auto", "auto")


@pytest.mark.parametrize("use", ["auto", "always", "never"])
def test_uses_may_be_given_as_chainers_strings(use: Any) -> None:
    options = Options(use_cudnn=use, use_cudnn_tensor_core=use)
    same = Options(use_cudnn=UseCudnn(use), use_cudnn_tensor_core=UseCudnnTensorCore(use))

    assert isinstance(options.use_cudnn, UseCudnn)
    assert isinstance(options.use_cudnn_tensor_core, UseCudnnTensorCore)
    assert options == same
    assert hash(options) == hash(same)


@pytest.mark.parametrize("name", ["use_cudnn", "use_cudnn_tensor_core"])
@pytest.mark.parametrize("use", ["Auto", "", None, True, 1, ["auto"]])
def test_another_use_is_refused(name: str, use: Any) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Options(**{name: use})

    assert str(raised.value) == f"{name} must be 'auto', 'always' or 'never', got {use!r}"
    assert raised.value.argument == name


@pytest.mark.parametrize("name", ["cudnn_deterministic", "autotune", "allow_tf32"])
@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_a_switch_that_is_neither_true_nor_false_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Options(**{name: value})

    assert str(raised.value) == f"{name} must be True or False, got {value!r}"
    assert raised.value.argument == name
