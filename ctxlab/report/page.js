"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const NARROW = 520;  // pixels of a plot below which names at lines' ends would leave no room for the lines

const swapped = (value, swaps) => {
  if (typeof value === "string") return swaps[value] || value;
  if (Array.isArray(value)) return value.map((one) => swapped(one, swaps));
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, swapped(v, swaps)]));
  return value;
};

const colourOf = (spec, name) => {
  for (const layer of spec.layer || []) {
    const scale = layer.encoding && layer.encoding.color && layer.encoding.color.scale;
    if (scale && scale.domain) return scale.range[scale.domain.indexOf(name)];
  }
  return null;
};

const shorter = (value, most) => {  // labels beside a narrow plot leave it the better part of the width
  if (Array.isArray(value)) return value.map((one) => shorter(one, most));
  if (!value || typeof value !== "object") return value;
  const copy = Object.fromEntries(Object.entries(value).map(([k, v]) => [k, k === "values" ? v : shorter(v, most)]));
  if (copy.labelLimit) copy.labelLimit = Math.min(copy.labelLimit, most);
  return copy;
};

const key = (names, spec) => {  // on a narrow plot, what the names at the lines' ends are on a wide one
  const list = document.createElement("ul");
  list.className = "key";
  for (const name of new Set(names)) {
    const item = document.createElement("li"), mark = document.createElement("span");
    mark.style.background = colourOf(spec, name) || "transparent";
    item.append(mark, name);
    list.append(item);
  }
  return list;
};

const draw = async (plot) => {
  const given = (page.figures[plot.dataset.figure] || [])[Number(plot.dataset.panel)];
  if (!given) return;
  const theme = page.themes[dark.matches ? "dark" : "light"];
  const width = plot.clientWidth;
  if (!width) return;
  let spec = { ...given, usermeta: undefined };
  if (theme.swaps && Object.keys(theme.swaps).length) spec = { ...swapped({ ...spec, data: undefined }, theme.swaps), ...(spec.data ? { data: spec.data } : {}) };
  const names = (given.usermeta && given.usermeta.names) || [];
  const small = width < NARROW && names.length > 1 && (spec.layer || []).some((layer) => layer.name === page.narrow);
  if (small) spec = { ...spec, layer: spec.layer.filter((layer) => layer.name !== page.narrow) };
  if (width < NARROW) spec = shorter(spec, Math.round(width * 0.36));
  plot.dataset.width = width;
  if (plot.view) plot.view.finalize();
  const options = { actions: false, ast: true, renderer: "svg", config: theme.config, tooltip: { theme: "custom" } };
  plot.view = await vegaEmbed(plot, spec, options);
  plot.querySelector("svg").setAttribute("aria-hidden", "true");  // the plot itself is named, and the numbers are in a table
  const before = plot.previousElementSibling;
  if (before && before.className === "key") before.remove();
  if (small) plot.before(key(names, spec));
};

let drawing = Promise.resolve();
const inTurn = (plot) => {  // one after another, so that the first is seen while the others are made
  drawing = drawing.then(() => new Promise((next) => setTimeout(next))).then(() => draw(plot)).catch((error) => console.error(error));
};

let watcher = null;
const drawAll = (again) => {  // each when it comes near to what is seen: a hundred panels are not drawn at once
  if (watcher) watcher.disconnect();
  watcher = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) {
      if (isIntersecting) { watcher.unobserve(target); inTurn(target); }
    }
  }, { rootMargin: "400px" });
  for (const plot of document.querySelectorAll(".plot")) {
    if (again || !plot.view) watcher.observe(plot);
  }
};

let waiting = 0;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    for (const plot of document.querySelectorAll(".plot")) {
      if (plot.view && Number(plot.dataset.width) !== plot.clientWidth) draw(plot);
    }
  }, 150);
});
dark.addEventListener("change", () => drawAll(true));
window.addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach((plot) => plot.view || draw(plot)));

const sortBy = (head, direction) => {
  const table = head.closest("table"), column = [...head.parentNode.children].indexOf(head), body = table.tBodies[0];
  const value = (row) => {
    const cell = row.children[column];
    return cell.dataset.v !== undefined ? Number(cell.dataset.v) : cell.textContent === "-" ? null : cell.textContent;
  };
  const rows = [...body.rows].map((row) => [value(row), row]);
  const sign = direction === "ascending" ? 1 : -1;
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);  // what has none stands last, both ways round
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), "en", { numeric: true });
  });
  body.append(...rows.map(([, row]) => row));
  for (const other of head.parentNode.children) other.setAttribute("aria-sort", other === head ? direction : "none");
};

const filterRows = () => {
  const find = document.getElementById("filter"), table = document.getElementById("runs-table");
  if (!find || !table) return;
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean), rows = [...table.tBodies[0].rows];
  let found = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    found += !row.hidden;
  }
  document.getElementById("found").textContent = `${found} of ${rows.length}`;
};

document.addEventListener("click", async (event) => {
  const head = event.target.closest("#runs-table thead th");
  if (head && event.target.closest("button")) {
    const up = head.getAttribute("aria-sort") !== "ascending";
    sortBy(head, up ? "ascending" : "descending");
    document.dispatchEvent(new CustomEvent("sorted", { detail: [head.textContent, up] }));
  }
  const copy = event.target.closest("button.copy");
  if (copy) {
    try { await navigator.clipboard.writeText(copy.dataset.copy); copy.textContent = "Copied"; } catch {
      getSelection().selectAllChildren(copy.previousElementSibling);
      copy.textContent = "Selected";
    }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  }
});
document.addEventListener("input", (event) => { if (event.target.id === "filter") filterRows(); });
drawAll(false);
