"use strict";
// What every part of the page needs, and the table of cases. All data come from the JSON that the page carries: no network.
const report = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const safe = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const show = (metric, value) => (value === null ? "missed" : (value * metric.factor).toFixed(metric.decimals));
const plotted = report.metrics.filter((metric) => metric.plotted);
const swatch = (look) => `<span class="swatch" style="border-color:${look.color};border-top-style:${{ dash: "dashed", dot: "dotted" }[look.dash] ?? "solid"}"></span>`;
const several = report.runs.length > 1;

// --- classes, where there are several: all of the page is of one of them, or of the mean over all

const { classes } = report;

const isMean = () => classes.length > 0 && !classes.some(({ name }) => name === report.view);

function showClass(name) {
  report.view = name;
  report.cases = report.views[name].cases;
  report.runs.forEach((run, index) => { run.agreement = report.views[name].agreements[index]; });
  byId("by-distance").hidden = isMean();
  document.querySelectorAll("[data-class]").forEach((part) => { part.hidden = part.dataset.class !== name; });
}

function listenToClasses() {
  byId("class-choice").hidden = false;
  byId("class").innerHTML = Object.keys(report.views).map((name) => `<option${name === report.view ? " selected" : ""}>${safe(name)}</option>`).join("");
  byId("class").addEventListener("change", (event) => { showClass(event.target.value); drawScores(); if (report.volumes) drawMasks(); });
  byId("class-legend").innerHTML = classes.map((one) => `<span>${swatch({ color: one.color })} ${safe(one.name)}</span>`).join("");
  showClass(report.view);
}

// --- per-case table

const table = { metric: report.metrics[0], column: 0, worstFirst: true }; // column null: by case

function columns() {
  if (!several) return report.metrics.map((metric) => ({ metric, run: 0, heading: safe(metric.heading) }));
  return report.runs.map((run, index) => ({ metric: table.metric, run: index, heading: `${swatch(run)} ${safe(run.name)}` }));
}

const isMissed = (scores) => report.metrics.some(({ key }) => scores[key] === null);

// How bad a case is in a column. A missed one is worse than any other, whichever way its metric runs, and among
// equals (Dice 0) worse than one that lies beside the label; null: not tested, at the end of either order.
function badness(item, { run, metric }) {
  const scores = item.scores[run];
  if (!scores) return null;
  const value = scores[metric.key];
  return { value: value === null ? Infinity : metric.low ? value : -value, missed: isMissed(scores) };
}

function sorted() {
  const sign = table.worstFirst ? 1 : -1;
  const byName = (a, b) => a.id.localeCompare(b.id);
  if (table.column === null) return [...report.cases].sort((a, b) => sign * byName(a, b));
  const column = columns()[table.column];
  const ranked = report.cases.map((item) => ({ item, bad: badness(item, column) }));
  const compare = ({ item: a, bad: x }, { item: b, bad: y }) => {
    if (!x || !y) return !x - !y || byName(a, b);
    const difference = x.value === y.value ? y.missed - x.missed : y.value - x.value;
    return sign * difference || byName(a, b);
  };
  return ranked.sort(compare).map(({ item }) => item);
}

function heading(text, index) {
  const column = columns()[index];
  const current = index === (table.column ?? -1);
  const rising = column?.metric.low ? !table.worstFirst : table.worstFirst; // of the numbers, as the arrow shows it
  return `<th scope="col" tabindex="0" data-column="${index}"${current ? ` aria-sort="${rising ? "ascending" : "descending"}"` : ""}>${text}</th>`;
}

function drawTable() {
  const shown = columns();
  const head = ["case", ...shown.map((column) => column.heading)].map((text, index) => heading(text, index - 1));
  const rows = sorted().map((item) => {
    const cells = shown.map(({ run, metric }) => {
      const scores = item.scores[run];
      return scores ? `<td${isMissed(scores) ? ' class="missed"' : ""}>${show(metric, scores[metric.key])}</td>` : "<td>–</td>";
    });
    const open = item.id === table.open;
    return `<tr data-case="${safe(item.id)}"${report.volumes ? ` tabindex="${open ? 0 : -1}"` : ""}${open ? ' class="open"' : ""}><td>${safe(item.id)}</td>${cells.join("")}</tr>`;
  });
  byId("cases").innerHTML = `<thead><tr>${head.join("")}</tr></thead><tbody>${rows.join("")}</tbody>`;
  const column = shown[table.column];
  const by = column ? `${column.metric.heading}${several ? ` of ${report.runs[column.run].name}` : ""}, ${table.worstFirst ? "worst" : "best"} first` : "case";
  byId("order").textContent = `Sorted by ${by}.`;
}

function sortBy(index) {
  const column = index < 0 ? null : index;
  table.worstFirst = column === table.column ? !table.worstFirst : true;
  table.column = column;
  drawTable();
}

function chooseMetric() {
  const options = report.metrics.map((metric, index) => `<option value="${index}">${safe(metric.heading)}</option>`);
  byId("metric-choice").innerHTML = `<label>metric <select id="metric">${options.join("")}</select></label>`;
  byId("metric").addEventListener("change", (event) => {
    table.metric = report.metrics[event.target.value];
    drawTable();
  });
}

// The open row is the one that the tab key reaches; from there the arrow keys go on.
function markOpen(id) {
  table.open = id;
  document.querySelectorAll("#cases tr[data-case]").forEach((row) => {
    row.classList.toggle("open", row.dataset.case === id);
    row.tabIndex = row.dataset.case === id ? 0 : -1;
  });
}

function openRow(row, scroll) {
  if (!row || !report.volumes) return;
  openCase(row.dataset.case);
  if (scroll) byId("viewer").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  else { row.tabIndex = 0; row.focus(); }
}

function listenToTable() {
  byId("cases").addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (head) sortBy(Number(head.dataset.column));
    else openRow(event.target.closest("tr[data-case]"), true);
  });
  byId("cases").addEventListener("keydown", (event) => {
    const [head, row] = [event.target.closest("th"), event.target.closest("tr[data-case]")];
    const step = row && { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!step && !["Enter", " "].includes(event.key)) return;
    event.preventDefault();
    if (step) openRow(row[step], false);
    else if (row) openRow(row, true);
    else {
      sortBy(Number(head.dataset.column));
      byId("cases").querySelector(`th[data-column="${head.dataset.column}"]`).focus();
    }
  });
}

// No link of the table of contents leads to a part that this report does not have.
function hideEmptyParts() {
  for (const link of document.querySelectorAll("nav a")) link.hidden = document.querySelector(link.hash).hidden;
}
