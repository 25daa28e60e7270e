"use strict";
// Everything the page shows beyond its static tables, from the JSON that the report carries. No network.
const report = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const LOOK = { displaylogo: false, displayModeBar: false, responsive: true };
const titled = (text) => ({ text, x: 0.01, xref: "container" });
const rooms = (parent, count) => Array.from({ length: count }, () => byId(parent).appendChild(document.createElement("div"))); // all before the first plot: they share the width
const FONT = { family: "system-ui, 'Segoe UI', Roboto, sans-serif", size: 13 };
const safe = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const show = (metric, value) => (value === null ? "–" : (value * metric.factor).toFixed(metric.decimals));

// --- per-case table

const several = report.systems.length > 1;
const table = { metric: report.metrics[0], column: null, ascending: true };

function columns() {
  if (!several) return report.metrics.map((metric) => ({ metric, system: 0, heading: metric.heading }));
  return report.systems.map((system, index) => ({ metric: table.metric, system: index, heading: system.name }));
}

function drawTable() {
  const shown = columns();
  const value = (item, column) => item.scores[column.system]?.[column.metric.key] ?? null;
  const order = [...report.cases];
  const sign = table.ascending ? 1 : -1;
  if (table.column === null) order.sort((a, b) => sign * a.id.localeCompare(b.id));
  else {
    const column = shown[table.column];
    // a missed case is worse than any other, whichever way its metric runs
    const rank = (item) => value(item, column) ?? (column.metric.low ? Infinity : -Infinity);
    order.sort((a, b) => sign * (rank(a) - rank(b) || 0));
  }
  const head = ["case", ...shown.map((column) => column.heading)].map((heading, index) => {
    const sorted = index - 1 === table.column || (index === 0 && table.column === null);
    return `<th data-column="${index - 1}"${sorted ? ` aria-sort="${table.ascending ? "ascending" : "descending"}"` : ""}>${safe(heading)}</th>`;
  });
  const rows = order.map((item) => {
    const cells = shown.map((column) => {
      const number = value(item, column);
      return `<td${number === null ? ' class="missed"' : ""}>${show(column.metric, number)}</td>`;
    });
    return `<tr data-case="${safe(item.id)}"><td>${safe(item.id)}</td>${cells.join("")}</tr>`;
  });
  byId("cases").innerHTML = `<thead><tr>${head.join("")}</tr></thead><tbody>${rows.join("")}</tbody>`;
}

byId("cases").addEventListener("click", (event) => {
  const heading = event.target.closest("th");
  const row = event.target.closest("tr[data-case]");
  if (heading) {
    const column = Number(heading.dataset.column) < 0 ? null : Number(heading.dataset.column);
    table.ascending = column === table.column ? !table.ascending : true;
    table.column = column;
    drawTable();
  } else if (row && report.volumes) {
    openCase(row.dataset.case);
    byId("viewer").scrollIntoView({ behavior: "smooth" });
  }
});

if (several) {
  const options = report.metrics.map((metric, index) => `<option value="${index}">${metric.heading}</option>`);
  byId("metric-choice").innerHTML = `Metric: <select id="metric">${options.join("")}</select>`;
  byId("metric").addEventListener("change", (event) => {
    table.metric = report.metrics[event.target.value];
    drawTable();
  });
}
table.column = 0;
drawTable();

// --- plots

function drawBoxes() {
  const places = rooms("boxes", report.metrics.length);
  for (const [number, metric] of report.metrics.entries()) {
    const traces = report.systems.map((system, index) => ({
      type: "box", name: system.name, boxpoints: "all", jitter: 0.5, pointpos: 0, boxmean: true, marker: { color: system.color, size: 5 },
      y: report.cases.map((item) => item.scores[index]?.[metric.key] ?? null).map((v) => (v === null ? null : v * metric.factor)),
      text: report.cases.map((item) => item.id), hovertemplate: "%{text}<br>%{y:.2f}<extra></extra>",
    }));
    const layout = { title: titled(metric.heading + (metric.low ? ", lower is better" : ", higher is better")), font: FONT, showlegend: false,
      height: 360, margin: { l: 50, r: 10, t: 50, b: several ? 110 : 40 }, yaxis: { rangemode: metric.low ? "tozero" : "normal" } };
    Plotly.newPlot(places[number], traces, layout, LOOK);
  }
}

function drawDifferences() {
  if (!several) return;
  const [first, ...others] = report.systems;
  const traces = others.map((system, index) => {
    const pairs = report.cases.filter((item) => item.scores[0] && item.scores[index + 1]);
    return { type: "box", name: system.name, boxpoints: "all", jitter: 0.5, pointpos: 0, boxmean: true, marker: { color: system.color, size: 5 },
      y: pairs.map((item) => 100 * (item.scores[index + 1].dice - item.scores[0].dice)), text: pairs.map((item) => item.id),
      hovertemplate: "%{text}<br>%{y:+.2f}<extra></extra>" };
  });
  Plotly.newPlot("differences", traces, { title: titled(`Dice of each case minus that of ${first.name} [points]`), font: FONT,
    showlegend: false, height: 380, margin: { l: 50, r: 10, t: 50, b: 110 }, yaxis: { zeroline: true, zerolinewidth: 2 } }, LOOK);
}

