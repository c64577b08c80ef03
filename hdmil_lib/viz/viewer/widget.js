// The viewer in the browser. Python sends the geometry and the overlays once, and tiles when they are asked for.

const KEPT_TILES = 4000; // JPEG files kept here, some 60 MB
const BAR_PX = 120;
let OSD = null;

const bytesUrl = (bytes, type) => URL.createObjectURL(new Blob([bytes], { type }));

function element(tag, style, properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  made.style.cssText = style;
  return made;
}

// Tiles of one slide: each is asked for once, whatever shows it, and kept.
class TileStore {
  constructor(model) {
    this.model = model;
    this.kept = new Map();
    this.waiting = new Map();
    this.onError = new Set();
    model.on("msg:custom", (message, buffers) => this.receive(message, buffers));
  }

  get(tile, done) {
    const key = `${tile.level}/${tile.x}_${tile.y}`;
    const blob = this.kept.get(key);
    if (blob) {
      this.keep(key, blob);
      done(blob);
      return () => {};
    }
    if (!this.waiting.has(key)) {
      this.waiting.set(key, new Set());
      this.model.send({ kind: "tile", level: tile.level, x: tile.x, y: tile.y });
    }
    const callbacks = this.waiting.get(key);
    callbacks.add(done);
    return () => {
      callbacks.delete(done);
      if (callbacks.size || this.waiting.get(key) !== callbacks) return;
      this.waiting.delete(key);
      this.model.send({ kind: "drop", level: tile.level, x: tile.x, y: tile.y });
    };
  }

  receive(message, buffers) {
    if (message.kind !== "tile") return;
    const key = `${message.level}/${message.x}_${message.y}`;
    const blob = new Blob([buffers[0]], { type: "image/jpeg" });
    this.keep(key, blob);
    if (message.error) this.onError.forEach((show) => show(message.error));
    const callbacks = this.waiting.get(key) ?? [];
    this.waiting.delete(key);
    callbacks.forEach((done) => done(blob));
  }

  keep(key, blob) {
    this.kept.delete(key);
    this.kept.set(key, blob);
    if (this.kept.size > KEPT_TILES) this.kept.delete(this.kept.keys().next().value);
  }
}

function tileSource(about, store) {
  const source = new OSD.TileSource({
    width: about.width, height: about.height, tileSize: about.side, tileOverlap: 0,
    minLevel: about.min_level, maxLevel: about.max_level,
  });
  source.getTileUrl = (level, x, y) => `slide/${level}/${x}_${y}`;
  source.downloadTileStart = (job) => {
    job.userData.cancel = store.get(job.tile, (blob) => job.finish(blob, null, "rasterBlob"));
  };
  source.downloadTileAbort = (job) => job.userData.cancel?.();
  return source;
}

// Which tile of the grid lies where.
function tileGrid(model, about) {
  const bytes = model.get("_rowcol");
  const rowcol = new Int32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  const side = about.pitch;
  const rows = new Map();
  for (let i = 0; i < rowcol.length / 2; i++) rows.set(rowcol[2 * i] * about.shape[1] + rowcol[2 * i + 1], i);
  return {
    count: rowcol.length / 2,
    at(x, y) {
      const row = Math.floor(y / side), column = Math.floor(x / side);
      if (column < 0 || column >= about.shape[1]) return null;
      return rows.get(row * about.shape[1] + column) ?? null;
    },
    box: (i) => [rowcol[2 * i + 1] * side, rowcol[2 * i] * side, side, side],
    within(polygon) {
      const found = [];
      for (let i = 0; i < rowcol.length / 2; i++) {
        const [left, top] = this.box(i);
        if (inside(polygon, left + side / 2, top + side / 2)) found.push(i);
      }
      return found;
    },
  };
}

function inside(polygon, x, y) {
  let within = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const a = polygon[i], b = polygon[j];
    if (a.y > y !== b.y > y && x < ((b.x - a.x) * (y - a.y)) / (b.y - a.y) + a.x) within = !within;
  }
  return within;
}

