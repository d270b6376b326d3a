"use strict";
// Draws the study in the JSON of this page. Texts are set as text (textContent), never as markup; nothing is loaded.
// View 4 is in heads.js, which stands before this file in the page.

const data = JSON.parse(document.getElementById("data").textContent);
const { reading, model } = data;
const size = reading.pieces.length;

// What is chosen. Every view is drawn from this, and drawn again when it changes.
const state = {
  mask: 0, // among the followed ones
  token: reading.masks.length ? reading.masks[0] : Math.max(0, reading.added.indexOf(false)),
  ...clearestHead(),
  taken: false, // the heads by what they take, not by where they look
  pointed: null, // the token under the mouse: it is shown in place of `token` for as long
};
const shownToken = () => state.pointed ?? state.token;

// The page opens with the head that looks at the previous token most clearly: the easiest one to understand.
function clearestHead() {
  const share = (head) => head.habits["the previous token"];
  const best = data.looks.reduce((best, head) => (share(head) > share(best) ? head : best), data.looks[0]);
  return best ? { layer: best.layer - 1, head: best.head - 1 } : { layer: 0, head: 0 };
}

// ------------------------------------------------------------------------------------------------------ small helpers

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const body = (view) => document.querySelector(`#${view} .body`);
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;

function percent(share) {
  const value = 100 * share;
  if (value < 0.005) return "< 0.01 %";
  return `${value.toFixed(value >= 9.95 ? 0 : value >= 0.095 ? 1 : 2)} %`;
}
const whole = (number) => number.toLocaleString("en-US");
const signed = (number) => (number < 0 ? "−" : "+") + Math.abs(number).toFixed(2);
const millions = (number) => (number / 1e6).toLocaleString("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const heat = (share) => `heat${Math.round(10 * clamp(share, 0, 1))}`;

// A bar whose parts are shares of its width.
function bar(parts) {
  let left = 0;
  const rects = parts.map(([share, kind]) => {
    const width = clamp(share, 0, 1);
    left += width;
    return draw("rect", { x: `${100 * (left - width)}%`, width: `${100 * width}%`, height: "100%", class: kind });
  });
  return draw("svg", { class: "bar", "aria-hidden": "true" }, ...rects);
}

// A bar and its number, which stands where the bar ends.
function measured(share, kind, text) {
  const line = bar([[1, kind]]);
  line.style.width = `calc(${clamp(share, 0, 1)} * (100% - 4.2rem))`;
  return make("span", { class: "measured" }, line, make("span", { class: "value" }, text));
}

// A bar from the middle: to the left if the number is negative.
function swing(number, most) {
  const width = 50 * clamp(Math.abs(number) / most, 0, 1);
  const x = number < 0 ? 50 - width : 50;
  return draw("svg", { class: "bar", "aria-hidden": "true" },
    draw("line", { x1: "50%", x2: "50%", y1: 0, y2: "100%", class: "axis" }),
    draw("rect", { x: `${x}%`, width: `${width}%`, height: "100%", class: number < 0 ? "less" : "more" }));
}

const cell = (content, kind = "") => make("td", { class: kind }, content);
const number = (content) => cell(content, "number");
function table(heads, rows, high = false) {
  const titles = heads.map(([title, kind, span]) => make("th", { class: kind, colspan: span, scope: "col" }, title));
  const whole = make("table", {}, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows));
  return scrolling(make("div", { class: `scroll${high ? " high" : ""}`, tabindex: "0" }, whole));
}

// What may be larger than its view says so in a line below it.
function scrolling(element) {
  const hint = make("p", { class: "more", hidden: true });
  const look = () => {
    const down = element.scrollHeight > element.clientHeight + 1;
    const across = element.scrollWidth > element.clientWidth + 1;
    hint.hidden = !down && !across;
    hint.textContent = `${down ? "↕" : ""}${across ? "↔" : ""} There is more: scroll in this view.`;
  };
  new ResizeObserver(look).observe(element);
  if (element.firstElementChild) new ResizeObserver(look).observe(element.firstElementChild);
  const holder = make("div", { class: "scrolling" });
  element.replaceWith(holder); // where it stands already
  holder.append(element, hint);
  return holder;
}

