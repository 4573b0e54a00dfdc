"""Human votes: vote.html, a page of blind pairs that needs no other file and no server, and the sum of its exports.

    python -m evaluation.vote votes-*.json          the table over all voters

The page shows the base and a trained model side by side, for the same prompt and noise, without their names. Order and
sides are random; each model stands on the left in half of its pairs. Votes stay in the browser until they are exported.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

from runtime import data, files, pictures
from runtime.options import Lazy, one_line_errors, require

from .report import Results, data_uri, render, spread

stats = Lazy("scipy.stats")

PICTURE_PROMPTS, VIDEO_PROMPTS = 200, 40  # at most so many are voted on; the paper's artists saw 200 to 240
SIDES = ("left", "right")


def make_pairs(prompts: int, models: int, shown: int) -> list[tuple[int, int, str]]:
    """What is voted on, in its order: number of the prompt, number of the trained model from 1 on, its side."""
    pairs = []
    for model in range(1, models + 1):
        chosen = spread(prompts, shown)
        sides = data.keyed_rng("sides of votes", prompts, model).permutation(len(chosen)) % 2  # half of them each
        pairs += [(p, model, SIDES[side]) for p, side in zip(chosen, sides, strict=True)]
    order = data.keyed_rng("order of votes", prompts, models).permutation(len(pairs))
    return [pairs[i] for i in order]


def write_page(results: Results, folder: Path) -> None:
    """Write vote.html into the folder, if there is a trained model to compare."""
    base, *trained = results.models
    if not trained:
        return
    width, height = pictures.read_picture(results.pictures[base][0][0]).size
    size = min(512 if results.frames == 1 else 256, max(width, height // results.frames))  # the browser enlarges
    pairs, most = [], PICTURE_PROMPTS if results.frames == 1 else VIDEO_PROMPTS
    for p, number, side in make_pairs(len(results.prompts), len(trained), most):
        model = trained[number - 1]
        shown = (model, base) if side == "left" else (base, model)
        sources = [data_uri(results.pictures[name][p][0], results.frames, results.fps, size) for name in shown]
        pairs.append({"prompt": results.prompts[p]["prompt"], "model": model, "trained": side, "pictures": sources})
    content = {"page": hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16], "models": trained, "pairs": pairs}
    files.write_atomically(folder / "vote.html", render("vote.html.j2", content=content))


def read_votes(path: str) -> tuple[str, Counter]:
    """A saved file's page and its votes, {(model, verdict): number}. Raises RunError if it is something else."""
    counts = Counter()
    try:
        export = json.loads(Path(path).read_text(encoding="utf-8"))
        for vote in export["votes"]:
            trained, choice = SIDES.index(vote["trained"]), (*SIDES, "tie").index(vote["choice"])
            verdict = "tie" if choice == 2 else "for it" if choice == trained else "for the base"
            counts[vote["model"], verdict] += 1
        whole = all(isinstance(name, str) for name in (export["page"], *(model for model, _ in counts)))
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    require(whole, f"{path} cannot be read as votes; give files that vote.html saved")
    return export["page"], counts


def main(paths: list[str]) -> None:
    """Print a table: for each model the votes for it and for the base, and the share with Wilson's interval."""
    require(bool(paths), "name the files that vote.html saved: python -m evaluation.vote votes-*.json")
    pages, votes = zip(*map(read_votes, paths), strict=True)
    found = ", ".join(sorted(set(pages)))
    require(len(set(pages)) == 1, f"the files are votes on different pages, {found}; add up those of one")
    counts = sum(votes, Counter())
    print("| model | for it | for the base | ties | share for it, 95 % |\n|---|---|---|---|---|")
    for model in dict.fromkeys(model for model, _ in counts):
        wins, losses, ties = (counts[model, kind] for kind in ("for it", "for the base", "tie"))
        share, low, high = "-", 0.0, 1.0
        if wins + losses:
            result = stats.binomtest(wins, wins + losses)
            share, (low, high) = f"{result.statistic:.3f}", result.proportion_ci(method="wilson")
        print(f"| {model} | {wins} | {losses} | {ties} | {share} ({low:.3f} to {high:.3f}) |")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