function barLength(umPerPixel) {
  const room = umPerPixel * BAR_PX, power = 10 ** Math.floor(Math.log10(room));
  return Math.max(...[1, 2, 5].map((step) => step * power).filter((length) => length <= room));
}

function drawScaleBar(context, umPerPixel, height) {
  const length = barLength(umPerPixel), pixels = length / umPerPixel;
  const text = length < 1000 ? `${+length.toPrecision(3)} µm` : `${length / 1000} mm`;
  context.font = "13px sans-serif";
  const width = Math.max(pixels, context.measureText(text).width);
  context.fillStyle = "rgba(255,255,255,0.85)";
  context.fillRect(8, height - 42, width + 12, 34);
  context.fillStyle = "#2b2f36";
  context.fillText(text, 14, height - 25);
  context.fillRect(14, height - 18, pixels, 4);
}

function drawFrame(context, [left, top, width, height], line, color) {
  context.lineWidth = line + 2;
  context.strokeStyle = "#2b2f36";
  context.strokeRect(left, top, width, height);
  context.lineWidth = line;
  context.strokeStyle = color;
  context.strokeRect(left, top, width, height);
}

// The controls below the picture.
function controls(model, viewer) {
  const bar = element("div", "display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center;padding:6px 2px;min-height:24px");
  const choice = element("select", "max-width:16em", { className: "slide-overlay", title: "overlay" });
  const slider = element("input", "width:90px", { type: "range", min: 0, max: 1, step: 0.01, className: "slide-opacity" });
  const legend = element("span", "display:inline-flex;gap:5px;align-items:center");
  const fit = element("button", "", { textContent: "whole slide", className: "slide-fit" });
  const status = element("span", "opacity:0.75;flex:1;text-align:right", { className: "slide-status" });
  const opacity = element("label", "display:inline-flex;gap:5px;align-items:center");
  opacity.append("opacity", slider);
  bar.append(choice, opacity, legend, fit, status);
  choice.onchange = () => { model.set("overlay", choice.value); model.save_changes(); };
  slider.oninput = () => { model.set("opacity", +slider.value); model.save_changes(); };
  fit.onclick = () => viewer.viewport.goHome();
  const update = () => {
    const layers = model.get("_layers");
    const names = ["", ...layers.map((layer) => layer.name)];
    choice.replaceChildren(
      ...names.map((name) => element("option", "", { value: name, textContent: name || "no overlay" })));
    for (const part of [choice, opacity, legend]) part.style.display = layers.length ? "inline-flex" : "none";
    choice.value = model.get("overlay");
    slider.value = model.get("opacity");
    const shown = layers.find((layer) => layer.name === model.get("overlay"))?.legend;
    legend.replaceChildren();
    if (!shown) return;
    const colors = shown.colors.length > 1 ? shown.colors : [shown.colors[0], shown.colors[0]];
    const width = colors.length > 2 ? 90 : 16;
    const swatch = element("span", `width:${width}px;height:12px;background:linear-gradient(to right,${colors.join(",")})`);
    legend.append(shown.low, swatch, shown.high);
  };
  return { bar, status, update };
}

