"""Human votes: vote.html, a page of blind pairs that needs no other file and no server, and the sum of its exports.

    python -m evaluation.vote votes-*.json          the table over all voters

The page shows the base and a trained model side by side, for the same prompt and noise, without their names. Order and
sides are random; each model stands on the left in half of its pairs. Votes stay in the browser until they are exported.

Legend: P prompts, M trained models.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

from runtime import data
from runtime.options import RunError, one_line_errors, require

from .report import Results, data_uri, spread

PICTURE_PROMPTS, VIDEO_PROMPTS = 200, 40  # at most so many are voted on; the paper's artists saw 200 to 240
CHOICES = ("left", "right", "tie")


def wilson(wins: int, votes: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion: it stays in [0, 1], also with few votes. (0, 1) without a vote."""
    if votes == 0:
        return 0.0, 1.0
    centre = (wins + z**2 / 2) / (votes + z**2)
    half = z / (votes + z**2) * math.sqrt(wins * (votes - wins) / votes + z**2 / 4)
    return centre - half, centre + half


def make_pairs(prompts: int, models: int, shown: int) -> list[dict]:
    """What is voted on, in its order: {"prompt": 0 … P - 1, "model": 1 … M, "trained": "left" or "right"}."""
    pairs = []
    for model in range(1, models + 1):
        chosen = spread(prompts, shown)
        sides = data.keyed_rng("sides of votes", prompts, model).permutation(len(chosen)) % 2  # half of them each
        pairs += [
            {"prompt": p, "model": model, "trained": CHOICES[side]}
            for p, side in zip(chosen, sides.tolist(), strict=True)
        ]
    order = data.keyed_rng("order of votes", prompts, models).permutation(len(pairs))
    return [pairs[i] for i in order]


def write_page(results: Results, folder: Path) -> None:
    """Write vote.html into the folder, if there is a trained model to compare."""
    base, *trained = results.models
    if not trained:
        return
    pairs = make_pairs(len(results.prompts), len(trained), PICTURE_PROMPTS if results.frames == 1 else VIDEO_PROMPTS)
    width, height = data.read_picture(results.pictures[base][0][0]).size
    side = min(512 if results.frames == 1 else 256, max(width, height // results.frames))  # the browser enlarges
    for pair in pairs:
        prompt, models = pair["prompt"], [base, trained[pair["model"] - 1]]
        shown = models[::-1] if pair["trained"] == "left" else models
        paths = [results.pictures[model][prompt][0] for model in shown]
        pair["pictures"] = [data_uri(path, results.frames, results.fps, side) for path in paths]
        pair["prompt"], pair["model"] = results.prompts[prompt]["prompt"], trained[pair["model"] - 1]
    content = {"page": hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16], "models": trained, "pairs": pairs}
    text = json.dumps(content).replace("<", "\\u003c")  # no prompt may end the script
    data.write_atomically(folder / "vote.html", PAGE.replace("CONTENT", text))


def add_up(exports: list[dict]) -> dict[str, dict]:
    """{model: {"wins", "losses", "ties"}} over the exports, of which each is one voter's."""
    counts = {}
    for export in exports:
        for vote in export["votes"]:
            own = counts.setdefault(vote["model"], {"wins": 0, "losses": 0, "ties": 0})
            own["ties" if vote["choice"] == "tie" else "wins" if vote["choice"] == vote["trained"] else "losses"] += 1
    return counts


def read_export(path: str) -> dict:
    """What the page exported. Raises RunError if the file is something else."""
    try:
        export = json.loads(Path(path).read_text(encoding="utf-8"))
        whole = all(vote["choice"] in CHOICES and vote["trained"] in CHOICES[:2] for vote in export["votes"])
        names = [export["page"], *(vote["model"] for vote in export["votes"])]
        whole = whole and all(isinstance(name, str) for name in names)
    except (OSError, ValueError, KeyError, TypeError) as e:
        what = f"{path} cannot be read as votes ({type(e).__name__})"
        raise RunError(f"{what}; give files that vote.html saved") from e
    require(whole, f"{path} is damaged or was changed by hand; export the votes again")
    return export


def main(paths: list[str]) -> None:
    """Print a table: for each model the votes for it and for the base, and the share with its interval."""
    require(bool(paths), "name the files that vote.html saved: python -m evaluation.vote votes-*.json")
    exports = [read_export(path) for path in paths]
    pages = sorted({export["page"] for export in exports})
    require(len(pages) == 1, f"the files are votes on different pages, {', '.join(pages)}; add up those of one")
    print("| model | for it | for the base | ties | share for it, 95 % |\n|---|---|---|---|---|")
    for model, n in add_up(exports).items():
        votes = n["wins"] + n["losses"]
        low, high = wilson(n["wins"], votes)
        share = f"{n['wins'] / votes:.3f}" if votes else "-"
        print(f"| {model} | {n['wins']} | {n['losses']} | {n['ties']} | {share} ({low:.3f} to {high:.3f}) |")


# --------------------------------------------------------------------------------------------------------------- page

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Which is better?</title><style>
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif }
body { margin: auto; max-width: 1100px; padding: .6rem; min-height: 96vh; display: flex; flex-direction: column }
h1 { font-size: 1.1rem; margin: .4rem 0; overflow-wrap: anywhere } p { margin: .2rem 0 } [hidden] { display: none }
.pair, .buttons { display: flex; gap: .6rem } .pair { justify-content: center; margin: .4rem 0 }
.pair img { width: 50%; min-width: 0; max-height: 60vh; object-fit: contain }
button { flex: 1; min-height: 3.5rem; font: inherit; touch-action: manipulation; border-radius: .6rem; margin: .2rem 0 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .3rem; text-align: left; font-size: .85rem }
.table { overflow-x: auto } .small { font-size: .85rem; opacity: .75 }
</style>
<main id="voting"><p class="small" id="count"></p><h1 id="prompt"></h1>
<div class="pair"><img id="left" alt="left"><img id="right" alt="right"></div>
<div class="buttons"><button id="vote-left">← left is better</button><button id="vote-tie">↓ no difference</button>
<button id="vote-right">right is better →</button></div>
<div class="buttons"><button id="undo">undo (backspace)</button><button id="stop">stop, show the result</button></div>
</main>
<main id="result" hidden><h1>Result</h1><div class="table"><table id="table"></table></div>
<p class="small">Share of the votes for the trained model among those that saw a difference, and Wilson's
interval for 95 %.</p>
<div class="buttons"><button id="export">save the votes as JSON</button>
<button id="again">delete them, start again</button></div></main>
<script type="application/json" id="data">CONTENT</script>
<script>
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent), key = "votes-" + data.page;
let state = { choices: [], over: false };
try { state = JSON.parse(localStorage.getItem(key)) || state } catch {}  // a browser may keep nothing for local files

