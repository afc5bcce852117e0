// Draws maps over the photograph. Pointing at a pixel shows the value of every map there. The page sets `palette`, the
// colours of the values from 0 to 1, and `firstOverlay`, how much colour covers the photograph until it is changed.
let pointed = null;
let redraws = [];
let drawn = {};
let newestRun = 0;
let photograph = {};

function made(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className || "";
  if (text !== undefined) node.textContent = text;
  return node;
}

function decoded(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return Float32Array.from(new Uint16Array(bytes.buffer), (value) => value / 65535);
}

// Every update of a run has the same photograph, which is decoded once.
function pixelsOf(view) {
  if (photograph.address !== view.photograph) photograph = { address: view.photograph, pixels: decodedPixels(view) };
  return photograph.pixels;
}

async function decodedPixels(view) {
  const image = new Image();
  image.src = view.photograph;
  await image.decode();
  const canvas = made("canvas");
  [canvas.width, canvas.height] = [view.width, view.height];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, view.width, view.height).data;
}

const [first, second, both] = [[249, 115, 22], [59, 130, 246], [16, 185, 129]];

// The colour of two values: that of the one that is high alone, as far as it is, and for the rest that of both.
function blended(one, other) {
  const shared = Math.min(one, other);
  const most = Math.max(one, other) || 1;
  return both.map(
    (part, at) => (part * shared + first[at] * (one - shared) + second[at] * (other - shared)) / most,
  );
}

// What each kind of panel paints over the grey photograph, if anything, and what it says of a pixel.
const kinds = {
  photograph: () => ({ says: () => "" }),
  heat(panel) {
    const values = decoded(panel.values);
    return {
      colour: values.some((value) => value) && ((place) => palette[Math.round(values[place] * 255)]),
      // As in the pictures that are downloaded: where a map is 0, the photograph is left alone.
      strength: (place) => values[place],
      says: (place) => values[place].toFixed(3),
    };
  },
  agreement(panel) {
    const [ones, others] = [decoded(panel.first), decoded(panel.second)];
    return {
      colour: (place) => blended(ones[place], others[place]),
      strength: (place) => Math.max(ones[place], others[place]),
      says: (place) => `${ones[place].toFixed(3)} | ${others[place].toFixed(3)}`,
    };
  },
};

function paint(canvas, pixels, { colour, strength }) {
  const overlay = window.captumFusionOverlay ?? firstOverlay;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  image.data.set(pixels);
  for (let at = 0; colour && at < pixels.length; at += 4) {
    const grey = (pixels[at] + pixels[at + 1] + pixels[at + 2]) / 3;
    const over = colour(at / 4);
    const share = Math.min(1, overlay * strength(at / 4));
    for (let part = 0; part < 3; part++) image.data[at + part] = grey * (1 - share) + over[part] * share;
  }
  context.putImageData(image, 0, 0);
}

function point(view, place) {
  pointed = place;
  for (const panel of element.querySelectorAll(".panel")) {
    const [cross, value] = [panel.querySelector(".cross"), panel.querySelector(".value")];
    cross.hidden = !place;
    const says = place ? panel.says(place.y * view.width + place.x) : "";
    value.hidden = !says;
    value.textContent = says;
    if (place) {
      cross.style.left = `${(100 * (place.x + 0.5)) / view.width}%`;
      cross.style.top = `${(100 * (place.y + 0.5)) / view.height}%`;
    }
  }
}

const within = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value)));

function move(view, event) {
  const box = event.target.getBoundingClientRect();
  point(view, {
    x: within(((event.clientX - box.left) / box.width) * view.width, view.width),
    y: within(((event.clientY - box.top) / box.height) * view.height, view.height),
  });
}

function step(view, event) {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!moves[event.key]) return;
  event.preventDefault();
  const from = pointed ?? { x: view.width / 2, y: view.height / 2 };
  const [right, down] = moves[event.key];
  point(view, { x: within(from.x + right, view.width), y: within(from.y + down, view.height) });
}

function canvasOf(view, panel) {
  const canvas = made("canvas");
  [canvas.width, canvas.height, canvas.tabIndex] = [view.width, view.height, 0];
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${panel.name}. Arrow keys go from pixel to pixel.`);
  canvas.addEventListener("pointermove", (event) => move(view, event));
  canvas.addEventListener("pointerdown", (event) => move(view, event));
  canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(view, null));
  canvas.addEventListener("keydown", (event) => step(view, event));
  canvas.addEventListener("blur", () => point(view, null));
  return canvas;
}

function panelOf(view, pixels, key, panel) {
  // What is pending shows what was there before, if anything.
  const shown = panel.kind === "pending" && drawn[key] ? drawn[key] : panel;
  const figure = made("figure", panel.kind === "pending" ? "panel pending" : "panel");
  const stack = made("div", "stack");
  stack.style.aspectRatio = `${view.width} / ${view.height}`;
  const [cross, value] = [made("div", "cross"), made("output", "value")];
  cross.hidden = value.hidden = true;
  figure.says = () => "";
  if (shown.kind !== "pending") {
    const canvas = canvasOf(view, panel);
    const kind = kinds[shown.kind](shown);
    const draw = () => paint(canvas, pixels, kind);
    redraws.push(draw);
    draw();
    figure.says = kind.says;
    stack.append(canvas);
  }
  stack.append(cross, value);
  const caption = made("figcaption");
  caption.append(made("strong", "", panel.name), made("span", "", shown.note));
  figure.append(stack, caption);
  return figure;
}

function legendOf(legend) {
  const node = made("div", `legend ${legend}`);
  if (legend === "scale") {
    const colours = palette.filter((_, index) => index % 15 === 0).map((colour) => `rgb(${colour})`);
    const bar = made("i");
    bar.style.background = `linear-gradient(to right, ${colours})`;
    node.append("0", bar, "1");
  } else {
    for (const [name, colour] of [["gradient map alone", first], ["region map alone", second], ["both", both]]) {
      const sign = made("i");
      sign.style.background = `rgb(${colour})`;
      node.append(sign, name);
    }
  }
  return node;
}

async function show() {
  const given = props.value;
  const view = JSON.parse(given);
  // An update of a run that a newer one has ended.
  if (view.begun < newestRun) return;
  newestRun = view.begun ?? newestRun;
  const root = element.querySelector(".maps");
  redraws = [];
  if (!view.rows.length) {
    root.replaceChildren(made("p", "note", view.note));
    return;
  }
  const pixels = await pixelsOf(view);
  if (given !== props.value) return;
  const now = {};
  const rows = view.rows.map((row) => {
    const section = made("section");
    const heading = made("h2", "", row.name);
    heading.append(made("span", "", `P = ${row.probability.toFixed(3)}`));
    const grid = made("div", "grid");
    const panels = [{ kind: "photograph", name: "photograph", note: "as the model sees it" }, ...row.panels];
    for (const panel of panels) {
      const key = JSON.stringify([view.photograph, row.name, panel.name]);
      grid.append(panelOf(view, pixels, key, panel));
      now[key] = panel.kind === "pending" ? drawn[key] : panel;
    }
    section.append(heading, grid);
    return section;
  });
  drawn = now;
  root.replaceChildren(...rows, legendOf(view.legend));
  if (pointed) point(view, pointed);
}

document.addEventListener("captum-fusion-overlay", () => redraws.forEach((draw) => draw()));
watch("value", show);
show();
