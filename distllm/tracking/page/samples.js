// Browses what was sampled while training: one step or all, in an order, by text, page by page. Without it the last rows show.
const ROWS_PER_PAGE = 10;

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function sampleRow(one) {
  const row = document.createElement("tr");
  const add = (className, ...parts) => {
    const cell = element("td", className);
    cell.append(...parts);
    row.append(cell);
  };
  const answer = element("div", "answer");
  if (one.right !== null) {
    const mark = element("span", `mark ${one.right ? "yes" : "no"}`, one.right ? "✓" : "✗");
    mark.title = one.right ? "right" : "wrong";
    answer.append(mark);
  }
  answer.append(element("div", "text", one.response));
  add("n", one.step);
  add("", element("div", "text prompt", one.prompt));
  add("", answer, ...(one.cut ? [element("span", "reward", "cut by the length limit")] : []));
  add("", element("div", "text", one.answer));
  add("n", one.reward === null ? "–" : format(one.reward));
  add("n", one.tokens === null ? "–" : one.tokens);
  return row;
}

for (const card of document.querySelectorAll(".browse")) {
  const all = JSON.parse(card.querySelector("script").textContent);
  const form = card.querySelector("form"), body = card.querySelector("tbody"), pages = card.querySelector(".pages");
  const { step, order, find, back, on } = form.elements, { previous, next } = pages.children;
  const steps = [...new Set(all.map((one) => one.step))];
  let page = 0;
  step.append(new Option(`all ${steps.length}`, ""), ...steps.map((name) => new Option(name, name)));
  step.value = steps.at(-1);
  const value = (one) => one.reward ?? -Infinity;
  const orders = {
    sampled: () => 0, high: (a, b) => value(b) - value(a), low: (a, b) => value(a) - value(b),
    long: (a, b) => (b.tokens ?? 0) - (a.tokens ?? 0),
  };

  function show() {
    const wanted = find.value.toLowerCase();
    const found = all.filter((one) => (!step.value || one.step === step.value)
      && (!wanted || `${one.prompt}\n${one.response}`.toLowerCase().includes(wanted))).sort(orders[order.value]);
    const count = Math.max(1, Math.ceil(found.length / ROWS_PER_PAGE));
    page = Math.min(Math.max(page, 0), count - 1);
    const first = page * ROWS_PER_PAGE, shown = found.slice(first, first + ROWS_PER_PAGE);
    body.replaceChildren(...shown.map(sampleRow));
    const rewards = found.map((one) => one.reward).filter((one) => one !== null);
    const mean = rewards.length ? `, mean reward ${format(rewards.reduce((a, b) => a + b, 0) / rewards.length)}` : "";
    pages.querySelector("output").textContent = found.length
      ? `${first + 1} to ${first + shown.length} of ${found.length}${mean}` : "none";
    previous.disabled = page === 0;
    next.disabled = page === count - 1;
    back.disabled = step.selectedIndex <= 1;
    on.disabled = step.selectedIndex === 0 || step.selectedIndex === steps.length;
  }
  function turn(by) { page += by; show(); }
  function move(by) {
    step.selectedIndex = Math.min(Math.max(step.selectedIndex + by, 1), steps.length);
    page = 0;
    show();
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { page = 0; show(); });
  back.addEventListener("click", () => move(-1));
  on.addEventListener("click", () => move(1));
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  // Where the table itself has the focus, the arrows walk through steps and the page keys through pages.
  card.querySelector(".scroll").addEventListener("keydown", (event) => {
    const act = {
      ArrowLeft: () => move(-1), ArrowRight: () => move(1), PageUp: () => turn(-1), PageDown: () => turn(1),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  form.hidden = pages.hidden = false;
  show();
}
