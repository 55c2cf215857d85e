// Draws charts, fetches panels and answers keys. Pages work without it, but for the charts.
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
    place.textContent = spec.data?.url ? "Drawing …" : "";
    figure.append(place);
    window.vegaEmbed?.(place, spec, { ...options, renderer: spec.data?.url ? "canvas" : "svg" }).then(() => figure.classList.add("drawn"));
  }

  // The slider of a histogram counts the tokens left; the count is exact, because it stops at the edges of bins.
  for (const slider of document.querySelectorAll(".slider")) {
    const rows = JSON.parse(slider.parentElement.querySelector("figure.chart script").textContent).datasets.rows;
    const [range, output] = slider.querySelectorAll("input, output");
    const field = document.querySelector(".filter [name=threshold]");
    const all = rows.reduce((sum, row) => sum + row.n_tokens, 0);
    const tell = () => {
      const left = rows.slice(range.value).reduce((sum, row) => sum + row.n_tokens, 0);
      const from = rows[range.value].from_value;
      output.textContent = `${from.toPrecision(4)}: ${left.toLocaleString("en")} tokens left (${((100 * left) / all).toPrecision(3)} %)${field && range.value > 0 ? ". Apply shows these alone." : ""}`;
    };
    range.addEventListener("input", tell);
    range.addEventListener("change", () => {
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
        .then((found) => {
          if (!found) return;
          entry.target.replaceWith(found);
          found.dispatchEvent(new Event("fetched", { bubbles: true }));
        })
        .catch(() => {});
    }
  });
  document.querySelectorAll(".later").forEach((panel) => later.observe(panel));

  // An address says only what was filled in.
  for (const form of document.querySelectorAll("form.filter"))
    form.addEventListener("formdata", (event) => {
      for (const [name, value] of [...event.formData]) if (value === "") event.formData.delete(name);
    });

  const LISTS = ".list tbody tr, .contexts li";
  const OTHERS = ".panel tbody tr:has(a)";
  const items = () => [...document.querySelectorAll(document.querySelector(LISTS) ? LISTS : OTHERS)];
  const choose = (step) => {
    const all = items();
    const focused = document.activeElement.closest(`${LISTS}, ${OTHERS}`);
    const next = all[Math.max(0, Math.min(all.length - 1, all.indexOf(focused ?? document.querySelector(".chosen")) + step))];
    document.querySelector(".chosen")?.classList.remove("chosen");
    next?.classList.add("chosen");
    (next?.querySelector("a") ?? next?.querySelector("[tabindex]"))?.focus();
  };
  // Up is the page that a page belongs to. If the reader came from there, it is as it was left.
  const up = () => {
    const [run, kind, what] = location.pathname.split("/").slice(2);
    const parent = { features: "features", docs: "docs", doc: "docs", ask: "questions", "tokens-at": "tokens", tokens: "tokens" }[kind];
    const address = !kind ? "/" : `/runs/${run}${parent && (what || parent !== kind) ? `/${parent}` : ""}`;
    const before = document.referrer && new URL(document.referrer);
    const cameFromThere = before && before.host === location.host && before.pathname === address;
    if (cameFromThere || location.protocol === "file:") history.back();
    else location.assign(address);
  };
  const keys = {
    "/": () => (document.querySelector(".filter input") ?? document.querySelector("form :is(textarea, input:not([type=hidden]))"))?.focus(),
    j: () => choose(1),
    k: () => choose(-1),
    u: up,
    b: () => history.back(),
    f: () => document.querySelector("nav a:is([href$='/features'], [href$='features.html'])")?.click(),
    "?": () => location.assign(document.querySelector("nav a:last-of-type").href + "#keys"),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input:not([type=checkbox]), select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (!Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
})();