// The selected tile beside its patch, with its values.
function drawPanel(panel, details, urls) {
  urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
  panel.replaceChildren();
  if (!details.title) {
    panel.append(element("p", "margin:0;opacity:0.75", {
      textContent: "Click a tile to see it. Hold the shift key and draw a line around tiles to mark them.",
    }));
    return;
  }
  const heading = element("div", "font-weight:bold", { textContent: details.title });
  const place = element("div", "opacity:0.75;margin-bottom:4px", { textContent: details.place });
  panel.append(heading, place);
  const pictures = [["tile", "image/jpeg", "tile: 256 × 256 pixels"], ["patch", "image/png", "patch: 16 × 16 pixels"]];
  const pair = element("div", "display:flex;flex-wrap:wrap;gap:6px");
  for (const [key, type, text] of pictures) {
    urls.push(bytesUrl(details[key], type));
    const figure = element("div", "flex:1 1 140px;max-width:220px");
    const style = "display:block;width:100%;aspect-ratio:1;image-rendering:" + (key === "patch" ? "pixelated" : "auto");
    figure.append(element("img", style, { src: urls.at(-1), alt: text, className: `slide-${key}` }));
    figure.append(element("div", "font-size:11px;opacity:0.75", { textContent: text }));
    pair.append(figure);
  }
  panel.append(pair);
  if (details.error) panel.append(element("div", "color:#d55e00", { textContent: details.error }));
  const table = element("table", "margin-top:6px;border-collapse:collapse;font-size:12px");
  for (const [name, value, rank] of details.values) {
    const line = table.insertRow();
    for (const text of [name, value, rank && `rank ${rank}`]) {
      const cell = line.insertCell();
      cell.textContent = text;
      cell.style.cssText = "padding:1px 8px 1px 0;text-align:left";
    }
  }
  panel.append(table);
}

