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
  const options = { ast: true, actions: false, defaultStyle: false, tooltip: { disableDefaultStyle: true }, config, renderer: "svg" };

  for (const figure of document.querySelectorAll("figure.chart")) {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const place = document.createElement("div");
    figure.append(place);
    window.vegaEmbed?.(place, spec, options);
  }

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
    else if (event.key === "?") location.assign("/about#keys");
    else return;
    event.preventDefault();
  });
})();
