"use strict";
// The page can be read without this: it filters, sorts, and reads out what is pointed at.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector, root = document) => root.querySelector(selector);
const kinds = all("input[name=kind]");
const classSelect = one("#class");
const groupSelect = one("#group");
const tip = one("#tip");

// Names by label, as text: they are never read as HTML.
const nameOf = new Map(all("#class option[value]").map((option) => [option.value, option.textContent]));
const kindName = kinds.map((input) => input.parentElement.textContent.trim());

function filter() {
  const label = classSelect.value;
  const shown = new Set(kinds.filter((input) => input.checked).map((input) => input.value));
  let visible = 0;
  let total = 0;
  let sheets = 0;
  const narrowed = label !== "" || shown.size < kinds.length;
  for (const sheet of all(".sheet")) {
    let here = 0;
    for (const box of all(".view .box", sheet)) {
      const on = shown.has(box.dataset.kind) && (label === "" || box.dataset.class === label);
      box.classList.toggle("off", !on);
      here += on;
      total += 1;
    }
    const wanted = groupSelect.value === "" || sheet.dataset.group === groupSelect.value;
    sheet.hidden = !wanted || (narrowed && here === 0);
    if (!sheet.hidden) {
      visible += here;
      sheets += 1;
    }
  }
  one("#status").textContent = `${visible} of ${total} boxes on ${sheets} sheets`;
  one("#nothing").hidden = sheets > 0 || total === 0;
  light(label);
}

function light(label) {
  for (const element of all("polyline[data-class], circle[data-class], tr[data-class]")) {
    const on = label !== "" && element.dataset.class === label;
    element.classList.toggle("lit", on);
    if (on && element.tagName === "polyline") element.parentElement.append(element);
  }
}

function showKinds(wanted) {
  for (const input of kinds) input.checked = wanted.has(input.value);
  filter();
}

for (const control of [...kinds, classSelect, groupSelect]) control.addEventListener("change", filter);
one("#reset").addEventListener("click", () => {
  classSelect.value = groupSelect.value = "";
  showKinds(new Set(kinds.map((input) => input.value)));
});
one("#only-errors").addEventListener("click", () => {
  showKinds(new Set(kinds.map((input) => input.value).filter((value) => value !== "0")));
});
for (const button of all("[data-show]")) {
  button.addEventListener("click", () => {
    classSelect.value = groupSelect.value = "";
    showKinds(new Set([button.dataset.show]));
    one("#sheets").scrollIntoView();
  });
}
for (const button of all("[data-pick]")) {
  button.addEventListener("click", () => {
    classSelect.value = classSelect.value === button.dataset.pick ? "" : button.dataset.pick;
    filter();
  });
}

for (const button of all(".enlarge")) {
  button.addEventListener("click", () => {
    const large = button.closest(".sheet").classList.toggle("large");
    button.setAttribute("aria-pressed", String(large));
    button.textContent = large ? "shrink" : "enlarge";
  });
}

// What the pointer is at: the box's class, and what became of it; its partner on the other side lights up.
function readBox(event) {
  for (const box of all(".view .box.lit")) box.classList.remove("lit");
  const box = event.target.closest?.(".view .box");
  tip.hidden = !box;
  if (!box) return;
  const parts = [nameOf.get(box.dataset.class), kindName[Number(box.dataset.kind)]];
  if (box.dataset.score) parts.splice(1, 0, box.dataset.score);
  const partner = box.dataset.partner;
  if (partner !== "-1") {
    for (const other of all(`.box[data-partner="${partner}"]`, box.closest(".sheet"))) {
      other.classList.add("lit");
      const truth = !other.dataset.score && box.dataset.score;
      if (truth && other.dataset.class !== box.dataset.class) {
        parts.push(`truth: ${nameOf.get(other.dataset.class)}`);
      }
    }
  }
  box.classList.add("lit");
  tip.textContent = parts.join(" · ");
  const { clientX: x, clientY: y } = event;
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${y + 18 + tip.offsetHeight < innerHeight ? y + 18 : y - tip.offsetHeight - 10}px`;
}
document.addEventListener("pointermove", readBox);
document.addEventListener("pointerdown", readBox);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// Charts: the line nearest to the pointer is lit and read at the pointer's x.
for (const chart of all(".chart")) {
  const svg = one("svg", chart);
  const reading = one(".reading", chart);
  const standing = reading.textContent;
  const lines = all("polyline", svg).map((line) => ({ line, values: line.dataset.values.split(" ").map(Number) }));
  const point = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const step = Math.round(Math.max(0, Math.min(1, (at.x - 46) / 380)) * 100);
    const height = 100 * (1 - (at.y - 14) / 260);
    let best = null;
    for (const entry of lines) {
      const distance = Math.abs(entry.values[step] - height);
      if (!best || distance < best.distance) best = { ...entry, distance };
    }
    if (!best) return;
    for (const { line } of lines) line.classList.toggle("lit", line === best.line);
    const value = (best.values[step] / 100).toFixed(2);
    reading.textContent =
      `${best.line.dataset.name}: ${chart.dataset.y} ${value} at ${chart.dataset.x} ${(step / 100).toFixed(2)}`;
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", () => {
    for (const { line } of lines) line.classList.remove("lit");
    light(classSelect.value);
    reading.textContent = standing;
  });
}

// Tables: numbers as numbers, what is missing last.
function sortBy(table, column, direction) {
  const body = table.tBodies[0];
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...body.rows].map((row) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    return { row, text, number: cell.dataset.value === undefined ? parseFloat(text) : NaN, gone: text === "–" };
  });
  rows.sort((a, b) => {
    if (a.gone || b.gone) return a.gone - b.gone;
    return sign * (Number.isNaN(a.number) ? a.text.localeCompare(b.text) : a.number - b.number);
  });
  body.append(...rows.map(({ row }) => row));
}
for (const button of all(".sortable th button[data-first]")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const now = head.getAttribute("aria-sort");
    const other = { ascending: "descending", descending: "ascending" };
    const direction = now ? other[now] : button.dataset.first;
    for (const cell of head.parentElement.cells) cell.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", direction);
    sortBy(head.closest("table"), head.cellIndex, direction);
  });
}

one("#theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});

filter();
