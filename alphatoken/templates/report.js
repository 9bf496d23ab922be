"use strict";
// Rows and their values -> masks by the library's rules (alphatoken/selection.py) -> page. Text of rows is only ever
// set as textContent.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const PAGE = 10; // rows shown at a time
const FEWEST = 3; // occurrences of a token, to be listed by its mean value
const BINS = 41, PLACES = 10;
const float32 = Math.fround;

function unpack(text, Kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Kind(bytes.buffer);
}

const tokens = unpack(DATA.tokens, Int32Array); // places in DATA.texts
const columns = {};
for (const name of Object.keys(DATA.columns)) columns[name] = unpack(DATA.columns[name], Float32Array);
const responses = [];
let end = 0;
for (const found of DATA.responses) responses.push({ ...found, start: end, end: (end += found.length) });
const rows = DATA.rows.map((row, index) => ({
  ...row, index, responses: responses.filter((found) => found.row === index),
  order: unpack(DATA.orders[index].ids, Int32Array), inside: unpack(DATA.orders[index].inside, Uint8Array),
}));
for (const row of rows) row.text = rowText(row).toLowerCase();

const state = {
  keep: DATA.settings.keep_fraction, weight: DATA.settings.stability_weight, scope: DATA.settings.scope,
  floor: DATA.settings.min_value, protect: new Set(DATA.settings.protect), rule: DATA.settings.rule, shown: PAGE,
};
const kept = new Uint8Array(tokens.length);
let values = new Float32Array(tokens.length);

// ---- the library's rules

function tokenValues(adaptation, stability, weight) {
  const found = new Float32Array(adaptation.length), factor = float32(weight);
  for (let i = 0; i < found.length; i++) found[i] = adaptation[i] + float32(factor * stability[i]);
  return found;
}

function kthLargest(list, fraction) {
  if (!list.length) return Infinity;
  const sorted = Float32Array.from(list).sort();
  return sorted[sorted.length - Math.max(1, Math.ceil(fraction * sorted.length - 1e-9))];
}

const isProtected = (i) => state.protect.has(DATA.class_names[DATA.classes[tokens[i]]]);

function unprotected(from, some) {
  const list = [];
  for (const found of some) for (let i = found.start; i < found.end; i++) if (!isProtected(i)) list.push(from[i]);
  return list;
}

function asStored() {
  const stored = DATA.settings;
  return state.keep === stored.keep_fraction && state.weight === stored.stability_weight &&
    state.scope === stored.scope && [...state.protect].sort().join() === [...stored.protect].sort().join();
}

function datasetThresholds(from) {
  const stored = from === values ? DATA.settings.threshold : null, found = {};
  for (const branch of new Set(responses.map((one) => one.branch))) {
    const known = stored !== null && typeof stored === "object" ? stored[branch] : stored;
    found[branch] = known !== null && known !== undefined && asStored()
      ? known : kthLargest(unprotected(from, responses.filter((one) => one.branch === branch)), state.keep);
  }
  return found;
}

// Surprising and, of `suspect`, harmful tokens go; so do all of a row that is surprising as a whole.
function fillUnsuspected(from, target) {
  const { row, tokens: bounds } = DATA.settings.bounds;
  for (const found of responses) {
    let sum = 0;
    for (let i = found.start; i < found.end; i++) sum -= columns.logprobs[i];
    const whole = row === null || !(sum / (found.end - found.start) > row);
    for (let i = found.start; i < found.end; i++) {
      const bound = bounds[DATA.class_names[DATA.classes[tokens[i]]]] ?? Infinity;
      const surprising = !isProtected(i) && -columns.logprobs[i] > bound;
      target[i] = whole && !(surprising && (state.rule === "surprising" || from[i] < 0)) ? 1 : 0;
    }
  }
}

