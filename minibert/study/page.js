"use strict";
// Draws the study in the JSON of this page. Texts are set as text (textContent), never as markup; nothing is loaded.

const data = JSON.parse(document.getElementById("data").textContent);
const { reading, model } = data;
const size = reading.pieces.length;

// What is chosen. Every view is drawn from this, and drawn again when it changes.
const state = {
  mask: 0, // among the followed ones
  token: reading.masks.length ? reading.masks[0] : Math.max(0, reading.added.indexOf(false)),
  ...clearestHead(),
  taken: false, // the heads by what they take, not by where they look
};

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
function table(heads, rows) {
  const titles = heads.map(([title, kind, span]) => make("th", { class: kind, colspan: span, scope: "col" }, title));
  return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows)));
}

function choose(change) {
  Object.assign(state, change);
  show();
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
    const answer = data.answers[place];
    const word = answer ? answer.best[0].token : reading.pieces[reading.masks[place]];
    parts.push(make("button", {
      class: `filled${reading.masks[place] === followed[state.mask] && followed.length > 1 ? " current" : ""}`,
      "data-token": reading.masks[place], onclick: () => chooseToken(reading.masks[place]),
    }, word));
  });
  const heading = document.getElementById("sentence");
  heading.replaceChildren(...parts);
  heading.classList.toggle("long", heading.textContent.length > 240);
  const kind = `${model.name}: ${model.layers} layers × ${model.heads} heads × ${model.hidden_size}`;
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
    bar([[guess.probability, place ? "word" : "asked"]]),
    make("span", { class: "probability" }, percent(guess.probability)),
  ]) : [];
  document.getElementById("answers").replaceChildren(make("div", { class: "five" }, ...rows));
  if (data.guesses.length && data.guesses.length < reading.masks.length) {
    masks.append(make("span", { class: "note" },
      `The first ${data.guesses.length} of ${reading.masks.length} masks can be chosen; the others are filled in above.`));
  }
}

const piece = (place) => make("bdi", { class: `piece${reading.masks.includes(place) ? " asked" : ""}` }, reading.pieces[place]);
const joined = (place) => reading.words[place] != null && reading.words[place] === reading.words[place - 1];
const inWords = (places) => places.map((place) => reading.pieces[place]).join(" ");

function drawReading() {
  const kinds = Object.keys(data.shares);
  const rows = reading.pieces.map((_, place) => make("tr", {
    "data-token": place, class: [joined(place) && "inside", joined(place + 1) && "held"].filter(Boolean).join(" "),
    onclick: () => chooseToken(place),
  },
  number(String(place)), make("td", {}, piece(place)), number(String(reading.ids[place])), number(String(reading.segments[place])),
  kinds.length ? make("td", { class: "wide", title: kinds.map((kind) => `${kind} ${percent(data.shares[kind][place])}`).join(", ") },
    bar(kinds.map((kind) => [data.shares[kind][place], kind]))) : null,
  kinds.length ? number(percent(data.shares.word[place])) : null));
  const heads = [["position", "number"], ["piece", ""], ["id", "number"], ["segment", "number"]];
  if (kinds.length) heads.push(["what the sum is made of", ""], ["word", "number"]);
  const legend = make("p", { class: "legend" }, ...kinds.map((kind) => make("span", {}, make("i", { class: kind }), kind)));
  const whole = table(heads, rows);
  whole.classList.add("high");
  body("reading").replaceChildren(kinds.length ? legend : why("shares"), whole);
}

const why = (view) => make("p", { class: "note" }, `Not here: ${data.left_out[view]}.`);

