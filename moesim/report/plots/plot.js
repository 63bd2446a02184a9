// What the page of `moesim plot` does in a browser: filters, the front of what is left, a table to sort.
//
// It reads `#plot-data`: for every group of points the index of its value on each axis (`at`), and for every row of the
// table what to sort it by (`sort`). Traces carry in `meta` which group each of their points is; `cells` are those of a
// heat map.
(() => {
  const page = JSON.parse(document.getElementById('plot-data').textContent);
  const plots = [...document.querySelectorAll('.plotly-graph-div')].map(div => ({div, data: div.data.slice()}));

  // Arrays as long as the trace keep the marked places; everything else stays.
  const keep = (value, marks) => {
    if (Array.isArray(value)) return value.length === marks.length ? value.filter((_, i) => marks[i]) : value;
    if (value === null || typeof value !== 'object' || ArrayBuffer.isView(value)) return value;
    const entries = Object.entries(value).map(([key, child]) => [key, key === 'meta' ? child : keep(child, marks)]);
    return Object.fromEntries(entries);
  };

  const fill = (trace, shown) => {
    const cells = trace.meta.cells, out = {...trace};
    for (const key of ['z', 'text', 'customdata']) {
      out[key] = trace[key].map(row => row.map(() => key === 'z' ? null : ''));
      cells.groups.forEach((group, i) => {
        if (shown[group]) out[key][cells.row[i]][cells.column[i]] = cells[key][i];
      });
    }
    return out;
  };

  // The points that no other one beats, ascending in x; of equal ones the first group.
  const front = (trace, data) => {
    const [alongX, alongY] = trace.meta.better, among = new Set(trace.meta.among), points = [];
    for (const {meta, x, y} of data) {
      if (!meta || meta.role !== 'points') continue;
      x.forEach((value, i) => { if (among.has(meta.groups[i])) points.push([value, y[i], meta.groups[i]]); });
    }
    points.sort((a, b) => alongX * (b[0] - a[0]) || alongY * (b[1] - a[1]) || a[2] - b[2]);
    const best = [];
    for (const point of points) {
      if (!best.length || alongY * (point[1] - best[best.length - 1][1]) > 0) best.push(point);
    }
    best.sort((a, b) => a[0] - b[0]);
    return {...trace, x: best.map(p => p[0]), y: best.map(p => p[1]), text: best.map(p => trace.meta.labels[p[2]])};
  };

  const allowed = () => page.axes.map((_, axis) => {
    const select = document.querySelector(`select[data-axis="${axis}"]`);
    if (select) return new Set([Number(select.value)]);
    const boxes = [...document.querySelectorAll(`input[data-axis="${axis}"]`)];
    return boxes.length ? new Set(boxes.filter(box => box.checked).map(box => Number(box.value))) : null;
  });

  const apply = () => {
    const wanted = allowed();
    const shown = page.at.map(at => at.every((value, axis) => !wanted[axis] || wanted[axis].has(value)));
    for (const {div, data} of plots) {
      let next = data.map(trace => {
        if (!trace.meta) return trace;
        if (trace.meta.cells) return fill(trace, shown);
        if (!trace.meta.groups) return trace;
        const marks = trace.meta.groups.map(group => shown[group]);
        const left = trace.meta.groups.filter((_, i) => marks[i]);
        return {...keep(trace, marks), meta: {...trace.meta, groups: left}, visible: left.length > 0};
      });
      next = next.map(trace => trace.meta && trace.meta.role === 'front' ? front(trace, next) : trace);
      Plotly.react(div, next, div.layout);
    }
    document.querySelectorAll('tr[data-group]').forEach(row => { row.hidden = !shown[Number(row.dataset.group)]; });
    const done = page.at.map((_, group) => page.done[group] && shown[group]).filter(Boolean).length;
    document.getElementById('shown').textContent = `${done} of ${page.done.filter(Boolean).length} shown`;
  };

  document.querySelectorAll('[data-axis]').forEach(control => control.addEventListener('change', apply));
  const all = document.getElementById('all');
  if (all) all.addEventListener('click', () => {
    document.querySelectorAll('input[data-axis]').forEach(box => { box.checked = true; });
    apply();
  });

  const table = document.getElementById('points');
  const rows = [...table.querySelectorAll('tr[data-group]')];
  table.querySelectorAll('th').forEach((head, column) => {
    let direction = -1;
    head.addEventListener('click', () => {
      direction = -direction;
      const by = row => page.sort[rows.indexOf(row)][column];
      const order = rows.slice().sort((a, b) => {
        const one = by(a), other = by(b);
        if (one === null || other === null) return (one === null) - (other === null);
        return direction * (typeof one === 'number' && typeof other === 'number'
          ? one - other : String(one).localeCompare(String(other), undefined, {numeric: true}));
      });
      table.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', direction > 0 ? 'ascending' : 'descending');
      order.forEach(row => row.parentNode.appendChild(row));
    });
  });
  apply();
})();
