// What a visitor does, run within a report once it has drawn the first case; test_report.py reads what comes of it.
const failures = [], byName = (id) => document.getElementById(id);
addEventListener("error", (event) => failures.push(event.message));
addEventListener("unhandledrejection", (event) => failures.push(String(event.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => failures.push(words.join(" "));
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const pixels = () => byName("plane-2").toDataURL();
const rows = () => [...document.querySelectorAll("#cases tbody tr")].map((row) => row.dataset.case);
const click = (column) => { document.querySelector(`#cases th[data-column="${column}"]`).click(); return rows(); };
const eyes = () => ["scene", "scene2"].map((scene) => byName("surfaces").layout[scene].camera.eye);
const set = (id, value, kind) => { byName(id).value = value; byName(id).dispatchEvent(new Event(kind)); };
function bar(normal) { // the longest white run in the canvas's last rows, as a part of its width
  const canvas = byName(`plane-${normal}`), row = canvas.height - 14;
  const bytes = canvas.getContext("2d").getImageData(0, row, canvas.width, 1).data;
  let longest = 0, run = 0;
  for (let i = 0; i < bytes.length; i += 4) { run = bytes[i] === 255 ? run + 1 : 0; longest = Math.max(longest, run); }
  return longest / canvas.width;
}
function colors(index) { // of a method, wherever it is shown
  const painted = (mark) => Object.assign(document.createElement("i"), { style: `color:${mark}` }).style.color;
  const swatches = [`#cases th[data-column="${index}"]`, `#masks > :nth-child(${index + 2})`, `#curve-legend span:nth-child(${index + 1})`];
  const own = [...byName("boxes").children].map((plot) => plot.data[index].marker.color);
  const paired = index ? [...byName("differences").children].map((plot) => plot.data[index - 1].marker.color) : [];
  const line = byName("curves").children[0].data[index].line.color;
  return [...swatches.map((where) => document.querySelector(`${where} .swatch`).style.borderTopColor), ...[...own, ...paired, line].map(painted)];
}
async function turning() { // how far the camera goes within a moment
  const [before] = eyes(); await wait(1500); const [after] = eyes();
  return Math.hypot(after.x - before.x, after.y - before.y);
}
async function visit() {
  const before = pixels(), result = { worst: rows(), bars: [0, 1, 2].map(bar), grays: view.image.reduce((a, b) => a + b, 0) };
  set("slice-2", 0, "input");
  result.moved = pixels() !== before; result.slice = byName("at-2").textContent;
  const level = pixels(); set("level", 10, "input"); result.windowed = pixels() !== level;
  set("slice-2", view.stored.centre[2], "input");
  const [outline, fill] = byName("masks").children[1].querySelectorAll("input");
  const plain = pixels(); fill.click(); const filled = pixels(); set("opacity", 90, "input"); const dense = pixels();
  fill.click(); outline.click(); result.looks = new Set([plain, filled, dense, pixels()]).size; outline.click();
  const press = (where, key) => where.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  set("slice-2", 0, "input"); press(byName("plane-2"), "ArrowUp"); press(byName("plane-2"), "PageUp"); result.keyed = byName("at-2").textContent;
  press(document.querySelector("#cases tr.open"), "ArrowDown");
  for (let i = 0; i < 100 && view.id === result.worst[0]; i++) await wait(100);
  result.next = [view.id, document.activeElement.dataset.case];
  result.page = { overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth, ground: getComputedStyle(document.body).backgroundColor,
    ink: byName("boxes").children[0]._fullLayout.font.color, links: [...document.querySelectorAll("nav a:not([hidden])")].map((link) => link.hash) };
  result.best = click(0);
  set("metric", report.metrics.findIndex(({ key }) => key === "hd95_vox"), "change");
  result.distance = { worst: click(1), best: click(1), arrow: document.querySelector("#cases th[aria-sort]").ariaSort };
  result.order = byName("order").textContent;
  byName("surfaces").scrollIntoView(); await wait(500);
  result.turned = await turning();
  result.together = JSON.stringify(eyes()[0]) === JSON.stringify(eyes()[1]);
  scrollTo(0, 0); await wait(500); result.unseen = await turning();
  byName("surfaces").scrollIntoView(); await wait(500); result.again = await turning();
  document.querySelector("#surfaces canvas").dispatchEvent(new PointerEvent("pointerdown", { bubbles: true }));
  await wait(200); result.dragged = await turning();
  await Plotly.relayout("surfaces", { "scene.camera": { eye: { x: 0, y: 2, z: 0 } } }); await wait(200);
  result.followed = eyes()[1];
  result.colors = [0, 1].map(colors);
  result.curves = [...byName("curves").children].map((plot) => ({ points: plot.querySelectorAll(".point").length,
    lines: [...plot.querySelectorAll(".js-line")].filter((line) => line.getTotalLength() > 0).length }));
  result.classes = {};
  set("slice-2", view.masks[0].indexOf(2) % view.shape[2], "input"); // where there are two classes, a slice with the second
  for (const name of report.classes.length ? Object.keys(report.views) : []) {
    set("class", name, "change"); await wait(1500);
    const tables = [...document.querySelectorAll("[data-class]:not([hidden])")].map((part) => part.dataset.class);
    result.classes[name] = { tables, surfaces: byName("surfaces").data.length, plane: pixels(), byDistance: !byName("by-distance").hidden, dice: report.cases[0].scores[0].dice };
  }
  const canvas = document.querySelector("#surfaces canvas");
  return { ...result, failures, surface: canvas !== null && canvas.width > 0, boxes: byName("boxes").querySelectorAll(".main-svg").length,
    differences: byName("differences").children.length, requests: performance.getEntriesByType("resource").map((entry) => entry.name).filter((name) => name !== ADDRESS) };
}
addEventListener("DOMContentLoaded", () => byName("surfaces").scrollIntoView()); // in view before they are drawn
addEventListener("load", async () => {
  await wait(3000);
  const result = await visit().catch((error) => ({ failures: [...failures, error.stack] }));
  fetch(ADDRESS, { method: "POST", mode: "no-cors", body: JSON.stringify(result) });
});