// Rank against step, both for the answer and for the words that are followed. The best rank is at the top.
function rankChart(one) {
  const room = clamp(body("guesses").clientWidth, 260, 720);
  const [width, height, left, right, top, bottom] = [room, 190, 44, 84, 12, 26];
  const lines = [[one.answer.token, one.steps.map((step) => step.answer.rank)],
    ...data.targets.map((word, number) => [word, one.steps.map((step) => step.targets[number].rank)])];
  const most = Math.max(10, ...lines.flatMap(([, ranks]) => ranks));
  const x = (place) => left + place * (width - left - right) / Math.max(1, one.steps.length - 1);
  const y = (rank) => top + Math.log(rank) / Math.log(most) * (height - top - bottom);
  const parts = [];
  for (let rank = 1; rank <= most; rank *= 10) {
    parts.push(draw("line", { x1: left, x2: width - right, y1: y(rank), y2: y(rank), class: "grid" }),
      draw("text", { x: left - 6, y: y(rank) + 4, "text-anchor": "end" }, whole(rank)));
  }
  one.steps.forEach((step, place) => {
    const named = step.after === "embeddings" ? "sum" : step.after.endsWith("feed-forward") ? step.after.split(" ")[1] : "";
    if (named) parts.push(draw("text", { x: x(place), y: height - 8, "text-anchor": "middle" }, named));
  });
  const taken = [];
  lines.forEach(([word, ranks], number) => {
    const kind = number % 5;
    let at = y(ranks.at(-1)) + 4;
    while (taken.some((other) => Math.abs(other - at) < 12)) at += 12;
    taken.push(at);
    parts.push(draw("polyline", { points: ranks.map((rank, place) => `${x(place)},${y(rank)}`).join(" "), class: `line${kind}` }),
      draw("text", { x: width - right + 8, y: at, class: `label${kind}` }, word));
  });
  return draw("svg", { class: "chart", width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `rank of ${one.answer.token} after each layer` }, ...parts);
}

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
  ...step.best.map((guess) => make("td", { class: `best ${heat(Math.sqrt(guess.probability))}`, title: percent(guess.probability) },
    make("bdi", { class: "piece" }, guess.token))),
  ...step.targets.flatMap((followed) => [number(whole(followed.rank)), number(percent(followed.probability))])));
  const heads = [["after", ""], ["rank", "number"], [`of “${one.answer.token}”`, "bars"], ["its p", "number"],
    ["the best words there, shaded by √p", "", one.steps[0].best.length],
    ...data.targets.flatMap((word) => [[`“${word}”: rank`, "number"], ["its p", "number"]])];
  body("guesses").replaceChildren(rankChart(one), table(heads, rows));
}

function drawInfluence() {
  const one = data.guesses[state.mask];
  if (!one || !data.influence.length) return body("influence").replaceChildren(why("influence"));
  const all = data.influence.flatMap((word) => [word.hidden[state.mask].nats, word.alone[state.mask].nats]);
  const most = Math.max(0.1, ...all.map(Math.abs));
  const rows = data.influence.map((word) => {
    const [hidden, alone] = [word.hidden[state.mask], word.alone[state.mask]];
    return make("tr", { "data-token": word.places.join(" "), onclick: () => chooseToken(word.places[0]) },
      make("td", { class: "wrap" }, make("bdi", { class: "piece" }, inWords(word.places))),
      number(signed(hidden.nats)), cell(swing(hidden.nats, most), "bars"), make("td", {}, make("bdi", { class: "piece" }, hidden.winner)),
      number(signed(alone.nats)), cell(swing(alone.nats, most), "bars"), make("td", {}, make("bdi", { class: "piece" }, alone.winner)));
  });
  const heads = [["word", ""], ["hidden", "number"], ["", "bars"], ["who wins", ""], ["alone", "number"], ["", "bars"], ["who wins", ""]];
  const whole = table(heads, rows);
  whole.classList.add("high");
  body("influence").replaceChildren(whole);
}

function drawChanges() {
  if (!data.changes.length) return body("changes").replaceChildren(why("changes"));
  const mixes = data.changes.every((layer) => layer.mixing);
  const columns = [["mixing", "from others"], ["attention", "attention"], ["feed_forward", "feed-forward"], ["cosine", "cosine"]];
  const shown = columns.filter(([name]) => name !== "mixing" || mixes);
  const rows = data.changes.map((layer, place) => make("tr", {}, number(String(place + 1)), ...shown.flatMap(([name]) => {
    const pair = [layer[name][state.token], mean(layer[name])];
    const told = pair.map((x) => number(name === "mixing" ? percent(x) : x.toFixed(2)));
    return name === "mixing" ? [cell(bar([[pair[0], "asked"]]), "bars"), ...told] : told;
  })));
  const heads = [["layer", "number"], ...shown.flatMap(([name, title]) =>
    name === "mixing" ? [["", "bars"], [title, "number", 2]] : [[title, "number", 2]])];
  const legend = make("p", { class: "legend" }, "In each pair: ", piece(state.token), `(token ${state.token}) first, then the mean of all tokens`);
  body("changes").replaceChildren(legend, table(heads, rows));
}

