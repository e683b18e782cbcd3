"use strict";
// The page can be read without this: it shows the doubts of chosen kinds and of one class.
const kinds = [...document.querySelectorAll("input[name=kind]")];
const classSelect = document.querySelector("#class");
const doubts = [...document.querySelectorAll(".doubt")];

function filter() {
  const wanted = new Set(kinds.filter((input) => input.checked).map((input) => input.value));
  const label = classSelect.value;
  for (const doubt of doubts) {
    const named = label === "" || doubt.dataset.class.split(" ").includes(label);
    doubt.hidden = !(wanted.has(doubt.dataset.kind) && named);
  }
  const shown = doubts.filter((doubt) => !doubt.hidden).length;
  document.querySelector("#status").textContent = `${shown} of ${doubts.length} doubts`;
  document.querySelector("#nothing").hidden = shown > 0 || doubts.length === 0;
}

for (const control of [...kinds, classSelect]) control.addEventListener("change", filter);
filter();