function wilson(wins, votes, z = 1.959964) {
  if (!votes) return [0, 1];
  const centre = (wins + z * z / 2) / (votes + z * z);
  const half = z / (votes + z * z) * Math.sqrt(wins * (votes - wins) / votes + z * z / 4);
  return [centre - half, centre + half];
}

function votes() {
  return state.choices.map((choice, i) => {
    const { prompt, model, trained } = data.pairs[i];
    return { prompt, model, trained, choice };
  });
}

function show() {
  try { localStorage.setItem(key, JSON.stringify(state)) } catch {}
  const done = state.choices.length, over = state.over || done == data.pairs.length;
  $("voting").hidden = over; $("result").hidden = !over; $("undo").disabled = !done; $("stop").disabled = !done;
  if (over) return showResult();
  const pair = data.pairs[done];
  $("count").textContent = `${done + 1} of ${data.pairs.length}: which shows this better?`;
  $("prompt").textContent = pair.prompt;
  [$("left").src, $("right").src] = pair.pictures;
  for (const img of [$("left"), $("right")])
    img.onload = () => img.style.imageRendering = img.naturalWidth > 128 ? "auto" : "pixelated";
}

function showResult() {
  $("table").innerHTML = "<tr><th>model<th>for it<th>for the base<th>ties<th>share";
  for (const model of data.models) {
    const own = votes().filter(vote => vote.model == model), ties = own.filter(vote => vote.choice == "tie").length;
    const wins = own.filter(vote => vote.choice == vote.trained).length, n = own.length - ties;
    const [low, high] = wilson(wins, n).map(x => x.toFixed(3)), row = $("table").insertRow();
    const share = (n ? (wins / n).toFixed(3) : "-") + ` (${low} to ${high})`;
    for (const cell of [model, wins, n - wins, ties, share]) row.insertCell().textContent = cell;
  }
}

function vote(choice) { if (!$("voting").hidden) { state.choices.push(choice); show() } }
function undo() { if (!$("voting").hidden) { state.choices.pop(); show() } }
for (const choice of ["left", "right", "tie"]) $("vote-" + choice).onclick = () => vote(choice);
$("undo").onclick = undo;
$("stop").onclick = () => { state.over = true; show() };
$("again").onclick = () => { if (confirm("Delete all votes?")) { state = { choices: [], over: false }; show() } };
$("export").onclick = () => {
  const text = JSON.stringify({ page: data.page, votes: votes() }, null, 1), link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `votes-${data.page}-${Date.now()}.json`;
  link.click();
};
addEventListener("keydown", event => {
  const action = { ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), ArrowDown: () => vote("tie"),
                   Backspace: undo }[event.key];
  if (action && !event.repeat) { event.preventDefault(); action() }
});
show();
</script></html>
"""

if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