function drawCost() {
  const most = Math.max(...data.cost.map((part) => part.multiply_adds));
  const rows = data.cost.map((part) => make("tr", {}, make("td", { class: "wrap" }, (part.times > 1 ? `${part.times} × ` : "") + part.name),
    make("td", { class: "piece" }, part.shapes), number(millions(part.parameters)), number(millions(part.multiply_adds)),
    cell(bar([[part.multiply_adds / most, "word"]]), "bars")));
  const sum = (name) => number(millions(data.cost.reduce((total, part) => total + part[name], 0)));
  rows.push(make("tr", { class: "last" }, cell("all"), cell(""), sum("parameters"), sum("multiply_adds"), cell("")));
  body("cost").replaceChildren(table([["step", ""], ["reads → gives", ""], ["parameters, M", "number"], ["multiply-adds, M", "number"], ["", "bars"]], rows));
}

// -------------------------------------------------------------------------------------------------- view 4: attention

// base64, deflate → bytes
async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
const weight = (byte) => (byte / 255) ** 2; // the maps keep √p

const SMALL = 48; // pixels of a small map, at most

// The weights of all heads, ready to be asked.
async function openMaps() {
  const { side, ...kept } = data.maps;
  const [weights, folded, rows, coded] = await Promise.all(
    [kept.weights, kept.taken, kept.rows, kept.lengths].map((text) => (text ? inflate(text) : new Uint8Array())));
  const full = side === size && !rows.length;
  const lengths = new DataView(coded.buffer);
  const start = (layer, head) => layer * model.heads + head;
  const length = (layer, head, token) =>
    lengths.getUint16(2 * (start(layer, head) * size + token), true) / 65535 * kept.longest[layer][head];

  // What one token reads: `size` shares that add up to 1. Null if the page does not carry it.
  function row(layer, head, token, taken) {
    const place = full ? token : kept.row_places.indexOf(token);
    if (place < 0) return null;
    const [bytes, high] = full ? [weights, size] : [rows, kept.row_places.length];
    const from = (start(layer, head) * high + place) * size;
    const values = Float32Array.from(bytes.subarray(from, from + size), weight);
    if (taken) values.forEach((value, token) => { values[token] = value * length(layer, head, token); });
    const total = values.reduce((sum, value) => sum + value, 0) || 1;
    return values.map((value) => value / total);
  }
  // The whole map, side × side.
  function map(layer, head, taken) {
    if (!full) return Float32Array.from((taken ? folded : weights).subarray(start(layer, head) * side * side, (start(layer, head) + 1) * side * side), weight);
    const values = new Float32Array(size * size);
    for (let token = 0; token < size; token++) values.set(row(layer, head, token, taken), token * size);
    return values;
  }
  return { side, full, row, map, canTake: coded.length > 0, exact: kept.row_places };
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => [1, 3, 5].map((at) => parseInt(style.getPropertyValue(name).trim().slice(at, at + 2), 16));
  const [low, high] = [rgb("--low"), rgb("--high")];
  const ramp = new Uint32Array(256);
  for (let step = 0; step < 256; step++) {
    const [r, g, b] = low.map((from, part) => Math.round(from + (high[part] - from) * step / 255));
    ramp[step] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return ramp;
}

// Paint a map of side × side into `pixels` × `pixels`; of several weights in one pixel the largest. Scaled to its own maximum.
function paint(context, values, side, pixels, ramp) {
  const image = context.createImageData(pixels, pixels);
  const target = new Uint32Array(image.data.buffer);
  const largest = new Float32Array(pixels * pixels);
  const scale = pixels / side;
  let most = 1e-9;
  for (let row = 0; row < side; row++) {
    for (let column = 0; column < side; column++) {
      const value = values[row * side + column];
      const place = Math.floor(row * scale) * pixels + Math.floor(column * scale);
      if (value > largest[place]) largest[place] = value;
      if (value > most) most = value;
    }
  }
  for (let place = 0; place < target.length; place++) target[place] = ramp[Math.round(255 * Math.sqrt(largest[place] / most))];
  context.putImageData(image, 0, 0);
  return most;
}

// The parts of the view that stay: they are made once, and filled by redraw().
function buildAttention(maps) {
  const looks = make("div", { class: "choices", role: "group", "aria-label": "What the maps show" });
  const switches = [[false, "where it looks: α"], [true, "what it takes: α·‖v W_O‖"]].map(([taken, title]) =>
    make("button", { onclick: () => choose({ taken }), disabled: taken && !maps.canTake }, title));
  looks.append(...switches);
  const sheet = make("div", { class: "heads", role: "group", "aria-label": "Every head" });
  const small = Math.min(maps.side, SMALL);
  const heads = [];
  sheet.append(make("span"), ...Array.from({ length: model.heads }, (_, head) => make("span", {}, String(head + 1))));
  for (let layer = 0; layer < model.layers; layer++) {
    sheet.append(make("span", {}, `L${layer + 1}`));
    for (let head = 0; head < model.heads; head++) {
      const button = make("button", { "data-head": `${layer + 1}.${head + 1}`, onclick: () => choose({ layer, head }) },
        make("canvas", { width: small, height: small }));
      heads.push(button);
      sheet.append(button);
    }
  }
  sheet.style.gridTemplateColumns = `1.5rem repeat(${model.heads}, minmax(0, 1fr))`;
  walkable(sheet, model.heads, (place) => choose({ layer: Math.floor(place / model.heads), head: place % model.heads }));
  const large = make("canvas", { class: "large", role: "img" });
  const title = make("h3", { id: "head-title" });
  const scale = make("p", { class: "legend" }, make("span", {}, "0 "), make("i", { class: "scale" }), make("span", { id: "scale-end" }));
  const strip = make("div", { class: "strip", role: "group", "aria-label": "The reading token" });
  const chips = reading.pieces.map((text, place) => make("button", {
    class: `piece${joined(place) ? " inside" : ""}`, "data-token": place, onclick: () => chooseToken(place),
  }, make("bdi", {}, text)));
  strip.append(...chips);
  walkable(strip, 1, chooseToken);
  const told = make("p", { class: "told", id: "reads", "aria-live": "polite" });
  const habits = make("dl", { class: "habits" });
  body("attention").replaceChildren(looks, make("div", { class: "attention" },
    make("div", {}, sheet, make("p", { class: "note told" }, maps.full
      ? "Each small map is scaled to its own maximum. Arrow keys walk from head to head."
      : `This text has ${size} tokens: each map shows the maxima of blocks, ${maps.side} × ${maps.side}. `
        + `${maps.exact.length ? `Exactly kept are the rows of ${maps.exact.length === 1 ? "the mask" : `${maps.exact.length} masks`}.` : "No row is kept exactly."}`),
    make("h3", {}, "What the heads do: layer.head, and the share that goes there"), habits),
    make("div", {}, title, large, scale)),
  make("h3", {}, "The token that reads (choose one), and how much it reads of each"), strip, told);
  large.addEventListener("click", (event) => {
    const { edge, step } = drawn;
    const row = Math.floor((event.offsetY / large.clientHeight * large.height / ratio() - edge) / step);
    if (row >= 0 && row < maps.side) chooseToken(Math.floor((row + 0.5) * size / maps.side));
  });
  let drawn = { edge: 0, step: 1 };
  let painted = null; // what the small maps show, so that a new choice does not paint them all again

  return () => {
    const ramp = colours();
    const look = `${state.taken} ${ramp[255]}`;
    if (look !== painted) {
      heads.forEach((button, place) => paint(button.firstChild.getContext("2d"),
        maps.map(Math.floor(place / model.heads), place % model.heads, state.taken), maps.side, small, ramp));
      painted = look;
    }
    const habit = (state.taken && data.takes.length ? data.takes : data.looks);
    heads.forEach((button, place) => {
      button.title = `layer ${habit[place].layer}, head ${habit[place].head}: ${habitOf(habit[place])}`;
      button.setAttribute("aria-label", button.title);
    });
    switches.forEach((button, taken) => button.setAttribute("aria-pressed", String(Boolean(taken) === state.taken)));
    roving(heads, state.layer * model.heads + state.head);
    title.textContent = `Layer ${state.layer + 1}, head ${state.head + 1}: ${habitOf(habit[state.layer * model.heads + state.head])}`;
    drawn = drawLarge(large, maps, ramp);
    document.getElementById("scale-end").textContent = ` ${percent(drawn.most)}${state.taken ? " of what is taken" : " of the weight"}, shaded by its root`;
    roving(chips, state.token);
    const row = maps.row(state.layer, state.head, state.token, state.taken);
    const top = row ? Math.max(...row) : 1;
    chips.forEach((chip, place) => {
      chip.classList.remove(...Array.from({ length: 11 }, (_, step) => `heat${step}`));
      if (row) chip.classList.add(heat(row[place] / top));
    });
    tellRow(told, row);
    drawHabits(habits, habit);
  };
}

const ratio = () => Math.max(1, window.devicePixelRatio || 1);
const habitOf = (head) => head.name ? `${percent(head.habits[head.name])} on ${head.name}` : `spread over ${head.spread.toFixed(1)} tokens`;

// The chosen head, with its tokens where they can be read.
function drawLarge(canvas, maps, ramp) {
  const named = maps.full && size <= 40;
  const edge = named ? Math.min(96, 12 + 7 * Math.max(...reading.pieces.map((text) => Math.min(11, text.length)))) : 4;
  const step = Math.max(4, Math.floor(460 / maps.side));
  const side = edge + step * maps.side + 4;
  canvas.width = canvas.height = side * ratio();
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const values = maps.map(state.layer, state.head, state.taken);
  const shown = document.createElement("canvas");
  shown.width = shown.height = maps.side;
  const most = paint(shown.getContext("2d"), values, maps.side, maps.side, ramp);
  context.scale(ratio(), ratio());
  context.imageSmoothingEnabled = false;
  context.drawImage(shown, edge, edge, step * maps.side, step * maps.side);
  const row = Math.floor((state.token + 0.5) * maps.side / size);
  context.strokeStyle = style.getPropertyValue("--accent");
  context.lineWidth = 2;
  context.strokeRect(edge, edge + step * row, step * maps.side, step);
  if (named) {
    context.font = `${Math.min(13, step - 1)}px ui-monospace, Menlo, Consolas, monospace`;
    context.textBaseline = "middle";
    reading.pieces.forEach((text, place) => {
      const label = text.length > 11 ? `${text.slice(0, 10)}…` : text;
      context.fillStyle = style.getPropertyValue(place === state.token ? "--accent" : "--ink");
      context.textAlign = "right";
      context.fillText(label, edge - 6, edge + step * (place + 0.5));
      context.save();
      context.translate(edge + step * (place + 0.5), edge - 6);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(label, 0, 0);
      context.restore();
    });
  }
  canvas.setAttribute("aria-label", `The map of layer ${state.layer + 1}, head ${state.head + 1}`);
  return { edge, step, most };
}

function tellRow(told, row) {
  if (!row) {
    told.textContent = "The row of this token is not kept exactly in a page for a text this long: choose a mask.";
    return;
  }
  const best = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 5);
  const parts = best.flatMap((place, number) => [number ? ", " : " ", piece(place), ` ${percent(row[place])}`]);
  told.replaceChildren(piece(state.token), ` (token ${state.token}) ${state.taken ? "takes from" : "reads"}`, ...parts);
}

