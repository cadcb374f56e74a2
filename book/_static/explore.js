// Five drawings to touch. Each is a function of its place on the page; nothing is fetched and nothing is kept.
// Controls are those of the browser, so that keyboard, touch and screen reader work without further code; what is
// dragged can be moved with the arrow keys too.

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
  const fixed = (x, digits = 2) => (Number.isFinite(x) ? x.toFixed(digits).replace("-", "−") : "–");

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  function draw(parent, tag, attributes = {}, text = "") {
    const node = parent.appendChild(document.createElementNS(SVG, tag));
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  }
  const canvas = (place, width, height, label) => {
    const svg = draw(place, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    return svg;
  };
  function slider(place, words, { min, max, step = 1, value, show = String }, changed) {
    const input = el("input", { type: "range", min, max, step, value });
    const out = el("output");
    const tell = () => {
      out.textContent = show(+input.value);
      input.setAttribute("aria-valuetext", out.textContent);
    };
    input.addEventListener("input", () => { tell(); changed(+input.value); });
    place.append(el("label", {}, words, input, out));
    tell();
    return input;
  }
  function choice(place, words, names, changed) {
    const group = el("fieldset", { class: "controls" });
    group.style.cssText = "border:0;padding:0;margin:0";
    group.append(el("legend", { class: "visually-hidden" }, words));
    const name = `choice-${Math.random().toString(36).slice(2)}`;
    names.forEach((text, i) => {
      const input = el("input", { type: "radio", name, ...(i ? {} : { checked: "" }) });
      input.addEventListener("change", () => changed(i));
      group.append(el("label", {}, input, text));
    });
    place.append(group);
  }
  const controls = (place) => place.appendChild(el("div", { class: "controls" }));
  const voice = (place) => place.appendChild(el("p", { class: "said", role: "status", "aria-live": "polite" }));

  // --- 1. an accuracy matrix and its measures -------------------------------------------------------------

  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  function measures(R, b) {
    const T = R.length, last = R[T - 1], old = [...Array(T - 1).keys()], all = [...Array(T).keys()];
    const falls = old.map((j) => Math.max(...all.slice(j, T - 1).map((i) => R[i][j])) - last[j]);
    return {
      "average accuracy": mean(last),
      "backward transfer": mean(old.map((j) => last[j] - R[j][j])),
      "forward transfer": mean(old.map((j) => R[j][j + 1] - b)),
      forgetting: mean(falls),
      "max forgetting": Math.max(...falls),
      "learning accuracy": mean(all.map((j) => R[j][j])),
      "average anytime accuracy": mean(all.map((i) => mean(R[i].slice(0, i + 1)))),
      stability: old.reduce((a, j) => a + Math.min(last[j], R[j][j]), 0) / old.reduce((a, j) => a + R[j][j], 0),
      plasticity: mean(all.slice(1).map((j) => R[j][j])),
    };
  }
  function metrics(place) {
    const R = [[0.9, 0.5, 0.3], [0.7, 0.8, 0.4], [0.6, 0.7, 0.85]], T = R.length;
    const table = el("table"), head = el("tr", {}, el("th", { scope: "col" }, "after \\ on"));
    R.forEach((_, j) => head.append(el("th", { scope: "col" }, `task ${j}`)));
    table.append(head);
    const list = el("div", { class: "measures", role: "status", "aria-live": "polite" });
    const inputs = [];
    const show = () => {
      list.replaceChildren();
      for (const [name, value] of Object.entries(measures(R, 0.5)))
        list.append(el("div", { "data-measure": name }, el("span", {}, name), el("output", {}, fixed(value, 3))));
    };
    R.forEach((row, i) => {
      const line = el("tr", {}, el("th", { scope: "row" }, `task ${i}`));
      row.forEach((value, j) => {
        const input = el("input", { type: "number", min: 0, max: 1, step: 0.05, value, "aria-label": `accuracy on task ${j} after task ${i}` });
        input.addEventListener("input", () => { R[i][j] = clamp(+input.value || 0, 0, 1); show(); });
        inputs.push([input, i, j]);
        line.append(el("td", i === j ? { class: "on-diagonal" } : {}, input));
      });
      table.append(line);
    });
    place.append(table);
    const row = controls(place);
    const presets = {
      "as in the text": [[0.9, 0.5, 0.3], [0.7, 0.8, 0.4], [0.6, 0.7, 0.85]],
      "forgets all": [[0.95, 0.5, 0.5], [0.5, 0.95, 0.5], [0.5, 0.5, 0.95]],
      "frozen after task 0": [[0.95, 0.5, 0.5], [0.95, 0.5, 0.5], [0.95, 0.5, 0.5]],
      "helps the past": [[0.7, 0.5, 0.5], [0.8, 0.75, 0.5], [0.9, 0.85, 0.8]],
    };
    for (const [name, values] of Object.entries(presets)) {
      const button = el("button", { type: "button", class: "book-button" }, name);
      button.addEventListener("click", () => {
        for (const [input, i, j] of inputs) input.value = R[i][j] = values[i][j];
        show();
      });
      row.append(button);
    }
    place.append(list);
    show();
    return T;
  }

  // --- 2. λ on EWC's well ---------------------------------------------------------------------------------

  function well(place) {
    // The old loss is a narrow, slanted valley about 0; the new one a round bowl about b.
    const F = [[4.25, 3.75], [3.75, 4.25]], b = [1.5, 0.5], D = [[F[0][0], 0], [0, F[1][1]]];
    let log = 0, M = F;
    const form = (A, v) => (A[0][0] * v[0] ** 2 + 2 * A[0][1] * v[0] * v[1] + A[1][1] * v[1] ** 2) / 2;
    const least = (A, l) => {  // argmin of ½|θ − b|² + λ/2 θᵀAθ
      const p = 1 + l * A[0][0], q = l * A[0][1], r = 1 + l * A[1][1], det = p * r - q * q;
      return [(r * b[0] - q * b[1]) / det, (p * b[1] - q * b[0]) / det];
    };
    const row = controls(place);
    slider(row, "λ", { min: -3, max: 3, step: 0.1, value: 0, show: (x) => fixed(10 ** x, x < 0 ? 3 : 1) }, (x) => { log = x; show(); });
    choice(row, "The penalty's Fisher", ["full Fisher", "its diagonal"], (i) => { M = i ? D : F; show(); });
    const svg = canvas(place, 560, 330, "The plane of two parameters with the old task's valley, the new optimum and EWC's solution");
    const X = (x) => 200 + 130 * x, Y = (y) => 190 - 130 * y;
    const ellipse = (A, level, attributes) => {
      const half = Math.atan2(2 * A[0][1], A[0][0] - A[1][1]) / 2, mid = (A[0][0] + A[1][1]) / 2;
      const gap = Math.hypot((A[0][0] - A[1][1]) / 2, A[0][1]);
      return draw(svg, "ellipse", { rx: 130 * Math.sqrt((2 * level) / (mid + gap)), ry: 130 * Math.sqrt((2 * level) / (mid - gap)),
        transform: `translate(${X(0)} ${Y(0)}) rotate(${(-half * 180) / Math.PI})`, fill: "none", ...attributes });
    };
    for (const level of [0.05, 0.2, 0.5]) ellipse(F, level, { stroke: "var(--ink-5)", "stroke-width": 1.5 });
    draw(svg, "text", { x: X(-1.1), y: Y(1.05) }, "old loss").style.fill = "var(--ink-5)";
    const path = draw(svg, "polyline", { fill: "none", stroke: "var(--ink-1)", "stroke-width": 2, "stroke-dasharray": "5 4" });
    for (const [at, name] of [[[0, 0], "old optimum"], [b, "new optimum"]]) {
      draw(svg, "circle", { cx: X(at[0]), cy: Y(at[1]), r: 4.5, fill: "var(--pst-color-text-base)" });
      const left = at === b ? {} : { "text-anchor": "end" };
      draw(svg, "text", { x: X(at[0]) + (at === b ? 9 : -12), y: Y(at[1]) + (at === b ? 20 : 24), ...left }, name);
    }
    const dot = draw(svg, "circle", { r: 8, fill: "var(--ink-2)" });
    const said = voice(place);
    function show() {

      const end = least(M, 10 ** log), steps = [...Array(61).keys()].map((i) => least(M, 10 ** (i / 10 - 3)));
      path.setAttribute("points", steps.map(([x, y]) => `${X(x)},${Y(y)}`).join(" "));
      dot.setAttribute("cx", X(end[0]));
      dot.setAttribute("cy", Y(end[1]));
      const away = Math.hypot(end[0] - b[0], end[1] - b[1]) ** 2 / 2;
      said.textContent = `Old loss has risen by ${fixed(form(F, end), 3)}; new loss is ${fixed(away, 3)} above its least; sum ${fixed(form(F, end) + away, 3)}.`;
    }
    show();
  }

  // --- 3. GEM's projection in the plane -------------------------------------------------------------------

  const dot = (a, b) => a[0] * b[0] + a[1] * b[1];
  const add = (a, b, s = 1) => [a[0] + s * b[0], a[1] + s * b[1]];
  function agem(g, old) {
    const ref = old.reduce((a, o) => add(a, o, 1 / old.length), [0, 0]), product = dot(g, ref);
    return product < 0 ? add(g, ref, -product / dot(ref, ref)) : g;
  }
  function gem(g, old) {
    // The nearest point of the cone {x: x·g_k ≥ 0}: g itself, its foot on one edge, or the tip.
    const meets = (x) => old.every((o) => dot(x, o) >= -1e-9);
    const feet = old.map((o) => add(g, o, -dot(g, o) / dot(o, o)));
    const found = [g, ...feet, [0, 0]].filter(meets);
    const far = (x) => dot(add(x, g, -1), add(x, g, -1));
    return found.reduce((best, x) => (far(x) < far(best) ? x : best));
  }
  function projection(place) {
    const arrows = { g: [1.25, -0.65], "g₁": [0.25, 1.05], "g₂": [-0.75, 0.75] };
    const svg = canvas(place, 560, 360, "Gradients in the plane; drag their tips, or choose one with Tab and turn it with the arrow keys");
    svg.classList.add("drags");
    const X = (x) => 280 + 120 * x, Y = (y) => 190 - 120 * y;
    const cone = draw(svg, "polygon", { fill: "var(--pst-color-text-muted)", opacity: 0.22 });
    const lines = {}, said = voice(place);
    const inks = { g: "var(--pst-color-text-base)", "g₁": "var(--ink-5)", "g₂": "var(--ink-5)", "A-GEM": "var(--ink-3)", GEM: "var(--ink-1)" };
    for (const [name, ink] of Object.entries(inks)) {
      const own = name in arrows;
      const group = draw(svg, "g", own ? { tabindex: 0, role: "slider", "aria-label": `direction of ${name}`, "aria-valuemin": -180, "aria-valuemax": 180 } : {});
      lines[name] = {
        group,
        line: draw(group, "line", { x1: X(0), y1: Y(0), stroke: ink, "stroke-width": own ? 2.5 : 4 }),
        tip: draw(group, "circle", { r: own ? 9 : 5, fill: ink }),
        text: draw(group, "text", { "text-anchor": "middle" }, name),
      };
      lines[name].text.style.fill = ink;
      if (!own) continue;
      group.style.cursor = "grab";
      draw(group, "circle", { r: 22, fill: "transparent", class: "grip" });
      group.addEventListener("keydown", (event) => {
        const turn = { ArrowLeft: 5, ArrowRight: -5 }[event.key], scale = { ArrowUp: 1.08, ArrowDown: 1 / 1.08 }[event.key];
        if (!turn && !scale) return;
        event.preventDefault();
        const [x, y] = arrows[name], angle = ((turn ?? 0) * Math.PI) / 180, size = clamp(Math.hypot(x, y) * (scale ?? 1), 0.3, 1.5) / Math.hypot(x, y);
        arrows[name] = [size * (x * Math.cos(angle) - y * Math.sin(angle)), size * (x * Math.sin(angle) + y * Math.cos(angle))];
        show();
      });
      group.addEventListener("pointerdown", (event) => {
        event.preventDefault();
        group.focus();
        group.setPointerCapture(event.pointerId);
        const move = (e) => {
          const box = svg.getBoundingClientRect(), scale = 560 / box.width;
          const x = ((e.clientX - box.left) * scale - 280) / 120, y = (190 - (e.clientY - box.top) * scale) / 120;
          const size = Math.hypot(x, y) || 1e-6, kept = clamp(size, 0.3, 1.5) / size;
          arrows[name] = [x * kept, y * kept];
          show();
        };
        const stop = () => { group.removeEventListener("pointermove", move); };
        group.addEventListener("pointermove", move);
        group.addEventListener("pointerup", stop, { once: true });
        group.addEventListener("pointercancel", stop, { once: true });
      });
    }
    function show() {
      const old = [arrows["g₁"], arrows["g₂"]], found = { "A-GEM": agem(arrows.g, old), GEM: gem(arrows.g, old) };
      for (const [name, [x, y]] of Object.entries({ ...arrows, ...found })) {
        const { line, tip, text, group } = lines[name], length = Math.hypot(x, y) || 1;
        line.setAttribute("x2", X(x)); line.setAttribute("y2", Y(y));
        for (const circle of group.querySelectorAll("circle")) { circle.setAttribute("cx", X(x)); circle.setAttribute("cy", Y(y)); }
        text.setAttribute("x", X(x + (0.2 * x) / length)); text.setAttribute("y", Y(y + (0.17 * y) / length) + 5);
        tip.setAttribute("cx", X(x));
        if (name in arrows) group.setAttribute("aria-valuenow", Math.round((Math.atan2(y, x) * 180) / Math.PI));
      }
      const allowed = [...Array(721).keys()].map((i) => (i * Math.PI) / 360).map((a) => [3 * Math.cos(a), 3 * Math.sin(a)]);
      const inside = allowed.map((v) => old.every((o) => dot(v, o) >= 0)), start = inside.findIndex((v, i) => v && !inside[(i + 720) % 721]);
      const edge = [];
      for (let i = 0; start >= 0 && i < 721 && inside[(start + i) % 721]; i++) edge.push(allowed[(start + i) % 721]);
      cone.setAttribute("points", edge.length ? [[0, 0], ...edge].map(([x, y]) => `${X(x)},${Y(y)}`).join(" ") : "");
      const harm = old.map((o, k) => [k + 1, dot(found["A-GEM"], o)]).filter(([, p]) => p < -1e-9).map(([k]) => `task ${k}`);
      const none = Math.hypot(...found.GEM) < 1e-9;
      said.textContent = (harm.length ? `A-GEM's step raises the loss of ${harm.join(" and ")}. ` : "A-GEM's step raises no old loss. ")
        + (none ? "GEM stands still: no step serves all three." : `GEM's step is ${fixed(100 * Math.hypot(...found.GEM) / Math.hypot(...arrows.g), 0)} % as long as g.`);
    }
    show();
  }

  // --- 4. buffer size against forgetting, from the table that the run printed above -----------------------

  function buffer(place) {
    const tables = [...document.querySelectorAll(".bd-article table.dataframe")];
    const table = tables.filter((t) => t.compareDocumentPosition(place) & Node.DOCUMENT_POSITION_FOLLOWING).pop();
    if (!table) return;
    const heads = [...table.querySelectorAll("thead tr:first-child th")].map((th) => th.textContent.trim()).slice(1);
    const rows = [...table.querySelectorAll("tbody tr")].map((tr) => ({
      size: +tr.querySelector("th").textContent,
      values: Object.fromEntries([...tr.querySelectorAll("td")].map((td, i) => [heads[i], +td.textContent.replace("−", "-")])),
    }));
    const tasks = heads.filter((name) => name.startsWith("task "));
    let chosen = Math.min(2, rows.length - 1);
    slider(controls(place), "images stored for each task", { min: 0, max: rows.length - 1, value: chosen, show: (i) => rows[i].size }, (i) => { chosen = i; show(); });
    const svg = canvas(place, 560, 260, "Accuracy on each task at the end, by buffer size");
    const bars = draw(svg, "g", { class: "moves" }), said = voice(place), wide = 480 / tasks.length;
    draw(svg, "line", { x1: 50, x2: 540, y1: 220, y2: 220, stroke: "var(--pst-color-text-muted)" });
    for (const level of [0, 50, 100]) draw(svg, "text", { x: 42, y: 224 - 2 * level, "text-anchor": "end", class: "muted" }, `${level} %`);
    const parts = tasks.map((name, i) => {
      draw(svg, "text", { x: 55 + wide * (i + 0.5), y: 242, "text-anchor": "middle" }, name);
      return [draw(bars, "rect", { x: 60 + wide * i, width: wide - 12, fill: "var(--ink-2)" }), draw(bars, "text", { x: 55 + wide * (i + 0.5), "text-anchor": "middle" })];
    });
    function show() {
      const { size, values } = rows[chosen];
      parts.forEach(([bar, text], i) => {
        const value = values[tasks[i]];
        bar.setAttribute("y", 220 - 2 * value); bar.setAttribute("height", 2 * value);
        text.setAttribute("y", 214 - 2 * value); text.textContent = fixed(value, 0);
      });
      said.textContent = `${size} images for each task: accuracy ${fixed(values.ACC, 0)} %, forgetting ${fixed(values.forgetting, 0)} points.`;
    }
    show();
  }

  // --- 5. Eidetic's staircase of owners -------------------------------------------------------------------

  function staircase(place) {
    const N = 16, inks = ["var(--ink-1)", "var(--ink-2)", "var(--ink-3)", "var(--ink-4)", "var(--ink-5)"];
    let tasks = 3, share = 0.4;
    const row = controls(place);
    slider(row, "tasks learned", { min: 0, max: 5, value: tasks }, (x) => { tasks = x; show(); });
    slider(row, "each keeps of the free neurons", { min: 10, max: 80, step: 10, value: 40, show: (x) => `${x} %` }, (x) => { share = x / 100; show(); });
    const svg = canvas(place, 560, 390, "Weights between two layers, rows and columns sorted by owner");
    const cells = draw(svg, "g"), said = voice(place), size = 21, left = 120, top = 40;
    draw(svg, "text", { x: left, y: 24 }, "neurons that are read, by owner →");
    draw(svg, "text", { x: 4, y: top + 12 }, "readers,"); draw(svg, "text", { x: 4, y: top + 36 }, "by owner ↓");
    function owners() {
      const owner = [];
      for (let t = 0; t < tasks && owner.length < N; t++) {
        const kept = Math.max(1, Math.round(share * (N - owner.length)));
        for (let k = 0; k < kept && owner.length < N; k++) owner.push(t);
      }
      return [...owner, ...Array(N - owner.length).fill(Infinity)];
    }
    function show() {
      const o = owners(), count = { frozen: 0, zero: 0, free: 0 };
      cells.replaceChildren();
      for (let r = 0; r < N; r++) for (let c = 0; c < N; c++) {
        const kind = o[r] === Infinity ? "free" : o[c] > o[r] ? "zero" : "frozen";
        count[kind] += 1;
        draw(cells, "rect", { x: left + size * c, y: top + size * r, width: size - 2, height: size - 2, "data-kind": kind,
          fill: kind === "frozen" ? inks[o[r]] : "none", stroke: kind === "zero" ? "none" : "var(--pst-color-text-muted)", "stroke-width": kind === "free" ? 1 : 0 });
        if (kind === "zero") draw(cells, "circle", { cx: left + size * (c + 0.5) - 1, cy: top + size * (r + 0.5) - 1, r: 1.6, fill: "var(--pst-color-text-muted)" });
      }
      o.forEach((t, r) => t !== Infinity && t !== o[r - 1] && draw(cells, "text", { x: left + size * N + 8, y: top + size * r + 15 }, `task ${t}`).setAttribute("style", `fill: ${inks[t]}`));
      said.textContent = `${count.frozen} weights frozen, ${count.zero} held at zero, ${count.free} free for task ${tasks}.`
        + (o.includes(Infinity) ? "" : " No neuron is free: nothing new can be learned.");
    }
    show();
  }

  function start() {
    for (const [name, make] of Object.entries({ metrics, well, projection, buffer, staircase }))
      for (const place of document.querySelectorAll(`.explore-${name}`)) make(place);
  }
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", start) : start();
})();
