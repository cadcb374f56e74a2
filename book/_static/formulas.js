// A formula that is wider than its place is set smaller, down to two thirds. What is left of it can be scrolled.

(() => {
  const LEAST = 2 / 3;

  function fit() {
    for (const formula of document.querySelectorAll("div.math mjx-container")) {
      formula.style.fontSize = formula.dataset.size ??= formula.style.fontSize;
      const share = formula.clientWidth / formula.scrollWidth;
      if (share >= 1) continue;
      const size = parseFloat(getComputedStyle(formula).fontSize);
      formula.style.fontSize = `${size * Math.max(LEAST, 0.995 * share)}px`;
    }
  }

  window.addEventListener("load", () => window.MathJax?.startup?.promise.then(fit));
  window.addEventListener("resize", fit);
  // on paper the style sheet wraps, and sizes are those of the page
  window.addEventListener("beforeprint", () => {
    for (const formula of document.querySelectorAll("div.math mjx-container[data-size]"))
      formula.style.fontSize = formula.dataset.size;
  });
  window.addEventListener("afterprint", fit);
})();
