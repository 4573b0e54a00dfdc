"""Re-makes the models of the tiny world from nothing, or prints how good they are.

python -m tiny NAME     prompts, vae, flux, sd, judge, clip, hps, hunyuan, skyreels, wan, videoalign, or all in this
                        order; video: hunyuan and skyreels
python -m tiny check    how well the checkers agree with the renderers, and the figures of each model: tiny/figures.json
"""

import argparse
import json
import random
from pathlib import Path

import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel, WanPipeline
from tqdm import trange

from rewards import VideoAlignReward, load_reward
from tiny import (
    clips,
    make_clip_hps,
    make_image_models,
    make_judge,
    make_prompts,
    make_video_models,
    make_videoalign,
    make_wan,
    pictures,
)
from tiny.training import CLEAN, MODELS, ROOT, sample, stock_pipeline

FIGURES = MODELS / "figures.json"
MAKERS = {
    "prompts": make_prompts.write_prompts,
    "vae": make_image_models.make_vae,
    "flux": make_image_models.make_flux,
    "sd": make_image_models.make_sd,
    "judge": make_judge.make_judge,
    "clip": make_clip_hps.make_clip,
    "hps": make_clip_hps.make_hps,
    "hunyuan": make_video_models.make_hunyuan,
    "skyreels": make_video_models.make_skyreels,
    "wan": make_wan.make_wan,
    "videoalign": make_videoalign.make_videoalign,
}


def check_pictures(count=3000, seed=1):
    """How often the checker of pictures agrees with the renderer."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    wanted = [pictures.random_metadata(rng, pictures.TAGS[i % len(pictures.TAGS)]) for i in range(count)]
    found = pictures.detect(pictures.render([pictures.random_scene(rng, metadata) for metadata in wanted]))
    wrong = [
        pictures.holds(o, other) for o, m in zip(found, wanted, strict=True) for other in pictures.hard_negatives(m)
    ]
    agree = sum(map(pictures.holds, found, wanted)) / count
    yield "pictures", {"correct captions accepted": agree, "wrong captions accepted": sum(wrong) / len(wrong)}


def check_clips(count=300, seed=1):
    """How often the checker of clips agrees with the renderer, and what it says about faults."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    agree, wrong, uglier, smooth, spoilt = 0, 0, 0, [], []
    for _ in trange(count, desc="clips", leave=False):
        action = clips.random_action(rng)
        scene = clips.random_clip(rng, action)
        clip, ugly = clips.make_clip(rng, scene), clips.make_clip(rng, scene, None, rng.choice(clips.QUALITY_FAULTS))
        agree += clips.check_clip(clip, clips.phrase_action(rng, action))
        wrong += clips.check_clip(clip, clips.phrase_action(rng, clips.another_action(rng, action)))
        rough = clips.make_clip(rng, scene, rng.choice(clips.faults_of_motion(action)))
        smooth.append(clips.roughness_of(clips.watch(clip)))
        spoilt.append(clips.roughness_of(clips.watch(rough)))
        uglier += clips.uncleanness_of(ugly, clips.watch(ugly)) > clips.uncleanness_of(clip, clips.watch(clip))
    shares = {"correct captions accepted": agree, "wrong captions accepted": wrong, "degraded clips less clean": uglier}
    figures = {what: share / count for what, share in shares.items()}
    yield "clips", figures | {"highest roughness of smooth": max(smooth), "lowest of spoilt": min(spoilt)}


def check_judges():
    """CLIP and HPS: the true caption above all with one attribute changed. HPS: the better of two pictures preferred.

    The second judge: which captions it accepts.
    VideoAlign: as in `make_videoalign.judge_figures`.
    """
    for name, file in (("clip", "clip/open_clip_pytorch_model.bin"), ("hps", "hps/HPS_tiny.pt")):
        model = make_clip_hps.load_clip(MODELS / file)
        shares = make_clip_hps.ranking(model, scenes=1200)
        yield name, shares | {"overall": sum(shares.values()) / len(shares)}
    yield "judge", make_judge.accuracy(make_judge.load_judge(), 1200)
    yield "hps, of two pictures", make_clip_hps.preference(model, batches=20)
    yield "videoalign", make_videoalign.judge_figures(VideoAlignReward(str(MODELS / "videoalign")), scenes=200)


def check_image_models():
    """The checker's accuracy of each generator of pictures, and how well CLIP and HPS agree with it (area under the ROC
    curve)."""
    judges = load_reward("hps,clip", {name: str(MODELS / name) for name in ("hps", "clip")}, torch.device("cpu"))
    for name, kind in make_image_models.KINDS.items():
        for folder in filter(Path.exists, (CLEAN / name, MODELS / name)):
            pipe, prompts = kind.from_pretrained(folder), make_image_models.heldout() * 4
            drawn = sample(pipe, prompts, **make_image_models.SAMPLING[kind])
            right = pictures.right(drawn, prompts)
            scores = judges(drawn, prompts)
            agreement = {f"AUC, {judge}": auc(scores[judge], right) for judge in scores}
            yield f"{folder.relative_to(ROOT)}", pictures.per_kind(right, prompts) | agreement


def check_video_models():
    """The checker's accuracy of each generator of clips, and how rough and unclean the clips are."""
    rows = make_video_models.heldout()
    prompts = [row["prompt"] for row in rows]
    for name, kind in {"hunyuan": HunyuanVideoPipeline, "skyreels": None, "wan": WanPipeline}.items():
        for folder in filter(Path.exists, (CLEAN / name, MODELS / name)):
            if kind:
                pipe = stock_pipeline(kind, folder)
            else:  # a transformer alone; the rest is tiny/hunyuan's
                pipe = stock_pipeline(HunyuanVideoPipeline, MODELS / "hunyuan")
                pipe.transformer = HunyuanVideoTransformer3DModel.from_pretrained(folder)
            pipe.set_progress_bar_config(disable=True)
            drawn = make_wan.sample(pipe, prompts) if name == "wan" else make_video_models.sample(pipe, rows)
            figures = {"right": clips.right(drawn, prompts)}
            figures |= {f.__name__: f(drawn, prompts) for f in (clips.roughness, clips.uncleanness)}
            yield f"{folder.relative_to(ROOT)}", {what: values.mean().item() for what, values in figures.items()}


def check():
    """Prints how well the checkers agree with the renderers, and the figures of each model; writes tiny/figures.json.

    The generators before their bad habits exist only where `python -m tiny` trained them.
    """
    figures = {}
    for part in (check_pictures, check_clips, check_judges, check_image_models, check_video_models):
        for name, row in part():
            print(f"{name:<24}" + "  ".join(f"{what} {value:.3f}" for what, value in row.items()), flush=True)
            figures[name] = row
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


def auc(scores, right):
    """Area under the ROC curve: how often a right picture scores above a wrong one."""
    above = scores[right == 1][:, None] > scores[right == 0][None]
    return above.float().mean().item()


def main():
    """Makes what is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=(*MAKERS, "video", "all", "check"))
    name = parser.parse_args().name
    if name == "check":
        return check()
    for maker in {"video": ("hunyuan", "skyreels"), "all": MAKERS}.get(name, (name,)):
        MAKERS[maker]()


if __name__ == "__main__":
    main()
