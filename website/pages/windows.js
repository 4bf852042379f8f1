"use strict";
// The live figure: the geometry of spatial_tokens.grid, and the extractor's parameters as SPProjectorConfig counts them.

const PRESETS = /*presets*/ {};
const FREQUENCIES = 3;
const FIELDS = ["rows", "columns", "variant", "kernels", "vision", "spatial", "rank"];
const get = (id) => document.getElementById(id);

// "4, 8x12" to [[4, 4], [8, 12]]; throws an Error that says what is wrong.
function parseSizes(text) {
  return text.split(",").map((part) => {
    const match = /^\s*(\d+)\s*(?:[x×]\s*(\d+))?\s*$/.exec(part);
    if (!match) throw new Error(`kernel sizes are numbers, or height x width, with commas between: not "${part.trim()}"`);
    return [Number(match[1]), Number(match[2] ?? match[1])];
  });
}

function checkSizes(grid, sizes, variant) {
  const named = ["rows", "columns"];
  sizes.forEach((size, index) => size.forEach((side, axis) => {
    if (side < 1) throw new Error("kernel sizes must be positive");
    if (side > grid[axis]) throw new Error(`kernel ${size.join(" x ")} is larger than the grid of ${grid.join(" x ")}`);
    if (variant === "cropping" && (grid[axis] - side) % 2)
      throw new Error(`a window of ${side} cannot be centered in ${grid[axis]} ${named[axis]}: ${grid[axis]} - ${side} is odd`);
    if (index && side < sizes[index - 1][axis]) throw new Error("kernel sizes must increase");
  }));
  sizes.forEach((size, index) => {
    if (index && size.join() === sizes[index - 1].join()) throw new Error("kernel sizes must increase");
  });
}

// Rectangles [top, left, height, width] in patches.
function windowsOf(grid, size, variant) {
  if (variant === "cropping") return [[(grid[0] - size[0]) / 2, (grid[1] - size[1]) / 2, size[0], size[1]]];
  const bins = (side, count) => Array.from({length: count}, (_, i) => {
    const start = Math.floor(i * side / count);
    return [start, Math.ceil((i + 1) * side / count) - start];
  });
  return bins(grid[0], size[0]).flatMap(([top, height]) => bins(grid[1], size[1]).map(([left, width]) => [top, left, height, width]));
}

function parametersOf(sizes, vision, spatial, rank) {
  const dense = sizes.reduce((sum, [height, width]) => sum + height * width, 0) * vision * spatial;
  const cores = sizes.reduce((sum, size) => sum + Math.min(FREQUENCIES, ...size) ** 2, 0) * rank * spatial;
  return {dense, factorized: vision * rank + cores};
}

function draw(grid, size, variant) {
  const make = (name, attributes, parent) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  };
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `-0.2 -0.2 ${grid[1] + 0.4} ${grid[0] + 0.4}`);
  svg.setAttribute("role", "img");
  const lines = [];
  for (let row = 0; row <= grid[0]; row++) lines.push(`M0 ${row}H${grid[1]}`);
  for (let column = 0; column <= grid[1]; column++) lines.push(`M${column} 0V${grid[0]}`);
  make("path", {class: "grid", d: lines.join("")}, svg);
  const windows = windowsOf(grid, size, variant);
  for (const [y, x, height, width] of windows) make("rect", {class: variant === "cropping" ? "window" : "bin", x, y, width, height}, svg);
  const text = variant === "cropping" ? "patches" : `bins of ${new Set(windows.map((each) => `${each[2]} x ${each[3]}`)).size > 1 ? "several sizes" : `${windows[0][2]} x ${windows[0][3]}`}`;
  svg.setAttribute("aria-label", `${size.join(" x ")} ${text}`);
  return [svg, `${size.join(" x ")} ${text}`];
}

function update() {
  const number = (id) => {
    const value = Number(get(id).value);
    if (!Number.isInteger(value) || value < 1) throw new Error(`${get(id).parentElement.firstChild.textContent.trim()} must be a positive integer`);
    return value;
  };
  const error = get("windows-error"), figure = get("windows-figure"), summary = get("windows-summary"), python = get("windows-python");
  try {
    const grid = [number("rows"), number("columns")], variant = get("variant").value, sizes = parseSizes(get("kernels").value);
    if (Math.max(...grid) > 64) throw new Error("the figure draws at most 64 rows and columns");
    checkSizes(grid, sizes, variant);
    if (number("rank") > number("vision")) throw new Error("the rank is at most the vision width");
    const {dense, factorized} = parametersOf(sizes, number("vision"), number("spatial"), number("rank"));
    figure.replaceChildren(...sizes.map((size, index) => {
      const [svg, text] = draw(grid, size, variant), holder = document.createElement("figure"), caption = document.createElement("figcaption");
      caption.textContent = `token ${index + 1}: ${text}`;
      holder.append(svg, caption);
      return holder;
    }));
    const patches = grid[0] * grid[1];
    const facts = {
      "spatial tokens": sizes.length, "patch tokens": patches, "tokens in all": sizes.length + patches,
      "dense parameters": dense, "in bfloat16, MiB": Math.round(dense / 2 ** 19), "factorized parameters": factorized,
    };
    summary.replaceChildren(...Object.entries(facts).map(([name, value]) => {
      const fact = document.createElement("span"), bold = document.createElement("b");
      bold.textContent = value.toLocaleString("en-US");
      bold.dataset.fact = name;
      fact.append(`${name}: `, bold);
      return fact;
    }));
    const told = (size) => size[0] === size[1] ? size[0] : `(${size.join(", ")})`;
    python.textContent = `from spatial_tokens import SpatialFeatureExtractor\n\nextractor = SpatialFeatureExtractor(\n`
      + `    ${number("vision")}, ${number("spatial")}, grid_size=(${grid.join(", ")}), kernel_sizes=(${sizes.map(told).join(", ")},), variant="${variant}"\n)`;
    error.textContent = "";
    history.replaceState(null, "", "#" + new URLSearchParams(FIELDS.map((id) => [id, get(id).value])));
  } catch (problem) {
    error.textContent = problem.message;
    for (const part of [figure, summary, python]) part.replaceChildren();
  }
}

function choose(name) {
  for (const [id, value] of Object.entries(PRESETS[name] ?? {})) get(id).value = value;
}

get("preset").replaceChildren(...["own", ...Object.keys(PRESETS)].map((name) => new Option(name)));
const shared = new URLSearchParams(location.hash.slice(1));
if (FIELDS.every((id) => shared.has(id))) FIELDS.forEach((id) => { get(id).value = shared.get(id); });
else { get("preset").selectedIndex = 1; choose(get("preset").value); }
get("preset").addEventListener("change", () => { choose(get("preset").value); update(); });
FIELDS.forEach((id) => get(id).addEventListener("input", () => { get("preset").value = "own"; update(); }));
get("windows-controls").addEventListener("submit", (event) => event.preventDefault());
update();
