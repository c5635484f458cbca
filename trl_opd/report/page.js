"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const several = data.runs.length > 1;
  const coarse = matchMedia("(pointer: coarse)").matches;
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  // plotly reads tags in its texts; the texts of a run are no tags
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const digits = (value, places = 4) =>
    value === null || value === undefined ? "–" : String(Number(value.toPrecision(places))).replace("-", "−");
  const signed = (value, places = 2) =>
    value === null || value === undefined ? "–" : (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(places);

  // ---------------------------------------------------------------- curves

  const settings = { smoothing: 0, raw: true, log: false, hidden: new Set() };
  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(name).trim();
    return { value, series: (index) => value(`--c${index % 8}`) };
  };
  const channels = (triple) => triple.split(",").map(Number);
  const between = (from, to, share) => from.map((c, i) => Math.round(c + share * (to[i] - c)));
  const hexToRgb = (hex) => {
    const full = hex.length === 4 ? [...hex.slice(1)].map((c) => c + c).join("") : hex.slice(1);
    return [0, 2, 4].map((i) => parseInt(full.slice(i, i + 2), 16));
  };
  const scaleOf = (diverging, colours) => {
    const middle = hexToRgb(colours.value("--card"));
    const ink = hexToRgb(colours.value("--ink"));
    const [less, more] = ["--less", "--more"].map((name) => channels(colours.value(name)));
    const deep = (colour) => between(colour, ink, 0.25);
    const stops = diverging
      ? [[0, deep(less)], [0.15, less], [0.5, middle], [0.85, more], [1, deep(more)]]
      : [[0, middle], [0.6, more], [1, deep(more)]];
    return stops.map(([at, colour]) => [at, `rgb(${colour.join(",")})`]);
  };

  // An exponential mean without the bias of its start, as TensorBoard draws it; gaps stay gaps.
  const smooth = (values, weight) => {
    let mean = 0, mass = 0;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return mean / mass;
    });
  };

  const isShare = (figure) => Boolean(figure.layout.yaxis && figure.layout.yaxis.title && figure.layout.yaxis.title.text === "share");
  const curveTraces = (figure, colours) => {
    const traces = [], format = isShare(figure) ? ".1%" : ".4g";
    for (const trace of figure.data) {
      const { run, series, kind, smooth: mayBeSmoothed } = trace.meta;
      const colour = colours.series(several ? run : series);
      const visible = !settings.hidden.has(run);
      const evaluated = kind === "eval";
      const smoothed = settings.smoothing > 0 && trace.y.length > 2 && mayBeSmoothed;
      const marker = { color: colour, size: evaluated ? 8 : 5, symbol: evaluated ? "diamond-open" : "circle" };
      const raw = { ...trace, visible, marker, line: { ...trace.line, color: colour, width: evaluated ? 1 : 1.8 } };
      raw.hovertemplate = `%{y:${format}}<extra>${trace.name}</extra>`;
      if (smoothed) {
        raw.opacity = 0.3;
        raw.line.width = 1;
        raw.line.dash = "solid";
        raw.hoverinfo = "skip";
        delete raw.hovertemplate;
      }
      if (!smoothed || settings.raw) traces.push(raw);
      if (smoothed) {
        traces.push({
          ...trace, visible, mode: "lines", customdata: trace.y, y: smooth(trace.y, settings.smoothing),
          line: { ...trace.line, color: colour, width: 2 }, meta: { ...trace.meta, smoothed: true },
          hovertemplate: `%{customdata:${format}} (smoothed %{y:${format}})<extra>${trace.name}</extra>`,
        });
      }
    }
    const alarms = data.marks.filter((mark) => mark.kind === "alarm" && !settings.hidden.has(mark.run));
    if (alarms.length) {
      traces.push({
        type: "scatter", mode: "markers", x: alarms.map((mark) => mark.step), y: alarms.map(() => 1), yaxis: "y2",
        meta: { kind: "alarm" }, cliponaxis: false,
        marker: {
          symbol: "triangle-down", size: 10,
          color: alarms.map((mark) => several ? colours.series(mark.run) : colours.value("--mark")),
        },
        text: alarms.map((mark) => plain(mark.names.slice(0, 4).join(", ").slice(0, 60))),
        hovertemplate: "alarm at step %{x}: %{text}<extra></extra>",
      });
    }
    return traces;
  };

  const base = (figure, colours) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.value("--soft") },
    hoverlabel: {
      bgcolor: colours.value("--card"), bordercolor: colours.value("--rule"), align: "left",
      font: { color: colours.value("--ink") }, namelength: -1,
    },
    dragmode: coarse ? false : "zoom",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.value("--soft"), activecolor: colours.value("--ink") },
  });

  const curveLayout = (figure, colours) => {
    const line = { gridcolor: colours.value("--grid"), zeroline: false, linecolor: colours.value("--rule"), automargin: true };
    const positive = figure.data.every((trace) => trace.y.every((value) => value === null || value > 0));
    const shapes = data.marks.filter((mark) => !settings.hidden.has(mark.run)).map((mark) => ({
      type: "line", xref: "x", yref: "paper", x0: mark.step, x1: mark.step, y0: 0, y1: 1, layer: "below",
      line: mark.kind === "alarm"
        ? { width: 1, dash: "dash", color: several ? colours.series(mark.run) : colours.value("--mark") }
        : { width: 1.5, dash: "dot", color: colours.value("--soft") },
    }));
    return {
      ...base(figure, colours), margin: { l: 8, r: 12, t: 12, b: 34 }, hovermode: "x unified", shapes,
      xaxis: { ...line, title: { text: "step", standoff: 6 }, showgrid: false, showline: true, rangemode: "tozero" },
      yaxis: {
        ...line, type: settings.log && positive ? "log" : "linear", nticks: 6,
        ...(isShare(figure) ? { tickformat: ",.0%" } : { exponentformat: "power", tickformat: "" }),
      },
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    };
  };

  const mapTraces = (figure, colours) => figure.data.map((trace) => ({
    ...trace, colorscale: scaleOf(trace.meta.diverging, colours),
    colorbar: { ...trace.colorbar, outlinewidth: 0, tickfont: { color: colours.value("--soft") } },
  }));
  const mapLayout = (figure, colours) => ({
    ...base(figure, colours), margin: { l: 8, r: 8, t: 8, b: 36 },
    xaxis: { title: { text: "step", standoff: 6 }, showgrid: false, zeroline: false },
    yaxis: { ...figure.layout.yaxis, automargin: true, showgrid: false, autorange: "reversed" },
  });

  const config = {
    displaylogo: false, scrollZoom: false, showTips: false, toImageButtonOptions: { format: "svg" },
    displayModeBar: coarse ? false : "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  const drawn = new Set();
  const draw = (id) => {
    const figure = data.figures[id], element = byId(id);
    const map = element.classList.contains("map"), colours = theme();
    const layout = map ? mapLayout(figure, colours) : curveLayout(figure, colours);
    drawn.add(id);
    return Plotly.react(
      element, map ? mapTraces(figure, colours) : curveTraces(figure, colours),
      { ...layout, width: element.clientWidth, height: element.clientHeight }, config,
    );
  };
  const ids = Object.keys(data.figures);
  const redraw = (all = false) => ids.filter((id) => drawn.has(id) && (all || !byId(id).classList.contains("map"))).forEach(draw);
  // A few at a time, so that the page can be read and scrolled meanwhile
  const drawRest = () => {
    const rest = ids.filter((id) => !drawn.has(id));
    rest.slice(0, 2).forEach(draw);
    document.body.dataset.drawn = String(drawn.size);
    if (rest.length > 2) setTimeout(drawRest, 0);
    else document.body.dataset.ready = "true";
  };

  const setUpCurves = () => {
    const smoothing = byId("smoothing");
    if (smoothing) {
      smoothing.value = data.lines >= 30 ? "0.6" : "0";
      const read = () => {
        settings.smoothing = Number(smoothing.value);
        byId("smoothing-value").textContent = settings.smoothing ? settings.smoothing.toFixed(2) : "off";
      };
      read();
      let waiting = 0;
      smoothing.addEventListener("input", () => {
        read();
        cancelAnimationFrame(waiting);
        waiting = requestAnimationFrame(() => redraw());
      });
      for (const name of ["raw", "log"]) {
        byId(name).checked = settings[name];
        byId(name).addEventListener("change", () => { settings[name] = byId(name).checked; redraw(); });
      }
      for (const box of document.querySelectorAll("input[data-run]")) {
        box.checked = true;
        box.addEventListener("change", () => {
          settings.hidden[box.checked ? "delete" : "add"](Number(box.dataset.run));
          redraw();
        });
      }
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(true));
    // Figures have their size and colours in them, so paper needs its own, and all of them
    const print = (on) => {
      if (document.documentElement.classList.toggle("printing", on) && on) ids.forEach(draw);
      if (!on) redraw(true);
    };
    addEventListener("beforeprint", () => print(true));
    addEventListener("afterprint", () => print(false));
    matchMedia("print").addEventListener("change", (event) => print(event.matches));
    let resizing = 0, width = innerWidth;
    addEventListener("resize", () => {
      if (innerWidth === width) return;
      width = innerWidth;
      clearTimeout(resizing);
      resizing = setTimeout(() => redraw(true), 100);
    });
    drawRest();
  };

  // ---------------------------------------------------------------- tokens

  // Nats, and the factors between the two probabilities that they stand for
  const LEVELS = [0.4, 0.69, 1.6, 2.3, 4.6];
  const FACTORS = ["1.5×", "2×", "5×", "10×", "100×"];
  const COLOURS = {
    gap: { title: "gap (teacher − student)", less: "Teacher finds it less likely:", more: "more likely than the student.", signed: true },
    kl: { title: "reverse KL", less: "Far from the teacher:", signed: false },
    teacher: { title: "teacher's surprise", less: "Surprises the teacher:", signed: false },
    student: { title: "student's surprise", less: "Surprises the student:", signed: false },
  };
  const LABELS = {
    gap: "gap, nats", student: "student log-prob", teacher: "teacher log-prob", kl: "reverse KL, nats",
    rank: "teacher's rank", weight: "weight",
  };
  const level = (size) => LEVELS.filter((limit) => size >= limit).length;
  const signal = (item, index, colour) => {
    const value = item[colour] ? item[colour][index] : null;
    if (value === null || value === undefined) return null;
    if (colour === "kl") return -value;
    return value;
  };
  const classOf = (value) => {
    const l = value === null ? 0 : level(Math.abs(value));
    return l ? `${value < 0 ? "less" : "more"} l${l}` : "";
  };
  const visible = (token) => token.replace(/\t/g, "→\t").replace(/\r/g, "␍").replace(/\n/g, "↵\n")
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f]/g, "␦");
  const inline = (token) => visible(token).replace(/\n/g, "").replace(/\t/g, "") || "(part of the character before)";

  const tip = byId("tip");
  const items = new WeakMap();
  let pinned = null;
  const showTip = (span) => {
    const [item, index] = items.get(span);
    tip.replaceChildren(make("code", { textContent: inline(item.tokens[index]) }));
    const list = make("dl");
    for (const [name, label] of Object.entries(LABELS)) {
      if (!item[name]) continue;
      const value = item[name][index];
      const text = name === "gap" ? signed(value, 3) : name === "rank" ? digits(value) : digits(value);
      list.append(make("dt", { textContent: label }), make("dd", { textContent: text }));
    }
    tip.append(list);
    if (item.mask && !item.mask[index]) tip.append(make("div", { textContent: "not distilled (masked)" }));
    tip.hidden = false;
    const box = span.getClientRects()[0] || span.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - own.width - 8);
    const above = box.top - own.height - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : box.bottom + 6}px`;
  };
  const hideTip = () => { tip.hidden = true; };

  const tokenSpan = (item, index, colour) => {
    const masked = item.mask && !item.mask[index];
    const span = make("span", { textContent: visible(item.tokens[index]) || "·" });
    span.className = `t ${masked ? "off" : classOf(signal(item, index, colour))}`;
    span.tabIndex = -1;
    items.set(span, [item, index]);
    return span;
  };
  const worstOf = (item, count) => {
    const gaps = (item.gap || []).map((gap, i) => [gap, i]);
    return gaps.filter(([gap, i]) => gap !== null && gap < -0.5 && (!item.mask || item.mask[i]))
      .sort((a, b) => a[0] - b[0]).slice(0, count);
  };
  const firstLine = (text, width) => {
    const line = text.replace(/\s+/g, " ").trim();
    return line.length > width ? `${line.slice(0, width)}…` : line;
  };
  const card = (item, place, colour) => {
    const article = make("article", { ariaLabel: `Completion ${place + 1} of step ${item.step}` });
    const head = make("header");
    const length = item.tokens ? item.tokens.length + (item.left_out || 0) : 0;
    head.append(make("b", { textContent: `#${place + 1}` }));
    if (item.mean !== null && item.mean !== undefined) head.append(make("span", { textContent: `mean gap ${signed(item.mean, 3)} nats` }));
    if (length) head.append(make("span", { textContent: `${length.toLocaleString("en")} tokens` }));
    for (const [name, value] of Object.entries(item.scores || {})) head.append(make("span", { textContent: `${name} ${digits(value)}` }));
    article.append(head);
    if (item.prompt) {
      article.append(make("details", {}, make("summary", { textContent: `Prompt: ${firstLine(item.prompt, 90)}` }),
        make("div", { className: "prompt", dir: "auto", tabIndex: 0, textContent: item.prompt })));
    }
    if (!item.tokens) {
      article.append(make("div", { className: "text", dir: "auto", tabIndex: 0, textContent: item.text || "(empty)" }));
      return article;
    }
    const text = make("div", { className: "text", dir: "auto", role: "group", ariaLabel: "Tokens" });
    const spans = item.tokens.map((_, index) => tokenSpan(item, index, colour));
    if (spans.length) spans[0].tabIndex = 0;
    spans.forEach((span, index) => {
      if (item.left_out && index === item.cut_at) {
        text.append(make("span", { className: "gap", textContent: `${item.left_out.toLocaleString("en")} tokens are left out` }));
      }
      text.append(span);
    });
    const worst = worstOf(item, 5);
    if (worst.length) {
      const row = make("div", { className: "worst" }, "Farthest below: ");
      for (const [gap, index] of worst) {
        const button = make("button", { type: "button" }, make("code", { textContent: firstLine(inline(item.tokens[index]), 24) || "␣" }), ` ${signed(gap)}`);
        button.addEventListener("click", () => { spans[index].scrollIntoView({ block: "nearest" }); spans[index].focus(); });
        row.append(button);
      }
      article.append(row);
    }
    article.append(text);
    return article;
  };

  const legend = (colour) => {
    const scheme = COLOURS[colour], parts = [];
    const label = (l) => (scheme.signed ? FACTORS[l - 1] : String(LEVELS[l - 1]));
    const sample = (sign, l) => make("span", { className: `t ${sign} l${l}`, textContent: label(l), title: `${LEVELS[l - 1]} nats or more` });
    parts.push(make("span", { textContent: scheme.less }));
    for (let l = 5; l >= 1; l--) parts.push(sample("less", l));
    parts.push(make("span", { className: "t", textContent: "equal" }));
    if (scheme.signed) for (let l = 1; l <= 5; l++) parts.push(sample("more", l));
    if (scheme.signed) parts.push(make("span", { textContent: scheme.more }));
    else parts[parts.length - 1].textContent = "little (nats)";
    parts.push(make("span", { className: "t off", textContent: "grey: not distilled" }));
    byId("token-legend").replaceChildren(...parts);
  };

  const setUpTokens = () => {
    const list = byId("token-list");
    if (!list) return;
    const [runs, steps, order, colours] = ["run", "step", "order", "colour"].map((name) => byId(`token-${name}`));
    const current = () => data.tokens[runs ? Number(runs.value) : data.tokens.findIndex((found) => found.length)];
    const fill = (select, options, chosen) => {
      select.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
      select.value = options.some(([value]) => String(value) === String(chosen)) ? chosen : options[options.length - 1][0];
    };
    const orders = {
      mean: (item) => item.mean ?? Infinity,
      worst: (item) => Math.min(...worstOf(item, 1).map(([gap]) => gap), 0),
      length: (item) => -((item.tokens || []).length + (item.left_out || 0)),
    };
    const show = () => {
      hideTip();
      const shown = current().filter((item) => String(item.step) === steps.value);
      shown.sort((a, b) => orders[order.value](a) - orders[order.value](b));
      legend(colours.value);
      const coloured = shown.some((item) => item.tokens);
      byId("token-legend").hidden = !coloured;
      list.replaceChildren(...shown.map((item, place) => card(item, place, colours.value)));
      byId("token-before").disabled = steps.selectedIndex <= 0;
      byId("token-after").disabled = steps.selectedIndex >= steps.options.length - 1;
    };
    const chooseRun = () => {
      const found = current();
      fill(steps, [...new Set(found.map((item) => item.step))].map((step) => [step, String(step)]), steps.value);
      const columns = Object.keys(COLOURS).filter((name) => found.some((item) => item[name]));
      fill(colours, (columns.length ? columns : ["gap"]).map((name) => [name, COLOURS[name].title]), colours.value || columns[0]);
      show();
    };
    const move = (by) => { steps.selectedIndex += by; show(); };
    byId("token-before").addEventListener("click", () => move(-1));
    byId("token-after").addEventListener("click", () => move(1));
    if (runs) runs.addEventListener("change", chooseRun);
    for (const select of [steps, order, colours]) select.addEventListener("change", show);
    const tokenAt = (event) => (event.target instanceof Element && items.has(event.target) ? event.target : null);
    list.addEventListener("mouseover", (event) => { const span = tokenAt(event); if (span) showTip(span); else if (!pinned) hideTip(); });
    list.addEventListener("mouseleave", () => { if (pinned) showTip(pinned); else hideTip(); });
    list.addEventListener("focusin", (event) => { pinned = tokenAt(event); if (pinned) showTip(pinned); });
    list.addEventListener("focusout", () => { pinned = null; hideTip(); });
    list.addEventListener("click", (event) => { const span = tokenAt(event); if (span) span.focus(); });
    list.addEventListener("keydown", (event) => {
      const by = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
      let span = tokenAt(event);
      if (event.key === "Escape") hideTip();
      if (!by || !span) return;
      do span = span[by]; while (span && !items.has(span));
      if (span) { event.preventDefault(); span.focus(); }
    });
    addEventListener("scroll", () => {
      const box = pinned && pinned.getBoundingClientRect();
      if (box && box.bottom > 0 && box.top < innerHeight) showTip(pinned);
      else hideTip();
    }, { passive: true, capture: true });
    chooseRun();
  };

  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", async () => {
      const source = byId(button.dataset.copy), before = button.textContent;
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(source);
        button.textContent = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C";
      }
      setTimeout(() => { button.textContent = before; }, 2000);
    });
  }
  setUpTokens();
  setUpCurves();
})();
