// Three planes of a case: scan, contours, sides of the patient, scale bar. A plane is named by the axis across it.
const PLANES = {
  2: { across: 0, down: 1, up: false, sides: "RLAP", axes: ["", "+x", "", "+y"] }, // left, right, top, bottom
  1: { across: 0, down: 2, up: true, sides: "RLSI", axes: ["", "+x", "+z", ""] },
  0: { across: 1, down: 2, up: true, sides: "APSI", axes: ["", "+y", "+z", ""] },
};
const AT_FIRST = { window: 64, level: 32, opacity: 30 }; // the whole range of the stored scan; percent, of what is filled
const GAPS = [0, 0.25, 0.42]; // at both ends of each edge of a voxel: a solid, a dashed and a dotted outline
const DASHES = ["solid", "dash", "dot"]; // what the swatches of these outlines look like
// With one class a colour is a mask and a line its method; with several a colour is a class and a line its mask.
const masks = [{ ...report.label, line: 0 }, ...report.runs.map((run) => ({ ...run, line: run.method % GAPS.length }))];
if (classes.length) masks.forEach((mask, which) => Object.assign(mask, { color: "currentColor", line: which && 1 + ((which - 1) % (GAPS.length - 1)) }));
// Numbers in the label maps of the classes that are shown.
function numbers() {
  const every = classes.length ? classes.map((_, index) => index + 1) : [1];
  const one = classes.findIndex(({ name }) => name === report.view);
  return one < 0 ? every : [one + 1];
}
const colorOf = (which, number) => (classes.length ? classes[number - 1].color : masks[which].color);
const firstSeed = (method) => 1 + report.runs.findIndex((run) => run.method === method);
// At first: the label and a run of each of two methods; more would hide the scan.
const view = { id: null, at: [0, 0, 0], shown: new Set([0, firstSeed(0), firstSeed(1)]), filled: new Set([0]), loading: 0 };

