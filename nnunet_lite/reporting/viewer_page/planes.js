// The planes of a case on one canvas, and what a pointer does to them.
import { outline } from "./slices.js";

const QUADRANTS = [[0, 0], [0, 1], [1, 1]]; // of the planes; the free one, at the top right, is for three dimensions
const WHEEL = 100; // of a mouse for one slice
const LINE = 33; // the same where a wheel counts lines
const GAP = 8; // pixels around the centre of the cross
const NARROW = 260; // pixels of a plane in which its name would touch the letters
const LETTERS = "600 13px system-ui, sans-serif";

export class Planes {
  zooms = {};
  pointers = new Map();
  painted = new Map(); // slices that were painted, by drawing and plane
  cross = true;
  scrolled = 0;

  // drawings(): what is drawn, from the bottom; changed(): called when the cross moves; windowed(): or the grey levels
  constructor(canvas, { drawings, changed, chosen, windowed }) {
    Object.assign(this, { canvas, drawings, changed, chosen, windowed, context: canvas.getContext("2d") });
    for (const type of ["pointerdown", "pointermove", "pointerup", "pointercancel", "dblclick", "wheel"])
      canvas.addEventListener(type, (event) => this.scene && this[type](event), { passive: false });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  open(scene) {
    this.scene = scene;
    this.at = [...scene.at];
    this.focus = scene.planes[0];
    this.painted.clear();
    for (const plane of scene.planes) this.zooms[plane.name] ??= { zoom: 1, x: 0, y: 0 };
  }

  // only: the one plane that is shown, or null for all
  show(only) {
    this.only = only;
    this.focus = only ?? this.focus;
    this.draw();
  }

  get tiles() {
    const { width, height } = this.canvas;
    const { planes } = this.scene;
    if (this.only || planes.length === 1) return [{ plane: this.only ?? planes[0], x: 0, y: 0, width, height }];
    const half = { width: width / 2, height: height / 2 };
    return planes.map((plane, i) => ({ plane, x: QUADRANTS[i][0] * half.width, y: QUADRANTS[i][1] * half.height, ...half }));
  }

  // Where the voxels of a plane lie on the canvas: column c is at left + c * across, row r (as drawn) at top + r * down.
  place({ plane, x, y, width, height }) {
    const [rows, columns] = [plane.rows, plane.columns].map((axis) => this.scene.shape[axis]);
    const [tall, wide] = [plane.rows, plane.columns].map((axis) => this.scene.spacing[axis]);
    const moved = this.zooms[plane.name];
    const scale = moved.zoom * Math.min(width / (columns * wide), height / (rows * tall));
    const [down, across] = [scale * tall, scale * wide];
    const left = x + width / 2 + moved.x - (across * columns) / 2;
    return { left, top: y + height / 2 + moved.y - (down * rows) / 2, down, across };
  }

  // The voxel of the file (x, y, z) for one of the turned image (z, y, x).
  stored(at) {
    const { order, reversed, shape } = this.scene;
    const voxel = [];
    order.forEach((axis, i) => (voxel[2 - axis] = reversed[i] ? shape[i] - 1 - at[i] : at[i]));
    return voxel;
  }

  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.scene) this.drawNow();
    });
  }

  drawNow() {
    const { canvas, context } = this;
    this.ratio = window.devicePixelRatio;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((n) => Math.round(n * this.ratio));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    const drawings = this.drawings();
    for (const tile of this.tiles) {
      context.save();
      context.beginPath();
      context.rect(tile.x, tile.y, tile.width, tile.height);
      context.clip();
      for (const drawing of drawings) this.drawOne(drawing, tile);
      if (this.cross) this.drawCross(tile);
      this.drawWords(tile);
      context.restore();
    }
  }

  // drawing: {name, stamp, volume} and either colours, of the outline of each value, or paint(plane, at)
  drawOne({ name, stamp, volume, colours, width, paint, opacity, smooth }, tile) {
    const { context, ratio } = this;
    const { plane } = tile;
    const key = `${name}|${plane.name}`;
    const now = `${volume.url}|${Math.floor(this.at[plane.normal] / volume.steps[plane.normal])}|${stamp}`;
    let slice = this.painted.get(key);
    if (slice?.stamp !== now) {
      slice = { stamp: now, content: colours ? outline(volume, plane, this.at) : paint(plane, this.at) };
      this.painted.set(key, slice);
    }
    const { left, top, down, across } = this.place(tile);
    const [rows, columns] = [plane.rows, plane.columns];
    const beyond = plane.upwards ? this.scene.shape[rows] - volume.shape[rows] * volume.steps[rows] : 0; // of a coarse copy
    const [wide, tall] = [across * volume.steps[columns], down * volume.steps[rows]];
    const matrix = new DOMMatrix([wide, 0, 0, tall, left, top + beyond * down]);
    if (!colours) {
      context.globalAlpha = opacity;
      context.imageSmoothingEnabled = smooth;
      context.setTransform(matrix);
      context.drawImage(slice.content, 0, 0);
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.globalAlpha = 1;
      return;
    }
    context.lineCap = "round";
    for (const [value, path] of slice.content) {
      if (!colours[value]) continue;
      const placed = new Path2D();
      placed.addPath(path, matrix);
      for (const [colour, wide] of [["#0008", width + 1.8], [colours[value], width]]) {
        context.strokeStyle = colour;
        context.lineWidth = wide * ratio;
        context.stroke(placed);
      }
    }
  }

  drawCross(tile) {
    const { context, ratio } = this;
    const { left, top, down, across } = this.place(tile);
    const [column, row] = this.drawnAt(tile.plane);
    const [x, y, gap] = [left + (column + 0.5) * across, top + (row + 0.5) * down, GAP * ratio];
    context.strokeStyle = "#ffe98acc";
    context.lineWidth = ratio;
    context.beginPath();
    for (const side of [-1, 1]) {
      context.moveTo(x + side * gap, y);
      context.lineTo(x + side * 1e5, y);
      context.moveTo(x, y + side * gap);
      context.lineTo(x, y + side * 1e5);
    }
    context.stroke();
  }

  drawnAt(plane) {
    const row = this.at[plane.rows];
    return [this.at[plane.columns], plane.upwards ? this.scene.shape[plane.rows] - 1 - row : row];
  }

  // The letters of the sides, and which slice it is.
  drawWords({ plane, x, y, width, height }) {
    const { context, ratio } = this;
    const write = (text, left, top, align) => {
      context.textAlign = align;
      context.strokeText(text, x + left, y + top);
      context.fillText(text, x + left, y + top);
    };
    const [edge, line] = [8 * ratio, 18 * ratio];
    context.font = LETTERS.replace("13", Math.round(13 * ratio));
    [context.fillStyle, context.strokeStyle, context.lineWidth] = ["#fff", "#000", 3 * ratio];
    const [left, right, top, bottom] = plane.sides;
    if (left) {
      write(left, edge, height / 2 + edge / 2, "left");
      write(right, width - edge, height / 2 + edge / 2, "right");
      write(top, width / 2, line, "center");
      write(bottom, width / 2, height - edge, "center");
    }
    const count = this.scene.shape[plane.normal];
    const axis = 2 - this.scene.order[plane.normal];
    const name = width < NARROW * ratio ? "" : plane.name; // the letters say it too
    if (count > 1) write(`${name} ${this.stored(this.at)[axis] + 1} of ${count}`, edge, line, "left");
  }

  // ------------------------------------------------------------------------------------------------ the pointer

  tileAt(event) {
    const [x, y] = [event.offsetX * this.ratio, event.offsetY * this.ratio];
    const inside = (tile) => x >= tile.x && x < tile.x + tile.width && y >= tile.y && y < tile.y + tile.height;
    return { x, y, tile: this.tiles.find(inside) };
  }

  moveCross({ x, y, tile }) {
    const { shape } = this.scene;
    const { rows, columns, upwards } = tile.plane;
    const { left, top, down, across } = this.place(tile);
    const within = (n, axis) => Math.max(0, Math.min(shape[axis] - 1, Math.floor(n)));
    const row = within((y - top) / down, rows);
    this.at[columns] = within((x - left) / across, columns);
    this.at[rows] = upwards ? shape[rows] - 1 - row : row;
    this.moved();
  }

  // Towards the head, the front or the right, as in 3D Slicer.
  scroll({ normal }, slices) {
    const next = this.at[normal] + (normal === 0 ? slices : -slices);
    this.at[normal] = Math.max(0, Math.min(this.scene.shape[normal] - 1, next));
    this.moved();
  }

  moved() {
    this.changed();
    this.draw();
  }

  // Zoom around a point of the canvas.
  zoom({ x, y, tile }, factor) {
    const moved = this.zooms[tile.plane.name];
    const zoom = Math.max(0.5, Math.min(40, moved.zoom * factor));
    for (const [axis, point, size] of [["x", x - tile.x, tile.width], ["y", y - tile.y, tile.height]]) {
      const fromCentre = point - size / 2;
      moved[axis] = fromCentre - ((fromCentre - moved[axis]) * zoom) / moved.zoom;
    }
    moved.zoom = zoom;
    this.draw();
  }

  pan(tile, x, y) {
    const moved = this.zooms[tile.plane.name];
    moved.x += x;
    moved.y += y;
    this.draw();
  }

  resetZoom() {
    for (const moved of Object.values(this.zooms)) Object.assign(moved, { zoom: 1, x: 0, y: 0 });
    this.draw();
  }

  pointerdown(event) {
    const found = this.tileAt(event);
    if (!found.tile) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, found);
    this.focus = found.tile.plane;
    if (event.button === 0 && !event.shiftKey && this.pointers.size === 1) this.moveCross(found);
  }

  pointermove(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = { ...before, x: event.offsetX * this.ratio, y: event.offsetY * this.ratio };
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    const [x, y] = [now.x - before.x, now.y - before.y];
    if (other) {
      const distance = (point) => Math.hypot(point.x - other.x, point.y - other.y) || 1;
      this.zoom(other, distance(now) / distance(before));
      this.pan(now.tile, x / 2, y / 2);
    } else if (event.buttons & 4 || event.shiftKey) this.pan(now.tile, x, y);
    else if (event.buttons & 2) this.windowed(x / this.canvas.width, y / this.canvas.height);
    else this.moveCross(now);
    this.pointers.set(event.pointerId, now);
  }

  pointerup(event) {
    this.pointers.delete(event.pointerId);
  }

  pointercancel(event) {
    this.pointers.delete(event.pointerId);
  }

  dblclick(event) {
    const { tile } = this.tileAt(event);
    if (tile) this.chosen(this.only ? null : tile.plane);
  }

  wheel(event) {
    event.preventDefault();
    const found = this.tileAt(event);
    if (!found.tile) return;
    const turned = event.deltaY * (event.deltaMode ? LINE : 1);
    if (event.ctrlKey || this.scene.shape[found.tile.plane.normal] === 1) this.zoom(found, Math.exp(-turned / 300));
    else {
      this.scrolled += turned;
      const slices = Math.trunc(this.scrolled / WHEEL);
      this.scrolled -= slices * WHEEL;
      if (slices) this.scroll(found.tile.plane, -slices);
    }
  }
}
