// Points in a square; a click selects the nearest one.

const MARGIN = 12, REACH = 14;

function render({ model, el }) {
  const size = model.get("size"), ratio = window.devicePixelRatio || 1;
  const canvas = document.createElement("canvas");
  canvas.className = "tile-scatter";
  canvas.style.cssText = `width:${size}px;height:${size}px;border:1px solid #bbb;background:#fff;cursor:pointer`;
  canvas.width = canvas.height = size * ratio;
  el.append(canvas);
  const numbers = model.get("_points"), colors = model.get("_colors");
  const points = new Float32Array(numbers.buffer.slice(numbers.byteOffset, numbers.byteOffset + numbers.byteLength));
  const place = (i) => [MARGIN + points[2 * i] * (size - 2 * MARGIN), size - MARGIN - points[2 * i + 1] * (size - 2 * MARGIN)];

  const draw = () => {
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, size, size);
    const disc = (i, radius, style, stroke) => {
      context.beginPath();
      context.arc(...place(i), radius, 0, 2 * Math.PI);
      context[stroke ? "strokeStyle" : "fillStyle"] = style;
      context[stroke ? "stroke" : "fill"]();
    };
    for (let i = 0; i < points.length / 2; i++) {
      const [r, g, b] = [0, 1, 2].map((k) => colors.getUint8(3 * i + k));
      disc(i, 3.5, `rgba(${r},${g},${b},0.8)`, false);
    }
    context.lineWidth = 2;
    for (const i of model.get("region")) disc(i, 5, "#2b2f36", true);
    context.lineWidth = 3;
    const selected = model.get("selected");
    if (selected !== null) disc(selected, 8, "#e69f00", true);
  };
  canvas.onclick = (event) => {
    let best = null, least = REACH;
    for (let i = 0; i < points.length / 2; i++) {
      const [x, y] = place(i), distance = Math.hypot(x - event.offsetX, y - event.offsetY);
      if (distance < least) [best, least] = [i, distance];
    }
    model.set("selected", best);
    model.save_changes();
  };
  model.on("change:selected", draw);
  model.on("change:region", draw);
  draw();
}

export default { render };
