// Distributions, paired differences and training curves, drawn by plotly.
const LOOK = { displaylogo: false, displayModeBar: false, responsive: true };
const FONT = { family: "system-ui, 'Segoe UI', Roboto, sans-serif", size: 13 };
const titled = (text) => ({ text, x: 0.01, xref: "container", font: { size: 14 } });
const rooms = (parent, count) => Array.from({ length: count }, () => byId(parent).appendChild(document.createElement("div"))); // all before the first plot: they share the width

// A horizontal box, so that the names of many methods stay legible; the value of a case is null where it has none.
function box(system, values, digits) {
  const missed = values.filter(({ missed }) => missed).length;
  const points = values.filter(({ value }) => value !== null);
  return { type: "box", orientation: "h", name: safe(system.name) + (missed ? `<br>(${missed} missed)` : ""), boxpoints: "all", jitter: 0.5, pointpos: 0,
    boxmean: true, line: { width: 1.5 }, marker: { color: system.color, size: 5 }, x: points.map(({ value }) => value), text: points.map(({ id }) => safe(id)),
    hovertemplate: `%{text}<br>%{x:${digits}}<extra></extra>` };
}

function boxLayout(title, count, xaxis) {
  return { title: titled(title), font: FONT, showlegend: false, height: 110 + Math.max(90, 34 * count), margin: { l: 10, r: 15, t: 45, b: 35 },
    yaxis: { automargin: true, autorange: "reversed", showticklabels: several, tickfont: { size: 12 } }, xaxis };
}

function drawBoxes() {
  const places = rooms("boxes", report.metrics.length);
  for (const [number, metric] of report.metrics.entries()) {
    const traces = report.systems.map((system, index) => box(system, report.cases.filter((item) => item.scores[index]).map((item) => {
      const value = item.scores[index][metric.key];
      return { id: item.id, value: value === null ? null : value * metric.factor, missed: value === null };
    }), ".2f"));
    const title = `${metric.heading}, ${metric.low ? "lower" : "higher"} is better`;
    Plotly.newPlot(places[number], traces, boxLayout(title, traces.length, { rangemode: metric.low ? "tozero" : "normal" }), LOOK);
  }
}

function drawDifferences() {
  byId("paired").hidden = !several;
  if (!several) return;
  const places = rooms("differences", report.metrics.length);
  const [first, ...others] = report.systems;
  byId("paired-to").textContent = first.name;
  for (const [number, metric] of report.metrics.entries()) {
    const traces = others.map((system, index) => box(system, report.cases.filter((item) => item.scores[0] && item.scores[index + 1]).map((item) => {
      const [from, to] = [item.scores[0][metric.key], item.scores[index + 1][metric.key]];
      const missed = from === null || to === null;
      return { id: item.id, value: missed ? null : metric.factor * (to - from), missed };
    }), "+.2f"));
    const title = `${metric.heading} minus ${safe(first.name)}, ${metric.low ? "below" : "above"} 0 is better`;
    Plotly.newPlot(places[number], traces, boxLayout(title, traces.length, { zeroline: true, zerolinewidth: 2, zerolinecolor: "#444" }), LOOK);
  }
}

function drawCurves() {
  const names = [...new Set(report.systems.flatMap((system) => Object.keys(system.curves)))].filter((name) => name !== "iteration");
  if (!names.length) byId("training").hidden = true;
  if (several) byId("curve-legend").innerHTML = report.systems.map((system) => `<span>${swatch(system)} ${safe(system.name)}</span>`).join("");
  const places = rooms("curves", names.length);
  for (const [number, name] of names.entries()) {
    const traces = report.systems.filter((system) => system.curves[name]).map((system) => ({ type: "scatter", mode: "lines", name: safe(system.name),
      line: { color: system.color, dash: system.dash, width: 1.5 }, x: system.curves.iteration, y: system.curves[name] }));
    const log = name.startsWith("loss/") && traces.every((trace) => trace.y.every((v) => v === null || v > 0));
    Plotly.newPlot(places[number], traces, { title: titled(safe(name)), font: FONT, height: 280, margin: { l: 60, r: 10, t: 40, b: 45 },
      showlegend: false, xaxis: { title: { text: "iteration" } }, yaxis: { type: log ? "log" : "linear", exponentformat: "power", automargin: true } }, LOOK);
  }
}
