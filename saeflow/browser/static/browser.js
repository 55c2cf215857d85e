// Draws charts and answers keys. Pages work without it, but for the charts.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const ink = dark ? "#a8a8a8" : "#595959";
  const config = {
    background: "transparent",
    axis: { labelColor: ink, titleColor: ink, gridColor: dark ? "#3a3d42" : "#e4e4e4" },
    legend: { labelColor: ink, titleColor: ink },
  };
  const options = { ast: true, actions: false, defaultStyle: false, tooltip: { disableDefaultStyle: true }, config };

  for (const figure of document.querySelectorAll("figure.chart")) {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const place = document.createElement("div");
    figure.append(place);
    window.vegaEmbed?.(place, spec, { ...options, renderer: spec.data?.url ? "canvas" : "svg" }).then(() => figure.classList.add("drawn"));
  }

  // The slider of a histogram counts the tokens left; the count is exact, because it stops at the edges of bins.
  for (const slider of document.querySelectorAll(".slider")) {
    const rows = JSON.parse(slider.parentElement.querySelector("figure.chart script").textContent).datasets.rows;
    const [range, output] = slider.querySelectorAll("input, output");
    const all = rows.reduce((sum, row) => sum + row.n_tokens, 0);
    const tell = () => {
      const left = rows.slice(range.value).reduce((sum, row) => sum + row.n_tokens, 0);
      const from = rows[range.value].from_value;
      output.textContent = `${from.toPrecision(4)}: ${left.toLocaleString("en")} tokens left (${((100 * left) / all).toPrecision(3)} %)`;
    };
    range.addEventListener("input", tell);
    range.addEventListener("change", () => {
      const field = document.querySelector(".filter [name=threshold]");
      if (field) field.value = range.value > 0 ? rows[range.value].from_value : "";
    });
    slider.hidden = false;
    tell();
  }

  // Panels that read much come when they are looked at.
  const later = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((each) => each.isIntersecting)) {
      later.unobserve(entry.target);
      fetch(entry.target.querySelector("a").href)
        .then((answer) => answer.text())
        .then((text) => new DOMParser().parseFromString(text, "text/html").getElementById(entry.target.id))
        .then((found) => found && entry.target.replaceWith(found))
        .catch(() => {});
    }
  });
  document.querySelectorAll(".later").forEach((panel) => later.observe(panel));

  // An address says only what was filled in.
  for (const form of document.querySelectorAll("form.filter"))
    form.addEventListener("formdata", (event) => {
      for (const [name, value] of [...event.formData]) if (value === "") event.formData.delete(name);
    });

  let chosen = -1;
  const items = () => [...document.querySelectorAll(".list tbody tr, .contexts li")];
  const choose = (step) => {
    const all = items();
    if (!all.length) return;
    all[chosen]?.classList.remove("chosen");
    chosen = Math.max(0, Math.min(all.length - 1, chosen + step));
    all[chosen].classList.add("chosen");
    (all[chosen].querySelector("a, [tabindex]") ?? all[chosen]).focus();
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    if (event.key === "/") document.querySelector("input[type=search], form input:not([type=hidden])")?.focus();
    else if (event.key === "j") choose(1);
    else if (event.key === "k") choose(-1);
    else if (event.key === "?") location.assign(document.querySelector("nav a:last-of-type").href + "#keys");
    else return;
    event.preventDefault();
  });
})();
