"""A product of a deconvolution, translated to cuDNN's words: an operation graph of one convolution operation.

A deconvolution is the gradient of a convolution, which cuDNN knows. That convolution's image is our y, and its result,
here called response, is our x:

    y     "backward data"      from the response x and the filter W
    gx    "forward"            from the image gy and the filter W
    gW    "backward filter"    from the response x and the image gy

A convolution rounds the size of its result down. So cuDNN also takes a y that an outsize makes larger than its natural
size. It takes no smaller one (see `crop`).
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
"""Every operand's address is a multiple of this. cuDNN's fastest loads need it."""

UIDS = (1, 2, 3)
"""The ids of a plan's a, b and out in the graph."""

_DATA_TYPES = {
    "float16": DataType.HALF,
    BFLOAT16.name: DataType.BFLOAT16,
    "float32": DataType.FLOAT,
    "float64": DataType.DOUBLE,
}


class Layout(StrEnum):
    """The order of a tensor's elements in memory. Shapes are in the order NCHW for both."""

    NCHW = "nchw"
    NHWC = "nhwc"

    def strides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the stride of each of four dimensions, in elements."""
        _, c, h, w = shape
        if self is Layout.NHWC:
            return (h * w * c, 1, w * c, c)
        return (c * h * w, h * w, w, 1)


class _OperationAttributes(NamedTuple):
    """cuDNN's names of an operation and its parts."""

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
"""The position of each part among a plan's a, b and out."""


def operation_graph(
    scope: DescriptorScope, handle: int, product: Product, problem: Problem, layout: Layout
) -> Descriptor:
    """Return the finalized graph of one operation.

    Raises:
        CudnnError: cuDNN does not support the operation.
    """
    operation = _make_operation(scope, product, problem, layout)
    graph = scope.new(DescriptorType.OPERATIONGRAPH)
    graph.set(Attribute.OPERATIONGRAPH_HANDLE, AttributeType.HANDLE, handle)
    graph.set(Attribute.OPERATIONGRAPH_OPS, AttributeType.BACKEND_DESCRIPTOR, operation.address)
    graph.finalize()
    return graph


def _make_operation(
    scope: DescriptorScope, product: Product, problem: Problem, layout: Layout
) -> Descriptor:
    names, order = _OPERATION_ATTRIBUTES[product], _OPERAND_ORDER[product]
    shapes = {"image": problem.y.shape, "filter": problem.W.shape, "response": problem.x.shape}
    operation = scope.new(names.kind)
    for part, shape in shapes.items():
        tensor = _tensor(scope, shape, problem.x.dtype, layout, UIDS[order[part]])
        operation.set(getattr(names, part), AttributeType.BACKEND_DESCRIPTOR, tensor.address)
    convolution = _convolution(scope, problem)
    operation.set(names.convolution, AttributeType.BACKEND_DESCRIPTOR, convolution.address)
    # out = alpha result + beta out: cuDNN wants both as doubles where it computes in doubles
    scalar = (
        AttributeType.DOUBLE if _compute_type(problem) is DataType.DOUBLE else AttributeType.FLOAT
    )
    operation.set(names.alpha, scalar, 1.0)
    operation.set(names.beta, scalar, 0.0)
    operation.finalize()
    return operation


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