function choose(change) {
  Object.assign(state, change);
  show();
}
function point(token) {
  if (token === state.pointed) return;
  state.pointed = token;
  drawChanges();
  redrawAttention(true);
  mark();
}
const chooseToken = (token) => choose({ token, mask: Math.max(0, followed.indexOf(token) >= 0 ? followed.indexOf(token) : state.mask) });
const followed = data.guesses.map((one) => one.position);

// Buttons that the arrow keys walk through. `columns` of them stand in a row.
function walkable(container, columns, pick) {
  container.addEventListener("keydown", (event) => {
    const buttons = [...container.querySelectorAll("button")];
    const here = buttons.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    const goal = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : here + step;
    if (here < 0 || !buttons[goal]) return;
    event.preventDefault();
    buttons[goal].focus();
    pick(goal);
  });
}
function roving(buttons, chosen) {
  buttons.forEach((button, place) => {
    button.classList.toggle("chosen", place === chosen);
    button.setAttribute("aria-pressed", String(place === chosen));
    button.tabIndex = place === chosen ? 0 : -1;
  });
}

// ---------------------------------------------------------------------------------------------- views 0 to 3, 5 and 6

function drawSentence() {
  const parts = [];
  reading.filling.forEach((text, place) => {
    parts.push(text);
    if (place >= reading.masks.length) return;
    const token = reading.masks[place];
    const word = data.answers[place] ? data.answers[place].best[0].token : reading.pieces[token];
    const kind = `filled${token === followed[state.mask] && followed.length > 1 ? " current" : ""}`;
    const choice = followed.length > 1 && place < followed.length; // else there is nothing to choose between
    parts.push(choice ? make("button", { class: kind, "data-token": token, onclick: () => chooseToken(token) }, word)
      : make("span", { class: kind, "data-token": token }, word));
  });
  const heading = document.getElementById("sentence");
  heading.replaceChildren(...parts);
  heading.classList.toggle("long", heading.textContent.length > 240);
  const kind = `${model.name}: ${model.layers} layers × ${model.heads} heads, hidden size ${model.hidden_size}`;
  document.getElementById("model").textContent = `${kind}. This page is one file and loads nothing.`;
}

function drawAnswer() {
  const masks = document.getElementById("masks");
  const choices = data.guesses.length > 1 ? data.guesses : [];
  masks.replaceChildren(...choices.map((one, place) => make("button", {
    "aria-pressed": String(place === state.mask), onclick: () => choose({ mask: place, token: one.position }),
  }, `mask ${place + 1}: ${one.answer.token}`)));
  const answer = data.answers[state.mask];
  const rows = answer ? answer.best.flatMap((guess, place) => [
    make("bdi", { class: `piece${place ? "" : " asked"}` }, guess.token),
    measured(guess.probability, place ? "word" : "asked", percent(guess.probability)),
  ]) : [];
  document.getElementById("answers").replaceChildren(make("div", { class: "five" }, ...rows));
  document.getElementById("answers-title").hidden = !answer;
  if (data.guesses.length && data.guesses.length < reading.masks.length) {
    masks.append(make("span", { class: "note" },
      `The first ${data.guesses.length} of ${reading.masks.length} masks can be chosen; the others are filled in above.`));
  }
}

// The tokens, always in sight.
function drawTokens() {
  const strip = document.querySelector("#tokens .strip");
  const chips = reading.pieces.map((text, place) => make("button", {
    class: `piece${joined(place) ? " inside" : ""}`, "data-token": place, title: `token ${place}`, onclick: () => chooseToken(place),
  }, make("bdi", {}, text)));
  strip.append(...chips);
  scrolling(strip);
  walkable(strip, 1, chooseToken);
  return () => roving(chips, state.token);
}

