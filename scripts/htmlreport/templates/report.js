"use strict";
// Sorting, finding runs, and opening what a link leads to. Everything else works without.

const say = (text) => { document.getElementById("status").textContent = text; };

function valueOf(row, column, mode) {
  const cell = row.cells[column];
  const data = cell.dataset[mode] ?? cell.dataset.value;
  if (data !== undefined) return data === "" ? null : Number(data);
  const text = cell.textContent.trim();
  return text !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en");
}

function sort(table, column, direction) {
  const body = table.tBodies[0];
  const checked = table.closest("section").querySelector("input[type=radio]:checked");
  const mode = checked ? checked.value : "value";
  const rows = [...body.rows].sort((a, b) => a.dataset.order - b.dataset.order);
  if (direction !== "none") {
    const sign = direction === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [valueOf(a, column, mode), valueOf(b, column, mode)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * compare(x, y);
    });
  }
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  [...table.tBodies[0].rows].forEach((row, number) => { row.dataset.order = number; });
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const next = { none: column ? "descending" : "ascending",
        descending: column ? "ascending" : "none", ascending: column ? "none" : "descending" };
      const direction = next[head.getAttribute("aria-sort") ?? "none"];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (direction !== "none") head.setAttribute("aria-sort", direction);
      sort(table, column, direction);
      say(direction === "none" ? "original order" : `${button.textContent}: ${direction}`);
    });
  });
  for (const input of table.closest("section").querySelectorAll(`input[name="mode-${table.closest("section").id}"]`)) {
    input.addEventListener("change", () => {
      const column = heads.findIndex((head) => head.hasAttribute("aria-sort"));
      if (column >= 0) sort(table, column, heads[column].getAttribute("aria-sort"));
    });
  }
}

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", openTarget);
if (location.hash) openTarget();

const find = document.getElementById("find");
find.addEventListener("input", () => {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const group of document.querySelectorAll("details.group")) {
    const label = group.querySelector("summary").textContent.toLowerCase();
    let inside = 0;
    for (const run of group.querySelectorAll("details.run")) {
      const text = `${label} ${run.id.toLowerCase()}`;
      run.hidden = !words.every((word) => text.includes(word));
      if (!run.hidden) inside += 1;
    }
    group.hidden = words.length > 0 && inside === 0;
    group.open = words.length > 0 && inside > 0;
    shown += inside;
  }
  say(words.length ? `${shown} runs` : "");
});
