(function () {
  "use strict";
  var read = function (id) { return JSON.parse(document.getElementById(id).textContent); };
  var settings = read("settings");
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var button = document.getElementById("theme");
  var plots = Array.prototype.slice.call(document.querySelectorAll("[data-figure]"));
  var chosen = null;
  var current = function () { return chosen || (dark.matches ? "dark" : "light"); };

  function label() {
    button.textContent = current() === "dark" ? "Light page" : "Dark page";
  }
  function dress(theme) {
    return Promise.all(plots.filter(function (plot) { return plot.drawn; }).map(function (plot) {
      return window.Plotly.relayout(plot, { template: settings.templates[theme] });
    }));
  }
  function apply() {
    if (chosen) { document.documentElement.dataset.theme = chosen; }
    label();
    dress(current());
  }
  function draw(plot) {
    var figure = read(plot.dataset.figure);
    figure.layout.template = settings.templates[current()];
    figure.layout.autosize = true;
    return window.Plotly.newPlot(plot, figure.data, figure.layout, settings.config).then(function () { plot.drawn = true; });
  }

  button.hidden = false;
  label();
  button.addEventListener("click", function () { chosen = current() === "dark" ? "light" : "dark"; apply(); });
  dark.addEventListener("change", function () { if (!chosen) { apply(); } });
  if (window.Plotly) {
    // one after the other, so that the page stays alive while a long report is drawn
    plots.reduce(function (before, plot) { return before.then(function () { return draw(plot); }); }, Promise.resolve());
  }
  // paper is white
  window.addEventListener("beforeprint", function () {
    document.documentElement.dataset.theme = "light";
    document.querySelectorAll("details").forEach(function (box) { box.dataset.was = box.open ? "1" : ""; });
    dress("light");
  });
  window.addEventListener("afterprint", function () {
    if (chosen) { document.documentElement.dataset.theme = chosen; } else { delete document.documentElement.dataset.theme; }
    dress(current());
  });
})();
