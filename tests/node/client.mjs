// A client that knows deconvd's .proto and nothing else of it.
//
//     node client.mjs TARGET PROTO_DIRECTORY
//
// Calls the server at TARGET and compares what it answers with the definition in reference.mjs. Exits
// with 1 at the first difference.

import assert from "node:assert/strict";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import protobuf from "protobufjs";
import { deconvolve, gradients, outputShape, size } from "./reference.mjs";
import { fromMessage, toMessage } from "./tensor.mjs";

const TIMEOUT_MS = 30_000;
const TOLERANCES = {
  ELEMENT_TYPE_FLOAT32: 1e-5, // some tens of products of numbers under 1, each rounded to 2^-24
  ELEMENT_TYPE_FLOAT64: 1e-13,
};
const PLAIN = { stride: { h: 1, w: 1 }, pad: { h: 0, w: 0 }, dilate: { h: 1, w: 1 }, groups: 1 };
const UNEVEN = { stride: { h: 2, w: 3 }, pad: { h: 1, w: 0 }, dilate: { h: 1, w: 2 }, groups: 2 };

const [target, protoDirectory] = process.argv.slice(2);
const client = connect(target, protoDirectory);
await checkServerInfo();
await checkByHand();
for (const elementType of Object.keys(TOLERANCES)) {
  await checkForward(elementType);
  await checkGradients(elementType);
}
await checkRefusal();
client.close();

async function checkServerInfo() {
  const info = await call("GetServerInfo", {});
  assert.match(info.version, /^\d+\.\d+/);
  assert.equal(info.devices[0].id, "cpu");
  assert.ok(info.limits.message_bytes > 4 << 20);
  assert.ok(info.element_types.includes("ELEMENT_TYPE_BFLOAT16"));
  console.log(`GetServerInfo: deconvd ${info.version} on ${info.devices[0].name}`);
}

/** A kernel as wide as the stride copies itself, scaled, into a tile for each pixel. */
async function checkByHand() {
  const x = { shape: [1, 1, 1, 2], data: [1, 2] };
  const w = { shape: [1, 1, 2, 2], data: [1, 10, 100, 1000] };
  const y = await call("Deconvolve", {
    x: toMessage(x, "ELEMENT_TYPE_FLOAT32"),
    w: toMessage(w, "ELEMENT_TYPE_FLOAT32"),
    geometry: { stride: { h: 2, w: 2 } },
  });
  assert.deepEqual(fromMessage(y.y), { shape: [1, 1, 2, 4], data: [1, 10, 2, 20, 100, 1000, 200, 2000] });
  console.log("Deconvolve: agrees with a sum done by hand");
}

async function checkForward(elementType) {
  for (const geometry of [PLAIN, UNEVEN]) {
    const { x, w, b } = operands(geometry);
    const { y } = await call("Deconvolve", {
      x: toMessage(x, elementType),
      w: toMessage(w, elementType),
      b: toMessage(b, elementType),
      geometry,
    });
    assertClose("y", fromMessage(y), deconvolve(x, w, b, geometry), TOLERANCES[elementType]);
  }
  console.log(`Deconvolve: ${elementType} agrees with the definition`);
}

async function checkGradients(elementType) {
  const { x, w, gy } = operands(UNEVEN);
  const response = await call("DeconvolveGrad", {
    x: toMessage(x, elementType),
    w: toMessage(w, elementType),
    gy: toMessage(gy, elementType),
    geometry: UNEVEN,
    wanted: { gx: true, gw: true, gb: true },
  });
  const expected = gradients(x, w, gy, UNEVEN);
  for (const name of ["gx", "gw", "gb"]) {
    assertClose(name, fromMessage(response[name]), expected[name], TOLERANCES[elementType]);
  }
  console.log(`DeconvolveGrad: ${elementType} agrees with the definition`);
}

async function checkRefusal() {
  const { x, w } = operands(PLAIN);
  const request = {
    x: toMessage(x, "ELEMENT_TYPE_FLOAT32"),
    w: toMessage(w, "ELEMENT_TYPE_FLOAT32"),
    geometry: { stride: { h: 0, w: 1 } },
  };
  const error = await call("Deconvolve", request).then(
    () => assert.fail("a stride of 0 was taken"),
    (error) => error,
  );
  assert.equal(error.code, grpc.status.INVALID_ARGUMENT, error.message);
  const [violation] = badRequest(error).field_violations;
  assert.equal(violation.field, "stride");
  assert.ok(violation.description.includes("stride"), violation.description);
  console.log(`a stride of 0: ${error.message}`);
}

function connect(target, protoDirectory) {
  const definition = loadSync("deconvd/v1/deconvd.proto", {
    includeDirs: [protoDirectory],
    keepCase: true,
    enums: String,
    longs: Number,
  });
  const { DeconvolutionService } = grpc.loadPackageDefinition(definition).deconvd.v1;
  return new DeconvolutionService(target, grpc.credentials.createInsecure(), {
    "grpc.enable_http_proxy": 0,
  });
}

function call(method, request) {
  const options = { deadline: Date.now() + TIMEOUT_MS };
  return new Promise((resolve, reject) => {
    client[method](request, options, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

/** Returns operands whose channels suit the geometry's groups, of numbers between -1 and 1. */
function operands(geometry) {
  const x = filled([2, 4, 3, 5]);
  const w = filled([4, 3, 4, 2]);
  const yShape = outputShape(x.shape, w.shape, geometry);
  return { x, w, b: filled([yShape[1]]), gy: filled(yShape) };
}

/** Returns an array of multiples of 2^-6, which every element type here holds exactly. */
function filled(shape) {
  const length = size(shape);
  const data = Array.from({ length }, (_, i) => (((i * 37 + length) % 127) - 63) / 64);
  return { shape, data };
}

function assertClose(name, actual, expected, tolerance) {
  assert.deepEqual(actual.shape, expected.shape, `${name}'s shape`);
  assert.equal(actual.data.length, expected.data.length, `${name}'s length`);
  expected.data.forEach((value, i) => {
    const difference = Math.abs(actual.data[i] - value);
    const allowed = tolerance * (1 + Math.abs(value));
    assert.ok(difference <= allowed, `${name}[${i}] is ${actual.data[i]}, expected ${value}`);
  });
}

/** Returns the google.rpc.BadRequest among the details of a failed call. */
function badRequest(error) {
  const schema = `
    syntax = "proto3";
    message Any { string type_url = 1; bytes value = 2; }
    message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
    message FieldViolation { string field = 1; string description = 2; }
    message BadRequest { repeated FieldViolation field_violations = 1; }
  `;
  const { root } = protobuf.parse(schema, { keepCase: true });
  const [packed] = error.metadata.get("grpc-status-details-bin");
  const { details } = root.lookupType("Status").decode(packed);
  const detail = details.find(({ type_url: url }) => url.endsWith("/google.rpc.BadRequest"));
  assert.ok(detail, "there is no BadRequest detail");
  return root.lookupType("BadRequest").decode(detail.value);
}