function drawCurves() {
  const names = [...new Set(report.systems.flatMap((system) => Object.keys(system.curves)))].filter((name) => name !== "iteration");
  if (!names.length) byId("training").hidden = true;
  const places = rooms("curves", names.length);
  for (const [number, name] of names.entries()) {
    const traces = report.systems.filter((system) => system.curves[name]).map((system) => ({
      type: "scatter", mode: "lines", name: system.name, line: { color: system.color, width: 1.4 }, x: system.curves.iteration, y: system.curves[name] }));
    const log = name.startsWith("loss/") && traces.every((trace) => trace.y.every((v) => v === null || v > 0));
    Plotly.newPlot(places[number], traces, { title: titled(name), font: FONT, height: 300, margin: { l: 60, r: 10, t: 45, b: 45 },
      showlegend: several, xaxis: { title: { text: "iteration" } }, yaxis: { type: log ? "log" : "linear" } }, LOOK);
  }
}

// --- slices

const PLANES = { 2: { across: 0, down: 1, up: false }, 1: { across: 0, down: 2, up: true }, 0: { across: 1, down: 2, up: true } };
const view = { id: null, at: [0, 0, 0], shown: new Set(), loading: 0 };

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function bits(packed, length) {
  const mask = new Uint8Array(length);
  for (let i = 0; i < length; i++) mask[i] = (packed[i >> 3] >> (7 - (i & 7))) & 1;
  return mask;
}

async function openCase(id) {
  const ticket = ++view.loading;
  const stored = report.volumes[id];
  const length = stored.shape.reduce((a, b) => a * b);
  const image = await unpack(stored.image);
  const masks = await Promise.all(stored.masks.map(async (text) => (text === null ? null : bits(await unpack(text), length))));
  if (ticket !== view.loading) return; // another case was asked for meanwhile
  Object.assign(view, { id, image, masks, shape: stored.shape, spacing: stored.spacing, at: [...stored.centre] });
  byId("case").value = id;
  document.querySelectorAll("#cases tr.open").forEach((row) => row.classList.remove("open"));
  document.querySelector(`#cases tr[data-case="${CSS.escape(id)}"]`)?.classList.add("open");
  const scores = report.cases.find((item) => item.id === id).scores;
  byId("scores").textContent = report.systems.map((system, index) => `${system.name}: ` + report.metrics
    .map((metric) => `${metric.heading} ${show(metric, scores[index]?.[metric.key] ?? null)}`).join(", ")).join("  ·  ");
  for (const normal of [0, 1, 2]) {
    const slider = byId(`slice-${normal}`);
    Object.assign(slider, { min: 0, max: view.shape[normal] - 1 });
  }
  drawSlices();
  drawSurfaces();
}

function drawSlices() {
  for (const normal of [0, 1, 2]) drawPlane(normal);
}

function drawPlane(normal) {
  const { across, down, up } = PLANES[normal];
  const { shape, spacing, at } = view;
  const [columns, rows] = [shape[across], shape[down]];
  const stride = [shape[1] * shape[2], shape[2], 1];
  const canvas = byId(`plane-${normal}`);
  const unit = Math.max(2, Math.round(720 / Math.max(columns * spacing[across], rows * spacing[down]) * Math.min(...spacing)));
  const [dx, dy] = [unit * spacing[across] / Math.min(...spacing), unit * spacing[down] / Math.min(...spacing)];
  canvas.width = Math.round(columns * dx);
  canvas.height = Math.round(rows * dy);
  const [width, level] = [Number(byId("window").value), Number(byId("level").value)];
  const small = new ImageData(columns, rows);
  const index = (c, r) => at[normal] * stride[normal] + c * stride[across] + (up ? rows - 1 - r : r) * stride[down];
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) {
    const gray = Math.max(0, Math.min(255, 255 * ((view.image[index(c, r)] - level) / width + 0.5)));
    small.data.set([gray, gray, gray, 255], 4 * (r * columns + c));
  }
  const source = new OffscreenCanvas(columns, rows);
  source.getContext("2d").putImageData(small, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  view.masks.forEach((mask, which) => {
    if (!mask || !view.shown.has(which)) return;
    const inside = (c, r) => c >= 0 && r >= 0 && c < columns && r < rows && mask[index(c, r)];
    context.beginPath();
    for (let r = 0; r <= rows; r++) for (let c = 0; c <= columns; c++) {
      const here = inside(c, r);
      if (here !== inside(c - 1, r) && Boolean(here) !== Boolean(inside(c - 1, r))) { context.moveTo(c * dx, r * dy); context.lineTo(c * dx, (r + 1) * dy); }
      if (here !== inside(c, r - 1) && Boolean(here) !== Boolean(inside(c, r - 1))) { context.moveTo(c * dx, r * dy); context.lineTo((c + 1) * dx, r * dy); }
    }
    context.strokeStyle = report.masks[which].color;
    context.lineWidth = which === 0 ? 3 : 2;
    context.stroke();
  });
  byId(`slice-${normal}`).value = at[normal];
  byId(`at-${normal}`).textContent = `${at[normal] + 1} / ${shape[normal]}`;
}

