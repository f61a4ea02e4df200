"use strict";
const EVERY = 2000;  // milliseconds between two looks at whether anything has changed
let seen = { stamp: "", sections: {}, chosen: [], found: [] }, asking = 0, timer = 0;
const el = (id) => document.getElementById(id);
const say = (text) => { if (el("state").textContent !== text) el("state").textContent = text; };

const remember = () => {  // the whole view is in the address, so that a copied one opens the same
  const query = new URLSearchParams(address);
  query.set("token", token);
  history.replaceState(null, "", `/?${query.toString().replaceAll("%2C", ",")}`);
};

const set = (name, value) => {
  if (value) address.set(name, value); else address.delete(name);
  remember();
};

const change = (name, value) => { set(name, value); look(true); };

const section = (html) => {  // the server's own markup, in which everything from a record is escaped
  const made = document.createElement("template");
  made.innerHTML = html;
  return made.content;
};

const replaced = (there, fresh, plots) => {
  for (const plot of fresh.querySelectorAll(".plot")) {  // what is drawn stays until it is drawn anew
    const old = plots.get(`${plot.dataset.figure}/${plot.dataset.panel}`);
    if (!old || !old.view) continue;
    const names = old.previousElementSibling;
    old.setAttribute("aria-label", plot.getAttribute("aria-label"));
    plot.replaceWith(old);
    if (names && names.className === "key") old.before(names);
  }
  if (!there) return fresh;
  const typing = there.contains(el("filter")) ? el("filter") : null;
  const focused = typing && document.activeElement === typing, caret = focused ? typing.selectionStart : 0;
  const scrolled = [...there.querySelectorAll(".wide")].map((wide) => [wide.scrollLeft, wide.scrollTop]);
  if (typing) fresh.querySelector("#filter").replaceWith(typing);
  there.replaceWith(fresh);
  [...fresh.querySelectorAll(".wide")].forEach((wide, n) => { if (scrolled[n]) [wide.scrollLeft, wide.scrollTop] = scrolled[n]; });
  if (focused) { typing.focus(); typing.setSelectionRange(caret, caret); }
  return fresh;
};

const put = (told) => {
  const before = page.figures;
  page.figures = told.figures;
  const main = document.querySelector("main"), content = section(told.main);
  const plots = new Map([...main.querySelectorAll(".plot")].map((plot) => [`${plot.dataset.figure}/${plot.dataset.panel}`, plot]));
  const open = new Set([...main.querySelectorAll("details[open]")].map(nameOf));
  const sections = {};
  let last = null;
  for (const fresh of [...content.children]) {  // a section that is as it was is left alone: nobody loses their place in it
    const html = fresh.outerHTML, there = el(fresh.id);
    sections[fresh.id] = html;
    const node = there && seen.sections[fresh.id] === html ? there : replaced(there, fresh, plots);
    if (last ? last.nextElementSibling !== node : main.firstElementChild !== node) {
      if (last) last.after(node); else main.prepend(node);
    }
    last = node;
  }
  while (last && last.nextElementSibling) last.nextElementSibling.remove();
  for (const one of main.querySelectorAll("details")) if (open.has(nameOf(one))) one.open = true;
  seen = { stamp: told.stamp, sections, chosen: told.chosen, found: told.found };
  head(told.facts);
  choices(told.keys);
  boxes();
  for (const plot of main.querySelectorAll(".plot")) {
    const { figure, panel } = plot.dataset;
    if (plot.view && JSON.stringify((before[figure] || [])[panel]) !== JSON.stringify((told.figures[figure] || [])[panel])) inTurn(plot);
  }
  drawAll(false);
};

const nameOf = (details) => `${(details.closest("[id]") || {}).id}/${details.querySelector("summary").textContent.replace(/\d+/g, "")}`;

const head = (facts) => {
  const header = el("header");
  header.querySelectorAll("p").forEach((line) => line.remove());
  for (const fact of facts) {
    const line = document.createElement("p");
    line.className = "soft";
    line.textContent = fact;
    header.append(line);
  }
};

