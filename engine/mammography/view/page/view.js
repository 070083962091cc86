"use strict";
// The page works from files, where a script can read neither other files nor the pixels of pictures: tiles are shown as
// pictures, and maps come as scripts that hand over a data URL. The server has no scripts with data, which pages of
// elsewhere could load: maps are pictures there.
const byId = (id) => document.getElementById(id);
const DATA = JSON.parse(byId("data").textContent);
const WHOLE_SCALE = { centre: 0.5, width: 1, invert: false }; // of grey values, from 0 (black) to 1 (white)
const state = { at: 0, order: [], shown: [], maps: new Map(), grey: { ...WHOLE_SCALE } };

function largest(exam) {
  return Math.max(...exam.views.map((view) => (masked ? covered(view) : main(view)[1])));
}

// Masks are shown where any class of them has a colour.
const masked = Object.keys(DATA.classes).length > 0;

// The share of an image that all classes of its mask take together.
function covered(view) {
  return Object.values(view.predicted).reduce((sum, one) => sum + one, 0);
}

// The prediction that is told: of two classes the second, else the highest.
function main(view) {
  const all = Object.entries(view.predicted);
  if (all.length === 2 && !view.numbers && Math.abs(all[0][1] + all[1][1] - 1) < 1e-3) return all[1];
  return all.reduce((best, one) => (one[1] > best[1] ? one : best), all[0]);
}

function sorted(how) {
  const numbers = DATA.exams.map((_, i) => i);
  const key = { error: (i) => DATA.exams[i].error ?? -1, score: (i) => largest(DATA.exams[i]) }[how];
  return key ? numbers.sort((a, b) => key(b) - key(a) || a - b) : numbers;
}

// An element of a class; names of tables are among its parts only as texts.
function made(tag, className, ...parts) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...parts);
  return element;
}

function lines(view) {
  return [
    made("div", "mark", [view.side, view.view].filter(Boolean).join(" ") || "image"),
    ...(masked ? maskLines(view) : predictionLines(view)),
    ...[view.split, view.name].filter(Boolean).map((text) => made("div", "", text)),
  ];
}

function maskLines(view) {
  return Object.entries(DATA.classes).map(([name, colour]) => {
    const share = view.predicted[name], dice = view.dice[name];
    const swatch = made("span", "swatch");
    swatch.style.background = colour;
    const parts = [];
    if (share !== undefined) parts.push(`${(100 * share).toPrecision(3)} % of the image`);
    if (dice !== undefined) parts.push(made("span", dice < 0.5 ? "wrong" : "", `Dice ${dice.toFixed(3)}`));
    if (parts.length > 1) parts.splice(1, 0, ", ");
    return made("div", "", swatch, `${name}: `, ...(parts.length ? parts : ["not known"]));
  });
}

function predictionLines(view) {
  const names = Object.keys(view.predicted), all = Object.values(view.predicted);
  // Of classes the true one is named; a label is there or not.
  const classes = names.length > 1 && Math.abs(all.reduce((sum, one) => sum + one, 0) - 1) < 1e-3;
  const label = (truth, name) => {
    if (view.numbers) return truth;
    if (!classes) return truth ? "yes" : "no";
    return names.find((one) => view.truth[one] === 1) ?? (names.length === 2 ? names.find((one) => one !== name) : `not ${name}`);
  };
  const shown = view.numbers || names.length > 2 || main(view)[0] !== names[1] ? names : [names[1]];
  return shown.map((name) => {
    const value = view.predicted[name], truth = view.truth[name];
    const wrong = truth !== undefined && !view.numbers && Math.abs(value - truth) > 0.5;
    const number = view.numbers ? value.toPrecision(4) : value.toFixed(3);
    const known = truth === undefined ? "" : `, label ${label(truth, name)}`;
    const what = view.numbers ? name : `p(${name})`;
    return made("div", wrong ? "wrong" : "", `${what} = ${number}${known}`);
  });
}