// `values` are this folder's. Another's may have another unit: no stored threshold and no smallest value is about them.
function fillMask(from, target) {
  if (state.rule !== "share") return fillUnsuspected(from, target);
  const common = state.scope === "dataset" ? datasetThresholds(from) : null;
  const floor = state.floor === null || from !== values ? -Infinity : float32(state.floor);
  for (const found of responses) {
    const threshold = float32(common ? common[found.branch] : kthLargest(unprotected(from, [found]), state.keep));
    let count = 0, highest = -Infinity;
    for (let i = found.start; i < found.end; i++) {
      target[i] = isProtected(i) || (from[i] >= threshold && from[i] >= floor) ? 1 : 0;
      count += target[i];
      highest = Math.max(highest, from[i]);
    }
    // A response always keeps a token.
    for (let i = found.start; !count && i < found.end; i++) target[i] = from[i] >= highest ? 1 : 0;
  }
}

// ---- small pieces of page

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value; else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") made.textContent = value; else made.setAttribute(key, value);
  }
  return made;
}

const percent = (share) => (100 * share).toFixed(1) + "%";
const short = (x) => (x === 0 ? "0" : Math.abs(x) >= 0.001 && Math.abs(x) < 1e5 ? x.toPrecision(3) : x.toExponential(2));
const total = (list) => list.reduce((sum, x) => sum + x, 0);
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, (blanks) => "␣".repeat(blanks.length));

function rowText(row) {
  const parts = Array.from(row.order, (place) => DATA.texts[place]);
  if (DATA.pairs) for (const one of row.responses) for (let i = one.start; i < one.end; i++) parts.push(DATA.texts[tokens[i]]);
  return row.id + " " + parts.join("");
}

function fill(id, head, lines) {
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))));
  const body = element("tbody");
  for (const line of lines) {
    const cells = line.map((cell) => {
      if (typeof cell === "object" && "share" in cell) {
        const bar = element("span");
        bar.style.width = percent(cell.share);
        return element("td", { class: "bar", "aria-hidden": "true" }, bar);
      }
      return element("td", typeof cell === "number" ? { class: "number" } : {}, typeof cell === "number" ? cell.toLocaleString("en") : cell);
    });
    body.append(element("tr", {}, ...cells));
  }
  table.append(body);
  byId(id).replaceChildren(lines.length ? table : element("p", {}, "none"));
}

// ---- panels

function keptBy(nameOf) {
  const found = new Map();
  for (const one of responses) {
    for (let i = one.start; i < one.end; i++) {
      const name = nameOf(one, i), counts = found.get(name) ?? [0, 0];
      counts[0] += 1;
      counts[1] += kept[i];
      found.set(name, counts);
    }
  }
  return [...found].sort((a, b) => b[1][0] - a[1][0]).map(([name, [all, some]]) => [name, all, percent(some / all), { share: some / all }]);
}

