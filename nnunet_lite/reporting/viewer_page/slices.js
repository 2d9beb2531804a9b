// Reads volumes and draws their slices: pixels are painted on a canvas of the slice's own size, outlines are paths.
// A volume is {voxels, shape, steps, colours}: shape (z, y, x), of which it holds every steps-th voxel.

const TYPES = {
  2: Uint8Array, 4: Int16Array, 8: Int32Array, 16: Float32Array, 128: Uint8Array, 256: Int8Array, 512: Uint16Array,
  768: Uint32Array,
};
const RGB = 128;
const HEADER = 352; // bytes of a NIfTI file before its voxels

export async function readVolume(url, steps) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  const data = await response.arrayBuffer();
  const header = new DataView(data);
  const shape = [46, 44, 42].map((place) => header.getInt16(place, true));
  const type = header.getInt16(70, true);
  return { url, steps, shape, voxels: new TYPES[type](data, HEADER), colours: type === RGB };
}

// Where a slice lies in a volume: the voxel of row r and column c is start + r * down + c * across.
function sliceOf(volume, plane, at) {
  const { shape, steps } = volume;
  const strides = [shape[1] * shape[2], shape[2], 1];
  const height = shape[plane.rows];
  const down = strides[plane.rows] * (plane.upwards ? -1 : 1);
  const index = Math.floor(at[plane.normal] / steps[plane.normal]);
  const start = index * strides[plane.normal] + (plane.upwards ? (height - 1) * strides[plane.rows] : 0);
  return { width: shape[plane.columns], height, start, down, across: strides[plane.columns] };
}

// The value of a volume at a voxel (z, y, x) of the whole image.
export function valueAt({ voxels, shape, steps }, at) {
  const [z, y, x] = at.map((n, axis) => Math.floor(n / steps[axis]));
  return voxels[(z * shape[1] + y) * shape[2] + x];
}

export function valuesOf({ voxels }) {
  const found = new Uint8Array(1 << (8 * voxels.BYTES_PER_ELEMENT));
  for (let i = 0; i < voxels.length; i++) found[voxels[i]] = 1;
  return [...found.keys()].filter((value) => found[value]);
}

// A canvas with the slice; colourOf(i) is the colour of voxel i as 0xAABBGGRR.
function paint(volume, plane, at, colourOf) {
  const { width, height, start, down, across } = sliceOf(volume, plane, at);
  const canvas = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let row = 0, pixel = 0; row < height; row++)
    for (let column = 0, i = start + row * down; column < width; column++, i += across) pixels[pixel++] = colourOf(i);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

export function paintImage(volume, plane, at, [low, high]) {
  const { voxels } = volume;
  const scale = 255 / (high - low);
  const grey = (i) => Math.max(0, Math.min(255, (voxels[i] - low) * scale));
  if (volume.colours)
    return paint(volume, plane, at, (i) => 0xff000000 | (grey(3 * i + 2) << 16) | (grey(3 * i + 1) << 8) | grey(3 * i));
  return paint(volume, plane, at, (i) => 0xff000000 | (Math.trunc(grey(i)) * 0x010101));
}

// table: the colour of each value.
export function paintValues(volume, plane, at, table) {
  const { voxels } = volume;
  return paint(volume, plane, at, (i) => table[voxels[i]]);
}

// kind(expected, predicted): which colour of the table a voxel has.
export function paintErrors(reference, prediction, plane, at, kind, table) {
  return paint(prediction, plane, at, (i) => table[kind(reference.voxels[i], prediction.voxels[i])]);
}

// The outlines of each value of a slice except 0, in its voxels: value -> Path2D.
export function outline(volume, plane, at) {
  const { width, height, start, down, across } = sliceOf(volume, plane, at);
  const value = (row, column) =>
    row < 0 || column < 0 || row >= height || column >= width ? 0 : volume.voxels[start + row * down + column * across];
  const paths = new Map();
  const line = (labels, ...[x1, y1, x2, y2]) => {
    for (const label of labels) {
      if (label === 0) continue;
      if (!paths.has(label)) paths.set(label, new Path2D());
      paths.get(label).moveTo(x1, y1);
      paths.get(label).lineTo(x2, y2);
    }
  };
  for (let row = 0; row <= height; row++)
    for (let column = 0; column <= width; column++) {
      const here = value(row, column);
      const left = value(row, column - 1);
      const above = value(row - 1, column);
      if (here !== left) line([left, here], column, row, column, row + 1);
      if (here !== above) line([above, here], column, row, column + 1, row);
    }
  return paths;
}