function move(normal, index) {
  view.at[normal] = Math.max(0, Math.min(view.shape[normal] - 1, index));
  drawPlane(normal);
}

function listen() {
  for (const normal of [0, 1, 2]) {
    const canvas = byId(`plane-${normal}`);
    byId(`slice-${normal}`).addEventListener("input", (event) => move(normal, Number(event.target.value)));
    canvas.addEventListener("wheel", (event) => { event.preventDefault(); move(normal, view.at[normal] + Math.sign(event.deltaY)); }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[event.key];
      if (step) { event.preventDefault(); move(normal, view.at[normal] + step); }
    });
    canvas.addEventListener("click", (event) => {
      canvas.focus();
      const { across, down, up } = PLANES[normal];
      const box = canvas.getBoundingClientRect();
      const part = (event.clientY - box.top) / box.height;
      move(across, Math.floor(((event.clientX - box.left) / box.width) * view.shape[across]));
      move(down, Math.floor((up ? 1 - part : part) * view.shape[down]));
    });
  }
  for (const id of ["window", "level"]) byId(id).addEventListener("input", drawSlices);
  byId("reset").addEventListener("click", () => { byId("window").value = 64; byId("level").value = 32; drawSlices(); });
  byId("case").innerHTML = report.cases.map((item) => `<option>${safe(item.id)}</option>`).join("");
  byId("case").addEventListener("change", (event) => openCase(event.target.value));
  report.masks.forEach((mask, which) => {
    view.shown.add(which);
    const label = byId("masks").appendChild(document.createElement("label"));
    label.innerHTML = `<input type="checkbox" checked> <span class="swatch" style="background:${mask.color}"></span> ${safe(mask.name)}`;
    label.firstElementChild.addEventListener("change", (event) => { view.shown[event.target.checked ? "add" : "delete"](which); drawSlices(); });
  });
  byId("surface").innerHTML = report.masks.slice(1).map((mask, which) => `<option value="${which + 1}">${safe(mask.name)}</option>`).join("");
  byId("surface").addEventListener("change", drawSurfaces);
}

// --- surfaces

function numbers(text, Type) {
  return new Type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

function meshTrace(stored, look) {
  const points = numbers(stored.points, Float32Array);
  const faces = numbers(stored.faces, Uint32Array);
  const every = (array, offset) => array.filter((_, index) => index % 3 === offset);
  return { type: "mesh3d", x: every(points, 0), y: every(points, 1), z: every(points, 2), i: every(faces, 0), j: every(faces, 1), k: every(faces, 2),
    lighting: { ambient: 0.5, diffuse: 0.7, specular: 0.15, roughness: 0.7 }, flatshading: false, ...look };
}

function drawSurfaces() {
  const stored = report.volumes[view.id].surfaces;
  const which = Number(byId("surface").value);
  const scene = { aspectmode: "data", xaxis: { title: { text: "x [mm]" } }, yaxis: { title: { text: "y [mm]" } }, zaxis: { title: { text: "z [mm]" } },
    camera: { eye: { x: 1.2, y: -1.5, z: 0.7 } } };
  const traces = [];
  if (stored[0]) traces.push(meshTrace(stored[0], { scene: "scene", color: report.masks[0].color, hoverinfo: "name", name: "label" }));
  if (stored[which]) {
    const distance = numbers(stored[which].distance, Float32Array);
    traces.push(meshTrace(stored[which], { scene: "scene2", intensity: distance, cmin: -8, cmax: 8, colorscale: [[0, "#2166ac"], [0.5, "#f2f2f2"], [1, "#b2182b"]],
      colorbar: { title: { text: "distance to the<br>label [voxel]" }, len: 0.7 }, hovertemplate: "%{intensity:.1f} voxels<extra></extra>" }));
  }
  const missing = [!stored[0] && "the label is empty", !stored[which] && "the prediction is empty: missed"].filter(Boolean).join("; ");
  Plotly.react("surfaces", traces, { font: FONT, height: 520, margin: { l: 0, r: 0, t: 40, b: 0 }, scene: { ...scene, domain: { x: [0, 0.48] } },
    scene2: { ...scene, domain: { x: [0.5, 0.98] } },
    annotations: [{ text: "label", x: 0.24, y: 1.06, xref: "paper", yref: "paper", showarrow: false },
      { text: report.masks[which].name + (missing ? ` (${missing})` : ""), x: 0.74, y: 1.06, xref: "paper", yref: "paper", showarrow: false }] }, LOOK);
}

drawBoxes();
drawDifferences();
drawCurves();
if (report.volumes) {
  byId("viewer").hidden = false;
  listen();
  openCase(document.querySelector("#cases tbody tr").dataset.case);
}