// A word or piece. A short one is never broken; a long one may be, where the view is narrow.
const word = (text, kind = "") => make("bdi", { class: `piece ${[...text].length > 12 ? "" : "short "}${kind}` }, text);
const piece = (place) => word(reading.pieces[place], reading.masks.includes(place) ? "asked" : "");
const joined = (place) => reading.words[place] != null && reading.words[place] === reading.words[place - 1];
const inWords = (places) => places.map((place) => reading.pieces[place]).join(" ");

function drawReading() {
  const kinds = Object.keys(data.shares);
  const rows = reading.pieces.map((_, place) => make("tr", {
    "data-token": place, class: [joined(place) && "inside", joined(place + 1) && "held"].filter(Boolean).join(" "),
    onclick: () => chooseToken(place),
  },
  number(String(reading.positions[place])), make("td", {}, piece(place)), number(String(reading.ids[place])), number(String(reading.segments[place])),
  kinds.length ? make("td", { class: "wide", title: kinds.map((kind) => `${kind} ${percent(data.shares[kind][place])}`).join(", ") },
    bar(kinds.map((kind) => [data.shares[kind][place], kind]))) : null,
  kinds.length ? number(percent(data.shares.word[place])) : null));
  const heads = [["token", "number"], ["piece", ""], ["id", "number"], ["segment", "number"]];
  if (kinds.length) heads.push(["its sum", "wide"], ["of the word", "number"]);
  const legend = make("p", { class: "legend" }, ...kinds.map((kind) => make("span", {}, make("i", { class: kind }), kind)));
  const tokens = table(heads, rows, true);
  body("reading").replaceChildren(kinds.length ? legend : why("shares"), tokens);
}

// A view that is left out says why, instead of what to look for.
function why(view) {
  document.getElementById(view === "shares" ? "reading" : view).classList.add("absent");
  return make("p", { class: "note" }, `Not here: ${data.left_out[view]}.`);
}

// Rank against step, both for the answer and for the words that are followed. The best rank is at the top.
function rankChart(one) {
  const width = clamp(body("guesses").clientWidth, 240, 720);
  const lines = [[one.answer.token, one.steps.map((step) => step.answer.rank)],
    ...data.targets.map((word, number) => [word, one.steps.map((step) => step.targets[number].rank)])];
  const most = Math.max(10, ...lines.flatMap(([, ranks]) => ranks));
  const ends = Math.min(width / 3, 16 + 7.5 * Math.max(...lines.map(([word]) => [...word].length))); // room for the words
  const [height, left, right, top, bottom] = [214, 64, ends, 14, 44];
  const x = (place) => left + place * (width - left - right) / Math.max(1, one.steps.length - 1);
  const y = (rank) => top + Math.log(rank) / Math.log(most) * (height - top - bottom);
  const text = (content, x, y, more) => draw("text", { x, y, "text-anchor": "middle", ...more }, content);
  const parts = [text("after layer (0: the embeddings)", left + (width - left - right) / 2, height - 6, {}),
    text("rank, 1 is best", 0, 0, { transform: `translate(13 ${top + (height - top - bottom) / 2}) rotate(-90)` })];
  for (let rank = 1; rank <= most; rank *= 10) {
    parts.push(draw("line", { x1: left, x2: width - right, y1: y(rank), y2: y(rank), class: "grid" }),
      text(whole(rank), left - 6, y(rank) + 4, { "text-anchor": "end" }));
  }
  const every = Math.ceil(one.steps.length / 2 / ((width - left - right) / 22)); // so many layers share a number
  one.steps.forEach((step, place) => {
    if (place % (2 * every) === 0) parts.push(text(String(place / 2), x(place), height - 26, {}));
  });
  const taken = [];
  lines.forEach(([word, ranks], number) => {
    const kind = number % 5;
    let at = y(ranks.at(-1)) + 4;
    while (taken.some((other) => Math.abs(other - at) < 12)) at += 12;
    taken.push(at);
    parts.push(draw("polyline", { points: ranks.map((rank, place) => `${x(place)},${y(rank)}`).join(" "), class: `line${kind}` }),
      draw("line", { x1: width - right + 3, x2: width - right + 9, y1: at - 4, y2: at - 4, class: `line${kind}` }),
      draw("text", { x: width - right + 12, y: at, class: number ? "" : "label" }, shortened(word, Math.floor((ends - 14) / 7.2))));
  });
  return draw("svg", { class: "chart", width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `rank of ${lines.map(([word]) => word).join(", ")} after each layer` }, ...parts);
}
const shortened = (text, most) => [...text].length > most ? `${[...text].slice(0, most - 1).join("")}…` : text;

