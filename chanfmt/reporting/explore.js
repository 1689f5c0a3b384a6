// The living part of a report: a heat map to point at, the channels of a layer, a channel's card, two metrics against each other.
// All text goes into the page as text, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const make = (name, attributes = {}, text = "") => {
    const space = ["svg", "g", "circle", "path", "text"].includes(name) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
    const element = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(text);
    return element;
  };
  const whole = (value) => Number.isInteger(value) && Math.abs(value) < 1e9;  // Ids are typed back, so no digit may be missing.
  const number = (value) => (value === null || value === undefined ? "-" : whole(value) ? String(value) : Number(value.toPrecision(3)).toString());
  const kind = (label) => (label === "supernode" || label === "halo" ? label : "");
  const metrics = data.metrics;
  let row = 0, bin = 0, chosen = 0;

  // The heat map.
  const map = find("map"), cell = make("div", { class: "cell" });
  map.append(cell);
  const ranks = (unit, place) => {
    const edge = (share) => Math.pow(unit.n + 1, share) - 1;
    const low = Math.floor(edge(place / data.bins)) + 1, high = Math.max(low, Math.ceil(edge((place + 1) / data.bins)));
    return low === high ? `rank ${low}` : `ranks ${low} to ${high}`;
  };
  const point = () => {
    const unit = data.units[row];
    Object.assign(cell.style, {
      left: `${(100 * bin) / data.bins}%`, width: `${100 / data.bins}%`,
      top: `${(100 * row) / data.units.length}%`, height: `${100 / data.units.length}%`,
    });
    find("readout").textContent = `${unit.name}, ${ranks(unit, bin)}: ${number(100 * unit.shares[bin])}% of its LP per channel`;
  };
  const at = (event) => {
    const box = map.getBoundingClientRect();
    const within = (value, count) => Math.max(0, Math.min(count - 1, Math.floor(value * count)));
    row = within((event.clientY - box.top) / box.height, data.units.length);
    bin = within((event.clientX - box.left) / box.width, data.bins);
    point();
  };
  map.addEventListener("mousemove", at);
  map.addEventListener("click", (event) => { at(event); open(); });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      row = Math.max(0, Math.min(data.units.length - 1, row + step[0]));
      bin = Math.max(0, Math.min(data.bins - 1, bin + step[1]));
      point();
    } else if (event.key === "Enter" || event.key === " ") open();
    else return;
    event.preventDefault();
  });

  // The channels of a layer.
  const list = find("channels"), axes = { x: find("x"), y: find("y") };
  for (const [name, select] of Object.entries(axes)) {
    for (const metric of metrics) select.append(make("option", { value: metric }, metric));
    const wished = name === "y" ? "lp" : "activation_power";
    select.value = metrics.includes(wished) ? wished : metrics[0];
    select.addEventListener("change", () => show());
  }
  const open = () => { chosen = 0; show(); };
  const choose = (place) => {
    chosen = Math.max(0, Math.min(data.units[row].channels.length - 1, place));
    show();
    list.querySelector(".chosen").scrollIntoView({ block: "nearest" });
  };
  list.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (!step) return;
    choose(chosen + step);
    event.preventDefault();
  });
  const show = () => {
    const unit = data.units[row];
    find("layer").textContent = `${unit.name}: ${unit.channels.length} of ${unit.n} channels`;
    const table = make("table"), head = make("tr");
    for (const name of ["rank", "channel", "label", "LP"]) head.append(make("th", {}, name));
    table.append(head);
    unit.channels.forEach((channel, place) => {
      const line = make("tr", { class: place === chosen ? "chosen" : "" });
      for (const text of [unit.ranks[place], channel]) line.append(make("td", {}, String(text)));
      line.append(make("td", { class: kind(unit.labels[place]) }, unit.labels[place]));
      line.append(make("td", {}, number(unit.values.lp[place])));
      line.addEventListener("click", () => choose(place));
      table.append(line);
    });
    list.replaceChildren(table);
    card(unit);
    scatter(unit);
  };
  const card = (unit) => {
    const box = find("card"), facts = make("dl");
    for (const metric of metrics) {
      if (!unit.values[metric]) continue;
      facts.append(make("dt", {}, metric), make("dd", {}, number(unit.values[metric][chosen])));
    }
    const title = `channel ${unit.channels[chosen]}, ${unit.labels[chosen]}, rank ${unit.ranks[chosen]} of ${unit.n}`;
    box.replaceChildren(make("strong", {}, title), facts);
  };

  // Two metrics against each other, on log axes.
  const scatter = (unit) => {
    const width = 460, height = 340, left = 64, below = 34;
    const svg = find("scatter");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const columns = [axes.x.value, axes.y.value].map((name) => unit.values[name] || []);
    const known = unit.channels.map((_, place) => place).filter((place) => columns.every((values) => values[place] > 0));
    const logs = columns.map((values) => known.map((place) => Math.log10(values[place])));
    const ends = logs.map((values) => [Math.min(...values), Math.max(...values)]);
    const scale = (axis, value) => (ends[axis][1] > ends[axis][0] ? (value - ends[axis][0]) / (ends[axis][1] - ends[axis][0]) : 0.5);
    const x = (value) => left + 8 + scale(0, value) * (width - left - 24), y = (value) => height - below - 8 - scale(1, value) * (height - below - 32);
    svg.replaceChildren(make("path", { class: "axes", d: `M${left} 16V${height - below}H${width - 8}` }));
    if (!known.length) { svg.append(make("text", { x: left + 20, y: height / 2 }, "no channel has both values above zero")); return; }
    const decades = (axis) => {
      const found = [];
      for (let power = Math.ceil(ends[axis][0]); power <= ends[axis][1]; power++) found.push(power);
      return found.length > 6 ? found.filter((power) => power % 2 === 0) : found;
    };
    for (const power of decades(0)) svg.append(make("text", { x: x(power), y: height - below + 14, "text-anchor": "middle" }, `1e${power}`));
    for (const power of decades(1)) svg.append(make("text", { x: left - 6, y: y(power) + 4, "text-anchor": "end" }, `1e${power}`));
    svg.append(make("text", { x: width - 8, y: height - 4, "text-anchor": "end" }, axes.x.value), make("text", { x: 4, y: 12 }, axes.y.value));
    known.forEach((place, index) => {
      const names = [kind(unit.labels[place]), place === chosen ? "chosen" : ""].join(" ");
      const dot = make("circle", { cx: x(logs[0][index]), cy: y(logs[1][index]), r: place === chosen ? 6 : 3.5, class: names });
      dot.append(make("title", {}, `channel ${unit.channels[place]}`));
      dot.addEventListener("click", () => choose(place));
      svg.append(dot);
    });
  };
  find("living").hidden = false;
  point();
  show();
})();