async function unpack(text) {
  const packed = atob(text);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function bits(packed, length) {
  const mask = new Uint8Array(length);
  for (let i = 0; i < length; i++) mask[i] = (packed[i >> 3] >> (7 - (i & 7))) & 1;
  return mask;
}

// The gray levels from what report.py's residual() has left of them; in place, the voxels before are restored already.
function restore(image, [w, h, d]) {
  for (let x = 0, at = 0; x < w; x++) for (let y = 0; y < h; y++) for (let z = 0; z < d; z++, at++) {
    image[at] += ((x ? image[at - h * d] : 0) + (y ? image[at - d] : 0)) >> 1;
  }
  return image;
}

async function openCase(id) {
  const ticket = ++view.loading;
  const stored = report.volumes[id];
  const length = stored.shape.reduce((a, b) => a * b);
  const image = restore(await unpack(stored.image), stored.shape);
  const opened = await Promise.all(stored.masks.map(async (text) => (text === null ? null : classes.length ? unpack(text) : bits(await unpack(text), length))));
  if (ticket !== view.loading) return; // another case was asked for meanwhile
  Object.assign(view, { id, image, masks: opened, stored, shape: stored.shape, spacing: stored.spacing, at: [...stored.centre] });
  byId("case").value = id;
  byId("case-name").textContent = id;
  markOpen(id);
  layOut();
  await drawMasks();
}

// One scale for the three planes, as in a viewer with panes: their widths share the row in proportion to their mm.
function layOut() {
  const extent = view.shape.map((count, axis) => count * view.spacing[axis]);
  view.bar = report.bars.find((mm) => mm <= Math.min(extent[0], extent[1]) / 4) ?? report.bars.at(-1);
  for (const normal of [0, 1, 2]) {
    const { across, down } = PLANES[normal];
    const unit = 720 / Math.max(extent[0], extent[1]); // pixels of the canvas for a mm
    const canvas = byId(`plane-${normal}`);
    Object.assign(canvas, { width: Math.round(extent[across] * unit), height: Math.round(extent[down] * unit) });
    Object.assign(canvas.parentElement.style, { flexGrow: extent[across] });
    canvas.parentElement.style.setProperty("--share", extent[across] / Math.max(extent[0], extent[1])); // one below the other on a phone
    Object.assign(byId(`slice-${normal}`), { min: 0, max: view.shape[normal] - 1 });
  }
  const widths = 2 * extent[0] + extent[1]; // of the row, which is as wide as lets the tallest plane be seen as a whole
  document.querySelector(".planes").style.maxWidth = `max(22rem, ${(60 * widths) / Math.max(extent[1], extent[2])}vh)`;
}

function writeScores() {
  const { scores } = report.cases.find((item) => item.id === view.id);
  masks.forEach((_, which) => {
    const found = scores[which - 1];
    const text = which ? (found ? plotted.map((metric) => `${metric.heading} ${show(metric, found[metric.key])}`) : ["not tested"]) : [];
    const volume = which ? found?.volume_ml : scores.find((score) => score)?.label_ml;
    if (volume !== undefined) text.push(`${isMean() ? "mean volume" : "volume"} ${volume.toFixed(2)} mL`);
    const absent = view.masks[which] === null;
    const mask = byId("masks").children[which];
    mask.querySelectorAll("input").forEach((input) => { input.disabled = absent; });
    mask.querySelector("small").textContent = [...text, ...(absent ? ["no mask"] : [])].join(", ");
  });
}

function drawSlices() {
  for (const normal of [0, 1, 2]) drawPlane(normal);
}

// Size of a plane, and where its pixel (column, row) lies in the volume.
function geometry(normal) {
  const { across, down, up } = PLANES[normal];
  const { shape, at } = view;
  const stride = [shape[1] * shape[2], shape[2], 1];
  const rows = shape[down];
  const first = at[normal] * stride[normal] + (up ? (rows - 1) * stride[down] : 0);
  return { columns: shape[across], rows, index: (c, r) => first + c * stride[across] + (up ? -r : r) * stride[down] };
}

function drawPlane(normal) {
  const canvas = byId(`plane-${normal}`);
  const context = canvas.getContext("2d");
  const plane = geometry(normal);
  drawScan(context, plane);
  const shown = [...masks.keys()].filter((which) => view.masks[which] && view.shown.has(which));
  const parts = (which) => numbers().map((number) => ({ mask: view.masks[which], number, color: colorOf(which, number), line: masks[which].line }));
  for (const which of shown) if (view.filled.has(which)) for (const part of parts(which)) drawFill(context, plane, part);
  for (const which of shown) for (const part of parts(which)) drawContour(context, plane, part, which === 0 ? 3 : 2);
  writeSides(context, PLANES[normal]);
  drawBar(context, view.shape[PLANES[normal].across] * view.spacing[PLANES[normal].across]);
  byId(`slice-${normal}`).value = view.at[normal];
  byId(`at-${normal}`).textContent = `${view.at[normal] + 1} / ${view.shape[normal]}`;
}

function drawScan(context, { columns, rows, index }) {
  const [width, level] = [Number(byId("window").value), Number(byId("level").value)];
  const small = new ImageData(columns, rows);
  const pixels = new Uint32Array(small.data.buffer);
  for (let r = 0, at = 0; r < rows; r++) for (let c = 0; c < columns; c++, at++) {
    const gray = Math.max(0, Math.min(255, 255 * ((view.image[index(c, r)] - level) / width + 0.5)));
    pixels[at] = 0xff000000 | (Math.round(gray) * 0x010101);
  }
  const source = new OffscreenCanvas(columns, rows);
  source.getContext("2d").putImageData(small, 0, 0);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, context.canvas.width, context.canvas.height);
}

function drawFill(context, { columns, rows, index }, { mask, number, color }) {
  const [dx, dy] = [context.canvas.width / columns, context.canvas.height / rows];
  const path = new Path2D();
  for (let r = 0; r < rows; r++) for (let c = 0, from = null; c <= columns; c++) {
    const here = c < columns && mask[index(c, r)] === number;
    if (here && from === null) from = c;
    if (!here && from !== null) { path.rect(from * dx, r * dy, (c - from) * dx, dy); from = null; }
  }
  Object.assign(context, { fillStyle: color, globalAlpha: Number(byId("opacity").value) / 100 });
  context.fill(path);
  context.globalAlpha = 1;
}

function drawContour(context, { columns, rows, index }, { mask, number, color, line }, width) {
  const [dx, dy] = [context.canvas.width / columns, context.canvas.height / rows];
  const inside = (c, r) => c >= 0 && r >= 0 && c < columns && r < rows && mask[index(c, r)] === number;
  const path = new Path2D();
  for (let r = 0; r <= rows; r++) for (let c = 0; c <= columns; c++) {
    const here = inside(c, r);
    const gap = GAPS[line];
    if (here !== inside(c - 1, r)) { path.moveTo(c * dx, (r + gap) * dy); path.lineTo(c * dx, (r + 1 - gap) * dy); }
    if (here !== inside(c, r - 1)) { path.moveTo((c + gap) * dx, r * dy); path.lineTo((c + 1 - gap) * dx, r * dy); }
  }
  context.lineCap = "round";
  stroke(context, path, "rgba(0, 0, 0, 0.55)", width + 2); // a rim, so that every colour is seen on every gray
  stroke(context, path, color, width);
}

