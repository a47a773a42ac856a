"use strict";
const $ = id => document.getElementById(id);
const FLOOR = 0.05;  // objects of a lower score are not asked for
const CROWD = 60;    // more would disappear behind their labels
const state = {colors: new Map(), token: "", image: null, size: null, objects: [], off: new Set(), lit: null, seconds: 0, asking: null};

// ---- asking

async function ask(path, options = {}) {
  const headers = state.token ? {Authorization: `Bearer ${state.token}`} : {};
  let answer;
  try { answer = await fetch(path, {...options, headers}); }
  catch (error) { throw error.name === "AbortError" ? error : new Error("The server cannot be reached."); }
  const content = await answer.json().catch(() => ({detail: `The server answers with status ${answer.status}.`}));
  if (answer.status === 401) $("entry").hidden = false;
  if (!answer.ok) throw new Error(content.detail);
  return content;
}

async function begin() {
  state.token = state.token || decodeURIComponent(location.hash.match(/^#token=(.+)/)?.[1] ?? "");
  if ($("entry").dataset.needed === "yes" && !state.token) { $("entry").hidden = false; $("token").focus(); return; }
  try {
    const model = await ask("model");
    state.colors = new Map(model.classes.map(one => [one.name, one.color]));
    const count = model.classes.length;
    $("model").textContent = `${model.file}: ${count} ${count === 1 ? "class" : "classes"}${model.finds_masks ? ", with masks" : ""}`;
    $("score").value = model.score_threshold;
    $("least").value = Number($("score").value).toFixed(2);
    $("entry").hidden = true;
    fault("");
  } catch (error) { fault(error.message); }
}

async function show(file) {
  state.asking?.abort();
  const asking = state.asking = new AbortController();
  fault("");
  say("Looking for objects …");
  Object.assign(state, {image: null, size: null, objects: [], off: new Set(), lit: null, seconds: 0});
  state.image = await createImageBitmap(file).catch(() => null);  // what the browser cannot show the server may read
  if (state.image) state.size = {width: state.image.width, height: state.image.height};
  render();
  try {
    const start = performance.now();
    const answer = await ask(`predict?threshold=${FLOOR}`, {method: "POST", body: file, signal: asking.signal});
    state.size = {width: answer.width, height: answer.height};
    state.objects = answer.objects;
    state.seconds = (performance.now() - start) / 1000;
    render();
  } catch (error) {
    if (error.name === "AbortError") return;
    say("");
    fault(error.message);
  }
}

const say = text => { $("status").textContent = text; };
const fault = text => { $("fault").textContent = text; $("fault").hidden = !text; };

// ---- what is shown

const shown = () => {
  const least = Number($("score").value);
  return state.objects.filter(one => one.score >= least && !state.off.has(one.name));
};

function render() {
  $("drop").hidden = Boolean(state.size);
  $("canvas").hidden = $("again").hidden = !state.size;
  $("side").hidden = !state.objects.length;
  classes();
  change();
}

function change() {
  const visible = shown();
  if (!visible.includes(state.lit)) state.lit = null;
  list(visible);
  draw();
  if (!state.seconds || !state.size) return;
  const few = state.objects.length ? `${visible.length} of ${state.objects.length} objects` : "no objects";
  say(`${few}, found in ${state.seconds.toFixed(1)} s`);
}

function element(name, values = {}, ...children) {
  const made = Object.assign(document.createElement(name), values);
  made.append(...children);
  return made;
}

function swatch(name) {
  const made = element("span", {className: "swatch"});
  made.style.background = color(name);
  return made;
}

const color = name => state.colors.get(name) ?? "#2f6fb3";

function classes() {
  const counts = new Map();
  state.objects.forEach(one => counts.set(one.name, (counts.get(one.name) ?? 0) + 1));
  const names = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a.localeCompare(b));
  $("classes").replaceChildren(...names.map(name => {
    const box = element("input", {type: "checkbox", checked: !state.off.has(name)});
    box.addEventListener("change", () => { box.checked ? state.off.delete(name) : state.off.add(name); change(); });
    return element("label", {}, box, swatch(name), name);
  }));
}

function every(on) {
  state.off = new Set(on ? [] : state.objects.map(one => one.name));
  classes();
  change();
}

function list(visible) {
  const focused = $("list").contains(document.activeElement) ? document.activeElement.one : null;
  $("list").replaceChildren(...visible.map((one, i) => {
    const [x0, y0, x1, y1] = one.box.map(Math.round);
    const item = element("button", {type: "button", one, tabIndex: i ? -1 : 0}, swatch(one.name),
      element("span", {className: "name", textContent: one.name}),
      element("span", {className: "value", textContent: one.score.toFixed(2)}));
    item.setAttribute("aria-label", `${one.name}, score ${one.score.toFixed(2)}, ${x1 - x0} by ${y1 - y0} pixels, ` +
      `${x0} from the left, ${y0} from the top`);
    item.addEventListener("pointerenter", () => light(one));
    item.addEventListener("pointerleave", () => light(document.activeElement.one ?? null));
    item.addEventListener("focus", () => light(one));
    item.addEventListener("blur", () => light(null));
    item.addEventListener("click", () => light(one));
    return element("li", {}, item);
  }));
  items().find(item => item.one === focused)?.focus();
}

const items = () => [...$("list").querySelectorAll("button")];

function light(one) {
  if (state.lit === one) return;
  state.lit = one;
  items().forEach(item => item.classList.toggle("lit", item.one === one));
  draw();
}

// ---- drawing

function draw() {
  const canvas = $("canvas");
  if (!state.size) return;
  const {width, height} = state.size;
  const room = $("bar").clientWidth;
  const high = innerWidth > 820 ? Math.max(260, innerHeight - 190) : innerHeight / 2;  // on a phone the list needs some
  const scale = Math.min(room / width, high / height, 6);
  const ratio = devicePixelRatio || 1;
  const [w, h] = [width * scale, height * scale];
  Object.assign(canvas, {width: Math.round(w * ratio), height: Math.round(h * ratio)});
  Object.assign(canvas.style, {width: `${w}px`, height: `${h}px`});
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.fillStyle = "#cbd2d9";
  pen.fillRect(0, 0, w, h);
  if (state.image) pen.drawImage(state.image, 0, 0, w, h);
  const visible = shown();
  const drawn = {masks: 0, boxes: 0};
  const order = [...visible].reverse().sort((a, b) => (a === state.lit) - (b === state.lit));  // the best on top
  for (const one of order) drawn.masks += mask(pen, one, scale);
  for (const one of order) drawn.boxes += frame(pen, one, scale);
  label(pen, visible, scale, w);
  Object.assign(canvas.dataset, {...drawn, scale});
  canvas.setAttribute("aria-label", described(visible));
}

function described(visible) {
  const counts = new Map();
  visible.forEach(one => counts.set(one.name, (counts.get(one.name) ?? 0) + 1));
  const parts = [...counts].map(([name, count]) => `${count} ${name}`).join(", ");
  return `the image, ${state.size.width} by ${state.size.height} pixels: ${parts || "no objects shown"}`;
}

const dimmed = one => state.lit !== null && state.lit !== one;

function frame(pen, one, scale) {
  const [x0, y0, x1, y1] = one.box.map(side => side * scale);
  pen.globalAlpha = dimmed(one) ? 0.45 : 1;
  const crowded = state.objects.length > CROWD && state.lit !== one;
  for (const [style, width] of [["#1f2933", crowded ? 2.5 : 4], [color(one.name), crowded ? 1.5 : 2.5]]) {
    pen.strokeStyle = state.lit === one && style !== "#1f2933" ? "#fff" : style;
    pen.lineWidth = state.lit === one ? width + 1 : width;
    pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
  }
  pen.globalAlpha = 1;
  return 1;
}

function label(pen, visible, scale, width) {
  const alone = visible.length <= 8;  // few may have labels that are wider than themselves
  const wanted = visible.filter(one => visible.length <= CROWD || one === state.lit);
  const taken = [];
  pen.font = "600 13px system-ui, 'DejaVu Sans', sans-serif";
  for (const one of [...wanted].sort((a, b) => (b === state.lit) - (a === state.lit))) {
    const text = `${one.name} ${one.score.toFixed(2)}`;
    const w = pen.measureText(text).width + 10;
    if (w > 1.5 * scale * (one.box[2] - one.box[0]) && !alone && one !== state.lit) continue;
    const x = Math.max(0, Math.min(one.box[0] * scale - 1, width - w));
    const y = Math.max(0, one.box[1] * scale - 20);
    if (taken.some(([a, b, c]) => a < x + w && x < c && Math.abs(b - y) < 19)) continue;
    taken.push([x, y, x + w]);
    pen.globalAlpha = dimmed(one) ? 0.45 : 1;
    pen.fillStyle = color(one.name);
    pen.fillRect(x, y, w, 19);
    pen.fillStyle = dark(color(one.name)) ? "#fff" : "#1f2933";
    pen.fillText(text, x + 5, y + 14);
  }
  pen.globalAlpha = 1;
}

const channels = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
const dark = hex => { const [r, g, b] = channels(hex); return 0.2126 * r + 0.7152 * g + 0.0722 * b < 125; };

// ---- masks

function mask(pen, one, scale) {
  if (!one.mask) return 0;
  one.picture ??= picture(one);
  const {canvas, x, y, step} = one.picture;
  pen.globalAlpha = dimmed(one) ? 0.3 : 1;
  pen.drawImage(canvas, x * scale, y * scale, canvas.width * step * scale, canvas.height * step * scale);
  pen.globalAlpha = 1;
  return 1;
}

// Of the part of the image in which its box lies, at every `step`-th pixel: large photographs have more than are seen.
function picture(one) {
  const [height, width] = one.mask.size;
  const step = Math.ceil(Math.max(height, width) / 1200);
  const [x, y] = [0, 1].map(i => Math.max(0, Math.floor(one.box[i] / step) - 1));
  const [right, bottom] = [[2, width], [3, height]].map(([i, most]) => Math.min(Math.ceil(most / step), Math.ceil(one.box[i] / step) + 1));
  const canvas = element("canvas", {width: Math.max(1, right - x), height: Math.max(1, bottom - y)});
  const data = new ImageData(canvas.width, canvas.height);
  const [r, g, b] = channels(color(one.name));
  let at = 0, on = false;
  for (const length of runs(one.mask.counts)) {
    const end = at + length;
    for (let column = Math.floor(at / height); on && column * height < end; column++) {
      const i = column / step - x;
      if (column % step || i < 0 || i >= canvas.width) continue;
      const [first, last] = [Math.max(at - column * height, y * step), Math.min(end - column * height, height)];
      for (let j = Math.ceil(first / step) - y; j < canvas.height && (j + y) * step < last; j++)
        data.data.set([r, g, b, 115], 4 * (j * canvas.width + i));
    }
    at = end;
    on = !on;
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
  return {canvas, x: x * step, y: y * step, step};
}

// COCO's compressed run lengths: background and object in turn, column by column.
function runs(text) {
  const found = [];
  for (let i = 0; i < text.length;) {
    let value = 0, shift = 0, digit;
    do {
      digit = text.charCodeAt(i++) - 48;
      value |= (digit & 31) << shift;
      shift += 5;
    } while (digit & 32);
    if (digit & 16 && shift < 32) value |= -1 << shift;
    found.push(found.length > 2 ? value + found[found.length - 2] : value);
  }
  return found;
}

// ---- hands

function under(event) {
  const place = $("canvas").getBoundingClientRect(), scale = Number($("canvas").dataset.scale);
  const [x, y] = [(event.clientX - place.left) / scale, (event.clientY - place.top) / scale];
  const size = one => (one.box[2] - one.box[0]) * (one.box[3] - one.box[1]);
  const hit = shown().filter(({box}) => box[0] <= x && x <= box[2] && box[1] <= y && y <= box[3]);
  return hit.sort((a, b) => size(a) - size(b))[0] ?? null;
}

$("canvas").addEventListener("pointermove", event => {
  light(under(event));
  const item = items().find(one => one.one === state.lit);
  if (item && event.pointerType === "mouse") $("list").scrollTop = item.offsetTop - $("list").offsetTop - 60;
});
$("canvas").addEventListener("pointerleave", event => { if (event.pointerType === "mouse") light(null); });
$("canvas").addEventListener("click", event => light(under(event)));

$("list").addEventListener("keydown", event => {
  const all = items(), i = all.indexOf(document.activeElement);
  const to = {ArrowDown: i + 1, ArrowUp: i - 1, Home: 0, End: all.length - 1}[event.key];
  if (to === undefined || !all[to]) return;
  event.preventDefault();
  all.forEach((item, j) => { item.tabIndex = j === to ? 0 : -1; });
  all[to].focus();
});

const offered = files => { const file = [...files].find(one => one.type.startsWith("image/")) ?? files[0]; if (file) show(file); };
$("file").addEventListener("change", () => { offered($("file").files); $("file").value = ""; });
document.addEventListener("paste", event => offered(event.clipboardData.files));
document.addEventListener("dragover", event => { event.preventDefault(); $("stage").classList.add("over"); });
document.addEventListener("dragleave", event => { if (!event.relatedTarget) $("stage").classList.remove("over"); });
document.addEventListener("drop", event => {
  event.preventDefault();
  $("stage").classList.remove("over");
  offered(event.dataTransfer.files);
});
$("score").addEventListener("input", () => { $("least").value = Number($("score").value).toFixed(2); change(); });
$("all").addEventListener("click", () => every(true));
$("none").addEventListener("click", () => every(false));
$("entry").addEventListener("submit", event => { event.preventDefault(); state.token = $("token").value; begin(); });
addEventListener("resize", draw);
begin();