function show() {
  for (const one of state.shown) one.viewer.destroy();
  const exam = DATA.exams[state.order[state.at]];
  byId("position").textContent = `${state.at + 1} / ${DATA.exams.length}`;
  byId("name").href = `#${state.order[state.at] + 1}`;
  const off = exam.error === null ? "" : masked ? `Dice ${(1 - exam.error).toFixed(3)}` : `error ${exam.error.toFixed(3)}`;
  byId("name").textContent = [exam.name, off].filter(Boolean).join(", ");
  const root = byId("views");
  root.replaceChildren();
  // Right breasts at the left, left ones at the right, a row for each view, as radiologists hang them.
  const sides = new Set(exam.views.map((view) => view.side));
  const hung = sides.has("R") && sides.has("L");
  const columns = hung ? 2 : Math.ceil(Math.sqrt(exam.views.length));
  root.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
  const rows = hung ? hangingRows(exam.views) : [];
  // All cells first: a viewer opens at the size that its cell has then.
  const cells = exam.views.map((view, i) => {
    const told = made("div", hung && view.side === "L" ? "told right" : "told", ...lines(view));
    const cell = made("div", "view", made("div", "image"), told, made("div", hung && view.side === "L" ? "scale right" : "scale"));
    if (hung) {
      cell.style.gridColumn = view.side === "L" ? 2 : 1;
      cell.style.gridRow = rows[i];
    }
    root.append(cell);
    return cell;
  });
  state.shown = exam.views.map((view, i) => ({ view, viewer: opened(cells[i].querySelector(".image"), view), masks: {} }));
  for (const { viewer } of state.shown) windowedByDragging(viewer.element);
  apply();
}

// The row of each view, in their order: of several images of one side and view each has its own.
function hangingRows(views) {
  const seen = {};
  const places = views.map((view) => {
    const here = `${view.view} ${view.side === "L"}`;
    seen[here] = (seen[here] || 0) + 1;
    return `${view.view} ${seen[here]}`;
  });
  const rows = [...new Set(places)];
  return places.map((place) => rows.indexOf(place) + 1);
}

// Tiles of an image or of a mask over it, which has the same scales.
function tiled(view, folder) {
  return {
    height: view.height,
    width: view.width,
    tileSize: DATA.tile,
    maxLevel: view.levels,
    minLevel: 0,
    getTileUrl: (level, x, y) => `${folder}/${view.levels - level}/${x}_${y}.png`,
  };
}

function opened(element, view) {
  const viewer = OpenSeadragon({
    element,
    drawer: "canvas",
    showNavigationControl: false,
    maxZoomPixelRatio: 8,
    animationTime: 0.3,
    imageSmoothingEnabled: false,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    tileSources: tiled(view, `tiles/${view.number}`),
  });
  // Masks are on the same canvas as their image, and keep their colours.
  if (masked) viewer.addHandler("tile-drawing", ({ context, tiledImage }) => {
    context.filter = tiledImage === viewer.world.getItemAt(0) ? grey() : "none";
  });
  viewer.addHandler("update-viewport", () => scaleBar(viewer, view));
  viewer.addHandler("open", () => {
    hang(viewer, view);
    for (const [left, top, right, bottom, what] of view.boxes) {
      const box = made("div", "box", made("span", "", what));
      const w = view.width;
      viewer.addOverlay({ element: box, location: new OpenSeadragon.Rect(left / w, top / w, (right - left) / w, (bottom - top) / w) });
    }
    if (DATA.evidence) ask(view.number);
    for (const which of view.masks) {
      viewer.addTiledImage({
        tileSource: tiled(view, `masks/${view.number}/${which}`),
        opacity: 0,
        success: ({ item }) => {
          const one = state.shown.find((shown) => shown.viewer === viewer);
          if (one) one.masks[which] = item;
          apply();
        },
      });
    }
    apply();
  });
  // OpenSeadragon scales what is seen by the pane's diagonal, which cuts images where the pane becomes narrower: those
  // that are seen whole stay so. It does that after this event.
  viewer.addHandler("resize", () => {
    if (viewer.hung === place(viewer)) queueMicrotask(() => hang(viewer, view));
  });
  return viewer;
}

// The whole image; the chest walls meet in the middle.
function hang(viewer, view) {
  viewer.viewport.goHome(true);
  const bounds = viewer.viewport.getBounds(), size = viewer.world.getItemAt(0).getBounds();
  if (view.side && bounds.width > size.width) {
    const x = view.side === "R" ? size.width - bounds.width : 0;
    viewer.viewport.fitBounds(new OpenSeadragon.Rect(x, bounds.y, bounds.width, bounds.height), true);
  }
  viewer.hung = place(viewer);
}