function stroke(context, path, style, width) {
  Object.assign(context, { strokeStyle: style, lineWidth: width });
  context.stroke(path);
}

function write(context, text, x, y, textAlign, textBaseline) {
  Object.assign(context, { font: "600 20px system-ui, sans-serif", textAlign, textBaseline, lineJoin: "round", lineWidth: 4, strokeStyle: "#000", fillStyle: "#fff" });
  context.strokeText(text, x, y);
  context.fillText(text, x, y);
}

function writeSides(context, { sides, axes }) {
  const { width, height } = context.canvas;
  const [left, right, top, bottom] = view.stored.anatomical ? sides : axes;
  write(context, left, 8, height / 2, "left", "middle");
  write(context, right, width - 8, height / 2, "right", "middle");
  write(context, top, width / 2, 6, "center", "top");
  write(context, bottom, width / 2, height - 6, "center", "bottom");
}

// A bar of a round number of mm in the lower right corner.
function drawBar(context, extent) {
  const { width, height } = context.canvas;
  const length = Math.round((view.bar / extent) * width);
  context.fillStyle = "#000";
  context.fillRect(width - length - 16, height - 18, length + 4, 8);
  context.fillStyle = "#fff";
  context.fillRect(width - length - 14, height - 16, length, 4);
  write(context, `${view.bar} mm`, width - 14 - length / 2, height - 22, "center", "bottom");
}

function move(normal, index) {
  view.at[normal] = Math.max(0, Math.min(view.shape[normal] - 1, index));
  drawPlane(normal);
}

// --- controls

function listenToPlane(normal) {
  const canvas = byId(`plane-${normal}`);
  byId(`slice-${normal}`).addEventListener("input", (event) => move(normal, Number(event.target.value)));
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); move(normal, view.at[normal] + Math.sign(event.deltaY)); }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (step) { event.preventDefault(); move(normal, view.at[normal] + step); }
  });
  canvas.addEventListener("click", (event) => {
    canvas.focus({ preventScroll: true });
    const { across, down, up } = PLANES[normal];
    const place = canvas.getBoundingClientRect();
    const part = (event.clientY - place.top) / place.height;
    move(across, Math.floor(((event.clientX - place.left) / place.width) * view.shape[across]));
    move(down, Math.floor((up ? 1 - part : part) * view.shape[down]));
  });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("pointermove", (event) => { if (event.buttons === 2) setGrays(event.movementX / 4, event.movementY / 4); });
}

// Right drag, as at a reading station: across for the window, down for the level.
function setGrays(wider, higher) {
  for (const [id, change] of [["window", wider], ["level", higher]]) byId(id).value = Number(byId(id).value) + change;
  drawSlices();
}

function listenToViewer() {
  for (const normal of [0, 1, 2]) listenToPlane(normal);
  for (const id of ["window", "level", "opacity"]) byId(id).addEventListener("input", drawSlices);
  byId("reset").addEventListener("click", () => { for (const [id, value] of Object.entries(AT_FIRST)) byId(id).value = value; drawSlices(); });
  byId("case").innerHTML = report.cases.map((item) => `<option>${safe(item.id)}</option>`).join("");
  byId("case").addEventListener("change", (event) => openCase(event.target.value));
  masks.forEach((look, which) => {
    const row = byId("masks").appendChild(document.createElement("div"));
    const box = (set, text, kind) => `<label class="${kind}"><input type="checkbox"${set.has(which) ? " checked" : ""}> ${text}</label>`;
    const name = `${swatch({ ...look, dash: DASHES[look.line] })} ${safe(look.name)}`;
    row.innerHTML = `${box(view.shown, name, "outline")}${box(view.filled, "fill", "fill")}<small></small>`;
    for (const [kind, set] of [["outline", view.shown], ["fill", view.filled]]) {
      row.querySelector(`.${kind} input`).addEventListener("change", (event) => { set[event.target.checked ? "add" : "delete"](which); drawSlices(); });
    }
  });
}
