// Sorts a table by the column whose head is clicked; again: the other way round. Numbers come before other texts.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    const value = (row) => row.cells[head.cellIndex].dataset.sort ?? row.cells[head.cellIndex].textContent.trim();
    const isNumber = (text) => text !== "" && Number.isFinite(Number(text));
    const compare = (a, b) =>
      isNumber(a) && isNumber(b) ? a - b : isNumber(b) - isNumber(a) || a.localeCompare(b, "en", { numeric: true });
    const rows = [...body.rows].sort((one, other) => compare(value(one), value(other)));
    body.append(...(down ? rows.reverse() : rows));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
  });
}
