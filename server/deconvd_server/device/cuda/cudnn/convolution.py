"""A deconvolution in cuDNN's words: one convolution operation, as an operation graph.

cuDNN sees the convolution whose gradient the deconvolution is: its image is y, its result is x. So
y comes from "backward data", gx from "forward", gW from "backward filter". cuDNN rounds its result's
size down, so a y that outsize made larger needs no more than its own size; a smaller one is not a
problem for it (see `window`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from deconvd.model.dtypes import BFLOAT16, DType
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.cudnn.descriptor import Descriptor, DescriptorScope
from deconvd_server.device.cuda.cudnn.enums import (
    CROSS_CORRELATION,
    Attribute,
    AttributeType,
    DataType,
    DescriptorType,
)
from deconvd_server.device.cuda.plan import Product

__all__ = ["ALIGNMENT_BYTES", "UIDS", "Layout", "operation_graph"]

ALIGNMENT_BYTES = 16
"""What every operand's address is a multiple of: cuDNN's fastest loads need it."""

UIDS = (1, 2, 3)
"""The names that the graph gives to a plan's a, b and out."""

_DATA_TYPES = {
    "float16": DataType.HALF,
    BFLOAT16.name: DataType.BFLOAT16,
    "float32": DataType.FLOAT,
    "float64": DataType.DOUBLE,
}


class Layout(StrEnum):
    """The order of the elements in memory; the shape's order is always the same."""

    NCHW = "nchw"
    NHWC = "nhwc"

    def strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the stride of each of four dimensions, in elements."""
        _, c, h, w = shape
        if self is Layout.NHWC:
            return (h * w * c, 1, w * c, c)
        return (c * h * w, h * w, w, 1)


class _OperationAttributes(NamedTuple):
    """How cuDNN calls an operation and its parts."""

    kind: DescriptorType
    convolution: Attribute
    image: Attribute
    filter: Attribute
    response: Attribute
    alpha: Attribute
    beta: Attribute


_OPERATION_ATTRIBUTES = {
    Product.Y: _OperationAttributes(
        DescriptorType.OPERATION_CONVOLUTION_BACKWARD_DATA,
        Attribute.OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
        Attribute.OPERATION_CONVOLUTION_BWD_DATA_DX,
        Attribute.OPERATION_CONVOLUTION_BWD_DATA_W,
        Attribute.OPERATION_CONVOLUTION_BWD_DATA_DY,
        Attribute.OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
        Attribute.OPERATION_CONVOLUTION_BWD_DATA_BETA,
    ),
    Product.GX: _OperationAttributes(
        DescriptorType.OPERATION_CONVOLUTION_FORWARD,
        Attribute.OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
        Attribute.OPERATION_CONVOLUTION_FORWARD_X,
        Attribute.OPERATION_CONVOLUTION_FORWARD_W,
        Attribute.OPERATION_CONVOLUTION_FORWARD_Y,
        Attribute.OPERATION_CONVOLUTION_FORWARD_ALPHA,
        Attribute.OPERATION_CONVOLUTION_FORWARD_BETA,
    ),
    Product.GW: _OperationAttributes(
        DescriptorType.OPERATION_CONVOLUTION_BACKWARD_FILTER,
        Attribute.OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
        Attribute.OPERATION_CONVOLUTION_BWD_FILTER_X,
        Attribute.OPERATION_CONVOLUTION_BWD_FILTER_DW,
        Attribute.OPERATION_CONVOLUTION_BWD_FILTER_DY,
        Attribute.OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
        Attribute.OPERATION_CONVOLUTION_BWD_FILTER_BETA,
    ),
}

_OPERAND_ORDER = {
    Product.Y: {"response": 0, "filter": 1, "image": 2},
    Product.GX: {"image": 0, "filter": 1, "response": 2},
    Product.GW: {"response": 0, "image": 1, "filter": 2},
}
"""Which of a plan's (a, b, out) each part is."""


