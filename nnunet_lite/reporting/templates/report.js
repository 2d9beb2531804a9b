"use strict";
// The page without this script is whole: tables, charts and the worst cases. This adds sorting, the viewer of cases,
// keys, the theme, and what a pointer reads off the curves. Nothing is fetched; text is only ever set as text.

const $ = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------------------------------------------------- the theme

const THEMES = ["system", "light", "dark"];

function remembered() {
  try { return localStorage.getItem("nnlite-theme"); } catch { return null; } // a file opened from disk may have no storage
}

function useTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("#theme").textContent = `Theme: ${theme}`;
  try { localStorage.setItem("nnlite-theme", theme); } catch { /* not remembered, then */ }
}

function nextTheme() {
  const now = document.documentElement.dataset.theme ?? "system";
  useTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
}

// --------------------------------------------------------------------------------------------------------- the tables

function keyOf(row, column) {
  const cell = row.cells[column];
  const number = cell.dataset.value ?? cell.dataset.order;
  return number === undefined ? cell.textContent.trim() : Number(number);
}

const NAMES = new Intl.Collator("en", { numeric: true });

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return NAMES.compare(String(a), String(b));
}

// Sort by a column; what is n/a stays at the end, whichever way round.
function sortTable(table, column) {
  const heading = table.tHead.rows[0].cells[column];
  const isText = heading.classList.contains("text");
  const now = heading.getAttribute("aria-sort");
  const ascending = now ? now !== "ascending" : isText;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = table.tBodies[0];
  const missing = (key) => !isText && typeof key !== "number";
  const rows = [...body.rows].map((row, place) => ({ row, place, key: keyOf(row, column) }));
  rows.sort((a, b) => {
    if (missing(a.key) || missing(b.key)) return missing(a.key) - missing(b.key) || a.place - b.place;
    return (ascending ? 1 : -1) * compare(a.key, b.key) || a.place - b.place;
  });
  body.append(...rows.map(({ row }) => row));
}

function prepareTables() {
  for (const table of all("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      $("button", heading).addEventListener("click", () => sortTable(table, column));
    });
  }
}

// ----------------------------------------------------------------------------------------------------------- the tabs

function showTab(tab) {
  for (const other of all('[role="tab"]')) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    $(`#${other.getAttribute("aria-controls")}`).hidden = !chosen;
  }
}

function prepareTabs() {
  const tabs = all('[role="tab"]');
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => showTab(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      showTab(next);
      next.focus();
      event.preventDefault();
    });
  });
}

// ---------------------------------------------------------------------------------------------------------- the cases

let report = null; // parsed when the first case is opened: it is most of the page
const data = () => (report ??= JSON.parse($("#report-data").textContent));

const shown = { model: "", case: "", channel: 0, reference: true, prediction: true, errors: true };

// The case rows of the table that is in view, in the order that it is sorted.
function caseRows(model) {
  const rows = all("tr.opens").filter((row) => !row.closest("[hidden]"));
  return model ? all("tr.opens").filter((row) => row.dataset.model === model) : rows;
}

function focusRow(row) {
  for (const other of all("tr.opens", row.closest("table"))) other.tabIndex = -1;
  row.tabIndex = 0;
  row.focus();
  row.scrollIntoView({ block: "nearest" });
}

function stepRow(step) {
  const rows = caseRows();
  if (!rows.length) return;
  const at = rows.indexOf(document.activeElement);
  focusRow(rows[Math.min(Math.max(at + step, 0), rows.length - 1)]);
}

function stepCase(step) {
  const rows = caseRows(shown.model);
  const at = rows.findIndex((row) => row.dataset.case === shown.case);
  const next = rows[at + step];
  if (next) openCase(next.dataset.case, shown.model);
}

function openCase(name, model) {
  shown.case = name;
  shown.model = model;
  fillCase();
  const dialog = $("#case");
  if (!dialog.open) {
    dialog.showModal();
    $('[data-key="j"]', dialog).focus();
  }
}

function closeCase() {
  const row = caseRows(shown.model).find((each) => each.dataset.case === shown.case);
  if (row && !row.closest("[hidden]")) focusRow(row);
}

function written(value, format) {
  if (value === null) return "n/a";
  if (format === "d") return String(value);
  const digits = Number(format.match(/\.(\d+)/)[1]);
  if (format.endsWith("%")) return `${value > 0 ? "+" : ""}${(100 * value).toFixed(digits)} %`;
  return format.endsWith("f") ? value.toFixed(digits) : String(Number(value.toPrecision(digits)));
}

