// Predictions take an answer before they show the run. The answer stays in this browser; nothing is sent.
// Without JavaScript, and on paper, everything is shown.

(() => {
  const key = (i) => `predict:${location.pathname}:${i}`;
  const store = {
    get: (k) => { try { return localStorage.getItem(k); } catch { return null; } },
    set: (k, v) => { try { localStorage.setItem(k, v); } catch { /* private mode: not kept */ } },
  };
  const make = (tag, props, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  };

  // What a prediction is about: the rest of its section, up to the next prediction.
  function after(box) {
    const found = [];
    for (let node = box.nextElementSibling; node; node = node.nextElementSibling) {
      if (node.matches("section, .predict, h2, h3")) break;
      found.push(node);
    }
    return found;
  }
  const shows = (node) => node.matches(".cell") ? node.querySelector(".cell_output, figure") : null;

  function set(box, i) {
    const rest = after(box), first = rest.findIndex(shows);
    if (first < 0) return;
    // The code stays in sight; its output and what is said about it wait.
    const hidden = rest.slice(first).flatMap((node, n) =>
      n || node.matches(".tag_hide-input") ? [node] : [...node.querySelectorAll(":scope > .cell_output, :scope > figure")]);
    const kept = store.get(key(i));
    const text = make("textarea", { value: kept ?? "", rows: 2, id: `predict-${i}` });
    text.setAttribute("aria-label", "Your prediction");
    const keep = make("button", { type: "button", className: "book-button", textContent: "Keep my answer and show the run" });
    const skip = make("button", { type: "button", className: "book-button quiet", textContent: "Show without an answer" });
    const said = make("span", { className: "said" });
    said.setAttribute("role", "status");
    const form = make("div", { className: "predict-form" }, text, make("div", { className: "answers" }, keep, skip, said));
    box.append(form);
    const sign = make("div", { className: "waiting", textContent: "What happened stands here, once you have said what you expect." });
    const show = (open) => {
      hidden.forEach((node) => node.classList.toggle("awaits", !open));
      sign.hidden = open;
      sign.style.display = open ? "none" : "";
      keep.textContent = open ? "Keep my answer" : "Keep my answer and show the run";
      skip.hidden = open;
      skip.style.display = open ? "none" : "";
    };
    (hidden[0].closest(".cell") ?? hidden[0]).after(sign);
    if (!hidden[0].matches(".cell_output, figure")) hidden[0].before(sign);
    keep.addEventListener("click", () => {
      store.set(key(i), text.value);
      said.textContent = text.value.trim() ? "Kept in this browser." : "";
      show(true);
    });
    skip.addEventListener("click", () => { store.set(key(i), text.value); show(true); });
    show(kept !== null);
    return { hidden, show };
  }

  function start() {
    const asked = [...document.querySelectorAll(".bd-article .admonition.predict")].map(set).filter(Boolean);
    // A link into what waits opens it.
    const reach = () => {
      const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
      for (const { hidden, show } of asked) if (target && hidden.some((node) => node.contains(target))) { show(true); target.scrollIntoView(); }
    };
    reach();
    addEventListener("hashchange", reach);
  }
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", start) : start();
})();
