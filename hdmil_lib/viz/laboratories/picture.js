// A picture, and the strokes that the pointer draws on it: places as shares of its width and height.

const PAUSE = 60; // ms between two messages of one stroke

function render({ model, el }) {
  const picture = document.createElement("img");
  picture.className = "laboratory-picture";
  picture.draggable = false;
  picture.style.cssText = "max-width:100%;touch-action:none;user-select:none";
  el.append(picture);
  let address = null;
  const show = () => {
    const bytes = model.get("value");
    if (address) URL.revokeObjectURL(address);
    address = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
    picture.src = address;
  };
  model.on("change:value", show);
  show();

  let points = [], timer = null, down = false;
  const send = () => {
    timer = null;
    if (!points.length) return;
    model.send({ points });
    points = points.slice(-1); // the stroke goes on from here
  };
  const note = (event) => {
    const box = picture.getBoundingClientRect();
    points.push([(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]);
    timer ??= setTimeout(send, PAUSE);
  };
  if (model.get("drawn_on")) {
    picture.style.cursor = "crosshair";
    picture.onpointerdown = (event) => {
      down = true;
      points = [];
      picture.setPointerCapture(event.pointerId);
      note(event);
    };
    picture.onpointermove = (event) => down && note(event);
    picture.onpointerup = picture.onpointercancel = () => {
      down = false;
      clearTimeout(timer);
      send();
      points = [];
    };
  }
  return () => {
    model.off("change:value", show);
    clearTimeout(timer);
    URL.revokeObjectURL(address);
  };
}

export default { render };