function measureTable(scores) {
  const { labels, measures, formats } = data();
  const used = measures.map((_, i) => i).filter((i) => scores.some((row) => row[i] !== null));
  const head = make("tr", {}, make("th", { scope: "col" }, "Label"),
    ...used.map((i) => make("th", { scope: "col", class: "number" }, measures[i])));
  const rows = labels.map((label, i) => make("tr", {}, make("th", { scope: "row" }, label),
    ...used.map((k) => make("td", { class: "number", "data-value": scores[i][k] ?? "" }, written(scores[i][k], formats[k])))));
  const table = make("table", { class: "measures" }, make("thead", {}, head), make("tbody", {}, ...rows));
  const region = { class: "scroll", tabindex: "0", role: "region", "aria-label": "Scores of this case" };
  return make("div", {}, make("div", region, table), csvButton(table, `scores of ${shown.case}`));
}

function planeFigure(plane) {
  const [width, height] = plane.size, [wide, high] = plane.mm;
  const scale = (plane.of === 1 ? 600 : 350) / Math.max(wide, high);
  const picture = plane.images[Math.min(shown.channel, plane.images.length - 1)];
  const voxels = draw("g", { transform: `scale(${wide / width} ${high / height})` },
    draw("image", { href: `data:image/webp;base64,${picture}`, width, height, preserveAspectRatio: "none" }));
  const svg = draw("svg", {
    viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": `${plane.name} plane`,
    width: wide * scale, height: high * scale,
  }, voxels);
  if (shown.errors) voxels.append(...plane.errors.map((d, kind) => draw("path", { class: `error e${kind}`, d })));
  for (const side of ["reference", "prediction"]) {
    if (!shown[side]) continue;
    for (const [label, d] of plane[side]) voxels.append(draw("path", { class: `${side} c${label % 10}`, d }));
  }
  const sides = plane.sides ? `, ${plane.sides[0]} on the left, ${plane.sides[2]} at the top` : "";
  const at = plane.of === 1 ? "" : `: slice ${plane.slice + 1} of ${plane.of} along ${plane.axis}`;
  const text = `${plane.name}${at}${sides}${plane.cropped ? ", cropped" : ""}`;
  return addDownload(make("figure", { class: "plane" }, svg, make("figcaption", {}, text)));
}

function toggle(key, name, act, pressed) {
  const button = make("button", { type: "button", "data-key": key }, `${name} `, make("kbd", {}, key));
  if (pressed !== undefined) button.setAttribute("aria-pressed", pressed);
  button.addEventListener("click", act);
  return button;
}

function fillCase() {
  const dialog = $("#case");
  const model = data().models[shown.model];
  const planes = model.pictures[shown.case];
  const focused = document.activeElement?.dataset.key;
  const known = model.scores[shown.case].map((row) => row[0]).filter((dice) => dice !== null);
  const mean = known.length ? (known.reduce((a, b) => a + b, 0) / known.length).toFixed(4) : "n/a";
  const top = make("div", { class: "bar-top" }, make("h2", { id: "case-title" }, shown.case),
    toggle("k", "Previous", () => stepCase(-1)), toggle("j", "Next", () => stepCase(1)),
    ...(modelsOf(shown.case).length > 1 ? [toggle("m", "Other model", nextModel)] : []),
    toggle("Esc", "Close", () => dialog.close()));
  const about = make("p", { class: "quiet" },
    `${model.label}, held out in fold ${model.fold[shown.case]}, mean Dice ${mean}`);
  const view = make("code", { class: "command" }, model.view[shown.case]);
  dialog.replaceChildren(top, about, make("p", {}, view, copyButton(view)));
  if (planes) {
    const channels = planes[0].images.length;
    const toggles = ["reference", "prediction", "errors"].map((what) =>
      toggle(what[0], what, () => flip(what), shown[what]));
    if (channels > 1) {
      const name = data().channels[Math.min(shown.channel, channels - 1)];
      toggles.push(toggle("c", `channel: ${name}`, nextChannel));
    }
    dialog.append(make("div", { class: "planes", "data-of": shown.case }, ...planes.map(planeFigure)),
      make("div", { class: "toggles" }, ...toggles), legend());
  } else {
    dialog.append(make("p", { class: "empty" }, "The pictures of this case were left out to keep the report small, " +
      "or could not be made; see \"What is left out\" at the top of the report."));
  }
  dialog.append(measureTable(model.scores[shown.case]));
  if (focused) $(`[data-key="${focused}"]`, dialog)?.focus();
}