def operation_graph(
    scope: DescriptorScope, handle: int, operation: Product, problem: Problem, layout: Layout
) -> Descriptor:
    """Return the graph of one operation, finalized.

    Raises:
        CudnnError: cuDNN does not take it.
    """
    parts = _make_operation(scope, operation, problem, layout)
    graph = scope.new(DescriptorType.OPERATIONGRAPH)
    graph.set(Attribute.OPERATIONGRAPH_HANDLE, AttributeType.HANDLE, handle)
    graph.set(Attribute.OPERATIONGRAPH_OPS, AttributeType.BACKEND_DESCRIPTOR, parts.address)
    graph.finalize()
    return graph


def _make_operation(
    scope: DescriptorScope, operation: Product, problem: Problem, layout: Layout
) -> Descriptor:
    words, places = _OPERATION_ATTRIBUTES[operation], _OPERAND_ORDER[operation]
    shapes = {"image": problem.y.shape, "filter": problem.W.shape, "response": problem.x.shape}
    node = scope.new(words.kind)
    for part, shape in shapes.items():
        tensor = _tensor(scope, shape, problem.x.dtype, layout, UIDS[places[part]])
        node.set(getattr(words, part), AttributeType.BACKEND_DESCRIPTOR, tensor.address)
    convolution = _convolution(scope, problem)
    node.set(words.convolution, AttributeType.BACKEND_DESCRIPTOR, convolution.address)
    scalar = (
        AttributeType.DOUBLE if _compute_type(problem) is DataType.DOUBLE else AttributeType.FLOAT
    )
    node.set(words.alpha, scalar, 1.0)
    node.set(words.beta, scalar, 0.0)
    node.finalize()
    return node


def _tensor(
    scope: DescriptorScope, shape: tuple[int, ...], dtype: DType, layout: Layout, uid: int
) -> Descriptor:
    tensor = scope.new(DescriptorType.TENSOR)
    tensor.set(Attribute.TENSOR_UNIQUE_ID, AttributeType.INT64, uid)
    tensor.set(Attribute.TENSOR_DATA_TYPE, AttributeType.DATA_TYPE, _DATA_TYPES[dtype.name])
    tensor.set(Attribute.TENSOR_DIMENSIONS, AttributeType.INT64, *shape)
    tensor.set(Attribute.TENSOR_STRIDES, AttributeType.INT64, *layout.strides(shape))
    tensor.set(Attribute.TENSOR_BYTE_ALIGNMENT, AttributeType.INT64, ALIGNMENT_BYTES)
    tensor.finalize()
    return tensor


def _convolution(scope: DescriptorScope, problem: Problem) -> Descriptor:
    geometry = problem.geometry
    convolution = scope.new(DescriptorType.CONVOLUTION)
    convolution.set(Attribute.CONVOLUTION_SPATIAL_DIMS, AttributeType.INT64, 2)
    convolution.set(
        Attribute.CONVOLUTION_COMP_TYPE, AttributeType.DATA_TYPE, _compute_type(problem)
    )
    convolution.set(
        Attribute.CONVOLUTION_CONV_MODE, AttributeType.CONVOLUTION_MODE, CROSS_CORRELATION
    )
    convolution.set(Attribute.CONVOLUTION_DILATIONS, AttributeType.INT64, *geometry.dilate)
    convolution.set(Attribute.CONVOLUTION_FILTER_STRIDES, AttributeType.INT64, *geometry.stride)
    convolution.set(Attribute.CONVOLUTION_PRE_PADDINGS, AttributeType.INT64, *geometry.pad)
    convolution.set(Attribute.CONVOLUTION_POST_PADDINGS, AttributeType.INT64, *geometry.pad)
    convolution.finalize()
    return convolution


def _compute_type(problem: Problem) -> DataType:
    return _DATA_TYPES[problem.compute_type.name]
