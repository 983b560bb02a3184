"""Options: Chainer's names and values, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from deconvd.errors import InvalidArgumentError
from deconvd.model.options import Options, UseCudnn


def test_options_left_out_have_chainers_defaults() -> None:
    options = Options()

    assert (options.cudnn_deterministic, options.autotune, options.allow_tf32) == (False,) * 3
    assert options.use_cudnn == "auto"


@pytest.mark.parametrize("use", ["auto", "always", "never"])
def test_use_cudnn_may_be_given_as_chainers_string(use: Any) -> None:
    options = Options(use_cudnn=use)

    assert isinstance(options.use_cudnn, UseCudnn)
    assert options == Options(use_cudnn=UseCudnn(use))
    assert hash(options) == hash(Options(use_cudnn=UseCudnn(use)))


@pytest.mark.parametrize("use", ["Auto", "", None, True, 1, ["auto"]])
def test_another_use_cudnn_is_refused(use: Any) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Options(use_cudnn=use)

    assert str(raised.value) == f"use_cudnn must be 'auto', 'always' or 'never', got {use!r}"
    assert raised.value.argument == "use_cudnn"


@pytest.mark.parametrize("name", ["cudnn_deterministic", "autotune", "allow_tf32"])
@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_a_switch_that_is_neither_true_nor_false_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Options(**{name: value})

    assert str(raised.value) == f"{name} must be True or False, got {value!r}"
    assert raised.value.argument == name
