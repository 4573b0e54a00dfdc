// The laboratory of annotated.html: the steps of sampling.py, and GRPO, on samples that are one number each.
"use strict";
const WEIGHT = 0.6, MEANS = [-1.5, 1.5], SPREAD = 0.4; // clean data: 0.6 N(-1.5, 0.4²) + 0.4 N(1.5, 0.4²)
const range = (n, f) => Array.from({ length: n }, (_, i) => f(i));
const mean = (xs) => xs.reduce((a, b) => a + b, 0) / xs.length;
const variance = (xs, m = mean(xs)) => (mean(xs.map((x) => (x - m) ** 2)) * xs.length) / (xs.length - 1);

const STEP = { // the Gaussian of one step. p: the prediction, v or (ddim) eps; s, n: the level of z and the next one
  dance(p, z, s, n, eta) {
    const x0 = z - s * p, score = -(z - (1 - s) * x0) / s ** 2;
    return { mean: z + (p - 0.5 * eta ** 2 * score) * (n - s), std: eta * Math.sqrt(s - n), x0 };
  },
  flow(p, z, s, n, eta) {
    const d = n - s, a = eta * Math.sqrt(s / (1 - (s === 1 ? n : s))), x0 = z - s * p;
    const mean = z * (1 + (a ** 2 / (2 * s)) * d) + p * (1 + (a ** 2 * (1 - s)) / (2 * s)) * d;
    return { mean, std: a * Math.sqrt(-d), x0 };
  },
  cps(p, z, s, n, eta) {
    const x0 = z - s * p, x1 = z + (1 - s) * p, angle = (eta * Math.PI) / 2;
    return { mean: (1 - n) * x0 + n * Math.cos(angle) * x1, std: n * Math.sin(angle), x0 };
  },
  ddim(p, z, s, n, eta) { // levels are alpha_bars
    const x0 = (z - Math.sqrt(1 - s) * p) / Math.sqrt(s), std = eta * Math.sqrt(((1 - n) / (1 - s)) * (1 - s / n));
    return { mean: Math.sqrt(n) * x0 + Math.sqrt(Math.max(0, 1 - n - std ** 2)) * p, std, x0 };
  },
};
function levels(kind, T, shift) { // sigmas, or for ddim alpha_bars that rise from 0.005 as noise falls
  const sigmas = range(T + 1, (t) => (shift * (1 - t / T)) / (1 + (shift - 1) * (1 - t / T)));
  return kind === "ddim" ? sigmas.map((s) => 0.005 + (0.995 * (1 - s) ** 2) / ((1 - s) ** 2 + s ** 2)) : sigmas;
}
function predict(kind, z, level, theta) { // the mixture's exact v or eps, plus theta, linear between 17 knots
  const a = kind === "ddim" ? Math.sqrt(level) : 1 - level, b = kind === "ddim" ? Math.sqrt(1 - level) : level;
  const d = z - a * MEANS[0], e = z - a * MEANS[1], total = (a * SPREAD) ** 2 + b ** 2; // z = a x0 + b noise
  const first = 1 / (1 + (1 / WEIGHT - 1) * Math.exp((d ** 2 - e ** 2) / (2 * total))); // P(left mode | z)
  const x0 = first * MEANS[0] + (1 - first) * MEANS[1] + ((a * SPREAD ** 2) / total) * (first * d + (1 - first) * e);
  const x = Math.min(15.999, Math.max(0, 2 * z + 8)), j = Math.floor(x), f = x - j; // knots: -4, -3.5, …, 4
  const low = (1 - f) * theta[j] + f * theta[j + 1], high = (1 - f) * theta[17 + j] + f * theta[18 + j];
  return { p: (z - (kind === "ddim" ? a : 1) * x0) / b + (1 - b) * low + b * high, j, f, b };
}
const logProb = (kind, x, { mean, std }) => // without constants
  kind === "cps" ? -((x - mean) ** 2) : -((x - mean) ** 2) / (2 * std ** 2) - Math.log(std);
