// Sorting, filtering, the theme, and heads that open when they are linked to. Without it the page only lacks these.
(() => {
  "use strict";
  const root = document.documentElement;
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const filter = document.getElementById("filter");
  const found = document.getElementById("found");
  const columns = [...table.tHead.rows[0].cells];
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

  // ------------------------------------------------------------------------------------------------------- theme
  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const name = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("clipfast-theme", root.dataset.theme); } catch { /* it is forgotten */ }
    name();
  });
  system.addEventListener("change", name);
  name();

  // ----------------------------------------------------------------------------------------------------- sorting
  const words = (column) => columns[column].classList.contains("c-texts");
  const rising = (column) => words(column) || columns[column].classList.contains("c-head");
  const value = (row, column) => row.cells[column].dataset.v;
  function sort(column) {
    const now = columns[column].getAttribute("aria-sort");
    const up = now ? now === "descending" : rising(column);
    columns.forEach((cell) => cell.removeAttribute("aria-sort"));
    columns[column].setAttribute("aria-sort", up ? "ascending" : "descending");
    const compare = words(column)
      ? (a, b) => collator.compare(value(a, column), value(b, column))
      : (a, b) => value(a, column) - value(b, column);
    const rows = [...body.rows].sort((a, b) => (up ? compare(a, b) : compare(b, a)));
    body.append(...rows);
  }
  columns.forEach((cell, column) => {
    cell.querySelector("button").addEventListener("click", () => sort(column));
  });

  // --------------------------------------------------------------------------------------------------- filtering
  const said = new Map();
  function text(row) {
    if (!said.has(row)) {
      const parts = [row.cells[0], ...row.querySelectorAll(".word")].map((part) => part.textContent);
      said.set(row, parts.join("\n").toLowerCase());
    }
    return said.get(row);
  }
  function sift() {
    const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      row.hidden = !wanted.every((word) => text(row).includes(word));
      shown += row.hidden ? 0 : 1;
    }
    found.textContent = wanted.length ? `${shown} of ${body.rows.length} heads` : `${body.rows.length} heads`;
    document.getElementById("none").hidden = shown > 0;
  }
  filter.addEventListener("input", sift);
  filter.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { filter.value = ""; sift(); }
  });
  sift();

  document.getElementById("close").addEventListener("click", () => {
    body.querySelectorAll("details[open]").forEach((each) => { each.open = false; });
  });

  // ----------------------------------------------------------------------------------------------- links to heads
  function show(id) {
    const target = document.getElementById(id);
    const row = target && target.closest("#table tbody tr");
    if (!row) return;
    if (row.hidden) { filter.value = ""; sift(); }
    body.querySelectorAll("tr.linked").forEach((each) => each.classList.remove("linked"));
    row.classList.add("linked");
    target.closest("details").open = true;
    row.scrollIntoView({ block: "start" });
    row.querySelector("summary").focus({ preventScroll: true });
  }
  const named = () => {
    try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; }
  };
  addEventListener("hashchange", () => show(named()));
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#L"]');
    if (link && link.hash === location.hash) show(named()); // no hashchange follows
  });
  // After the browser's own jump to the address, which takes the focus away again.
  if (location.hash) addEventListener("load", () => setTimeout(() => show(named())));
})();
