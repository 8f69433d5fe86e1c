"use strict";
(() => {
  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // Titles move out of the drawing into a tooltip that shows at once.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest && event.target.closest("svg [data-tip], svg :has(> title)");
    tip.hidden = !mark;
    if (!mark) return;
    const title = mark.querySelector(":scope > title");
    if (title) {
      mark.dataset.tip = title.textContent;
      title.remove();
    }
    tip.textContent = mark.dataset.tip;
    const right = event.clientX + 14 + tip.offsetWidth > innerWidth;
    tip.style.left = `${right ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)}px`;
  });

  const spans = document.querySelector("svg.spans");
  if (!spans) return;
  const whole = spans.viewBox.baseVal.width, height = spans.viewBox.baseVal.height;
  const axis = document.querySelector(".time-axis"), left = Number(axis.dataset.left);
  let from = 0, width = whole;

  const element = (tag, attributes) => {
    const made = document.createElementNS(axis.namespaceURI, tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    axis.append(made);
    return made;
  };
  const draw = () => {
    width = Math.min(whole, Math.max(whole / 500, width));
    from = Math.min(whole - width, Math.max(0, from));
    spans.setAttribute("viewBox", `${from} 0 ${width} ${height}`);
    const ms = Number(spans.dataset.ms) / whole, raw = width * ms / 10, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
    axis.replaceChildren();
    for (let tick = Math.ceil(from * ms / step - 1e-9); tick * step <= (from + width) * ms * (1 + 1e-9); tick++) {
      const x = left + (tick * step / ms - from) / width * whole;
      element("line", { class: "grid", x1: x, x2: x, y1: 26, y2: axis.dataset.height });
      const label = element("text", { class: "tick", "text-anchor": "middle", x, y: 16 });
      label.textContent = (tick * step).toFixed(Math.max(0, -Math.floor(Math.log10(step))));
    }
  };
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => {
      const factor = Number(button.dataset.zoom), middle = from + width / 2;
      width = factor ? width / factor : whole;
      from = middle - Math.min(whole, width) / 2;
      draw();
    });
  }
  let held = null;
  spans.addEventListener("pointerdown", (event) => { held = event.clientX; });
  addEventListener("pointerup", () => { held = null; });
  addEventListener("pointermove", (event) => {
    if (held === null) return;
    from -= (event.clientX - held) / spans.getBoundingClientRect().width * width;
    held = event.clientX;
    draw();
  });
})();
