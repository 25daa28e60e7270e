// Distributions, paired differences, agreement of volumes and training curves, drawn by plotly.
const LOOK = { displaylogo: false, displayModeBar: false, responsive: true };
const FONT = { family: "system-ui, 'Segoe UI', Roboto, sans-serif", size: 13 };
const titled = (text) => ({ text, x: 0.01, xref: "container", font: { size: 14 } });
const DARK = matchMedia("(prefers-color-scheme: dark)");
const COLORS = { light: { ink: "#1c2733", grid: "#dfe4e9" }, dark: { ink: "#e3e8ed", grid: "#3a4652" } };
const rooms = (parent, count) => {
  byId(parent).replaceChildren(...Array.from({ length: count }, () => document.createElement("div")));
  return [...byId(parent).children];
}; // all before the first plot: they share the width

// What all plots share, for the screen as the reader has set it; paper is always light.
function theme(name = DARK.matches ? "dark" : "light") {
  const { ink, grid } = COLORS[name];
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, color: ink };
  const scene = Object.fromEntries(["xaxis", "yaxis", "zaxis"].map((key) => [key, { ...axis, backgroundcolor: "rgba(0,0,0,0)" }]));
  return { layout: { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink }, xaxis: axis, yaxis: axis, scene } };
}

function plot(place, traces, layout) {
  return Plotly.react(place, traces, { template: theme(), font: FONT, ...layout }, LOOK);
}

// A horizontal box, so that the names of many methods stay legible; the value of a case is null where it has none.
function box(run, values, digits) {
  const missed = values.filter(({ missed }) => missed).length;
  const points = values.filter(({ value }) => value !== null);
  return { type: "box", orientation: "h", name: safe(run.name) + (missed ? `<br>(${missed} missed)` : ""), boxpoints: "all", jitter: 0.5, pointpos: 0,
    boxmean: true, line: { width: 1.5 }, marker: { color: run.color, size: 5 }, x: points.map(({ value }) => value), text: points.map(({ id }) => safe(id)),
    hovertemplate: `%{text}<br>%{x:${digits}}<extra></extra>` };
}

function boxLayout(title, count, xaxis) {
  return { title: titled(title), showlegend: false, height: 110 + Math.max(90, 34 * count), margin: { l: 10, r: 15, t: 45, b: 35 },
    yaxis: { automargin: true, autorange: "reversed", showticklabels: several, tickfont: { size: 12 } }, xaxis };
}

function drawBoxes() {
  const places = rooms("boxes", plotted.length);
  for (const [number, metric] of plotted.entries()) {
    const traces = report.runs.map((run, index) => box(run, report.cases.filter((item) => item.scores[index]).map((item) => {
      const value = item.scores[index][metric.key];
      return { id: item.id, value: value === null ? null : value * metric.factor, missed: value === null };
    }), ".2f"));
    const title = `${metric.heading}, ${metric.low ? "lower" : "higher"} is better`;
    plot(places[number], traces, boxLayout(title, traces.length, { rangemode: metric.low ? "tozero" : "normal" }));
  }
}

function drawDifferences() {
  byId("paired").hidden = !several;
  if (!several) return;
  const places = rooms("differences", plotted.length);
  const [first, ...others] = report.runs;
  byId("paired-to").textContent = first.name;
  for (const [number, metric] of plotted.entries()) {
    const traces = others.map((run, index) => box(run, report.cases.filter((item) => item.scores[0] && item.scores[index + 1]).map((item) => {
      const [from, to] = [item.scores[0][metric.key], item.scores[index + 1][metric.key]];
      const missed = from === null || to === null;
      return { id: item.id, value: missed ? null : metric.factor * (to - from), missed };
    }), "+.2f"));
    const title = `Difference in ${metric.heading}, ${metric.low ? "below" : "above"} 0 is better`;
    plot(places[number], traces, boxLayout(title, traces.length, { zeroline: true, zerolinewidth: 2, zerolinecolor: "#888" }));
  }
}

