// The deconvolution and its gradients by their definition, one product at a time, in float64.

/** Returns the number of elements of an array of the shape. */
export const size = (shape) => shape.reduce((product, extent) => product * extent, 1);

/** Returns y's shape (n, c_O, h_O, w_O), without outsize. */
export function outputShape([n, , ...image], [, outputsPerGroup, ...kernel], geometry) {
  const { stride, pad, dilate, groups } = geometry;
  const extents = ["h", "w"].map(
    (axis, i) => stride[axis] * (image[i] - 1) + dilate[axis] * (kernel[i] - 1) + 1 - 2 * pad[axis],
  );
  return [n, outputsPerGroup * groups, ...extents];
}

/** Returns y = the deconvolution of x by w, plus b. */
export function deconvolve(x, w, b, geometry) {
  const shape = outputShape(x.shape, w.shape, geometry);
  const pixels = shape[2] * shape[3];
  const data = Array.from({ length: size(shape) }, (_, i) => b.data[Math.floor(i / pixels) % shape[1]]);
  for (const [i, j, k] of taps(x.shape, w.shape, geometry)) data[k] += x.data[i] * w.data[j];
  return { shape, data };
}

/** Returns the gradients with respect to x, w and b of the sum of y * gy. */
export function gradients(x, w, gy, geometry) {
  const gx = { shape: x.shape, data: x.data.map(() => 0) };
  const gw = { shape: w.shape, data: w.data.map(() => 0) };
  const gb = { shape: [gy.shape[1]], data: Array(gy.shape[1]).fill(0) };
  for (const [i, j, k] of taps(x.shape, w.shape, geometry)) {
    gx.data[i] += w.data[j] * gy.data[k];
    gw.data[j] += x.data[i] * gy.data[k];
  }
  const pixels = gy.shape[2] * gy.shape[3];
  gy.data.forEach((value, k) => (gb.data[Math.floor(k / pixels) % gb.shape[0]] += value));
  return { gx, gw, gb };
}

/** Yields the indices [in x, in w, in y] of every product x w that is part of a y. */
function* taps(xShape, wShape, geometry) {
  const { stride, pad, dilate, groups } = geometry;
  const yShape = outputShape(xShape, wShape, geometry);
  const inputsPerGroup = xShape[1] / groups;
  for (const [n, c, i, j] of indices(xShape)) {
    for (const [o, k, l] of indices(wShape.slice(1))) {
      const channel = Math.floor(c / inputsPerGroup) * wShape[1] + o;
      const row = stride.h * i + dilate.h * k - pad.h;
      const column = stride.w * j + dilate.w * l - pad.w;
      if (row < 0 || row >= yShape[2] || column < 0 || column >= yShape[3]) continue;
      yield [
        offset([n, c, i, j], xShape),
        offset([c, o, k, l], wShape),
        offset([n, channel, row, column], yShape),
      ];
    }
  }
}

/** Yields every index into an array of the shape, the last dimension fastest. */
function* indices([extent, ...rest]) {
  for (let i = 0; i < extent; i++) {
    if (rest.length === 0) yield [i];
    else for (const index of indices(rest)) yield [i, ...index];
  }
}

const offset = (index, shape) => index.reduce((sum, i, axis) => sum * shape[axis] + i, 0);
