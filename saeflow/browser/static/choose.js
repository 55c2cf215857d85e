// Chooses tokens by a click. A bar at the foot leads to the features that tell them from the rest.
"use strict";
(() => {
  const run = /^\/runs\/[^/]+/.exec(location.pathname)?.[0];
  if (!run) return; // a copy on a disk, or a page of no run
  const MOST = 100;
  const CONTEXT = "[data-lengths]";
  const kept = `chosen tokens of ${run}`;
  const chosen = new Set(JSON.parse(sessionStorage.getItem(kept) ?? "[]"));
  const given = new URLSearchParams(location.search).get("tokens");
  if (location.pathname === `${run}/selection` && given) {
    chosen.clear();
    for (const word of given.split(",").slice(0, MOST)) if (/^\d+$/.test(word)) chosen.add(Number(word));
  }

  // The silent tokens of a context are one text. The lengths say where each ends; `m` is a token with a mark of its own.
  const split = (context) => {
    if (!context || context.dataset.split) return;
    context.dataset.split = "yes";
    const lengths = context.dataset.lengths.split(" ");
    let place = -1, left = 0, span = null;
    const name = (element) => (element.dataset.token = Number(context.dataset.first) + place);
    for (const node of [...context.childNodes]) {
      if (node.nodeType === Node.TEXT_NODE) {
        let rest = node.data;
        const pieces = [];
        while (rest) {
          if (!left) {
            while (lengths[++place] === "0");
            left = Number(lengths[place]);
            pieces.push((span = document.createElement("span")));
            span.tabIndex = -1;
            name(span);
          }
          span.append(rest.slice(0, left));
          left -= Math.min(left, rest.length);
          rest = rest.slice(span.lastChild.length);
        }
        node.replaceWith(...pieces);
      } else if (node.nodeName === "BR") span?.append(node);
      else {
        while (lengths[++place] === "0");
        name(node);
        span = null;
      }
    }
    show(context);
  };

  const tokenOf = (element) => Number(element.dataset.token ?? element.id.slice(1));
  const SELECTABLE = "[data-token], .text a[id^=t]";
  const show = (inside = document) => {
    for (const each of inside.querySelectorAll(SELECTABLE)) {
      const isChosen = chosen.has(tokenOf(each));
      each.classList.toggle("picked", isChosen);
      if (!each.href && (isChosen || each.role)) {
        each.role = "button";
        each.ariaPressed = isChosen;
      }
    }
  };
  const splitChosen = (inside = document) => {
    for (const context of inside.querySelectorAll(CONTEXT)) {
      const first = Number(context.dataset.first), end = first + context.dataset.lengths.split(" ").length;
      if ([...chosen].some((token) => token >= first && token < end)) split(context);
    }
    show(inside);
  };

  const bar = document.createElement("aside");
  bar.className = "bar";
  bar.ariaLabel = "Chosen tokens";
  const count = document.createElement("span"), link = document.createElement("a"), none = document.createElement("button");
  count.role = "status";
  link.textContent = "Which features?";
  none.textContent = "Choose none";
  bar.append(count, link, none);
  document.body.append(bar);
  const tell = (note = "") => {
    bar.hidden = !chosen.size;
    count.textContent = `${chosen.size === 1 ? "1 token" : `${chosen.size} tokens`} chosen${note}`;
    link.href = `${run}/selection?tokens=${[...chosen].sort((a, b) => a - b)}`;
    sessionStorage.setItem(kept, JSON.stringify([...chosen]));
  };
  none.addEventListener("click", () => {
    chosen.clear();
    tell();
    show();
  });

  const choose = (element) => {
    const token = tokenOf(element), isFull = chosen.size >= MOST && !chosen.has(token);
    if (!isFull && !chosen.delete(token)) chosen.add(token);
    splitChosen();
    tell(isFull ? `, the most there may be` : "");
  };

  for (const kind of ["pointerover", "focusin"])
    document.addEventListener(kind, (event) => split(event.target.closest(CONTEXT)));
  document.addEventListener("fetched", (event) => splitChosen(event.target));

  // On a page of a document a click opens the token, unless the reader says that clicks choose.
  const mode = document.querySelector(".choose");
  if (mode) mode.hidden = false;
  document.addEventListener("click", (event) => {
    const found = event.target.closest(SELECTABLE);
    if (!found || event.ctrlKey || event.metaKey || event.shiftKey || String(getSelection())) return;
    if (found.href && !mode?.querySelector("input").checked) return;
    event.preventDefault();
    choose(found);
  });
  document.addEventListener("keydown", (event) => {
    const found = event.target.closest(SELECTABLE);
    if (!found || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const chooses = event.key === "x" || (!found.href && ["Enter", " "].includes(event.key));
    if (!step && !chooses) return;
    event.preventDefault();
    if (chooses) return choose(found);
    const all = [...found.closest(`${CONTEXT}, .text`).querySelectorAll(SELECTABLE)];
    all[all.indexOf(found) + step]?.focus();
  });
  splitChosen();
  tell();
})();
