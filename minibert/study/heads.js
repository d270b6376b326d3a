"use strict";
// View 4 of the page: every attention head. The helpers that it uses are in page.js, which starts everything.

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
    if (!full) {
      const from = start(layer, head) * side * side;
      return Float32Array.from((taken ? folded : weights).subarray(from, from + side * side), weight);
    }
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

// Paint a map of side × side into `pixels` × `pixels`, scaled to its own maximum. Of several weights in one pixel the
// largest is shown.
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
  largest.forEach((value, place) => { target[place] = ramp[Math.round(255 * Math.sqrt(value / most))]; });
  context.putImageData(image, 0, 0);
  return most;
}

// Each part of the view is made once. It has its element, and a function that brings it up to date.

function buildSwitch(maps) {
  const titles = ["where it looks: α", "what it takes: α·‖v·W_O‖"];
  const buttons = titles.map((title, taken) =>
    make("button", { onclick: () => choose({ taken: Boolean(taken) }) }, title));
  const element = maps.canTake
    ? make("div", { class: "choices", role: "group", "aria-label": "What the maps show" }, ...buttons)
    : make("p", { class: "note" }, `The maps show where a head looks. What it takes is not here: ${data.left_out.takes}.`);
  const redraw = () => buttons.forEach((button, taken) =>
    button.setAttribute("aria-pressed", String(Boolean(taken) === state.taken)));
  return { element, redraw };
}

// All heads, small: a row for each layer.
function buildSheet(maps) {
  const pixels = Math.min(maps.side, SMALL);
  const element = make("div", { class: "heads", role: "group", "aria-label": "Every head" }, make("span"));
  element.style.gridTemplateColumns = `1.5rem repeat(${model.heads}, minmax(0, 1fr))`;
  for (let head = 1; head <= model.heads; head++) element.append(make("span", {}, String(head)));
  const buttons = data.looks.map((at) => {
    if (at.head === 1) element.append(make("span", {}, `L${at.layer}`));
    const button = make("button", {
      "data-head": `${at.layer}.${at.head}`, onclick: () => choose({ layer: at.layer - 1, head: at.head - 1 }),
    }, make("canvas", { width: pixels, height: pixels }));
    element.append(button);
    return button;
  });
  walkable(element, model.heads, (place) => choose({ layer: Math.floor(place / model.heads), head: place % model.heads }));
  let painted = null; // what the maps show, so that a click does not paint them all again
  function redraw(ramp) {
    const look = `${state.taken} ${ramp[255]}`;
    buttons.forEach((button, place) => {
      const { layer, head } = data.looks[place];
      if (look !== painted) {
        paint(button.firstChild.getContext("2d"), maps.map(layer - 1, head - 1, state.taken), maps.side, pixels, ramp);
        button.title = `layer ${layer}, head ${head}: ${habitOf(heads()[place])}`;
        button.setAttribute("aria-label", button.title);
      }
    });
    painted = look;
    roving(buttons, state.layer * model.heads + state.head);
  }
  return { element, redraw };
}

