#!/usr/bin/env bash
# Builds nnunet_lite/reporting/viewer_page/niivue.js and niivue.third_party.txt from the npm registry (needs node and npm).
# The decoders of Zarr files, 1.4 of 2.9 MB, are left out: the viewer is given NIfTI alone.
set -euo pipefail
cd "$(dirname "$0")/.."
page=$PWD/nnunet_lite/reporting/viewer_page
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
npm init -y >/dev/null
npm install --silent --no-audit --no-fund --save-exact @niivue/niivue@0.69.0 fflate@0.8.3 gl-matrix@3.4.4 \
    nifti-reader-js@0.8.0 zarrita@0.5.4 @zarrita/storage@0.1.4 @ungap/structured-clone@1.4.0 @lukeed/uuid@2.0.1 \
    @lukeed/csprng@1.1.0 array-equal@1.0.2 esbuild@0.25.12
echo 'export { Niivue } from "@niivue/niivue";' >entry.js
npx esbuild entry.js --bundle --minify --format=esm --target=es2022 '--external:numcodecs/*' --legal-comments=none \
    --banner:js='/* NiiVue 0.69.0, BSD-2-Clause, with what it is built of: see niivue.LICENSE.txt and niivue.third_party.txt */' \
    --metafile=meta.json --outfile="$page/niivue.js"
node - >"$page/niivue.third_party.txt" <<'JS'
const fs = require("fs");
const inputs = Object.keys(JSON.parse(fs.readFileSync("meta.json")).inputs);
const names = new Set(inputs.map((i) => i.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1]).filter(Boolean));
names.delete("@niivue/niivue"); // its package holds no licence text; niivue.LICENSE.txt is that of its repository
console.log("niivue.js holds NiiVue (niivue.LICENSE.txt) and parts of these packages, under their licences:");
for (const name of [...names].sort()) {
    const about = JSON.parse(fs.readFileSync(`node_modules/${name}/package.json`));
    const file = fs.readdirSync(`node_modules/${name}`).find((f) => /^licen[sc]e/i.test(f));
    console.log(`\n${"-".repeat(100)}\n${name} ${about.version}: ${about.license}\n`);
    console.log(fs.readFileSync(`node_modules/${name}/${file}`, "utf8").trim());
}
JS
