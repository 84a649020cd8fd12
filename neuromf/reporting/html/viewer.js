/* A volume in three planes. A page carries each volume once, as its axial slices side by side in one picture;
   the other two planes are cut here. Neurological: the subject's left is on the left, the face of sagittal slices too. */

const PLANES = [
  { name: "Sagittal", normal: 0, across: 1, up: 2, mirrored: true, left: "A", right: "P" },
  { name: "Coronal", normal: 1, across: 0, up: 2, mirrored: false, left: "L", right: "R" },
  { name: "Axial", normal: 2, across: 0, up: 1, mirrored: false, left: "L", right: "R" },
];

/** The grey levels of a volume, i fastest, then j, then k. */
async function unpack(sprite) {
  const image = new Image();
  image.src = sprite.data;
  await image.decode();
  const canvas = make("canvas", { width: image.width, height: image.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height).data;
  const [I, J, K] = sprite.size, [pitch, rows] = sprite.tile, grey = new Uint8Array(I * J * K);
  for (let k = 0; k < K; k++) {
    const left = (k % sprite.columns) * pitch, top = Math.floor(k / sprite.columns) * rows;
    for (let j = 0; j < J; j++)
      for (let i = 0; i < I; i++) grey[i + I * (j + J * k)] = pixels[4 * ((top + j) * image.width + left + i)];
  }
  return grey;
}

class Viewer {
  constructor(box, spec) {
    this.box = box;
    this.spec = spec;
    this.grey = new Map();
    this.chosen = { ...spec.items[0].is };
    this.at = spec.items[0].sprite.size.map((n) => Math.floor(n / 2));
    this.number = box.dataset.viewer;
    this.build();
    this.select();
    onWidth(this.planes[0].canvas, () => this.draw());
  }

  get item() {
    const all = this.spec.items, fits = (it) => Object.entries(this.chosen).every(([key, value]) => it.is[key] === value);
    return all.find(fits) || all[0];
  }

  build() {
    const parts = Object.keys(this.spec.items[0].is).map((axis) => this.picker(axis)).filter(Boolean);
    const grid = make("div", { class: "planes" });
    this.planes = PLANES.map((plane) => this.plane(plane, grid));
    this.cross = make("input", { type: "checkbox" });
    this.cross.checked = true;
    this.cross.addEventListener("change", () => this.draw());
    const foot = make("div", { class: "foot" }, make("span", {}, this.spec.note), make("label", {}, this.cross, " lines"));
    this.tint = make("input", { type: "checkbox" });
    this.tint.checked = true;
    this.tint.addEventListener("change", () => this.draw());
    if (this.spec.items.some((item) => item.mask)) foot.append(make("label", {}, this.tint, " mask"));
    this.box.replaceChildren(...parts, grid, foot);
  }

  /** Radio buttons for one thing that items differ by. */
  picker(axis) {
    const values = [...new Set(this.spec.items.map((item) => item.is[axis]))];
    if (values.length < 2) return null;
    const field = make("fieldset", {}, make("legend", {}, axis));
    for (const value of values) {
      const radio = make("input", { type: "radio", name: `viewer-${this.number}-${axis}`, value });
      radio.checked = value === this.chosen[axis];
      radio.addEventListener("change", () => { this.chosen[axis] = value; this.select(); });
      field.append(make("label", { class: "pill" }, radio, value));
    }
    return field;
  }

  plane(plane, grid) {
    const canvas = make("canvas", { role: "img" }), output = make("output");
    const id = `viewer-${this.number}-${plane.name}`;
    const slider = make("input", { type: "range", id, min: 0, max: 0, step: 1 });
    slider.addEventListener("input", () => { this.at[plane.normal] = +slider.value; this.draw(); });
    const drag = (event) => { if (event.buttons & 1) this.aim(plane, canvas, event); };
    canvas.addEventListener("pointerdown", drag);
    canvas.addEventListener("pointermove", drag);
    grid.append(make("div", { class: "plane" }, canvas, make("div", { class: "bar" }, make("label", { for: id }, plane.name), output), slider));
    return { ...plane, canvas, slider, output };
  }

  async select() {
    const item = this.item, sprite = item.sprite;
    if (!this.grey.has(item)) this.grey.set(item, [await unpack(sprite), item.mask && (await unpack(item.mask))]);
    this.at = this.at.map((value, axis) => Math.min(value, sprite.size[axis] - 1));
    this.draw();
  }

  /** Where a volume lies in the square of a plane: all planes have the same millimetres to the pixel. */
  frame(plane, side) {
    const { mm } = this.item.sprite, scale = side / Math.max(...mm);
    const width = mm[plane.across] * scale, height = mm[plane.up] * scale;
    return { left: (side - width) / 2, top: (side - height) / 2, width, height };
  }

  aim(plane, canvas, event) {
    const box = canvas.getBoundingClientRect(), { size } = this.item.sprite, f = this.frame(plane, box.width);
    const limit = (share, n) => Math.min(n - 1, Math.max(0, Math.floor(share * n)));
    const across = (event.clientX - box.left - f.left) / f.width, down = (event.clientY - box.top - f.top) / f.height;
    this.at[plane.across] = limit(plane.mirrored ? 1 - across : across, size[plane.across]);
    this.at[plane.up] = limit(1 - down, size[plane.up]);
    this.draw();
  }

  draw() {
    const [grey, mask] = this.grey.get(this.item) || [];
    if (!grey) return;
    for (const plane of this.planes) {
      const size = this.item.sprite.size, index = this.at[plane.normal], n = size[plane.normal];
      plane.slider.max = n - 1;
      plane.slider.value = index;
      plane.slider.setAttribute("aria-valuetext", `slice ${index + 1} of ${n}`);
      plane.output.textContent = `${index + 1} / ${n}`;
      plane.canvas.setAttribute("aria-label", `${plane.name} slice ${index + 1} of ${n}`);
      this.paint(plane, this.slice(grey, this.tint.checked && mask, plane, index));
    }
  }

  /** One slice, a pixel to the voxel; what the mask marks is tinted. */
  slice(grey, mask, plane, index) {
    const size = this.item.sprite.size, [w, h] = [size[plane.across], size[plane.up]], stride = [1, size[0], size[0] * size[1]];
    const image = new ImageData(w, h);
    for (let y = 0; y < h; y++)
      for (let x = 0; x < w; x++) {
        const a = plane.mirrored ? w - 1 - x : x, b = h - 1 - y;
        const at = index * stride[plane.normal] + a * stride[plane.across] + b * stride[plane.up], v = grey[at];
        image.data.set(mask && mask[at] > 127 ? [0.5 * v + 127, 0.5 * v + 38, 0.5 * v + 30, 255] : [v, v, v, 255], 4 * (y * w + x));
      }
    const canvas = make("canvas", { width: w, height: h });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  paint(plane, picture) {
    const canvas = plane.canvas, ratio = window.devicePixelRatio || 1, side = Math.round(canvas.clientWidth * ratio);
    if (!side) return;
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d"), f = this.frame(plane, side), size = this.item.sprite.size;
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, f.left, f.top, f.width, f.height);
    if (this.cross.checked) {
      const across = (this.at[plane.across] + 0.5) / size[plane.across], up = (this.at[plane.up] + 0.5) / size[plane.up];
      const x = Math.round(f.left + f.width * (plane.mirrored ? 1 - across : across)), y = Math.round(f.top + f.height * (1 - up));
      context.fillStyle = "rgba(108, 197, 211, .45)";
      context.fillRect(x, 0, Math.max(1, Math.round(ratio)), side);
      context.fillRect(0, y, side, Math.max(1, Math.round(ratio)));
    }
    context.fillStyle = "rgba(255, 255, 255, .6)";
    context.font = `${11 * ratio}px system-ui, sans-serif`;
    context.fillText(plane.left, 7 * ratio, 17 * ratio);
    context.textAlign = "right";
    context.fillText(plane.right, side - 7 * ratio, 17 * ratio);
  }
}

for (const box of document.querySelectorAll("[data-viewer]")) new Viewer(box, PAGE.viewers[box.dataset.viewer]);