function drawHistogram() {
  const width = 400, height = 150, bottom = 20;
  const sizes = Float32Array.from(values, Math.abs).sort();
  const reach = sizes[Math.floor(0.98 * (sizes.length - 1))] || 1;
  const bins = Array.from({ length: BINS }, () => [0, 0]);
  values.forEach((value, i) => {
    const place = Math.min(BINS - 1, Math.max(0, Math.floor(((value / reach + 1) / 2) * BINS)));
    bins[place][kept[i] ? 0 : 1] += 1;
  });
  const most = Math.max(...bins.map(total)), step = width / BINS;
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of values from ${short(-reach)} to ${short(reach)}; kept and dropped tokens` });
  bins.forEach(([some, others], place) => {
    let top = height - bottom;
    for (const [count, kind] of [[some, "kept"], [others, "dropped"]]) {
      const tall = (count / most) * (height - bottom - 5);
      top -= tall;
      picture.append(drawn("rect", { x: place * step, y: top, width: step - 1, height: tall, class: kind }));
    }
  });
  for (const [x, text, anchor] of [[0, "≤ " + short(-reach), "start"], [width / 2, "0", "middle"], [width, "≥ " + short(reach), "end"]]) {
    picture.append(drawn("text", { x, y: height - 5, "text-anchor": anchor, text }));
  }
  byId("histogram").replaceChildren(picture);
}

function drawPositions() {
  const sums = Array.from({ length: PLACES }, () => [0, 0]);
  for (const one of responses) {
    for (let i = one.start; i < one.end; i++) {
      const place = Math.floor(((i - one.start) / one.length) * PLACES);
      sums[place][0] += values[i];
      sums[place][1] += 1;
    }
  }
  const means = sums.map(([sum, count]) => (count ? sum / count : 0));
  const width = 400, height = 150, middle = 68, reach = Math.max(...means.map(Math.abs)) || 1, step = width / PLACES;
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Mean value in each tenth of the response: " + means.map(short).join(", ") });
  means.forEach((mean, place) => {
    const tall = (Math.abs(mean) / reach) * (middle - 5);
    picture.append(drawn("rect", { x: place * step + 2, y: mean >= 0 ? middle - tall : middle, width: step - 4, height: tall, fill: `rgb(var(${mean >= 0 ? "--up" : "--down"}))` }));
  });
  picture.append(drawn("line", { x1: 0, x2: width, y1: middle, y2: middle }));
  for (const [x, text, anchor] of [[0, "first tenth", "start"], [width, "last tenth", "end"], [width / 2, "highest " + short(Math.max(...means)), "middle"]]) {
    picture.append(drawn("text", { x, y: height - 3, "text-anchor": anchor, text }));
  }
  byId("position").replaceChildren(picture);
}

function listTokens() {
  const sums = new Map();
  tokens.forEach((place, i) => {
    const found = sums.get(place) ?? [0, 0, 0];
    sums.set(place, [found[0] + values[i], found[1] + 1, found[2] + kept[i]]);
  });
  const means = [...sums].filter(([, found]) => found[1] >= FEWEST).sort((a, b) => b[1][0] / b[1][1] - a[1][0] / a[1][1]);
  const lines = (list) => list.map(([place, [sum, count, some]]) => [visible(DATA.texts[place]), short(sum / count), count, percent(some / count)]);
  const head = ["token", "mean value", "times", "kept"];
  fill("best", head, lines(means.slice(0, 12)));
  fill("worst", head, lines(means.slice(-12).reverse()));
}

function ranks(list) {
  const order = Array.from(list.keys()).sort((a, b) => list[a] - list[b]), found = new Float64Array(list.length);
  for (let i = 0; i < order.length;) {
    let j = i;
    while (j < order.length && list[order[j]] === list[order[i]]) j++;
    for (let k = i; k < j; k++) found[order[k]] = (i + j - 1) / 2;
    i = j;
  }
  return found;
}

function correlation(a, b) {
  const meanA = total(a) / a.length, meanB = total(b) / b.length;
  let both = 0, squareA = 0, squareB = 0;
  a.forEach((x, i) => {
    both += (x - meanA) * (b[i] - meanB);
    squareA += (x - meanA) ** 2;
    squareB += (b[i] - meanB) ** 2;
  });
  return both / Math.sqrt(squareA * squareB);
}

function showAgreement() {
  if (!columns.other) return;
  byId("agreement-panel").hidden = false;
  const mask = new Uint8Array(tokens.length);
  fillMask(tokenValues(columns.other, columns.other_stability, state.weight), mask);
  const same = kept.reduce((sum, flag, i) => sum + (flag === mask[i] ? 1 : 0), 0) / kept.length;
  fill("agreement", ["compared with " + DATA.compared_with, ""], [
    ["rank correlation of adaptation", correlation(ranks(columns.adaptation), ranks(columns.other)).toFixed(3)],
    ["tokens with the same fate", percent(same)],
  ]);
}

// ---- rows

function tokenElement(i, scale) {
  const strength = Math.min(1, Math.abs(values[i]) / scale);
  const made = element(kept[i] ? "span" : "s", { class: "token", "data-i": i }, DATA.texts[tokens[i]].replace(/\n/g, "↵\n"));
  made.style.background = `rgba(var(${values[i] >= 0 ? "--up" : "--down"}), ${(0.65 * strength).toFixed(2)})`;
  return made;
}

function strongest(found) {
  const sizes = Float32Array.from(values.subarray(found.start, found.end), Math.abs).sort();
  return sizes[Math.floor(0.9 * (sizes.length - 1))] || 1;
}

function responseElement(found, label) {
  return element("div", { class: "text", tabindex: 0, role: "group", "aria-label": `${label}; arrow keys go from token to token` });
}

function rowElement(row) {
  const made = element("article", {}, headElement(row));
  if (!DATA.pairs) {
    const [found] = row.responses, scale = strongest(found), text = responseElement(found, "row " + row.id);
    let next = found.start;
    row.order.forEach((place, i) => {
      text.append(row.inside[i] ? tokenElement(next++, scale) : element("span", { class: "prompt" }, DATA.texts[place]));
    });
    made.append(text);
    return made;
  }
  made.append(element("div", { class: "text prompt" }, Array.from(row.order, (place) => DATA.texts[place]).join("")));
  const sides = element("div", { class: "sides" });
  for (const found of row.responses) {
    const text = responseElement(found, found.branch), scale = strongest(found);
    for (let i = found.start; i < found.end; i++) text.append(tokenElement(i, scale));
    sides.append(element("div", {}, element("h4", {}, `${found.branch}: ${countText([found])}`), text));
  }
  made.append(sides);
  return made;
}

function countText(some) {
  const all = total(some.map((one) => one.length));
  return `kept ${total(some.map((one) => total(kept.subarray(one.start, one.end))))} of ${all} response tokens`;
}

function headElement(row) {
  const mean = short(meanValue(row)), loss = row.mean_loss === null ? "" : `, mean loss ${row.mean_loss.toFixed(2)}`;
  const cut = row.truncated ? ", truncated" : "";
  return element("div", { class: "head" }, element("h3", {}, row.id), element("small", {}, `${countText(row.responses)}, mean value ${mean}${loss}${cut}, ${row.group}`));
}

function meanOf(row, list) {
  return total(row.responses.map((one) => total(list.subarray(one.start, one.end)))) / total(row.responses.map((one) => one.length));
}
const meanValue = (row) => meanOf(row, values);

const ORDERS = {
  drawn: () => 0, best: (row) => -meanValue(row), worst: meanValue,
  loss: (row) => -(row.mean_loss ?? -Infinity), kept: (row) => meanOf(row, kept),
};

function showRows() {
  const wanted = byId("search").value.toLowerCase(), group = byId("group").value;
  const key = ORDERS[byId("order").value];
  const found = rows.filter((row) => row.text.includes(wanted) && (!group || row.group === group))
    .map((row) => [key(row), row]).sort((a, b) => a[0] - b[0]).map(([, row]) => row);
  byId("found").textContent = `${found.length} of ${rows.length} rows`;
  byId("list").replaceChildren(...found.slice(0, state.shown).map(rowElement));
  byId("more").hidden = found.length <= state.shown;
}

// ---- details of a token

function details(i) {
  const lines = [
    `“${visible(DATA.texts[tokens[i]])}” (${DATA.class_names[DATA.classes[tokens[i]]]}): ${kept[i] ? "kept" : "dropped"}`,
    `value ${short(values[i])}`, `adaptation ${short(columns.adaptation[i])}`, `stability ${short(columns.stability[i])}`,
    `log-probability ${short(columns.logprobs[i])}`,
  ];
  if (columns.other) lines.push(`adaptation there ${short(columns.other[i])}`);
  return lines.join("\n");
}

function showTip(token) {
  const tip = byId("tip");
  tip.hidden = !token;
  if (!token) return;
  tip.textContent = details(Number(token.dataset.i));
  const place = token.getBoundingClientRect(), widest = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(4, Math.min(place.left, widest)) + window.scrollX + "px";
  tip.style.top = place.bottom + window.scrollY + 4 + "px";
}

function moveThrough(event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const text = event.target;
  if (!step || !text.classList.contains("text")) return;
  event.preventDefault();
  const list = [...text.querySelectorAll(".token")];
  const before = list.findIndex((token) => token.classList.contains("current"));
  const next = list[Math.max(0, Math.min(list.length - 1, before + step))];
  if (before >= 0) list[before].classList.remove("current");
  next.classList.add("current");
  next.scrollIntoView({ block: "nearest" });
  showTip(next);
  byId("spoken").textContent = details(Number(next.dataset.i));
}

// ---- settings

// As one word of a POSIX shell.
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);

function commandText() {
  const { input, target_weights: targets, drop_sequences: dropped } = DATA.settings, share = state.rule === "share";
  const words = ["alphatoken", "mask", "--input", input, "--output", "NEW-FOLDER", "--rule", state.rule, "--stability-weight", state.weight];
  const weights = Object.entries(targets).map(([name, weight]) => `${name}=${weight}`);
  if (weights.length) words.push("--target-weights", ...weights);
  if (share) words.push("--keep-fraction", state.keep, "--scope", state.scope);
  if (share && state.floor !== null) words.push("--min-value", state.floor);
  if (share && dropped) words.push("--drop-sequences", dropped);
  if (state.protect.size) words.push("--protect", ...state.protect);
  return words.map((word) => quoted(String(word))).join(" ");
}

function refresh() {
  values = tokenValues(columns.adaptation, columns.stability, state.weight);
  fillMask(values, kept);
  byId("keep-out").textContent = state.keep;
  byId("weight-out").textContent = state.weight;
  const share = state.rule === "share", some = total(kept);
  for (const id of ["keep", "scope", "floor"]) byId(id).disabled = !share;
  const estimated = share && state.scope === "dataset" && !(asStored() && DATA.settings.threshold !== null);
  byId("result").textContent = `Keeps ${some.toLocaleString("en")} of ${kept.length.toLocaleString("en")} response tokens shown here (${percent(some / kept.length)})` +
    (estimated ? "; threshold estimated from these rows" : !share && DATA.settings.estimated ? "; bounds by these rows alone" : "");
  byId("command").textContent = commandText();
  fill("classes", ["class", "tokens", "kept", ""], keptBy((_, i) => DATA.class_names[DATA.classes[tokens[i]]]));
  fill("groups", ["source", "tokens", "kept", ""], keptBy((one) => rows[one.row].group));
  drawHistogram();
  drawPositions();
  listTokens();
  showAgreement();
  showRows();
}

let pending = 0;
function soon() { // a slider sends many events
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(refresh);
}

function start() {
  byId("keep").value = state.keep;
  byId("weight").max = Math.max(10, 2 * state.weight);
  byId("weight").value = state.weight;
  byId("scope").value = state.scope;
  byId("rule").value = state.rule;
  byId("rule-choice").hidden = !DATA.settings.bounds;
  byId("floor").value = state.floor ?? "";
  for (const name of DATA.class_names) {
    const box = element("input", { type: "checkbox", value: name });
    box.checked = state.protect.has(name);
    box.addEventListener("change", () => { state.protect[box.checked ? "add" : "delete"](name); soon(); });
    byId("protect").append(element("label", {}, box, " " + name));
  }
  for (const name of new Set(rows.map((row) => row.group))) byId("group").append(element("option", { value: name }, name));
  byId("keep").addEventListener("input", (event) => { state.keep = Number(event.target.value); soon(); });
  byId("weight").addEventListener("input", (event) => { state.weight = Number(event.target.value); soon(); });
  byId("rule").addEventListener("change", (event) => { state.rule = event.target.value; soon(); });
  byId("scope").addEventListener("change", (event) => { state.scope = event.target.value; soon(); });
  byId("floor").addEventListener("input", (event) => {
    const text = event.target.value.trim(), number = Number(text);
    event.target.setAttribute("aria-invalid", String(!Number.isFinite(number)));
    if (Number.isFinite(number)) { state.floor = text === "" ? null : number; soon(); }
  });
  for (const id of ["search", "group", "order"]) byId(id).addEventListener("input", () => { state.shown = PAGE; showRows(); });
  byId("more").addEventListener("click", () => { state.shown += PAGE; showRows(); });
  byId("list").addEventListener("mouseover", (event) => showTip(event.target.closest(".token")));
  byId("list").addEventListener("mouseleave", () => showTip(null));
  byId("list").addEventListener("focusout", () => showTip(null));
  byId("list").addEventListener("keydown", moveThrough);
  fill("quarantine", ["stage", "reason", "rows"], DATA.quarantine.map((one) => [one.stage, one.reason, one.rows]));
  fill("facts", ["", ""], DATA.facts);
  refresh();
}

start();
