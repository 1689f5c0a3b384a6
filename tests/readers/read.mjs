// Prints what h5wasm reads from an atlas, as JSON: node read.mjs H5WASM_DIR FILE
import { pathToFileURL } from "node:url";

const h5wasm = await import(pathToFileURL(process.argv[2] + "/node_modules/h5wasm/dist/node/hdf5_hl.js").href);
await h5wasm.ready;
const file = new h5wasm.File(process.argv[3], "r");

const stacks = {};
for (const name of file.get("stacks").keys()) {
  const group = file.get(`stacks/${name}`);
  stacks[name] = { kind: group.attrs.kind.value };
  for (const variable of group.keys()) {
    const dataset = group.get(variable);
    stacks[name][variable] = {
      shape: dataset.shape,
      dtype: dataset.dtype,
      // NaN has no JSON, and 64-bit integers are BigInt.
      values: Array.from(dataset.value, (x) => (Number.isNaN(x) ? null : Number(x))),
    };
  }
}
const slice = file.get("stacks/decoder.experts/lp").slice([[1, 2], [], [3, 5]]);
console.log(JSON.stringify({
  format: file.attrs.format.value,
  rho: file.get("labels").attrs.rho.value,
  modules: file.get("block/module").value,
  slice: Array.from(slice),
  stacks,
}));
file.close();