// Where a viewer looks, whatever the sides of its pane.
function place({ viewport }) {
  const { x, y } = viewport.getCenter();
  return `${x} ${y} ${viewport.getZoom()}`;
}

// A bar of 1, 2 or 5 times a power of ten millimetres, at most 120 pixels of the screen long.
function scaleBar(viewer, view) {
  const bar = viewer.element.parentElement?.querySelector(".scale");
  if (!bar || !(view.mm > 0) || !viewer.world.getItemCount()) return;
  const pixels = viewer.world.getItemAt(0).viewportToImageZoom(viewer.viewport.getZoom(true));
  const most = (120 * view.mm) / pixels, power = 10 ** Math.floor(Math.log10(most));
  const mm = [5, 2, 1].map((one) => one * power).find((one) => one <= most);
  bar.style.width = `${(mm * pixels) / view.mm}px`;
  bar.textContent = mm < 1 ? `${mm.toPrecision(1)} mm` : `${mm} mm`;
}

function grey() {
  return JSON.stringify(state.grey) === JSON.stringify(WHOLE_SCALE) ? "none" : "url(#grey)";
}

// Show grey values between centre - width / 2 and centre + width / 2 from black to white.
function windowed(change) {
  Object.assign(state.grey, change);
  const now = state.grey;
  now.width = Math.min(Math.max(now.width, 0.01), 2);
  now.centre = Math.min(Math.max(now.centre, 0), 1);
  byId("invert").checked = now.invert;
  document.body.classList.toggle("inverted", now.invert);
  const slope = (now.invert ? -1 : 1) / now.width, middle = 0.5 - slope * now.centre;
  for (const channel of document.querySelectorAll("#grey feFuncR, #grey feFuncG, #grey feFuncB")) {
    channel.setAttribute("slope", slope);
    channel.setAttribute("intercept", middle);
  }
  for (const { viewer } of state.shown) {
    if (masked) viewer.forceRedraw();
    else viewer.drawer.canvas.style.filter = grey();
  }
}

// With the right mouse button or Shift: to the right for more contrast, up for a brighter image.
function windowedByDragging(element) {
  let last = null;
  element.addEventListener("contextmenu", (event) => event.preventDefault());
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 2 && !event.shiftKey) return;
    last = event;
    event.stopPropagation();
    element.setPointerCapture(event.pointerId);
  }, true);
  element.addEventListener("pointermove", (event) => {
    if (!last) return;
    event.stopPropagation();
    const { centre, width } = state.grey, size = Math.max(width, 0.05);
    windowed({
      centre: centre + ((event.clientY - last.clientY) * size) / 300,
      width: width * Math.exp((last.clientX - event.clientX) / 200),
    });
    last = event;
  }, true);
  for (const end of ["pointerup", "pointercancel"]) element.addEventListener(end, () => (last = null), true);
}

function ask(number) {
  if (state.maps.has(number)) return placed(number);
  const place = `evidence/${number}.${DATA.evidence}`;
  if (DATA.evidence !== "js") return gotEvidence(number, place);
  const script = document.createElement("script");
  script.src = place;
  document.head.append(script);
}

// The scripts in evidence/ call it.
function gotEvidence(number, url) {
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height).data;
    const values = new Uint8Array(image.width * image.height);
    for (let i = 0; i < values.length; i++) values[i] = pixels[4 * i];
    state.maps.set(number, { values, width: image.width, height: image.height });
    placed(number);
  };
  image.src = url;
}

function placed(number) {
  const one = state.shown.find((shown) => shown.view.number === number);
  if (!one || one.canvas) return;
  const map = state.maps.get(number);
  one.canvas = made("canvas", "map");
  one.canvas.width = map.width;
  one.canvas.height = map.height;
  one.viewer.addOverlay({ element: one.canvas, location: new OpenSeadragon.Rect(0, 0, 1, one.view.height / one.view.width) });
  apply();
}