// The chosen head, large.
function buildLarge(maps) {
  const canvas = make("canvas", { class: "large", role: "img" });
  const title = make("h3", { id: "head-title" });
  const end = make("span");
  const scale = make("p", { class: "legend" }, make("span", {}, "0 "), make("i", { class: "scale" }), end);
  const told = make("p", { class: "told", id: "reads", "aria-live": "polite" });
  const under = make("p", { class: "note", id: "under" });
  const element = make("div", {}, title, canvas, scale, told, under);
  let drawn = null;
  function place(event) { // the row and the column of the map under the mouse, as tokens
    const at = (pixel, side) => Math.floor((pixel / side * drawn.side - drawn.edge) / drawn.step);
    const [row, column] = [at(event.offsetY, canvas.clientHeight), at(event.offsetX, canvas.clientWidth)];
    if (row < 0 || row >= maps.side) return null;
    return [row, column].map((cell) => Math.floor((cell + 0.5) * size / maps.side));
  }
  canvas.addEventListener("click", (event) => {
    const found = place(event);
    if (found) chooseToken(found[0]);
  });
  canvas.addEventListener("mousemove", (event) => {
    const found = place(event);
    point(found ? found[0] : null);
    const row = found && maps.row(state.layer, state.head, found[0], state.taken);
    const [reads, read] = found || [];
    under.textContent = row && row[read] >= 0
      ? `${reading.pieces[reads]} (token ${reads}) ${state.taken ? "takes from" : "reads"} ${reading.pieces[read]} (token ${read}): ${percent(row[read])}`
      : "";
  });
  canvas.addEventListener("mouseleave", () => { under.textContent = ""; point(null); });
  function redraw(ramp) {
    drawn = drawLarge(canvas, maps, ramp, element.clientWidth || 460);
    const head = heads()[state.layer * model.heads + state.head];
    title.textContent = `Layer ${head.layer}, head ${head.head}: ${habitOf(head)}`;
    end.textContent = ` ${percent(drawn.most)} of ${state.taken ? "what is taken" : "the weight"}, shaded by its root`;
    document.getElementById("place").textContent =
      `head ${head.head} of layer ${head.layer} is layers[${head.layer - 1}], and index ${head.head - 1} where a shape says H.`;
    tellRow(told, maps.row(state.layer, state.head, shownToken(), state.taken));
  }
  return { element, redraw };
}

// One head number through all layers: what the chosen token reads there most.
function buildThrough(maps) {
  const element = make("div", { id: "through" });
  function redraw() {
    const rows = [];
    for (let layer = 0; layer < model.layers; layer++) {
      const row = maps.row(layer, state.head, shownToken(), state.taken);
      if (!row) break;
      const most = row.indexOf(Math.max(...row));
      rows.push(make("tr", { class: layer === state.layer ? "chosen" : "" },
        make("td", {}, make("button", { "aria-pressed": String(layer === state.layer), onclick: () => choose({ layer }) }, `layer ${layer + 1}`)),
        make("td", {}, piece(most)), cell(measured(row[most], "asked", percent(row[most])), "bars kept")));
    }
    element.replaceChildren(...(rows.length ? [
      make("h3", {}, `Head ${state.head + 1} in every layer: what `, piece(shownToken()), ` ${state.taken ? "takes from" : "reads"} most`),
      table([["", ""], ["token", ""], ["of the row", ""]], rows),
      make("p", { class: "note" }, "The layers number their heads each for itself: one number in two layers is two heads.")] : []));
  }
  return { element, redraw };
}

function buildHabits() {
  const element = make("dl", { class: "habits" });
  return { element, redraw: () => drawHabits(element, heads()) };
}

function aboutTheMaps(maps) {
  if (maps.full) return "Each small map is scaled to its own maximum. Arrow keys walk from head to head.";
  const rows = { 0: "No row is kept exactly", 1: "Exactly kept is the row of the mask" }[maps.exact.length]
    ?? `Exactly kept are the rows of ${maps.exact.length} masks`;
  return `This text has ${size} tokens: each map shows the maxima of blocks, ${maps.side} × ${maps.side}. ${rows}.`;
}

// Put the view together. Returns what brings it up to date; while the mouse only points, the small maps stay.
function buildAttention(maps) {
  const [choice, sheet, large, through, habits] = [buildSwitch, buildSheet, buildLarge, buildThrough, buildHabits]
    .map((build) => build(maps));
  body("attention").replaceChildren(choice.element, make("div", { class: "attention" },
    make("div", {}, sheet.element, make("p", { class: "note told" }, aboutTheMaps(maps)),
      make("h3", {}, "What the heads do: layer.head, and the share that goes there"), habits.element),
    large.element, through.element));
  return (pointing = false) => {
    const ramp = colours();
    for (const part of pointing ? [large, through] : [choice, sheet, large, through, habits]) part.redraw(ramp);
  };
}

