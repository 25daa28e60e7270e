// Draws the page; on paper it is laid out anew, for plots keep the width that the window gave them.
const PRINT_WIDTH = 480; // pixels of a plot on paper: two beside each other on A4, landscape
const plots = () => [...document.querySelectorAll(".js-plotly-plot")];

addEventListener("beforeprint", () => {
  byId("rotate").checked = false;
  document.querySelectorAll("details:not([open])").forEach((part) => { part.dataset.closed = ""; part.open = true; });
  plots().forEach((plot) => Plotly.relayout(plot, { width: plot.id === "surfaces" ? 2 * PRINT_WIDTH : PRINT_WIDTH }));
});
addEventListener("afterprint", () => {
  document.querySelectorAll("details[data-closed]").forEach((part) => { delete part.dataset.closed; part.open = false; });
  plots().forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true }));
});

listenToTable();
if (several) chooseMetric();
drawTable();
drawBoxes();
drawDifferences();
drawCurves();
if (report.volumes) {
  byId("viewer").hidden = false;
  byId("row-opens").hidden = false;
  document.body.classList.add("has-viewer");
  listenToViewer();
  listenToSurfaces();
  openCase(sorted()[0].id);
}
