// Surfaces of label and prediction side by side: one camera for both, that turns by itself until somebody drags.
const TURN_SECONDS = 16; // for a whole turn
const SCENES = ["scene", "scene2"];
const ERROR_VOX = 8; // at the ends of the colour scale
const RED_OUTSIDE = [[0, "#2166ac"], [0.5, "#f2f2f2"], [1, "#b2182b"]];
const turn = { camera: { eye: { x: 1.6, y: -2.1, z: 1 }, up: { x: 0, y: 0, z: 1 }, center: { x: 0, y: 0, z: 0 } }, seen: false, followed: false, last: null };

async function openSurface(stored) {
  const [points, faces, distance] = await Promise.all([stored.points, stored.faces, stored.distance].map(unpack));
  const [mm, vox] = stored.steps;
  const Index = stored.bytes === 2 ? Uint16Array : Uint32Array;
  return { points: Float32Array.from(new Int16Array(points.buffer), (n) => n * mm), faces: new Index(faces.buffer),
    distance: Float32Array.from(new Int16Array(distance.buffer), (n) => n * vox) };
}

// Of the classes that are shown, those that a label map has.
async function openClasses(stored, which) {
  const surfaces = await Promise.all(numbers().map(async (number) => {
    const part = classes.length ? stored[number - 1] : stored;
    return part && { ...(await openSurface(part)), color: colorOf(which, number), name: classes[number - 1]?.name ?? "label" };
  }));
  return surfaces.filter(Boolean);
}

const every = (array, offset) => array.filter((_, index) => index % 3 === offset);

function meshTrace({ points, faces }, look) {
  return { type: "mesh3d", x: every(points, 0), y: every(points, 1), z: every(points, 2), i: every(faces, 0), j: every(faces, 1), k: every(faces, 2),
    lighting: { ambient: 0.5, diffuse: 0.7, specular: 0.15, roughness: 0.7 }, flatshading: false, ...look };
}

// The box around all surfaces of a case, in mm: both scenes show it, so that sizes and places compare.
function boxAround(surfaces) {
  return [0, 1, 2].map((axis) => {
    const values = surfaces.flatMap(({ points }) => Array.from(every(points, axis)));
    const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    return [low - 3, high + 3];
  });
}

// Side by side; on a phone one below the other.
const narrow = () => byId("surfaces").clientWidth < 600;
const DOMAINS = { wide: [{ x: [0, 0.46] }, { x: [0.47, 0.93] }], tall: [{ x: [0, 1], y: [0.58, 1] }, { x: [0, 1], y: [0.12, 0.53] }] };
const BARS = { wide: { len: 0.7 }, tall: { orientation: "h", len: 0.9, y: 0.1, yanchor: "top" } }; // of colour

function sceneLayout(ranges, domain) {
  const sides = view.stored.anatomical ? [": R to L", ": A to P", ": I to S"] : ["", "", ""];
  const axis = (number) => ({ title: { text: `${"xyz"[number]}${sides[number]} [mm]`, font: { size: 11 } }, range: ranges[number], tickfont: { size: 10 }, showspikes: false });
  return { aspectmode: "data", xaxis: axis(0), yaxis: axis(1), zaxis: axis(2), camera: structuredClone(turn.camera), domain };
}

async function drawSurfaces() {
  const which = Number(byId("surface").value);
  const [{ id, stored }, shown] = [view, report.view];
  const opened = await Promise.all([0, which].map((number) => openClasses(stored.surfaces[number], number)));
  if (id !== view.id || which !== Number(byId("surface").value) || shown !== report.view) return; // another one was asked for meanwhile
  const [[label, mask], shape] = [opened, narrow() ? "tall" : "wide"];
  const plain = ({ color, name }) => ({ color, name, hoverinfo: "name" });
  const byDistance = ({ distance }) => ({ intensity: distance, cmin: -ERROR_VOX, cmax: ERROR_VOX, colorscale: RED_OUTSIDE,
    colorbar: { title: { text: "distance to the<br>label [voxel]", side: "top" }, thickness: 16, ...BARS[shape] }, hovertemplate: "%{intensity:.1f} voxels<extra></extra>" });
  const traces = label.map((surface) => meshTrace(surface, { scene: "scene", ...plain(surface) }));
  traces.push(...mask.map((surface) => meshTrace(surface, { scene: "scene2", ...(numbers().length > 1 ? plain : byDistance)(surface) })));
  const ranges = boxAround([...label, ...mask]);
  const nothing = stored.masks[which] === null ? "no mask" : "empty: missed";
  const [first, second] = DOMAINS[shape];
  const name = (text, { x, y = [0, 1] }) => ({ text, x: (x[0] + x[1]) / 2, y: y[1], yanchor: "bottom", xref: "paper", yref: "paper", showarrow: false, font: { size: 14 } });
  await plot("surfaces", traces, { height: shape === "tall" ? 760 : 460, margin: { l: 0, r: 0, t: 40, b: 0 },
    scene: sceneLayout(ranges, first), scene2: sceneLayout(ranges, second),
    annotations: [name(`label${label.length ? "" : " (empty)"}`, first), name(safe(masks[which].name) + (mask.length ? "" : ` (${nothing})`), second)] });
  listenToCamera();
  start();
}

// --- the camera

// By parts of the camera, which tells our own change from that of a visitor, who sets it as a whole.
function setCamera(camera, scenes) {
  turn.camera = camera;
  const parts = scenes.flatMap((scene) => ["eye", "up", "center"].map((part) => [`${scene}.camera.${part}`, camera[part]]));
  Plotly.relayout("surfaces", Object.fromEntries(parts));
}

function follow(change) {
  for (const [index, scene] of SCENES.entries()) {
    const camera = change?.[`${scene}.camera`];
    if (camera) setCamera({ eye: camera.eye, up: camera.up, center: camera.center }, [SCENES[1 - index]]);
  }
}

// Once, and not before plotly has drawn for the first time.
function listenToCamera() {
  if (turn.followed) return;
  turn.followed = true;
  for (const name of ["plotly_relayout", "plotly_relayouting"]) byId("surfaces").on(name, follow);
}

function step(now) {
  if (!byId("rotate").checked || !turn.seen || !turn.followed) { turn.last = null; return; } // start() goes on
  const passed = turn.last === null ? 0 : Math.min(now - turn.last, 100); // no leap after a pause
  turn.last = now;
  const angle = (2 * Math.PI * passed) / (1000 * TURN_SECONDS);
  const { x, y, z } = turn.camera.eye;
  const eye = { x: x * Math.cos(angle) - y * Math.sin(angle), y: x * Math.sin(angle) + y * Math.cos(angle), z };
  if (angle) setCamera({ ...turn.camera, eye }, SCENES);
  requestAnimationFrame(step);
}

function start() {
  if (turn.last === null) { turn.last = performance.now(); requestAnimationFrame(step); }
}

function listenToSurfaces() {
  byId("surface").innerHTML = report.runs.map((run, which) => `<option value="${which + 1}">${safe(run.name)}</option>`).join("");
  byId("surface").addEventListener("change", drawSurfaces);
  if (narrow()) for (const axis of ["x", "y", "z"]) turn.camera.eye[axis] *= 1.4; // farther away, for the scene is as narrow as the page
  byId("rotate").checked = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  byId("rotate").addEventListener("change", start);
  byId("surfaces").addEventListener("pointerdown", () => { byId("rotate").checked = false; }, { capture: true });
  new IntersectionObserver(([entry]) => { turn.seen = entry.isIntersecting; start(); }).observe(byId("surfaces"));
}
