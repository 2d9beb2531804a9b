// Shows scene.json: image channels, of which one is drawn at a time, and segmentations above it.
import { Niivue } from "./niivue.js";

const VIEWS = { "three planes": 3, axial: 0, coronal: 1, sagittal: 2, "3D": 4 };
const HALF = 0.5;
const element = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

function fail(error) {
  element("problem").textContent = `The image cannot be shown: ${error?.message ?? error}`;
  element("problem").hidden = false;
  console.error(error);
}

// The look-up table of a segmentation: voxel 0 is the background, voxel i the i-th entry of the legend.
function tableOf(layer) {
  const colours = layer.legend.map((entry) => entry.colour);
  const column = (i) => [0, ...colours.map((colour) => colour[i])];
  return {
    R: column(0), G: column(1), B: column(2),
    A: [0, ...layer.legend.map((_, i) => (layer.hidden.has(i) ? 0 : 255))],
    I: [0, ...colours.map((_, i) => i + 1)],
    labels: ["", ...layer.legend.map((entry) => entry.name)],
  };
}

async function open(nv, scene) {
  await nv.attachToCanvas(element("canvas"));
  await nv.loadVolumes(
    scene.layers.map((layer) => ({
      url: layer.url,
      name: layer.url,
      colormap: "gray",
      opacity: layer.shown ? (layer.kind === "image" ? 1 : HALF) : 0,
      ...(layer.window ? { cal_min: layer.window[0], cal_max: layer.window[1] } : {}),
    })),
  );
  scene.layers.forEach((layer, i) => {
    Object.assign(layer, { volume: nv.volumes[i], hidden: new Set(), opacity: HALF });
    if (layer.kind === "segmentation") layer.volume.setColormapLabel(tableOf(layer));
  });
  nv.setInterpolation(true);
  nv.updateGLVolume();
}

function drawOpacity(nv, layer) {
  nv.setOpacity(nv.volumes.indexOf(layer.volume), layer.shown ? layer.opacity : 0);
}

function showImage(nv, images, chosen) {
  for (const layer of images) layer.volume.opacity = layer === chosen ? 1 : 0;
  nv.setVolume(chosen.volume, 0); // the first volume is the one below the segmentations
}

function segmentationControls(nv, layer, number, changed) {
  const box = make("input", { type: "checkbox", checked: layer.shown });
  const slider = make("input", { type: "range", min: 0, max: 1, step: 0.05, value: layer.opacity });
  slider.setAttribute("aria-label", `opacity of ${layer.name}`);
  box.addEventListener("change", () => {
    layer.shown = box.checked;
    drawOpacity(nv, layer);
    changed();
  });
  slider.addEventListener("input", () => {
    layer.opacity = Number(slider.value);
    drawOpacity(nv, layer);
  });
  const labels = layer.legend.map((entry, i) => {
    const dot = make("i");
    dot.style.background = `rgb(${entry.colour})`;
    const button = make("button", { type: "button" }, dot, entry.name);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      if (!layer.hidden.delete(i)) layer.hidden.add(i);
      button.setAttribute("aria-pressed", String(!layer.hidden.has(i)));
      layer.volume.setColormapLabel(tableOf(layer));
      nv.updateGLVolume();
    });
    return button;
  });
  const key = number <= 9 ? make("kbd", {}, String(number)) : "";
  layer.box = box;
  return make(
    "div",
    { className: "layer" },
    make("label", { className: "line" }, box, make("span", {}, layer.name), key),
    slider,
    make("div", { className: "labels" }, ...labels),
  );
}

function radio(group, name, checked, chosen) {
  const input = make("input", { type: "radio", name: group, checked });
  input.addEventListener("change", chosen);
  return make("label", { className: "line" }, input, make("span", {}, name));
}

function keyboard(nv, segmentations) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key >= "1" && event.key <= "9") segmentations[Number(event.key) - 1]?.box.click();
    else if (event.key === "h") {
      const all = segmentations.filter((layer) => layer.shown);
      const turned = all.length ? all : (nv.lastShown ?? segmentations);
      nv.lastShown = turned;
      for (const layer of turned) layer.box.click();
    } else if (event.key === "v") {
      const views = [...document.querySelectorAll("#views input")];
      views[(views.findIndex((view) => view.checked) + 1) % views.length]?.click();
    } else return;
    event.preventDefault();
    event.stopImmediatePropagation(); // NiiVue has keys of its own
  }, true);
}

// Where the cross is: voxel, intensity, and the label of each segmentation that is shown.
function showPlace(scene, location) {
  const [x, y, z] = location.mm;
  const voxel = scene.to_voxel.map((row) => Math.round(row[0] * x + row[1] * y + row[2] * z + row[3]));
  const parts = [`voxel ${voxel.join(", ")}`];
  for (const found of location.values ?? []) {
    const layer = scene.layers.find((other) => other.url === found.name || other.volume?.id === found.id);
    if (!layer?.shown) continue;
    if (layer.kind === "image" && !layer.window) continue; // colours are no number
    if (layer.kind === "image") parts.push(`${layer.name} ${Number(found.value.toPrecision(5))}`);
    else parts.push(`${layer.name}: ${layer.legend[Math.round(found.value) - 1]?.name ?? "background"}`);
  }
  element("place").textContent = parts.join("  ·  ");
}

async function start() {
  const scene = await (await fetch("scene.json")).json();
  document.title = element("title").textContent = scene.title;
  const images = scene.layers.filter((layer) => layer.kind === "image");
  const segmentations = scene.layers.filter((layer) => layer.kind === "segmentation");
  const nv = new Niivue({
    backColor: [0, 0, 0, 1],
    isRadiologicalConvention: true,
    isOrientationTextVisible: !scene.flat,
    multiplanarShowRender: 0, // a view of its own: without a GPU it is slow
    show3Dcrosshair: true,
    crosshairColor: [1, 1, 0.5, 0.7],
    crosshairWidthUnit: "percent",
    crosshairWidth: 0.6,
  });
  nv.onLocationChange = (location) => showPlace(scene, (scene.place = location));
  scene.changed = () => scene.place && showPlace(scene, scene.place);
  await open(nv, scene);
  nv.setSliceType(scene.flat ? VIEWS.axial : VIEWS["three planes"]);
  for (const [name, type] of Object.entries(VIEWS))
    element("views").append(radio("view", name, name === "three planes", () => nv.setSliceType(type)));
  images.forEach((layer, i) =>
    element("images").append(
      radio("image", layer.name, i === 0, () => {
        for (const other of images) other.shown = other === layer;
        showImage(nv, images, layer);
        scene.changed();
      }),
    ),
  );
  segmentations.forEach((layer, i) => element("segmentations").append(segmentationControls(nv, layer, i + 1, scene.changed)));
  element("views").hidden = scene.flat;
  element("images").hidden = images.length < 2;
  element("segmentations").hidden = segmentations.length === 0;
  keyboard(nv, segmentations);
  nv.createOnLocationChange(); // shows where the cross is before it moves
  document.documentElement.dataset.ready = "true";
}

start().catch(fail);