const choices = (keys) => {
  const select = el("group"), now = address.get("group") || "";
  const wanted = ["", ...keys, ...(now && !keys.includes(now) ? [now] : [])];
  if (wanted.join("\n") !== [...select.options].map((one) => one.value).join("\n")) {
    select.replaceChildren(...wanted.map((key) => new Option(key || "what tells them apart", key)));
  }
  select.value = now;
};

const boxes = () => {  // a box a run: which are drawn
  const table = el("runs-table"), chosen = new Set(seen.chosen), find = el("filter");
  if (!table) return;
  for (const row of table.tBodies[0].rows) {
    const name = row.cells[0];
    let box = name.querySelector("input");
    if (!box) {
      box = document.createElement("input");
      box.type = "checkbox";
      box.setAttribute("aria-label", `Draw ${row.dataset.run}`);
      name.prepend(box);
    }
    box.checked = chosen.has(row.dataset.run);
    row.classList.toggle("chosen", box.checked);
  }
  const typed = address.get("filter") || "";  // what has been typed since it was asked for
  if (find.value !== typed && document.activeElement !== find) find.value = typed;
};

const look = async (now) => {
  clearTimeout(timer);
  const mine = ++asking, query = new URLSearchParams(address);
  if (!now) query.set("stamp", seen.stamp);
  try {
    const answer = await (first || ask(query));
    first = null;
    if (mine !== asking) return;
    if (answer.ok) {
      const told = await answer.json();
      if (told.main !== undefined) put(told);
      say("");
    }
    else if (answer.status === 400) say((await answer.json()).problem);
    else say(`${answer.status}: ${(await answer.text()).trim()}`);
  } catch { say("The dashboard does not answer; it may have been stopped."); }
  if (mine === asking) timer = setTimeout(() => look(false), document.hidden ? 5 * EVERY : EVERY);
};

const pressed = {
  "draw-newest": () => change("runs", ""),
  "draw-found": () => change("runs", seen.found.join(",")),
  "copy-link": async () => {
    remember();
    try { await navigator.clipboard.writeText(location.href); say("Copied."); } catch { say("Copy the address from the browser's own field."); }
  },
};

let pause = 0;
document.addEventListener("click", (event) => { const act = pressed[event.target.id]; if (act) act(); });
document.addEventListener("sorted", ({ detail: [column, up] }) => change("sort", `${column}:${up ? "ascending" : "descending"}`));
document.addEventListener("input", ({ target }) => {
  if (target.id === "filter") { set("filter", target.value); clearTimeout(pause); pause = setTimeout(() => look(true), 150); }
  if (target.id === "smooth") { clearTimeout(pause); pause = setTimeout(() => change("smooth", Number(target.value) ? target.value : ""), 120); }
});
document.addEventListener("change", ({ target }) => {
  if (target.id === "group") change("group", target.value);
  if (target.id === "metric") change("metric", target.value === "perplexity" ? "" : target.value);
  if (target.id === "outliers") change("outliers", target.checked ? "hide" : "");
  if (target.id === "log-x" || target.id === "log-y") change("log", (el("log-x").checked ? "x" : "") + (el("log-y").checked ? "y" : ""));
  const row = target.closest("tr[data-run]");
  if (row) {
    const chosen = new Set(seen.chosen);
    if (target.checked) chosen.add(row.dataset.run); else chosen.delete(row.dataset.run);
    change("runs", [...chosen].join(","));
  }
});
document.addEventListener("submit", (event) => event.preventDefault());

el("metric").value = address.get("metric") || "perplexity";
el("smooth").value = address.get("smooth") || "0";
el("log-x").checked = (address.get("log") || "").includes("x");
el("log-y").checked = (address.get("log") || "").includes("y");
el("outliers").checked = address.get("outliers") === "hide";
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(false); });
look(true);
