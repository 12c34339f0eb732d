// Behaviour of a report: draws figures as they come into view; sorts, filters and pages its tables.
"use strict";
let colours = {};
const colour = name =>
  colours[name] ??= getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// On a touch screen a finger on a figure has to scroll the page.
const coarse = matchMedia("(pointer: coarse)").matches;
const plots = [...document.querySelectorAll(".plot")];
const hidden = new Set();  // places in the legend

function template() {
  const axis = {gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true,
    title: {standoff: 12}};
  const font = {color: colour("--text"), size: 13, family: "system-ui, sans-serif"};
  const colorscale = [[0, colour("--faint")], [0.5, colour("--middle")], [1, colour("--strong")]];
  return {layout: {
    font, colorway: [colour("--accent"), colour("--mark"), colour("--dim")],
    paper_bgcolor: colour("--page"), plot_bgcolor: colour("--page"), xaxis: axis, yaxis: axis,
    coloraxis: {colorscale, colorbar: {thickness: 12, outlinewidth: 0}},
    hoverlabel: {align: "left", bgcolor: colour("--page"), bordercolor: colour("--dim"), font},
    margin: {l: 60, r: 20, t: 30, b: 50}, dragmode: coarse ? false : "zoom",
  }};
}

function draw(plot) {
  const own = (key, value) =>
    /color$/.test(key) && String(value).startsWith("--") ? colour(value) : value;
  const {data, layout} = JSON.parse(plot.nextElementSibling.textContent, own);
  for (const trace of data) if (hidden.has(trace.meta)) trace.visible = false;
  Plotly.react(plot, data, {...layout, template: template()},
    {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
     // Its button would send the figure's data to a server.
     showSendToCloud: false, plotlyServerURL: ""});
  // The figure's label says it; a drawing's loose words do not.
  for (const drawing of plot.querySelectorAll("svg.main-svg")) drawing.setAttribute("aria-hidden", "true");
}

// Whoever opens a long page waits for the figures in sight, not for all.
const sight = new IntersectionObserver(found => {
  for (const {target, isIntersecting} of found)
    if (isIntersecting) { sight.unobserve(target); draw(target); }
}, {rootMargin: "300px"});

function redraw(some) {
  for (const plot of some) { sight.unobserve(plot); sight.observe(plot); }
}

function rowsOf(part, body) {
  const stored = part.querySelector("script");
  if (!stored) {
    const rows = [...body.rows], number = cell => cell.dataset.value;
    const value = cell => number(cell) === undefined ? cell.textContent : number(cell) ? Number(number(cell)) : null;
    return {count: rows.length, text: (row, at) => rows[row].cells[at].textContent, row: row => rows[row],
      value: (row, at) => value(rows[row].cells[at])};
  }
  const columns = JSON.parse(stored.textContent), digits = text => Number(text.replaceAll(",", ""));
  for (const column of columns)
    if (column.values === true)
      column.values = column.texts.map(text => text === "" || Number.isNaN(digits(text)) ? null : digits(text));
  const row = at => {
    const made = document.createElement("tr");
    for (const {texts, values, marks} of columns) {
      const cell = made.insertCell(), text = texts[at];
      const letters = marks ? [...text] : text, part = (from, to) => marks ? letters.slice(from, to).join("") : text;
      let from = 0;
      for (const [begin, end] of marks?.[at] ?? []) {
        const mark = document.createElement("mark");
        mark.textContent = part(begin, end);
        cell.append(part(from, begin), mark);
        from = end;
      }
      cell.append(part(from));
      cell.classList.toggle("long", text.length > 60);
      if (values) cell.dataset.value = values[at] ?? "";
    }
    return made;
  };
  return {count: columns[0].texts.length, text: (row, at) => columns[at].texts[row], row,
    value: (row, at) => (columns[at].values ?? columns[at].texts)[row]};
}

// Words that a row must have, or `column > number`, between commas.
function wanted(text, heads) {
  const terms = text.toLowerCase().split(",").map(term => term.trim()).filter(term => term);
  const compared = {"<": (a, b) => a < b, ">": (a, b) => a > b, "=": (a, b) => a === b};
  const tests = terms.map(term => {
    const [, name, sign, number] = term.match(/^(.+?)\s*([<>=])\s*(-?[\d.]+(?:e-?\d+)?)$/) ?? [];
    const at = heads.indexOf(name);
    if (at < 0) return (rows, row) => heads.some((_, at) => rows.text(row, at).toLowerCase().includes(term));
    return (rows, row) => {
      const value = rows.value(row, at);
      return typeof value === "number" && compared[sign](value, Number(number));
    };
  });
  return (rows, row) => tests.every(test => test(rows, row));
}

function comparison(a, b, up) {
  if (a === null || b === null) return (a === null) - (b === null);
  const less = typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
  return up ? less : -less;
}
const collator = new Intl.Collator();

for (const part of document.querySelectorAll(".table")) {
  const table = part.querySelector("table"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const rows = rowsOf(part, body), pages = part.querySelector(".pages"), size = pages ? 50 : Infinity;
  const names = heads.map(head => head.textContent.toLowerCase());
  let order = [...Array(rows.count).keys()], kept = order, start = 0;
  const show = () => {
    body.replaceChildren(...kept.slice(start, start + size).map(rows.row));
    if (!pages) return;
    const [first, previous, next, last] = pages.querySelectorAll("button");
    first.disabled = previous.disabled = start === 0;
    next.disabled = last.disabled = start + size >= kept.length;
    const said = number => number.toLocaleString("en");
    pages.querySelector("output").textContent = kept.length
      ? `rows ${said(start + 1)} to ${said(Math.min(start + size, kept.length))} of ${said(kept.length)}` : "no rows";
  };
  const filter = () => {
    const box = part.querySelector("input"), fits = wanted(box?.value ?? "", names);
    kept = order.filter(row => fits(rows, row));
    start = 0;
    show();
    if (box) part.querySelector("output").textContent = `${kept.length} of ${rows.count} rows`;
  };
  heads.forEach((head, at) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    order = [...order].sort((a, b) => comparison(rows.value(a, at), rows.value(b, at), up));
    filter();
  }));
  part.querySelector("input")?.addEventListener("input", filter);
  const turns = [() => 0, () => start - size, () => start + size, () => size * Math.floor((kept.length - 1) / size)];
  pages?.querySelectorAll("button").forEach((button, at) => button.addEventListener("click", () => {
    start = turns[at]();
    show();
    part.querySelector(".scroll").scrollTop = 0;
    // A button that has become useless must not take the keyboard's place with it.
    if (button.disabled) [...pages.querySelectorAll("button")].find(other => !other.disabled)?.focus();
  }));
  if (pages) show();
}

for (const button of document.querySelectorAll(".legend button"))
  button.addEventListener("click", () => {
    const at = Number(button.dataset.at), shown = hidden.delete(at);
    if (!shown) hidden.add(at);
    for (const twin of document.querySelectorAll(`.legend button[data-at="${at}"]`))
      twin.setAttribute("aria-pressed", String(shown));
    redraw(plots);
  });

redraw(plots);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  colours = {};
  redraw(plots);
});
// What was drawn behind a closed line may have got another width or other colours since.
document.addEventListener("toggle", event => {
  if (event.target.open) redraw(event.target.querySelectorAll(".plot"));
}, true);
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const details of closed) details.open = true;
  document.body.classList.add("printing");  // as wide as a sheet of paper, on which figures do not shrink
  plots.forEach(draw);
});
addEventListener("afterprint", () => {
  for (const details of closed) details.open = false;
  document.body.classList.remove("printing");
  redraw(plots);
});
