// Draws the page; on paper it is laid out anew, for plots keep the width that the window gave them.
const PRINT_WIDTH = 480; // pixels of a plot on paper: two beside each other on A4, landscape, and two rows on a page
const PRINT_HEIGHT = Math.max(285, 24 * report.runs.length + 80); // where the methods leave room for it
const plots = () => [...document.querySelectorAll(".js-plotly-plot")];

addEventListener("beforeprint", () => {
  byId("rotate").checked = false;
  document.querySelectorAll("details:not([open])").forEach((part) => { part.dataset.closed = ""; part.open = true; });
  for (const plot of plots()) {
    plot.dataset.height = plot.layout.height;
    const size = { width: PRINT_WIDTH, height: Math.min(plot.layout.height, PRINT_HEIGHT) };
    Plotly.relayout(plot, { ...(plot.id === "surfaces" ? { width: 2 * PRINT_WIDTH } : size), template: theme("light") });
  }
});
addEventListener("afterprint", () => {
  document.querySelectorAll("details[data-closed]").forEach((part) => { delete part.dataset.closed; part.open = false; });
  for (const plot of plots()) Plotly.relayout(plot, { width: null, height: Number(plot.dataset.height), autosize: true, template: theme() });
});
DARK.addEventListener("change", () => { for (const plot of plots()) Plotly.relayout(plot, { template: theme() }); });

// What the switch of the class changes.
function drawScores() {
  drawTable();
  drawBoxes();
  drawDifferences();
  drawAgreement();
}

async function drawMasks() {
  writeScores();
  drawSlices();
  await drawSurfaces();
}

listenToTable();
if (several) chooseMetric();
if (classes.length) listenToClasses();
drawScores();
drawCurves();
if (report.volumes) {
  byId("viewer").hidden = false;
  byId("row-opens").hidden = false;
  document.body.classList.add("has-viewer");
  listenToViewer();
  listenToSurfaces();
  openCase(sorted()[0].id);
}
hideEmptyParts();
