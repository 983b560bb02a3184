// Arrays as the schema's Tensor messages: little-endian, row-major, no padding.

const TYPES = {
  ELEMENT_TYPE_FLOAT32: { bytes: 4, read: "readFloatLE", write: "writeFloatLE" },
  ELEMENT_TYPE_FLOAT64: { bytes: 8, read: "readDoubleLE", write: "writeDoubleLE" },
};

/** Returns the Tensor message for an array { shape, data }. */
export function toMessage({ shape, data }, elementType) {
  const { bytes, write } = TYPES[elementType];
  const raw = Buffer.alloc(data.length * bytes);
  data.forEach((value, i) => raw[write](value, i * bytes));
  return { element_type: elementType, shape, raw };
}

/** Returns the array { shape, data } of a Tensor message. */
export function fromMessage({ element_type: elementType, shape, raw }) {
  const { bytes, read } = TYPES[elementType];
  const data = Array.from({ length: raw.length / bytes }, (_, i) => raw[read](i * bytes));
  return { shape, data };
}