function drawGuesses() {
  const one = data.guesses[state.mask];
  if (!one) return body("guesses").replaceChildren(why("guesses"));
  const most = Math.log(Math.max(2, ...one.steps.map((step) => step.answer.rank)));
  const ranks = one.steps.map((step) => step.answer.rank);
  const settled = ranks.findLastIndex((rank) => rank > 1) + 1;
  const rows = one.steps.map((step, place) => make("tr", {
    class: [step.after.endsWith("attention") && "half", place === one.steps.length - 1 && "last", place === settled && "first"].filter(Boolean).join(" "),
  },
  cell(step.after), number(whole(step.answer.rank)), cell(bar([[1 - Math.log(step.answer.rank) / most, step.answer.rank === 1 ? "asked" : "word"]]), "bars"),
  number(percent(step.answer.probability)),
  make("td", { class: "best" }, make("div", {}, ...step.best.map((guess) => make("span", {
    class: `piece short ${heat(Math.sqrt(guess.probability))}`, title: percent(guess.probability) }, make("bdi", {}, guess.token)))),
  data.targets.length ? make("p", { class: "follow" }, ...step.targets.map((followed, place) =>
    make("span", {}, word(data.targets[place]), ` ${whole(followed.rank)} (${percent(followed.probability)}) `))) : null)));
  const heads = [["after", ""], ["rank", "number"], [`of “${one.answer.token}”`, "bars wrap"], ["its p", "number"],
    [`the best words there${data.targets.length ? "; below them the followed ones, with rank and p" : ""}`, "best"]];
  body("guesses").replaceChildren(rankChart(one), table(heads, rows));
}

function drawInfluence() {
  const one = data.guesses[state.mask];
  if (!one || !data.influence.length) return body("influence").replaceChildren(why("influence"));
  const all = data.influence.flatMap((word) => [word.hidden[state.mask].nats, word.alone[state.mask].nats]);
  const most = Math.max(0.1, ...all.map(Math.abs));
  const rows = data.influence.map(({ places, hidden: all, alone: each }) => {
    const [hidden, alone] = [all[state.mask], each[state.mask]];
    return make("tr", { "data-token": places.join(" "), onclick: () => chooseToken(places[0]) },
      make("td", { class: "wrap" }, word(inWords(places))),
      number(signed(hidden.nats)), cell(swing(hidden.nats, most), "bars"), cell(word(hidden.winner)),
      number(signed(alone.nats)), cell(swing(alone.nats, most), "bars"), cell(word(alone.winner)));
  });
  const heads = [["word", ""], ["hidden", "number"], ["nats", "bars"], ["best then", ""], ["alone", "number"], ["nats", "bars"], ["best then", ""]];
  const words = table(heads, rows, true);
  const grouped = data.influence.length < new Set(reading.words.filter((word) => word != null)).size - reading.masks.length;
  const note = grouped ? make("p", { class: "note" }, "This text is long: neighbouring words go together.") : null;
  body("influence").replaceChildren(...[note, words].filter(Boolean));
}

