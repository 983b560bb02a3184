"""What a call keeps of tensors that are on a device already."""

from __future__ import annotations

import numpy as np

from deconvd.model.problem import TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.residents import CallResidents
from tests.registry_fixtures import make_registry_fixture


def test_a_tensor_of_a_device_is_copied_in_pieces() -> None:
    spec = TensorSpec((5, 3 << 20), np.dtype(np.float32))  # one sample has 12 MiB
    array = np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32)
    with make_registry_fixture(device_bytes=None) as at_home:
        engine = at_home.engine
        given = engine.empty(spec)
        engine.write(given, array, CallContext())
        residents = CallResidents(at_home.registry, at_home.open(), CallContext())

        residents.copy("x", given, engine)

        copy = residents.operand("x", engine)
        assert copy is not given
        assert not isinstance(copy, np.ndarray)
        np.testing.assert_array_equal(engine.read(copy, CallContext()), array)
        residents.release()
        engine.free(given)
