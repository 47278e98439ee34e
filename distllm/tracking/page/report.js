// Shows the values under the pointer. The page is complete without it.
"use strict";
const tip = document.getElementById("tip");

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high];
}

function format(value) {
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function cell(row, text) {
  row.insertCell().textContent = text;
}

for (const plot of document.querySelectorAll(".plot")) {
  const { box, x, y, series } = JSON.parse(plot.dataset.plot);
  const svg = plot.querySelector("svg");
  const marks = document.createElementNS("http://www.w3.org/2000/svg", "g");
  const shown = series.filter((one) => one.points.length);
  svg.append(marks);
  const atX = (step) => box[0] + (step - x[0]) / (x[1] - x[0]) * (box[2] - box[0]);
  const atY = (value) => box[3] - (value - y[0]) / (y[1] - y[0]) * (box[3] - box[1]);
  const leave = () => { marks.replaceChildren(); tip.hidden = true; };

  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    if (!shown.length || at.x < box[0] - 4 || at.x > box[2] + 4) return leave();
    const pointer = x[0] + (at.x - box[0]) / (box[2] - box[0]) * (x[1] - x[0]);
    const close = shown.map((one) => nearest(one.points, pointer));
    const step = close.reduce((a, b) => Math.abs(a[0] - pointer) <= Math.abs(b[0] - pointer) ? a : b)[0];
    const line = document.createElementNS(marks.namespaceURI, "line");
    for (const [key, value] of Object.entries({ x1: atX(step), x2: atX(step), y1: box[1], y2: box[3] })) {
      line.setAttribute(key, value);
    }
    line.setAttribute("class", "cursor");
    const table = document.createElement("table");
    const head = table.insertRow();
    cell(head, "step");
    cell(head, step.toLocaleString("en"));
    const dots = shown.map((one) => {
      const point = nearest(one.points, step);
      const dot = document.createElementNS(marks.namespaceURI, "circle");
      for (const [key, value] of Object.entries({ cx: atX(point[0]), cy: atY(point[1]), r: 2.6 })) {
        dot.setAttribute(key, value);
      }
      dot.style.fill = `var(--c${one.color})`;
      const row = table.insertRow();
      const name = row.insertCell();
      const swatch = document.createElement("i");
      swatch.className = "dots";
      swatch.style.setProperty("--c", `var(--c${one.color})`);
      name.append(swatch, one.label + (point[0] === step ? "" : ` (step ${point[0].toLocaleString("en")})`));
      cell(row, format(point[1]));
      return dot;
    });
    marks.replaceChildren(line, ...dots);
    tip.replaceChildren(table);
    tip.hidden = false;
    const width = tip.offsetWidth, room = document.documentElement.clientWidth;
    tip.style.left = `${event.clientX + 16 + width > room ? event.clientX - 16 - width : event.clientX + 16}px`;
    tip.style.top = `${event.clientY + 14}px`;
  });
}