function render({ model, el, store }) {
  OSD ??= loadOpenSeadragon();
  const about = model.get("_about"), grid = tileGrid(model, about), urls = [];
  const root = element("div", "font:13px sans-serif;width:100%", { className: "slide-viewer" });
  const row = element("div", "display:flex;gap:10px;align-items:stretch;flex-wrap:wrap");
  const stage = element("div", `position:relative;flex:3 1 360px;height:${model.get("height")}px;background:#fff;border:1px solid #bbb;box-sizing:border-box`);
  stage.dataset.lmSuppressShortcuts = "true"; // the keys move the slide, not the notebook
  const panel = element("div", "flex:1 1 190px;max-width:300px;min-width:0", { className: "slide-panel" });
  row.append(stage, ...(grid.count ? [panel] : []));
  root.append(row);
  el.append(root);

  const viewer = new OSD.Viewer({
    element: stage, tileSources: tileSource(about, store), drawer: "canvas", showNavigationControl: false,
    showNavigator: true, navigatorPosition: "BOTTOM_RIGHT", navigatorSizeRatio: 0.16,
    navigatorBackground: "#fff", navigatorBorderColor: "#bbb", imageLoaderLimit: 8,
    maxImageCacheCount: 500, timeout: 600000, maxZoomPixelRatio: 8, visibilityRatio: 0.3, animationTime: 0.4,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
  });
  const canvas = element("canvas", "position:absolute;inset:0;width:100%;height:100%;pointer-events:none");
  viewer.canvas.append(canvas);
  const { bar, status, update } = controls(model, viewer);
  root.append(bar);

  const images = new Map();
  let lasso = null, moved = false, gone = false;
  const toScreen = (x, y) => viewer.viewport.pixelFromPoint(new OSD.Point(x / about.width, y / about.width), true);
  const toSlide = (position) => viewer.viewport.pointFromPixel(position, true).times(about.width);
  const onScreen = ([x, y, width, height]) => {
    const start = toScreen(x, y), end = toScreen(x + width, y + height);
    return [start.x, start.y, end.x - start.x, end.y - start.y];
  };
  const draw = () => {
    const { clientWidth, clientHeight } = stage, ratio = window.devicePixelRatio || 1;
    if (gone || !clientWidth || !viewer.isOpen()) return;
    canvas.width = clientWidth * ratio;
    canvas.height = clientHeight * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    const shown = images.get(model.get("overlay"));
    if (shown) {
      context.globalAlpha = model.get("opacity");
      context.drawImage(shown.bitmap, ...onScreen([0, 0, ...shown.size]));
      context.globalAlpha = 1;
    }
    for (const i of model.get("region")) drawFrame(context, onScreen(grid.box(i)), 1.5, "#f0e442");
    const selected = model.get("selected");
    if (selected !== null) drawFrame(context, onScreen(grid.box(selected)), 3, "#e69f00");
    if (lasso) {
      context.setLineDash([5, 4]);
      context.lineWidth = 2;
      context.strokeStyle = "#2b2f36";
      context.beginPath();
      lasso.forEach((point) => context.lineTo(...Object.values(toScreen(point.x, point.y)).slice(0, 2)));
      context.closePath();
      context.stroke();
    }
    const pixels = onScreen([0, 0, about.width, about.height])[2];
    drawScaleBar(context, (about.mpp * about.width) / pixels, clientHeight);
  };
  const loadLayers = () => {
    for (const layer of model.get("_layers")) {
      createImageBitmap(new Blob([layer.png], { type: "image/png" })).then((bitmap) => {
        images.set(layer.name, { bitmap, size: layer.size });
        draw();
      });
    }
  };

  viewer.addHandler("open", draw);
  viewer.addHandler("update-viewport", draw);
  viewer.addHandler("resize", () => {
    // The page finds its size after the slide is opened; until the slide is moved, all of it is shown.
    if (!moved) setTimeout(() => gone || viewer.viewport.goHome(true));
    draw();
  });
  for (const name of ["canvas-press", "canvas-scroll"]) viewer.addHandler(name, () => { moved = true; });
  viewer.addHandler("tile-drawn", () => { root.dataset.drawn = "true"; });
  viewer.addHandler("canvas-click", (event) => {
    if (!event.quick) return;
    const place = toSlide(event.position), found = grid.at(place.x, place.y);
    if (event.originalEvent.shiftKey && found !== null) {
      const others = model.get("region").filter((i) => i !== found);
      model.set("region", others.length < model.get("region").length ? others : [...others, found]);
    } else {
      model.set("selected", found);
    }
    model.save_changes();
  });
  viewer.addHandler("canvas-drag", (event) => {
    if (!event.originalEvent.shiftKey && !lasso) return;
    event.preventDefaultAction = true;
    lasso = [...(lasso ?? []), toSlide(event.position)];
    draw();
  });
  viewer.addHandler("canvas-drag-end", (event) => {
    if (!lasso) return;
    event.preventDefaultAction = true;
    model.set("region", grid.within(lasso));
    model.save_changes();
    lasso = null;
    draw();
  });

  const showSelected = () => {
    const selected = model.get("selected");
    if (selected !== null && viewer.isOpen()) {
      const [x, y, width, height] = grid.box(selected);
      const center = new OSD.Point((x + width / 2) / about.width, (y + height / 2) / about.width);
      if (!viewer.viewport.getBounds().containsPoint(center)) viewer.viewport.panTo(center);
    }
    draw();
  };
  const showRegion = () => {
    const count = model.get("region").length;
    status.textContent = count ? `${count} tiles marked` : "";
    draw();
  };
  const showDetails = () => drawPanel(panel, model.get("_details"), urls);
  const showOverlay = () => { update(); draw(); };
  const showLayers = () => { loadLayers(); showOverlay(); };
  const showHeight = () => { stage.style.height = `${model.get("height")}px`; };
  const showError = (error) => { status.textContent = error; };
  const observed = {
    overlay: showOverlay, opacity: showOverlay, selected: showSelected, region: showRegion, _details: showDetails,
    height: showHeight, _layers: showLayers,
  };
  for (const [name, react] of Object.entries(observed)) model.on(`change:${name}`, react);
  store.onError.add(showError);
  showLayers();
  showRegion();
  showDetails();

  return () => {
    gone = true;
    for (const [name, react] of Object.entries(observed)) model.off(`change:${name}`, react);
    store.onError.delete(showError);
    viewer.destroy();
    urls.forEach((url) => URL.revokeObjectURL(url));
  };
}

export default () => {
  let store = null;
  return {
    initialize({ model }) { store = new TileStore(model); },
    render: ({ model, el }) => render({ model, el, store }),
  };
};
