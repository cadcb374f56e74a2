// A table of class "sortable" is sorted by the column whose title is pressed, numbers from the largest, words from a;
// pressed again, the other way round. Rows without a number stand last.

(() => {
  const text = (row, column) => row.cells[column].textContent.trim();
  const number = (row, column) => parseFloat(text(row, column).replace("−", "-").replace(",", ""));

  function sort(table, title) {
    const column = title.cellIndex, rows = [...table.tBodies[0].rows];
    const numbers = rows.some((row) => !isNaN(number(row, column)));
    const before = title.getAttribute("aria-sort");
    const up = before ? before === "descending" : !numbers;
    const compare = (a, b) => {
      if (!numbers) return text(a, column).localeCompare(text(b, column)) * (up ? 1 : -1);
      const [x, y] = [number(a, column), number(b, column)];
      return isNaN(x) - isNaN(y) || (x - y) * (up ? 1 : -1) || 0;
    };
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    title.setAttribute("aria-sort", up ? "ascending" : "descending");
    table.tBodies[0].append(...rows.sort(compare));
  }

  function start() {
    for (const table of document.querySelectorAll("table.sortable"))
      for (const title of table.tHead.rows[0].cells) {
        const button = document.createElement("button");
        button.type = "button";
        button.append(...title.childNodes);
        button.addEventListener("click", () => sort(table, title));
        title.append(button);
      }
  }
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", start) : start();
})();
