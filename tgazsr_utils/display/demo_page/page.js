// What is computed here is what tgazsr_utils computes: core/attention.py, core/attacks.py, core/models.py.
const id = (name) => document.getElementById(name);
const facts = JSON.parse(id("facts").textContent);
const { side, scale, tasks } = facts;
const [ROWS, COLUMNS] = facts.grid;
const PATCHES = ROWS * COLUMNS, PIXELS = 3 * side * side, EPSILONS = [0, ...facts.epsilons]; // 1/255; 0: clean
const NAMES = { original: "original", tuned: "tuned with TGA-ZSR" };
const pause = (ms = 0) => new Promise((done) => setTimeout(done, ms));

function bytes(base64) {
  const text = atob(base64), found = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
  return found;
}

async function unpack(name) {
  const packed = new Blob([bytes(id(name).textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  id(name).remove();
  return new Uint8Array(await new Response(packed).arrayBuffer());
}

for (const task of Object.values(tasks)) task.text = new Float32Array(bytes(task.text).buffer);

// --- the models -------------------------------------------------------------------------------------------------------

let ort;
const sessions = {};

async function load() {
  const script = new Blob([await unpack("runtime")], { type: "text/javascript" });
  ort = await import(URL.createObjectURL(script));
  Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: (await unpack("wasm")).buffer });
  const errorsOnly = { logSeverityLevel: 3 }; // not what the runtime would have liked to optimise
  for (const name in NAMES) sessions[name] = await ort.InferenceSession.create(await unpack(`model-${name}`), errorsOnly);
  started();
}

let started;
let last = new Promise((done) => (started = done)); // runs wait for the models, and for one another

/** Tokens of pixels [B,3,H,W] in [0,1] and the gradient of the cross-entropy that leads away from class `label`. */
function encode(model, pixels, task, label = 0) {
  const count = pixels.length / PIXELS, classes = task.classes.length;
  const wanted = new Float32Array(count * classes);
  for (let row = 0; row < count; row++) wanted[row * classes + label] = 1;
  const tensor = (data, ...shape) => new ort.Tensor("float32", data, shape);
  last = last.catch(() => {}).then(() => sessions[model].run({
    pixels: tensor(pixels, count, 3, side, side),
    text: tensor(task.text, classes, task.text.length / classes),
    labels: tensor(wanted, count, classes),
  }));
  return last.then(({ pooled, patches, gradient }) => (
    { count, pixels, pooled: pooled.data, patches: patches.data, gradient: gradient.data, width: pooled.dims[1] }));
}

/** PGD of one image [3,H,W] at each epsilon at once, clean one first: [E+1,3,H,W]. Null once `stale()`. */
async function attack(model, image, task, label, stale) {
  const count = EPSILONS.length, current = new Float32Array(count * PIXELS);
  const noise = image.map(() => 2 * Math.random() - 1);
  const move = (direction, share) => {
    for (let e = 0; e < count; e++) {
      const eps = EPSILONS[e] / 255;
      for (let i = 0; i < PIXELS; i++) {
        const at = e * PIXELS + i, x = image[i];
        current[at] = Math.min(Math.min(1, x + eps), Math.max(Math.max(0, x - eps), current[at] + share * eps * direction(at, i)));
      }
    }
  };
  for (let e = 0; e < count; e++) current.set(image, e * PIXELS);
  move((_, i) => noise[i], 1);
  for (let step = 0; step < facts.steps; step++) {
    const { gradient } = await encode(model, current, task, label);
    if (stale()) return null;
    move((at) => Math.sign(gradient[at]), 1 / 4);
    own.done = `${NAMES[model]} model, step ${step + 1} of ${facts.steps}`;
    if (state.image === own && state.eps) id("sentence").textContent = attacking();
    await pause();
  }
  return current;
}

/** Logits and probabilities of one row of tokens for the classes of a task. */
function answer(tokens, row, task) {
  const { width, pooled } = tokens, classes = task.classes.length, from = row * width;
  let length = 0;
  for (let d = 0; d < width; d++) length += pooled[from + d] ** 2;
  length = Math.max(Math.sqrt(length), 1e-12);
  const logits = Array.from({ length: classes }, (_, c) => {
    let sum = 0;
    for (let d = 0; d < width; d++) sum += (pooled[from + d] / length) * task.text[c * width + d];
    return scale * sum;
  });
  const most = Math.max(...logits), powers = logits.map((x) => Math.exp(x - most));
  const total = powers.reduce((a, b) => a + b);
  return { logits, probabilities: powers.map((x) => x / total), best: logits.indexOf(most) };
}

/** Text-guided attention of one row of tokens, in [0,1], row by row over the patches: variant "reference". */
function attention(tokens, row, task, label) {
  const { width, pooled, patches } = tokens, scores = new Float64Array(PATCHES);
  for (let d = 0; d < width; d++) {
    let squares = pooled[row * width + d] ** 2;
    for (let p = 0; p < PATCHES; p++) squares += patches[(row * PATCHES + p) * width + d] ** 2;
    const weight = task.text[label * width + d] / Math.sqrt(Math.max(squares, 2 ** -126));
    for (let p = 0; p < PATCHES; p++) scores[p] += patches[(row * PATCHES + p) * width + d] * weight;
  }
  const low = Math.min(...scores), high = Math.max(...scores);
  const constant = high - low <= 16 * 2 ** -23 * Math.max(Math.abs(low), Math.abs(high));
  return scores.map((x) => (constant ? 0 : (x - low) / (high - low)));
}

const distance = (a, b) => Math.hypot(...a.map((x, i) => x - b[i]));

// --- images -----------------------------------------------------------------------------------------------------------

const images = facts.images.map((shown) => ({ ...shown, tokens: {}, attacked: true }));
const own = { task: "shapes", label: null, tokens: {}, attacked: false, version: 0 };
const state = { image: null, model: "original", eps: 0, text: null }; // text: a class, or what the clean image is taken for

async function readImages() {
  const pixels = await unpack("pixels"), attacks = {};
  for (const model in NAMES) attacks[model] = new Int8Array((await unpack(`attacks-${model}`)).buffer);
  images.forEach((image, n) => {
    image.pixels = Float32Array.from(pixels.subarray(n * PIXELS, (n + 1) * PIXELS), (x) => x / 255);
    image.at = (model) => {
      const all = new Float32Array(EPSILONS.length * PIXELS);
      all.set(image.pixels);
      facts.epsilons.forEach((eps, e) => {
        const from = (n * facts.epsilons.length + e) * PIXELS, to = (e + 1) * PIXELS;
        for (let i = 0; i < PIXELS; i++) all[to + i] = image.pixels[i] + (eps / 255) * (attacks[model][from + i] / 127);
      });
      return all;
    };
  });
}

/** Tokens of an image of the set, clean and attacked; computed once. */
const tokensOf = (image, model) => (image.tokens[model] ??= encode(model, image.at(model), tasks[image.task])
  .then((tokens) => (image.tokens[model] = tokens)));

async function compute(image) {
  if (image !== own) await Promise.all(Object.keys(NAMES).map((model) => tokensOf(image, model)));
}

let soon;
/** After a stroke: both models at once; the attack when the hand rests. */
async function ownChanged() {
  const version = ++own.version, stale = () => version !== own.version, task = tasks[own.task];
  clearTimeout(soon);
  own.attacked = false, own.done = "";
  own.pixels = fromCanvas(small.getContext("2d").getImageData(0, 0, side, side).data);
  for (const model in NAMES) {
    const tokens = await encode(model, own.pixels, task);
    if (stale()) return;
    own.tokens[model] = tokens;
  }
  show();
  soon = setTimeout(async () => {
    for (const model in NAMES) {
      const label = answer(own.tokens[model], 0, task).best;
      const attacked = await attack(model, own.pixels, task, label, stale);
      if (!attacked) return;
      attacked.set(own.pixels);
      const tokens = await encode(model, attacked, task);
      if (stale()) return;
      own.tokens[model] = tokens;
    }
    own.attacked = true;
    show();
  }, 500);
}

function fromCanvas(data) {
  const pixels = new Float32Array(PIXELS);
  for (let c = 0; c < 3; c++) for (let i = 0; i < side * side; i++) pixels[c * side * side + i] = data[4 * i + c] / 255;
  return pixels;
}

// --- what is shown ----------------------------------------------------------------------------------------------------

/** What a model sees in an image at each epsilon. */
function readings(image, model) {
  const tokens = image.tokens[model], task = tasks[image.task];
  const text = state.text ?? answer(tokens, 0, task).best;
  const rows = EPSILONS.map((_, e) => {
    const row = Math.min(e, tokens.count - 1);
    return { row, ...answer(tokens, row, task), map: attention(tokens, row, task, text) };
  });
  for (const reading of rows) reading.shift = distance(reading.map, rows[0].map);
  return { task, text, tokens, rows };
}

function paint(canvas, pixels, map) {
  const picture = new ImageData(side, side), plane = side * side, data = picture.data;
  for (let i = 0; i < plane; i++) {
    const colour = [pixels[i], pixels[plane + i], pixels[2 * plane + i]];
    if (map) {
      const grey = (colour[0] + colour[1] + colour[2]) / 3, heat = Math.round(255 * resized(map, i % side, Math.floor(i / side)));
      for (let c = 0; c < 3; c++) colour[c] = 0.35 * grey + 0.65 * (facts.viridis[3 * heat + c] / 255);
    }
    for (let c = 0; c < 3; c++) data[4 * i + c] = Math.round(255 * colour[c]);
    data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

/** A map at pixel (x, y), bilinear (align_corners=False). */
function resized(map, x, y) {
  const place = (at, n) => {
    const exact = Math.max(0, ((at + 0.5) * n) / side - 0.5), low = Math.floor(exact);
    return [low, Math.min(low + 1, n - 1), exact - low];
  };
  const [left, right, u] = place(x, COLUMNS), [top, bottom, v] = place(y, ROWS);
  const line = (row) => (1 - u) * map[row * COLUMNS + left] + u * map[row * COLUMNS + right];
  return (1 - v) * line(top) + v * line(bottom);
}

const word = (text) => Object.assign(document.createElement("b"), { textContent: text });
const of = (model, text) => Object.assign(document.createElement("span"), { className: model, textContent: text });
const number = (eps) => `${eps}/255`;

function show() {
  const { image, model, eps } = state;
  if (!image?.tokens.original?.count || !image.tokens.tuned?.count) return;
  document.documentElement.style.setProperty("--now", `var(--${model})`);
  const seen = Object.fromEntries(Object.keys(NAMES).map((name) => [name, readings(image, name)]));
  const { task, text, tokens, rows } = seen[model], now = rows[eps];
  const about = `attention of “${task.prompts[text]}”`;
  for (const [name, reading] of [["clean", rows[0]], ["attacked", now]]) {
    const pixels = tokens.pixels.subarray(reading.row * PIXELS, (reading.row + 1) * PIXELS);
    paint(id(name), pixels), paint(id(`${name}-map`), pixels, reading.map);
    const strongest = reading.map.indexOf(Math.max(...reading.map));
    const where = `row ${Math.floor(strongest / COLUMNS) + 1}, column ${(strongest % COLUMNS) + 1} of ${COLUMNS}`;
    id(name).ariaLabel = `${name} image, taken for ${task.classes[reading.best]}`;
    id(`${name}-map`).ariaLabel = `${name} image with ${about}, strongest in ${where}`;
    bars(id(`${name}-bars`), task, reading, rows[0], now, image.label);
  }
  id("attacked-note").textContent = eps ? `at most ${number(EPSILONS[eps])} off` : "the image";
  id("head-attacked").textContent = eps ? `Attacked, epsilon ${number(EPSILONS[eps])}` : "Attacked: not yet";
  const waits = image === own && !own.attacked;
  document.querySelector(".stage").ariaBusy = String(waits && eps > 0);
  say(seen, eps, waits), chart(seen, eps, waits), whole();
  choices(task, text);
}

function bars(table, task, reading, clean, attacked, label) {
  const order = task.classes.map((_, c) => c).sort((a, b) =>
    Math.max(clean.probabilities[b], attacked.probabilities[b]) - Math.max(clean.probabilities[a], attacked.probabilities[a]));
  table.caption.textContent = `${task.question} Of ${task.classes.length} answers:`;
  table.tBodies[0].replaceChildren(...order.slice(0, 4).map((c) => {
    const row = document.createElement("tr"), share = 100 * reading.probabilities[c];
    row.className = c === reading.best ? "answer" : "";
    const name = row.insertCell(), bar = document.createElement("i"), box = document.createElement("div");
    name.textContent = task.classes[c] + (c === label ? " ✓" : "");
    name.title = task.prompts[c];
    box.className = "bar", bar.style.width = `${share}%`;
    box.append(bar), row.insertCell().append(box);
    row.insertCell().textContent = `${share.toFixed(1)} %`;
    return row;
  }));
}

const attacking = () => `Attacking your picture at every epsilon: ${own.done || "first gradient"}…`;

function say(seen, eps, waits) {
  const parts = [];
  if (waits && eps) parts.push(attacking());
  else if (!eps) {
    const [a, b] = Object.values(seen).map(({ task, rows }) => task.classes[rows[0].best]);
    if (a === b) parts.push("Nobody attacks yet, and both models say ", word(a), ".");
    else parts.push("Nobody attacks yet; the ", of("original", "original model"), " says ", word(a), ", the ", of("tuned", "tuned one"), " ", word(b), ".");
    parts.push(waits ? " The attack is being made…" : " Raise epsilon.");
  } else {
    parts.push(`At epsilon ${number(EPSILONS[eps])} `);
    for (const [model, { task, rows }] of Object.entries(seen)) {
      const [before, after] = [rows[0].best, rows[eps].best].map((c) => task.classes[c]);
      parts.push("the ", of(model, model === "original" ? "original model" : "tuned one"));
      if (before === after) parts.push(" still says ", word(after));
      else parts.push(" says ", word(after), " in place of ", word(before));
      parts.push(`, and its attention moves by ${rows[eps].shift.toFixed(2)}${model === "original" ? "; " : "."}`);
    }
  }
  id("sentence").replaceChildren(...parts);
}

/** Over all images, once each is computed; the attention of each one's own class. */
function whole() {
  const { eps } = state, ready = images.every((image) => Object.keys(NAMES).every((model) => image.tokens[model]?.count));
  if (!ready) return void (id("all").textContent = "");
  const sums = {};
  for (const model in NAMES) {
    const of = images.map(({ tokens, task, label }) => {
      const [clean, moved] = [0, eps].map((row) => attention(tokens[model], row, tasks[task], label));
      return { right: answer(tokens[model], eps, tasks[task]).best === label, shift: distance(clean, moved) };
    });
    const mean = of.reduce((sum, { shift }) => sum + shift, 0) / of.length;
    sums[model] = `${of.filter(({ right }) => right).length} right, attention moves by ${mean.toFixed(2)}`;
  }
  const at = eps ? ` at epsilon ${number(EPSILONS[eps])}` : ", not attacked";
  id("all").replaceChildren(`All ${images.length} images${at}: `, of("original", "original"), ` ${sums.original}; `, of("tuned", "tuned"), ` ${sums.tuned}.`);
}

function chart(seen, eps, waits) {
  const width = 340, height = 250, left = 34, right = 12, top = 22, bottom = 38, most = EPSILONS.at(-1);
  const high = Math.max(2, ...Object.values(seen).flatMap(({ rows }) => rows.map(({ shift }) => shift))) * 1.08;
  const x = (e) => left + ((width - left - right) * e) / most, y = (s) => height - bottom - ((height - top - bottom) * s) / high;
  const text = (at, up, words, more = "") => `<text x="${at}" y="${up}" ${more}>${words}</text>`;
  let drawn = "";
  for (let s = 0; s <= high; s++)
    drawn += `<path d="M${left} ${y(s)}H${width - right}" stroke="var(--line)"/>` + text(left - 6, y(s) + 4, s, 'text-anchor="end"');
  for (let e = 0; e <= most; e += 2) drawn += text(x(e), height - bottom + 16, e, 'text-anchor="middle"');
  drawn += text((left + width - right) / 2, height - 4, "epsilon (1/255)", 'text-anchor="middle"');
  drawn += `<path d="M${x(EPSILONS[eps])} ${top - 6}V${height - bottom}" stroke="var(--ink)" stroke-dasharray="3 3"/>`;
  const said = [];
  for (const [model, { rows }] of Object.entries(waits ? {} : seen)) {
    const points = rows.map(({ shift }, e) => [x(EPSILONS[e]), y(shift)]), colour = `var(--${model})`;
    drawn += `<path d="M${points.map((point) => point.join(" ")).join("L")}" fill="none" stroke="${colour}" stroke-width="2.2" stroke-linejoin="round"/>`;
    points.forEach(([cx, cy], e) => {
      const same = rows[e].best === rows[0].best, r = e === eps ? 6 : 3.6;
      drawn += `<circle cx="${cx}" cy="${cy}" r="${r}" fill="${same ? colour : "var(--card)"}" stroke="${colour}" stroke-width="2"/>`;
    });
    said.push(`${NAMES[model]} ${rows[eps].shift.toFixed(2)}`);
  }
  const mark = (at, colour, fill, words) => `<circle cx="${at}" cy="8" r="4" fill="${fill}" stroke="${colour}" stroke-width="2"/>` + text(at + 8, 12, words);
  drawn += mark(left + 6, "var(--original)", "var(--original)", "original") + mark(left + 84, "var(--tuned)", "var(--tuned)", "tuned");
  drawn += mark(left + 152, "var(--soft)", "var(--card)", "hollow: other answer");
  id("chart").innerHTML = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="Shift of attention against epsilon; now ${said.join(", ")}">${drawn}</svg>`;
}

// --- controls ---------------------------------------------------------------------------------------------------------

function radios(box, entries, pick) {
  const inside = box.id === "images" ? box : box.appendChild(document.createElement("div"));
  entries.forEach(([value, content, label], n) => {
    const outer = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: box.id, value, checked: n === 0, ariaLabel: label ?? null });
    input.addEventListener("change", () => pick(value));
    outer.append(input, content), inside.append(outer);
  });
  return inside;
}

function choices(task, text) {
  const select = id("text"), of = task.prompts.join();
  if (select.dataset.of !== of) {
    const first = new Option("", "");
    select.replaceChildren(first, ...task.classes.map((name, c) => new Option(name, c)));
    select.dataset.of = of;
  }
  select.options[0].text = `what the clean image is taken for (${task.classes[answer(state.image.tokens[state.model], 0, task).best]})`;
  select.value = state.text ?? "";
  select.title = task.prompts[text];
}

async function pick(image) {
  Object.assign(state, { image, text: null });
  id("own").hidden = image !== own;
  if (image === own && !own.pixels) return sheet(GROUNDS.sky), dot(140, 140, 120), ownChanged();
  if (image.pixels) paint(id("clean"), image.pixels);
  await compute(image);
  show();
}

function setEps(eps) {
  state.eps = eps;
  id("eps").value = eps;
  id("eps-value").textContent = eps ? number(EPSILONS[eps]) : "0, no attack";
  id("eps").ariaValueText = eps ? `${EPSILONS[eps]} of 255` : "0, no attack";
  show();
}

let playing;
function play(on) {
  clearInterval(playing);
  id("play").textContent = on ? "❚❚" : "▶";
  id("play").ariaPressed = String(on);
  if (on) playing = setInterval(() => setEps((state.eps + 1) % EPSILONS.length), 450);
}

// --- the reader's own picture -----------------------------------------------------------------------------------------

const PENS = { red: "#db1f1f", orange: "#f5850f", yellow: "#f2e026", green: "#1f9e2e", blue: "#2447e0", purple: "#8c29ad", white: "#f5f5f5", black: "#121212" };
const GROUNDS = { sky: "#a6c5e8", grass: "#577d30", sand: "#d0bf97", water: "#307a80", rock: "#757270", night: "#181a35", bricks: "#965040" };
const pad = id("pad"), ink = pad.getContext("2d", { willReadFrequently: true });
const small = Object.assign(document.createElement("canvas"), { width: side, height: side });
let pen = "red", at = [140, 140], down = false;

function shrink(source, width, height) {
  const brush = small.getContext("2d", { willReadFrequently: true }), edge = Math.min(width, height);
  brush.imageSmoothingQuality = "high";
  brush.drawImage(source, (width - edge) / 2, (height - edge) / 2, edge, edge, 0, 0, side, side);
}

function drawn() {
  shrink(pad, pad.width, pad.height);
  ownChanged();
}

function sheet(colour) {
  ink.fillStyle = colour;
  ink.fillRect(0, 0, pad.width, pad.height);
  drawn();
}

function dot(x, y, width = Number(id("width").value)) {
  ink.fillStyle = PENS[pen];
  ink.beginPath(), ink.arc(x, y, width / 2, 0, 2 * Math.PI), ink.fill();
  at = [x, y];
  drawn();
}

function line(x, y) {
  Object.assign(ink, { strokeStyle: PENS[pen], lineWidth: Number(id("width").value), lineCap: "round" });
  ink.beginPath(), ink.moveTo(...at), ink.lineTo(x, y), ink.stroke();
  at = [x, y];
  drawn();
}

async function ownFile(file) {
  const note = id("own-note");
  try {
    const bitmap = await createImageBitmap(file);
    const edge = Math.min(bitmap.width, bitmap.height);
    ink.imageSmoothingQuality = "high";
    ink.drawImage(bitmap, (bitmap.width - edge) / 2, (bitmap.height - edge) / 2, edge, edge, 0, 0, pad.width, pad.height);
    shrink(bitmap, bitmap.width, bitmap.height);
    note.textContent = `${file.name}: its middle, at ${side} × ${side} pixels. It stays in your browser.`;
    note.className = "quiet";
    await ownChanged();
  } catch {
    note.textContent = `${file.name} is not an image that this browser can read.`;
    note.className = "error";
  }
}

function wireOwn() {
  const place = (event) => {
    const box = pad.getBoundingClientRect(), unit = pad.width / box.width;
    return [(event.clientX - box.left) * unit, (event.clientY - box.top) * unit];
  };
  pad.addEventListener("pointerdown", (event) => (pad.setPointerCapture(event.pointerId), dot(...place(event))));
  pad.addEventListener("pointermove", (event) => event.buttons && line(...place(event)));
  pad.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [-7, 0], ArrowRight: [7, 0], ArrowUp: [0, -7], ArrowDown: [0, 7] }[event.key];
    if (!by && event.key !== " ") return;
    event.preventDefault();
    if (!by) (down = !down) && dot(...at);
    else {
      const to = at.map((x, i) => Math.min(pad.width, Math.max(0, x + by[i])));
      down ? line(...to) : (at = to);
    }
    const [left, top] = at.map((x) => `${(100 * x) / pad.width}%`);
    Object.assign(id("tip").style, { left, top, background: down ? PENS[pen] : "none" });
  });
  const swatch = (colours) => Object.keys(colours).map((name) => [name, "", name]);
  radios(id("colours"), swatch(PENS), (name) => (pen = name));
  for (const input of id("colours").querySelectorAll("input")) {
    input.parentElement.style.background = PENS[input.value];
    input.parentElement.title = input.value;
  }
  const grounds = id("grounds").appendChild(document.createElement("div"));
  for (const [name, colour] of Object.entries(GROUNDS)) {
    const button = Object.assign(document.createElement("button"), { type: "button", title: name, ariaLabel: `new sheet, ${name}` });
    button.style.background = colour;
    button.addEventListener("click", () => sheet(colour));
    grounds.append(button);
  }
  id("file").addEventListener("change", (event) => event.target.files[0] && ownFile(event.target.files[0]));
  radios(id("questions"), Object.entries(tasks).map(([key, { question }]) => [key, question]), (key) => {
    Object.assign(own, { task: key });
    state.text = null;
    ownChanged();
  });
}

function wire() {
  const thumbs = images.map((image, n) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
    paint(canvas, image.pixels);
    return [String(n), canvas, `${tasks[image.task].classes[image.label]} (${tasks[image.task].question})`];
  });
  radios(id("images"), [...thumbs, ["own", "Draw, or your image"]], (value) => pick(images[value] ?? own));
  id("images").querySelector("[value=own]").parentElement.classList.add("own");
  radios(id("models"), Object.entries(NAMES), (model) => ((state.model = model), show()));
  id("eps").max = EPSILONS.length - 1;
  id("eps").addEventListener("input", () => (play(false), setEps(Number(id("eps").value))));
  id("play").addEventListener("click", () => play(id("play").ariaPressed !== "true"));
  id("text").addEventListener("change", () => ((state.text = id("text").value === "" ? null : Number(id("text").value)), show()));
  wireOwn();
}

document.documentElement.style.setProperty("--now", "var(--original)");
try {
  await readImages();
  wire();
  setEps(EPSILONS.indexOf(facts.start));
  paint(id("clean"), images[0].pixels);
  await load();
  await pick(state.image ?? images[0]);
  globalThis.demo = { state, images, own, readings, encode, tasks, EPSILONS }; // for tests, and for the curious
  for (const image of images) await compute(image).then(() => pause(20));
  whole();
  document.body.dataset.ready = "yes";
} catch (error) {
  id("sentence").textContent = `This browser could not start the models: ${error.message}`;
  id("sentence").className = "error";
  throw error;
}