// Prediction minus label against the mean of both; all runs on the same scale.
function drawAgreement() {
  const runs = report.runs.map((run, index) => ({ ...run, index })).filter((run) => run.agreement);
  byId("volume").hidden = !runs.length;
  if (!runs.length) return;
  const points = runs.map(({ index }) => report.cases.filter((item) => item.scores[index]).map(({ id, scores: { [index]: scores } }) =>
    ({ id, mean: (scores.volume_ml + scores.label_ml) / 2, difference: scores.volume_ml - scores.label_ml })));
  const limits = runs.flatMap(({ agreement: { low, high } }) => [low, high]).filter((value) => value !== null);
  const most = 1.1 * Math.max(...points.flat().map(({ difference }) => Math.abs(difference)), ...limits.map(Math.abs), 1e-3);
  const places = rooms("agreement", runs.length);
  for (const [number, run] of runs.entries()) {
    const trace = { type: "scatter", mode: "markers", marker: { color: run.color, size: 6 }, x: points[number].map(({ mean }) => mean), y: points[number].map(({ difference }) => difference),
      text: points[number].map(({ id }) => safe(id)), hovertemplate: "%{text}<br>mean %{x:.2f} mL, difference %{y:+.2f} mL<extra></extra>" };
    const { mean, low, high } = run.agreement;
    const lines = [[low, "dash"], [mean, "solid"], [high, "dash"]].filter(([value]) => value !== null);
    const shapes = lines.map(([value, dash]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { color: run.color, dash, width: 1.5 } }));
    const annotations = lines.map(([value]) => ({ text: `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`, xref: "paper", x: 1, xanchor: "right", y: value, yanchor: "bottom", showarrow: false, font: { size: 11 } }));
    plot(places[number], [trace], { title: titled(safe(run.name)), height: 320, margin: { l: 60, r: 15, t: 40, b: 45 }, showlegend: false, shapes, annotations,
      xaxis: { title: { text: "mean of prediction and label [mL]" }, rangemode: "tozero" }, yaxis: { title: { text: "prediction − label [mL]" }, range: [-most, most], zeroline: true } });
  }
}

// Names of curves are for programs.
const TERMS = { "loss/seg": "Loss: segmentation", "loss/mask": "Loss: mask of the distance map", "loss/dis": "Loss: distance map", "loss/sdm": "Loss: distance map",
  "loss/semi": "Loss: trusted voxels", step_seconds: "Seconds per step" };
const readable = (name) => { if (name in TERMS) return TERMS[name]; const words = name.replace("/", ": ").replaceAll("_", " "); return words[0].toUpperCase() + words.slice(1); };
const FEW_POINTS = 40; // of a curve, which are marked, for a single one has no line

function drawCurves() {
  const names = [...new Set(report.runs.flatMap((run) => Object.keys(run.curves)))];
  byId("training").hidden = !names.length;
  if (several) byId("curve-legend").innerHTML = report.runs.map((run) => `<span>${swatch(run)} ${safe(run.name)}</span>`).join("");
  const places = rooms("curves", names.length);
  for (const [number, name] of names.entries()) {
    const traces = report.runs.filter((run) => run.curves[name]).map((run) => ({ type: "scatter", name: safe(run.name), ...run.curves[name],
      mode: run.curves[name].y.length < FEW_POINTS ? "lines+markers" : "lines", line: { color: run.color, dash: run.dash, width: 1.5 } }));
    const log = name.startsWith("loss/") && traces.every((trace) => trace.y.every((v) => v === null || v > 0));
    plot(places[number], traces, { title: titled(safe(readable(name))), height: 280, margin: { l: 60, r: 10, t: 40, b: 45 },
      showlegend: false, xaxis: { title: { text: "iteration" } }, yaxis: { type: log ? "log" : "linear", exponentformat: "power", automargin: true } });
  }
}