function drawHabits(list, heads) {
  const names = Object.keys(heads[0].habits);
  const rows = names.flatMap((name) => {
    const found = heads.filter((head) => head.name === name).sort((a, b) => b.habits[name] - a.habits[name]);
    if (!found.length) return [];
    const links = found.slice(0, 8).map((head) => make("button", {
      class: head.layer === state.layer + 1 && head.head === state.head + 1 ? "chosen" : "",
      onclick: () => choose({ layer: head.layer - 1, head: head.head - 1 }),
    }, `${head.layer}.${head.head} (${percent(head.habits[name])})`));
    if (found.length > 8) links.push(make("span", { class: "note" }, `and ${found.length - 8} more`));
    return [make("dt", {}, `${found.length} on ${name}`), make("dd", {}, ...links)];
  });
  const spread = heads.filter((head) => !head.name).length;
  if (spread) rows.push(make("dt", {}, `${spread} spread`), make("dd", {}, make("span", { class: "note" }, "no habit has 40 % or more")));
  list.replaceChildren(...rows);
}

// ---------------------------------------------------------------------------------------------------------- everything

let redrawAttention = () => {};

function drawSays() {
  for (const place of document.querySelectorAll("[data-says]")) {
    const said = data.says[place.dataset.says] || [];
    place.textContent = said[state.mask] || said[0] || "";
    place.hidden = !place.textContent;
  }
}

function mark() {
  for (const element of document.querySelectorAll("tr[data-token]")) {
    element.classList.toggle("chosen", element.dataset.token.split(" ").includes(String(state.token)));
  }
}

let drawnMask = null; // the mask for which the views that depend on it were drawn

function show() {
  if (drawnMask !== state.mask) {
    drawSentence();
    drawAnswer();
    drawGuesses();
    drawInfluence();
    drawSays();
    drawnMask = state.mask;
  }
  drawChanges();
  redrawAttention();
  mark();
}

async function start() {
  drawReading();
  drawCost();
  show();
  if (!data.maps) {
    body("attention").replaceChildren(why("attention"));
  } else if (typeof DecompressionStream === "undefined") {
    body("attention").replaceChildren(make("p", { class: "note" },
      "This browser cannot unpack the maps (it has no DecompressionStream, which all have had since 2023). The rest is here."));
  } else {
    redrawAttention = buildAttention(await openMaps());
    redrawAttention();
    mark();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAttention);
  }
  document.documentElement.dataset.ready = "yes";
}

start();