function rollout(kind, l, eta, theta, noise) { // noise[0] is the first z, noise[t + 1] step t's; the last has none
  for (let t = 0, z = noise[0], draws = []; ; t++) {
    const last = t + 2 === l.length, { p } = predict(kind, z, l[t], last ? theta.map(() => 0) : theta);
    const g = STEP[kind](p, z, l[t], l[t + 1], last ? 0 : eta);
    if (last) return { draws, z0: g.x0 };
    const next = g.mean + g.std * noise[t + 1];
    draws.push({ z, next, t, old: logProb(kind, next, g) });
    z = next;
  }
}
function gradient(kind, l, eta, theta, draws, clip) { // of the clipped objective, eq. 9, summed over the draws
  const sum = theta.map(() => 0);
  for (const { z, next, t, A, old } of draws) {
    const { p, j, f, b } = predict(kind, z, l[t], theta), g = STEP[kind](p, z, l[t], l[t + 1], eta);
    const rho = Math.exp(logProb(kind, next, g) - old);
    if (A > 0 ? rho > 1 + clip : rho < 1 - clip) continue;
    const slope = STEP[kind](p + 1, z, l[t], l[t + 1], eta).mean - g.mean; // d mean / d p: it is linear in p
    const d = A * rho * slope * (next - g.mean) * (kind === "cps" ? 2 : 1 / g.std ** 2); // d objective / d p
    sum[j] += d * (1 - b) * (1 - f);
    sum[j + 1] += d * (1 - b) * f;
    sum[17 + j] += d * b * (1 - f);
    sum[18 + j] += d * b * f;
  }
  return sum;
}
function iterate(theta, kind, l, eta, reward, random, { P = 8, G = 16, updates = 4, clip = 0.2, rate = 0.1 } = {}) {
  const parts = range(updates, () => []), groups = range(P, () => { // a group: G samples from one initial noise
    const start = random(), group = range(G, () => rollout(kind, l, eta, theta, [start, ...l.slice(2).map(random)]));
    const r = group.map((s) => reward(s.z0)), m = mean(r), std = Math.sqrt(variance(r)) + 1e-8;
    group.forEach((s, i) => parts[i % updates].push(...s.draws.map((draw) => ({ ...draw, A: (r[i] - m) / std }))));
    return m;
  });
  for (const draws of parts) { // gradient ascent in steps of length `rate`
    const g = gradient(kind, l, eta, theta, draws, clip), length = Math.hypot(...g) + 1e-8;
    g.forEach((x, i) => (theta[i] += (rate * x) / length));
  }
  return mean(groups);
}
const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

if (typeof document !== "undefined") { // the page: sliders, curves, training
  const $ = (id) => document.getElementById(id), value = (id) => Number($(id).value);
  const noise = range(2000, () => range(51, normal)), bell = (x, m, s) => Math.exp(-((x - m) ** 2) / (2 * s ** 2));
  const reward = (x) => bell(x, value("bump"), 0.5), height = (density) => 230 - 230 * density;
  const density = (x) => WEIGHT * bell(x, MEANS[0], SPREAD) + (1 - WEIGHT) * bell(x, MEANS[1], SPREAD);
  const exact = (x) => density(x) / (SPREAD * Math.sqrt(2 * Math.PI));
  const M = WEIGHT * MEANS[0] + (1 - WEIGHT) * MEANS[1], between = WEIGHT * (1 - WEIGHT) * (MEANS[1] - MEANS[0]) ** 2;
  const setting = () => [$("kind").value, levels($("kind").value, value("T"), value("shift")), value("eta")];
  const shape = (id, points) => $(id).setAttribute("d", points.length ? "M" + points.join("L") : "");
  const curve = (id, f) => shape(id, range(161, (i) => [4 * i, height(f(i / 20 - 4))]));
  let theta, rewards, timer;
  function draw() {
    const [kind, l, eta] = setting(), bins = range(80, () => 0);
    const z0 = noise.map((n) => rollout(kind, l, eta, theta, n).z0);
    for (const x of z0) if (Math.abs(x) < 4) bins[Math.floor(10 * (x + 4))] += 10 / z0.length;
    shape("histogram", [[0, 230], ...bins.flatMap((b, i) => [[8 * i, height(b)], [8 * i + 8, height(b)]]), [640, 230]]);
    curve("exact", exact);
    curve("hill", reward);
    shape("rewards", rewards.map((r, i) => [3.2 * i, 100 - 100 * r]));
    for (const id of ["eta", "T", "shift", "bump"]) $(id + "-value").value = $(id).value;
    const error = 100 * (variance(z0) / (SPREAD ** 2 + between) - 1);
    $("errors").value = `mean ${(mean(z0) - M).toFixed(3)}, variance ${error.toFixed(1)} %`;
    $("train").disabled = !eta;
    $("score").value = `${mean(z0.map(reward)).toFixed(3)}`;
  }
  function train(on) {
    clearInterval(timer);
    timer = on && value("eta") > 0 && setInterval(() => {
      rewards = [...rewards, iterate(theta, ...setting(), reward, normal)].slice(-200);
      draw();
    }, 50);
    $("train").textContent = timer ? "Pause" : "Train";
  }
  function reset() {
    train(false);
    [theta, rewards] = [range(34, () => 0), []];
    draw();
  }
  function drag(event) {
    const box = $("plot").getBoundingClientRect();
    if (event.buttons) $("bump").value = (8 * (event.clientX - box.left)) / box.width - 4;
    if (event.buttons) draw();
  }
  $("laboratory").hidden = $("laboratory-link").hidden = false;
  for (const id of ["kind", "eta", "T", "shift"]) $(id).addEventListener("input", reset);
  for (const name of ["pointerdown", "pointermove"]) $("plot").addEventListener(name, drag);
  $("bump").addEventListener("input", draw);
  $("train").addEventListener("click", () => train(!timer));
  $("reset").addEventListener("click", reset);
  reset();
}