// Black body colours: red for little, yellow for much.
function painted(canvas, values) {
  const from = 2.55 * byId("threshold").value;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  values.forEach((value, i) => {
    const opaque = value > 0 && value >= from ? Math.min(255, 64 + value) : 0;
    image.data.set([255, Math.min(255, 2 * Math.max(0, value - 64)), 0, opaque], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

function apply() {
  byId("from").textContent = `${byId("threshold").value} %`;
  painted(byId("colours"), Uint8Array.from({ length: 256 }, (_, value) => value));
  windowed({});
  for (const one of state.shown) {
    for (const box of one.viewer.element.querySelectorAll(".box")) box.classList.toggle("hidden", !byId("boxes").checked);
    one.masks.predicted?.setOpacity(byId("predicted").checked ? byId("opacity").value / 100 : 0);
    one.masks.reference?.setOpacity(byId("reference").checked ? 1 : 0);
    if (!one.canvas) continue;
    painted(one.canvas, state.maps.get(one.view.number).values);
    one.canvas.style.opacity = byId("opacity").value / 100;
    one.canvas.classList.toggle("hidden", !byId("evidence").checked);
  }
}

// To an exam by its name, or its number by decreasing error, which links have.
function jump(text) {
  const named = DATA.exams.findIndex((exam) => exam.name === text);
  const number = named < 0 ? DATA.exams.findIndex((_, i) => String(i + 1) === text.replace("#", "")) : named;
  const at = state.order.indexOf(number);
  if (at < 0 || at === state.at) return at >= 0;
  state.at = at;
  show();
  return true;
}

function go(step) {
  const at = Math.min(Math.max(state.at + step, 0), DATA.exams.length - 1);
  if (at === state.at) return;
  state.at = at;
  show();
}

byId("previous").onclick = () => go(-1);
byId("next").onclick = () => go(1);
byId("exam").onchange = ({ target }) => {
  target.placeholder = jump(target.value.trim()) ? "go to" : `no ${target.value}`;
  target.value = "";
  target.blur();
};
byId("exam").onkeydown = ({ key, target }) => {
  if (key === "Enter" || key === "Escape") target.blur();
};
// Copied, not followed: the server answers only to addresses that the user enters.
byId("name").onclick = (event) => {
  event.preventDefault();
  navigator.clipboard?.writeText(event.target.href);
};
byId("exams").append(...DATA.exams.map(({ name }) => new Option(name, name)));
window.onhashchange = () => jump(location.hash);
byId("invert").onchange = ({ target }) => windowed({ invert: target.checked });
byId("order").onchange = (event) => {
  state.order = sorted(event.target.value);
  state.at = 0;
  event.target.blur();
  show();
};
const KEYS = { e: "evidence", m: "predicted", r: "reference", b: "boxes" };
for (const id of Object.values(KEYS)) byId(id).onchange = apply;
for (const id of ["opacity", "threshold"]) byId(id).oninput = apply;
const parts = { evidence: DATA.evidence, masks: masked, findings: DATA.exams.some((exam) => exam.views.some((view) => view.boxes.length)) };
for (const { classList } of document.querySelectorAll(".evidence, .masks, .findings")) {
  classList.toggle("hidden", !Object.entries(parts).some(([name, there]) => there && classList.contains(name)));
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.id === "exam") return;
  const steps = { ArrowRight: 1, n: 1, ArrowLeft: -1, p: -1 };
  if (["range", "select-one"].includes(event.target.type) && event.key.startsWith("Arrow")) return;
  if (event.key in steps) go(steps[event.key]);
  else if (event.key in KEYS) {
    const box = byId(KEYS[event.key]);
    box.checked = !box.checked;
    apply();
  } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    const up = event.key === "ArrowUp" ? 1 : -1, { centre, width } = state.grey;
    windowed(event.shiftKey ? { width: width * 0.9 ** up } : { centre: centre - 0.05 * width * up });
  } else if (event.key === "i") windowed({ invert: !state.grey.invert });
  else if (event.key === "0") {
    for (const one of state.shown) hang(one.viewer, one.view);
    windowed(WHOLE_SCALE);
  } else return;
  event.preventDefault();
  event.stopPropagation();
}, true);
state.order = sorted("error");
if (!jump(location.hash) || !state.shown.length) show();