function drawChanges() {
  if (!data.changes.length) return body("changes").replaceChildren(why("changes"));
  const mixes = data.changes.every((layer) => layer.mixing);
  const columns = [["mixing", "from others"], ["attention", "attention"], ["feed_forward", "feed-forward"], ["cosine", "cosine"]];
  const shown = columns.filter(([name]) => name !== "mixing" || mixes);
  const rows = data.changes.map((layer, place) => make("tr", {}, number(String(place + 1)), ...shown.flatMap(([name]) => {
    const pair = [layer[name][shownToken()], mean(layer[name])];
    return name === "mixing" ? [cell(measured(pair[0], "asked", percent(pair[0])), "bars kept"), number(percent(pair[1]))]
      : pair.map((x) => number(x.toFixed(2)));
  })));
  const heads = [["layer", "number"], ...shown.map(([, title]) => [title, "number", 2])];
  const legend = make("p", { class: "legend" }, "In each pair: ", piece(shownToken()), `(token ${shownToken()}) first, then the mean of all tokens`);
  body("changes").replaceChildren(legend, table(heads, rows));
}

function drawCost() {
  const most = Math.max(...data.cost.map((part) => part.multiply_adds));
  const rows = data.cost.map((part) => make("tr", {}, make("td", { class: "wrap" }, (part.times > 1 ? `${part.times} × ` : "") + part.name),
    make("td", { class: "piece" }, part.shapes), number(millions(part.parameters)), cell(measured(part.multiply_adds / most, "word", millions(part.multiply_adds)), "bars kept")));
  const total = (name) => millions(data.cost.reduce((sum, part) => sum + part[name], 0));
  rows.push(make("tr", { class: "last" }, cell("all"), cell(""), number(total("parameters")), cell(total("multiply_adds"))));
  body("cost").replaceChildren(table([["step", ""], ["reads → gives", ""], ["parameters, M", "number"], ["multiply-adds, M", ""]], rows));
}

// ---------------------------------------------------------------------------------------------------------- everything

let redrawAttention = () => {};

function drawSays() {
  for (const place of document.querySelectorAll("[data-says]")) {
    const said = data.says[place.dataset.says] || [];
    place.textContent = (said[state.mask] || said[0] || "").replaceAll(" %", "\u00a0%");
    place.hidden = !place.textContent;
  }
}

// Every row and token that shows the chosen token, or the one under the mouse.
function mark() {
  for (const element of document.querySelectorAll("[data-token]")) {
    const tokens = element.dataset.token.split(" ");
    element.classList.toggle("pointed", tokens.includes(String(state.pointed)));
    if (element.tagName === "TR") element.classList.toggle("chosen", tokens.includes(String(state.token)));
  }
}

let drawnMask = null; // the mask for which the views that depend on it were drawn
let redrawTokens = () => {};

function show() {
  if (drawnMask !== state.mask) {
    drawSentence();
    drawAnswer();
    drawGuesses();
    drawInfluence();
    drawSays();
    drawnMask = state.mask;
  }
  redrawTokens();
  drawChanges();
  redrawAttention();
  mark();
}

async function start() {
  scrolling(document.getElementById("sentence"));
  drawReading();
  drawCost();
  redrawTokens = drawTokens();
  show();
  document.addEventListener("mouseover", (event) => {
    if (event.target.tagName === "CANVAS") return; // the large map says itself what is under the mouse
    const over = event.target.closest("[data-token]");
    point(over ? Number(over.dataset.token.split(" ")[0]) : null);
  });
  if (!data.maps) {
    body("attention").replaceChildren(why("attention"));
  } else {
    redrawAttention = buildAttention(await openMaps());
    redrawAttention();
    mark();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redrawAttention());
  }
  let width = innerWidth;
  window.addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    drawGuesses();
    redrawAttention();
  });
  document.documentElement.dataset.ready = "yes";
}

start();