function legend() {
  const item = (name, kind) => make("li", {}, make("i", { class: `swatch ${kind}` }), name);
  return make("ul", { class: "legend swatch-on-picture" },
    ...data().labels.map((name, i) => item(name, `c${i % 10}`)),
    make("li", { class: "quiet" }, "solid: reference, dashed: prediction"),
    ...data().errors.map((name, i) => item(name, `full e${i}`)));
}

function flip(what) {
  shown[what] = !shown[what];
  fillCase();
}

function nextChannel() {
  const planes = data().models[shown.model].pictures[shown.case];
  if (!planes) return;
  shown.channel = (shown.channel + 1) % planes[0].images.length;
  fillCase();
}

// The models that were scored on a case.
function modelsOf(name) {
  return Object.keys(data().models).filter((model) => name in data().models[model].scores);
}

function nextModel() {
  const models = modelsOf(shown.case);
  shown.model = models[(models.indexOf(shown.model) + 1) % models.length];
  fillCase();
}

function prepareCases() {
  for (const row of all("tr.opens")) row.addEventListener("click", () => openCase(row.dataset.case, row.dataset.model));
  for (const dot of all("[data-open]")) dot.addEventListener("click", () => openCase(dot.dataset.open, dot.dataset.model));
  for (const worst of all(".worst")) {
    for (const figure of all("figure", worst)) {
      figure.addEventListener("click", () => openCase(worst.dataset.case, worst.dataset.model));
    }
  }
  $("#case").addEventListener("close", closeCase);
}

// ----------------------------------------------------------------------------------------------------------- the keys

const IN_CASE = {
  j: () => stepCase(1), ArrowRight: () => stepCase(1), ArrowDown: () => stepCase(1),
  k: () => stepCase(-1), ArrowLeft: () => stepCase(-1), ArrowUp: () => stepCase(-1),
  r: () => flip("reference"), p: () => flip("prediction"), e: () => flip("errors"), c: nextChannel,
  m: nextModel,
};
const ON_PAGE = { j: () => stepRow(1), k: () => stepRow(-1), t: nextTheme, "?": () => $("#keys").showModal() };
const IN_ROW = { ArrowDown: () => stepRow(1), ArrowUp: () => stepRow(-1), Enter: openRow, " ": openRow };

function openRow() {
  openCase(document.activeElement.dataset.case, document.activeElement.dataset.model);
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inRow = document.activeElement?.matches("tr.opens");
  const act = $("#case").open ? IN_CASE[event.key]
    : $("#keys").open ? undefined
      : (inRow && IN_ROW[event.key]) || ON_PAGE[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

// --------------------------------------------------------------------------------------------------------- the curves

function readOff(figure, svg) {
  const curves = JSON.parse(svg.dataset.curves);
  const [low, high, left, right] = curves.x;
  const cursor = draw("path", { class: "cursor" });
  const readout = make("div", { class: "readout" });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const value = low + ((Math.min(Math.max(x, left), right) - left) / (right - left)) * (high - low);
    const lines = curves.series.map(({ name, x: xs, y: ys }) => {
      const i = xs.reduce((best, at, k) => (Math.abs(at - value) < Math.abs(xs[best] - value) ? k : best), 0);
      return ys[i] === null ? null : `${name}: ${Number(ys[i].toPrecision(4))}`;
    });
    const nearest = curves.series[0].x.reduce((a, b) => (Math.abs(b - value) < Math.abs(a - value) ? b : a));
    readout.textContent = [`${curves.label} ${Number(nearest.toPrecision(5))}`, ...lines.filter(Boolean)].join("\n");
    cursor.setAttribute("d", `M${Math.min(Math.max(x, left), right)} 10V${svg.viewBox.baseVal.height - 34}`);
    const beyond = x > (left + right) / 2; // the box keeps off the cursor
    readout.style.left = beyond ? "3.5rem" : "";
    readout.style.right = beyond ? "" : "1rem";
    svg.append(cursor);
    figure.append(readout);
  });
  svg.addEventListener("pointerleave", () => { cursor.remove(); readout.remove(); });
}

// ------------------------------------------------------------------------------------- copies, downloads and printing

function small(kind, text, act) {
  const button = make("button", { type: "button", class: kind, title: kind === "download" ? `Save as ${text}` : text }, text);
  button.addEventListener("click", (event) => { event.stopPropagation(); act(button); });
  return button;
}

