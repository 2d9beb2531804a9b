// The page: which case, which layers and how they are drawn. planes.js draws slices, solid.js three dimensions.
import { Planes } from "./planes.js";
import { paintErrors, paintImage, paintValues, readVolume, valueAt, valuesOf } from "./slices.js";

const NARROW = "(max-width: 700px)"; // as in viewer.css; phones load the full resolution on request
const ERROR_STRENGTH = 1.9; // errors are more opaque than fills, which they dim
const DIM = 0.3;
const element = (id) => document.getElementById(id);
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
const packed = ([r, g, b], alpha = 255) => ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;
// black, red, yellow, white; the lower the more transparent
const HEAT = Array.from({ length: 256 }, (_, i) => {
  const part = (from) => Math.max(0, Math.min(255, 3 * i - from));
  return packed([part(0), part(255), part(510)], Math.min(150, i));
});

const page = { hidden: new Set(), opacity: 0.45, view: "all", choices: [], number: 0, window: null, adjusted: false };
let scene, planes, solid;

function make(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

function swatch(colour, { outlined, width } = {}) {
  const node = make("i");
  node.style.color = colour;
  if (outlined) Object.assign(node.style, { background: "none", border: `${width}px solid` });
  return node;
}

const styleOf = ({ outlined, width }) => (!outlined ? "filled" : width > 2 ? "thick outline" : "outline");

function fail(error) {
  element("problem").textContent = `This cannot be shown: ${error?.message ?? error}`;
  element("problem").hidden = false;
  console.error(error);
}

async function readJson(url) {
  return (await fetch(url)).json();
}

// ---------------------------------------------------------------------------------------------------- the layers

const layersOf = (kind) => scene.layers.filter((layer) => layer.kind === kind);

// The errors of each prediction are a layer too, which the page computes.
function addLayers() {
  const [reference, ...predictions] = layersOf("segmentation");
  if (scene.compared)
    for (const prediction of predictions)
      scene.layers.push({ name: `errors of ${prediction.name}`, kind: "errors", of: [reference, prediction] });
  scene.layers.forEach((layer, i) => {
    const before = page.choices[i]?.kind === layer.kind ? page.choices[i] : null; // of the case before
    layer.url = `${page.number}/layer-${i}`;
    layer.shown = before?.shown ?? (i === 0 || layer.kind === "segmentation");
    layer.outlined = before?.outlined ?? predictions.includes(layer);
    layer.width = layer === reference ? 3.2 : 1.8;
  });
  if (!page.choices.length && scene.ignore !== null) page.hidden.add(scene.legend[scene.ignore - 1].name);
  page.choices = scene.layers;
}

const hasCoarse = () => scene.coarse.some((step) => step > 1);

// Read the coarse copy of a layer, or all of it, once.
async function read(layer, coarse) {
  const [name, steps] = coarse && hasCoarse() ? ["-coarse", scene.coarse] : ["", scene.fine];
  layer.read ??= {};
  layer.read[name] ??= readVolume(`${layer.url}${name}.nii`, steps).then((volume) => {
    if (layer.kind === "segmentation") layer.values = [...(layer.values ?? []), ...valuesOf(volume)];
    return volume;
  }).catch((error) => {
    delete layer.read[name]; // the next choice tries again
    throw error;
  });
  const volume = await layer.read[name];
  if (!name || !layer.volume) layer.volume = volume;
  return volume;
}

// Read what is shown: coarse copies first, so that there is a picture soon.
async function readShown() {
  const of = scene;
  const wanted = scene.layers.filter((layer) => layer.kind === "segmentation" || (layer.shown && layer.kind !== "errors"));
  const onlyCoarse = hasCoarse() && !page.full && matchMedia(NARROW).matches;
  const passes = onlyCoarse ? [true] : hasCoarse() ? [true, false] : [false];
  for (const coarse of passes) {
    page.reading = true;
    await Promise.all(wanted.map((layer) => read(layer, coarse)));
    if (of !== scene) return; // another case was opened in the meantime
    if (scene.number === page.number) element("problem").hidden = true;
    page.reading = coarse !== passes.at(-1);
    listLabels();
    refresh();
    await new Promise(requestAnimationFrame);
    document.documentElement.dataset.ready = coarse ? "coarse" : "full";
    performance.mark(coarse ? "coarse" : "full");
  }
  element("full").hidden = !onlyCoarse;
}

const isHidden = (entry) => page.hidden.has(entry.name);
const valueTable = () => [0, ...scene.legend.map((entry) => (isHidden(entry) ? 0 : packed(entry.colour)))];
const errorTable = () => [0, ...scene.errors.map((entry) => packed(entry.colour))];

// Returns which kind of error a voxel is, from 1 as in scene.errors, or 0; a hidden label counts as background.
function errorKind() {
  const seen = [0, ...scene.legend.map((entry, i) => (isHidden(entry) ? 0 : i + 1))];
  return (expected, predicted) => {
    const [before, after] = [seen[expected], seen[predicted]];
    if (before === after || expected === scene.ignore) return 0;
    return after === 0 ? 1 : before === 0 ? 2 : 3;
  };
}

// What planes.js draws, from the bottom.
function drawings() {
  const shown = (kind) => scene.layers.filter((layer) => layer.kind === kind && layer.shown && (layer.volume || layer.of));
  const stamp = [...page.hidden].join();
  const values = (layer, table, opacity, smooth) => ({
    name: layer.name, volume: layer.volume, stamp, opacity, smooth,
    paint: (plane, at) => paintValues(layer.volume, plane, at, table),
  });
  const [labels, errors, kind] = [valueTable(), errorTable(), errorKind()];
  const colours = ["", ...scene.legend.map((entry) => (isHidden(entry) ? "" : css(entry.colour)))];
  return [
    ...shown("image").map((layer) => ({
      name: "image", volume: layer.volume, stamp: page.window.join(), opacity: 1, smooth: true,
      paint: (plane, at) => paintImage(layer.volume, plane, at, page.window),
    })),
    ...shown("map").map((layer) => values(layer, HEAT, 1, true)),
    ...shown("segmentation").filter((layer) => !layer.outlined)
      .map((layer) => values(layer, labels, page.opacity * (shown("errors").length ? DIM : 1), false)),
    ...shown("errors").flatMap((layer) => {
      const [reference, prediction] = layer.of.map((one) => one.volume);
      if (!reference || reference.steps !== prediction?.steps) return []; // still being read
      const paint = (plane, at) => paintErrors(reference, prediction, plane, at, kind, errors);
      return { name: layer.name, volume: prediction, stamp, opacity: Math.min(1, ERROR_STRENGTH * page.opacity), smooth: false, paint };
    }),
    ...shown("segmentation").filter((layer) => layer.outlined)
      .map((layer) => ({ name: `${layer.name} outlined`, volume: layer.volume, stamp: "", colours, width: layer.width })),
  ];
}

// Draw everything anew after a choice.
function refresh() {
  planes.draw();
  showPlace();
  showKey();
  clearTimeout(page.later);
  if (!page.reading) page.later = setTimeout(() => showSolid().catch(failSolid), 30); // last: without a GPU it is slow
}

// -------------------------------------------------------------------------------------------- three dimensions

function failSolid(error) {
  console.warn(`no three dimensions: ${error.message ?? error}`);
  element("solid").dataset.failed = "true";
}

async function readErrors({ of }) {
  const [reference, prediction] = await Promise.all(of.map((one) => read(one, true)));
  const kind = errorKind();
  return { ...prediction, voxels: prediction.voxels.map((value, i) => kind(reference.voxels[i], value)) };
}

async function showSolid() {
  const box = element("solid");
  box.hidden = scene.planes.length < 2 || !["all", "3D"].includes(page.view);
  if (box.hidden || box.dataset.failed) return;
  const layer = scene.layers[box.querySelector("select").value];
  const volume = await (layer.of ? readErrors(layer) : read(layer, true));
  const { Solid } = await import("./solid.js");
  solid ??= new Solid(box.querySelector("canvas"), scene.planes[0].sides !== "").open();
  const table = layer.kind === "errors" ? errorTable() : valueTable();
  await (await solid).show(volume, layer.kind === "image" ? { window: layer.window } : { table });
  document.documentElement.dataset.solid = "true";
  performance.mark("solid");
}

function listSolids() {
  const list = element("solid").querySelector("select");
  const kinds = ["segmentation", "errors", "image"];
  const layers = kinds.flatMap(layersOf);
  list.replaceChildren(...layers.map((layer) => make("option", { value: scene.layers.indexOf(layer) }, layer.name)));
  list.selectedIndex = Math.max(0, Math.min(page.solid ?? layersOf("segmentation").length - 1, layers.length - 1));
  list.onchange = () => {
    page.solid = list.selectedIndex;
    refresh();
  };
}

// ------------------------------------------------------------------------------------------------- the controls

// Where the cross is: the voxel as `--at` takes it, intensity, and the label in each segmentation that is shown.
function showPlace() {
  const [flat, voxel] = [scene.shape[0] === 1, planes.stored(planes.at).reverse()];
  const parts = [flat ? `pixel y x: ${voxel.slice(1).join(" ")}` : `voxel z y x: ${voxel.join(" ")}`];
  const shown = scene.layers.filter((layer) => layer.shown && layer.volume && !layer.volume.colours);
  for (const { kind, name, volume } of shown) {
    const value = valueAt(volume, planes.at);
    if (kind === "image") parts.push(`${name} ${Number(value.toPrecision(5))}`);
    if (kind === "map") parts.push(`${name} ${(value / 255).toFixed(2)}`);
    if (kind === "segmentation") parts.push(`${name}: ${scene.legend[value - 1]?.name ?? "background"}`);
  }
  element("place").textContent = parts.join("  ·  ");
}

// The legend in the picture.
function showKey() {
  const one = scene.legend.length === 1 ? css(scene.legend[0].colour) : "#fff";
  const entries = [];
  for (const layer of scene.layers.filter((layer) => layer.shown)) {
    if (layer.kind === "segmentation") entries.push([swatch(one, layer), `${layer.name} (${styleOf(layer)})`]);
    if (layer.kind === "map") entries.push([make("b", { className: "scale" }, "0", make("i"), "1"), layer.name + meaning(layer)]);
    if (layer.kind === "errors") for (const entry of errorKinds()) entries.push([swatch(css(entry.colour)), entry.name]);
  }
  element("key").replaceChildren(...entries.map((entry) => make("li", {}, ...entry)));
}

const meaning = ({ name }) => (name.includes("entropy") ? ": 0 sure, 1 all labels equal" : "");

// With one label, no voxel can have another one.
const errorKinds = () => (scene.legend.length > 1 ? scene.errors : scene.errors.slice(0, 2));

function radio(group, name, checked, chosen) {
  const input = make("input", { type: "radio", name: group, checked, value: name });
  input.addEventListener("change", chosen);
  return make("label", { className: "line" }, input, make("span", {}, name));
}

function fill(id, nodes) {
  const box = element(id);
  box.replaceChildren(box.querySelector("legend"), ...nodes);
  box.hidden = nodes.length === 0;
}

function listViews() {
  const names = scene.planes.length > 1 ? ["all", ...scene.planes.map((plane) => plane.name), "3D"] : [];
  if (!names.includes(page.view)) page.view = "all";
  fill("views", names.map((name) => radio("view", name, name === page.view, () => showView(name))));
  showView(page.view);
}

function showView(name) {
  page.view = name;
  element("pictures").dataset.view = scene.planes.length > 1 ? name : "";
  planes.show(scene.planes.find((plane) => plane.name === name) ?? null);
  if (layersOf("image")[0].volume) refresh();
}

function listImages() {
  const images = layersOf("image");
  const choose = (layer) => {
    for (const other of images) other.shown = other === layer;
    resetWindow();
    readShown().catch(fail);
  };
  const choices = images.map((layer) => radio("image", layer.name, layer.shown, () => choose(layer)));
  fill("images", choices.length > 1 ? choices : []);
}

function listSegmentations() {
  const layers = [...layersOf("segmentation"), ...layersOf("errors")];
  const rows = layers.map((layer, i) => {
    const box = make("input", { type: "checkbox", checked: layer.shown });
    box.addEventListener("change", () => {
      layer.shown = box.checked;
      readShown().catch(fail);
    });
    layer.box = box;
    const key = layer === layersOf("errors")[0] ? "e" : i < 9 ? String(i + 1) : "";
    const line = make("label", { className: "line" }, box, make("span", {}, layer.name));
    if (key) line.append(make("kbd", {}, key));
    if (layer.kind === "errors") {
      const kinds = errorKinds().map((entry) => make("span", {}, swatch(css(entry.colour)), " ", entry.name));
      return make("div", { className: "layer" }, line, make("p", {}, ...kinds));
    }
    const style = make("button", { type: "button", title: "filled or outlined (o)" });
    const name = () => style.replaceChildren(swatch("", layer), styleOf(layer));
    layer.turn = () => {
      layer.outlined = !layer.outlined;
      name();
      refresh();
    };
    style.addEventListener("click", layer.turn);
    name();
    return make("div", { className: "layer" }, line, style);
  });
  if (scene.compared && layersOf("segmentation").length === 1)
    rows.push(make("p", { className: "line" }, "no prediction: no finished fold holds this case out"));
  const slider = make("input", { type: "range", min: 0, max: 1, step: 0.05, value: page.opacity });
  slider.addEventListener("input", () => {
    page.opacity = Number(slider.value);
    refresh();
  });
  fill("segmentations", rows.length ? [...rows, make("label", { className: "line" }, "opacity of fills", slider)] : []);
}

// The labels that occur; a click hides one in all layers.
function listLabels() {
  const found = new Set(layersOf("segmentation").flatMap((layer) => layer.values ?? []));
  const entries = scene.legend.filter((_, i) => found.has(i + 1));
  const button = (entry) => {
    const chip = make("button", { type: "button" }, swatch(css(entry.colour)), entry.name);
    chip.setAttribute("aria-pressed", String(!isHidden(entry)));
    chip.addEventListener("click", () => hide([entry], !isHidden(entry)));
    return chip;
  };
  const all = (name, hidden) => {
    const chip = make("button", { type: "button", className: "all" }, name);
    chip.addEventListener("click", () => hide(entries, hidden));
    return chip;
  };
  const chips = entries.length > 2 ? [all("all", false), all("none", true)] : [];
  fill("labels", entries.length ? [make("div", {}, ...chips, ...entries.map(button))] : []);
}

function hide(entries, hidden) {
  for (const { name } of entries) hidden ? page.hidden.add(name) : page.hidden.delete(name);
  listLabels();
  refresh();
}

function listMaps() {
  const maps = layersOf("map");
  const list = make("select");
  list.setAttribute("aria-label", "map");
  list.append(make("option", {}, "none"), ...maps.map((layer) => make("option", { selected: layer.shown }, layer.name)));
  list.addEventListener("change", () => {
    maps.forEach((layer, i) => (layer.shown = i === list.selectedIndex - 1));
    const filled = layersOf("segmentation").filter((layer) => !layer.outlined && list.selectedIndex > 0);
    for (const layer of filled) layer.turn(); // or it would cover the map
    readShown().catch(fail);
  });
  fill("maps", maps.length ? [list] : []);
}

// -------------------------------------------------------------------------------------------------- the keyboard

function keyboard(event) {
  const { key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || !scene) return;
  if (key.startsWith("Arrow") && event.target.matches("select, input")) return;
  const layers = [...layersOf("segmentation"), ...layersOf("errors")];
  if (key >= "1" && key <= "9") layers[Number(key) - 1]?.box.click();
  else if (key === "e") layersOf("errors")[0]?.box.click();
  else if (key === "o") for (const layer of layersOf("segmentation")) layer.turn();
  else if (key === "h") {
    const shown = layers.filter((layer) => layer.shown);
    for (const layer of shown.length ? shown : (page.before ?? layers)) layer.box.click();
    page.before = shown.length ? shown : null;
  } else if (key === "v") {
    const views = [...document.querySelectorAll("#views input")];
    views[(views.findIndex((view) => view.checked) + 1) % views.length]?.click();
  } else if (key === "n" || key === "p") step(key === "n" ? 1 : -1);
  else if (key === "c") {
    planes.cross = !planes.cross;
    planes.draw();
  } else if (key === "ArrowUp" || key === "ArrowDown") planes.scroll(planes.focus, key === "ArrowUp" ? 1 : -1);
  else if (key === "0") {
    resetWindow();
    planes.resetZoom();
    refresh();
  } else return;
  event.preventDefault();
}

function resetWindow() {
  page.window = layersOf("image").find((layer) => layer.shown).window;
  page.adjusted = false;
}

// Drag to change the grey levels: x their width, y their middle, as shares of the canvas.
function adjustWindow(x, y) {
  const [low, high] = page.window;
  const width = (high - low) * Math.exp(3 * x);
  const middle = (low + high) / 2 + (high - low) * 2 * y;
  [page.window, page.adjusted] = [[middle - width / 2, middle + width / 2], true];
  planes.draw();
}

// ----------------------------------------------------------------------------------------------------- the cases

function step(by) {
  const list = element("cases").querySelector("select");
  const next = list.selectedIndex + by;
  if (next < 0 || next >= list.length) return;
  list.selectedIndex = next;
  openCase(next).catch(fail);
}

function listCases({ cases, first }) {
  const [before, after] = element("cases").querySelectorAll("button");
  const list = element("cases").querySelector("select");
  list.append(...cases.map(([name, dice]) => make("option", {}, dice === null ? name : `${name} · ${dice.toFixed(3)}`)));
  list.selectedIndex = first;
  list.addEventListener("change", () => openCase(list.selectedIndex).catch(fail));
  before.addEventListener("click", () => step(-1));
  after.addEventListener("click", () => step(1));
  const scored = cases.some(([, dice]) => dice !== null) ? " with their Dice, the worst first" : "";
  element("cases").querySelector("small").textContent = `${cases.length} cases${scored}`;
  element("cases").hidden = cases.length < 2;
}

async function openCase(number) {
  page.number = number;
  document.documentElement.dataset.ready = "";
  element("place").textContent = "reading …";
  const next = await readJson(`${number}/scene.json`);
  if (page.number !== number) return;
  element("problem").hidden = true;
  if (next.problem) {
    fail(next.problem);
    return;
  }
  scene = { ...next, number };
  document.title = element("title").textContent = scene.title;
  addLayers();
  if (!page.adjusted) resetWindow();
  planes.open(scene);
  for (const list of [listImages, listSegmentations, listMaps, listSolids, listViews]) list();
  await readShown();
}

async function start() {
  planes = new Planes(element("planes"), {
    drawings, changed: showPlace, windowed: adjustWindow,
    chosen: (plane) => document.querySelector(`#views input[value="${plane?.name ?? "all"}"]`)?.click(),
  });
  document.addEventListener("keydown", keyboard);
  element("full").addEventListener("click", () => {
    page.full = true;
    readShown().catch(fail);
  });
  const listing = await readJson("cases.json");
  listCases(listing);
  await openCase(listing.first);
}

start().catch(fail);