// The heads as they are counted now: by their weights, or by what they take.
const heads = () => (state.taken && data.takes.length ? data.takes : data.looks);
const ratio = () => Math.max(1, window.devicePixelRatio || 1);
const habitOf = (head) => head.name ? `${percent(head.habits[head.name])} on ${head.name}` : `spread over ${head.spread.toFixed(1)} tokens`;

// The chosen head, with its tokens where they can be read.
function drawLarge(canvas, maps, ramp, width) {
  const room = clamp(width, 200, 560);
  const context = canvas.getContext("2d");
  const font = (step) => `${Math.min(13, step - 1)}px ui-monospace, Menlo, Consolas, monospace`;
  context.font = font(14);
  const letters = Math.ceil(Math.max(...reading.pieces.map((text) => context.measureText(text).width))) + 12;
  const named = maps.full && letters < room / 2 && (room - letters - 4) / maps.side >= 10;
  const edge = named ? letters : 4;
  const step = Math.max(named ? 10 : 1, (named ? Math.floor : Number)((room - edge - 4) / maps.side));
  const side = edge + step * maps.side + 4;
  canvas.width = canvas.height = side * ratio();
  canvas.style.width = canvas.style.height = `${side}px`;
  const style = getComputedStyle(document.documentElement);
  const values = maps.map(state.layer, state.head, state.taken);
  const shown = document.createElement("canvas");
  shown.width = shown.height = maps.side;
  const most = paint(shown.getContext("2d"), values, maps.side, maps.side, ramp);
  context.scale(ratio(), ratio());
  context.imageSmoothingEnabled = false;
  context.drawImage(shown, edge, edge, step * maps.side, step * maps.side);
  const row = Math.floor((shownToken() + 0.5) * maps.side / size);
  context.strokeStyle = style.getPropertyValue("--accent");
  context.lineWidth = 2;
  context.strokeRect(edge, edge + step * row, step * maps.side, step);
  if (named) {
    context.font = font(step);
    context.textBaseline = "middle";
    reading.pieces.forEach((text, place) => {
      context.fillStyle = style.getPropertyValue(place === shownToken() ? "--accent" : "--ink");
      context.textAlign = "right";
      context.fillText(text, edge - 6, edge + step * (place + 0.5));
      context.save();
      context.translate(edge + step * (place + 0.5), edge - 6);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillText(text, 0, 0);
      context.restore();
    });
  }
  canvas.setAttribute("aria-label", `The map of layer ${state.layer + 1}, head ${state.head + 1}`);
  return { edge, step, side, most };
}

function tellRow(told, row) {
  if (!row) {
    told.textContent = "The row of this token is not kept exactly in a page for a text this long: choose a mask.";
    return;
  }
  const best = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 5);
  const parts = best.flatMap((place, number) => [number ? ", " : " ", piece(place), ` ${percent(row[place])}`]);
  told.replaceChildren(piece(shownToken()), ` (token ${shownToken()}) ${state.taken ? "takes from" : "reads"}`, ...parts);
}

function drawHabits(list, heads) {
  const names = Object.keys(heads[0].habits);
  const rows = names.flatMap((name) => {
    const found = heads.filter((head) => head.name === name).sort((a, b) => b.habits[name] - a.habits[name]);
    if (!found.length) return [];
    const links = found.slice(0, 8).map((head) => make("button", {
      "aria-pressed": String(head.layer === state.layer + 1 && head.head === state.head + 1),
      onclick: () => choose({ layer: head.layer - 1, head: head.head - 1 }),
    }, `${head.layer}.${head.head} (${percent(head.habits[name])})`));
    if (found.length > 8) links.push(make("span", { class: "note" }, `and ${found.length - 8} more`));
    return [make("dt", {}, `${found.length} on ${name}`), make("dd", {}, ...links)];
  });
  const spread = heads.filter((head) => !head.name).length;
  if (spread) rows.push(make("dt", {}, `${spread} spread`), make("dd", {}, make("span", { class: "note" }, "nothing has 40 % or more")));
  list.replaceChildren(...rows);
}