function copyButton(element) {
  return small("copy", "Copy", async (button) => {
    const text = element.innerText;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // a page from disk may not be allowed to
      getSelection().selectAllChildren(element);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

function save(blob, title, ending) {
  const name = `${document.title.split(" ")[0]} ${title}`.replace(/[^\p{L}\p{N}_.+-]+/gu, "-");
  const link = make("a", { href: URL.createObjectURL(blob), download: `${name}.${ending}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Numbers as exact as they are known, in the order of the page; what is n/a is empty.
function toCsv(table) {
  const written = (cell) => (cell.textContent.trim() === "n/a" ? "" : cell.dataset.value ?? cell.textContent.trim());
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = [...table.rows].map((row) => [...row.cells].map((cell) => quoted(written(cell))).join(","));
  return new Blob([`\ufeff${lines.join("\n")}\n`], { type: "text/csv" });
}

const STYLES = ["fill", "fill-opacity", "fill-rule", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size",
  "font-family", "vector-effect"];

// An SVG that needs no style sheet: the title, the drawing of a figure and a legend of its curves.
function wholeDrawing(figure) {
  const svg = $("svg", figure), copy = svg.cloneNode(true), box = svg.viewBox.baseVal;
  const page = getComputedStyle(document.body), width = svg.classList.contains("plot") ? box.width : 600;
  const height = (box.height / box.width) * width, growth = (2 * width) / svg.getBoundingClientRect().width;
  const originals = [svg, ...all("*", svg)];
  [copy, ...all("*", copy)].forEach((element, i) => {
    const style = getComputedStyle(originals[i]);
    for (const name of STYLES) element.style[name] = style.getPropertyValue(name);
    if (style.vectorEffect !== "non-scaling-stroke") return;
    for (const name of ["strokeWidth", "strokeDasharray"]) {
      element.style[name] = style[name].replace(/[\d.]+/g, (length) => growth * length);
    }
  });
  const curves = all(".line title", svg).map((title) => [title.textContent, getComputedStyle(title.parentElement)]);
  const [title, note] = titleOf(figure), top = note ? 42 : 26, total = top + height + 18 * curves.length + 6;
  const text = (x, y, content) => draw("text", { x, y, fill: page.color, "font-family": page.fontFamily, "font-size": 12 }, content);
  for (const [name, value] of Object.entries({ x: 0, y: top - 2, width, height })) copy.setAttribute(name, value);
  const legend = curves.flatMap(([name, style], i) => {
    const y = top + height + 18 * i + 7;
    const line = { d: `M16 ${y}h24`, stroke: style.color, "stroke-width": 2, "stroke-dasharray": style.strokeDasharray };
    return [draw("path", line), text(48, y + 4, name)];
  });
  return draw("svg", { viewBox: `0 0 ${width} ${total}`, width: 2 * width, height: 2 * total },
    draw("rect", { width, height: total, fill: page.backgroundColor }), text(8, 16, title), text(8, 32, note), copy, ...legend);
}

// What a figure shows, with the name of its model or case, and its note.
function titleOf(figure) {
  const caption = $("figcaption", figure), of = figure.closest("[data-of]")?.dataset.of;
  const heading = ($("strong", caption) ?? caption).textContent;
  return [of ? `${of}, ${heading}` : heading, $("span", caption)?.textContent ?? ""];
}

function csvButton(table, title) {
  return small("download", "CSV", () => save(toCsv(table), title, "csv"));
}

function savePicture(figure) {
  const svg = wholeDrawing(figure);
  const image = new Image();
  image.onload = () => {
    const canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight });
    canvas.getContext("2d").drawImage(image, 0, 0);
    canvas.toBlob((blob) => save(blob, titleOf(figure)[0], "png"));
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(svg))}`;
}

function addDownload(figure) {
  figure.append(small("download", "PNG", () => savePicture(figure)));
  return figure;
}

function prepareDownloads() {
  for (const element of all("[data-copy]")) element.after(copyButton(element));
  for (const table of all("table.sortable")) {
    table.parentElement.before(csvButton(table, table.caption.textContent));
  }
  for (const figure of all("figure")) addDownload(figure);
}

function preparePrinting() {
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details:not([open])");
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
}

// -------------------------------------------------------------------------------------------------------- the contents

function followSections() {
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  for (const section of all("main > section")) watcher.observe(section);
}

useTheme(THEMES.includes(remembered()) ? remembered() : "system");
$("#theme").addEventListener("click", nextTheme);
$("#help").addEventListener("click", () => $("#keys").showModal());
document.addEventListener("keydown", pressed);
prepareTables();
prepareTabs();
prepareCases();
prepareDownloads();
preparePrinting();
for (const svg of all("svg[data-curves]")) readOff(svg.closest("figure"), svg);
followSections();
