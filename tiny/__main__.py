"""Re-makes the models of the tiny world from nothing, or prints how good they are.

python -m tiny NAME     prompts, vae, flux, sd, clip, hps, hunyuan, skyreels, wan, videoalign, or all in this order;
                        video: hunyuan and skyreels
python -m tiny check    how well the checkers agree with the renderers, and the figures of each model
"""

import argparse
import random
from pathlib import Path

import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from tqdm import trange

from rewards import VideoAlignReward, load_reward
from tiny import (
    clips,
    make_clip_hps,
    make_image_models,
    make_prompts,
    make_video_models,
    make_videoalign,
    make_wan,
    pictures,
)
from tiny.training import CLEAN, MODELS, ROOT, sample

MAKERS = {
    "prompts": make_prompts.write_prompts,
    "vae": make_image_models.make_vae,
    "flux": make_image_models.make_flux,
    "sd": make_image_models.make_sd,
    "clip": make_clip_hps.make_clip,
    "hps": make_clip_hps.make_hps,
    "hunyuan": make_video_models.make_hunyuan,
    "skyreels": make_video_models.make_skyreels,
    "wan": make_wan.make_wan,
    "videoalign": make_videoalign.make_videoalign,
}


def show(name, shares):
    """Prints a line of shares {what: share in [0, 1]}."""
    print(f"{name:<24}" + "  ".join(f"{what} {share:.1%}" for what, share in shares.items()), flush=True)


def check_pictures(count=3000, seed=1):
    """Prints how often the checker of pictures agrees with the renderer."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    wanted = [pictures.random_metadata(rng, pictures.TAGS[i % len(pictures.TAGS)]) for i in range(count)]
    found = pictures.detect(pictures.render([pictures.random_scene(rng, metadata) for metadata in wanted]))
    wrong = [
        pictures.holds(o, other) for o, m in zip(found, wanted, strict=True) for other in pictures.hard_negatives(m)
    ]
    agree = sum(map(pictures.holds, found, wanted)) / count
    show("pictures", {"correct captions accepted": agree, "wrong captions accepted": sum(wrong) / len(wrong)})


def check_clips(count=300, seed=1):
    """Prints how often the checker of clips agrees with the renderer, and what it says about faults."""
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
    show("clips", {what: share / count for what, share in shares.items()})
    print(f"roughness: at most {max(smooth):.2f} of smooth clips, at least {min(spoilt):.2f} of spoilt ones")


def check_models():
    """Prints the figures of CLIP, HPS, VideoAlign and of the generators."""
    for name, file in (("clip", "clip/open_clip_pytorch_model.bin"), ("hps", "hps/HPS_tiny.pt")):
        shares = make_clip_hps.ranking(make_clip_hps.load_clip(MODELS / file), scenes=1200)
        show(name, shares | {"overall": sum(shares.values()) / len(shares)})
    show("videoalign", make_videoalign.judge_figures(VideoAlignReward(str(MODELS / "videoalign")), scenes=200))
    judges = load_reward("hps,clip", {name: str(MODELS / name) for name in ("hps", "clip")}, torch.device("cpu"))
    for name, kind in make_image_models.KINDS.items():
        for folder in (CLEAN / name, MODELS / name):
            if not folder.exists():
                continue
            pipe, prompts = kind.from_pretrained(folder), make_image_models.heldout() * 4
            drawn = sample(pipe, prompts, **make_image_models.SAMPLING[kind])
            right = pictures.right(drawn, prompts)
            show(f"{folder.relative_to(ROOT)}", pictures.per_kind(right, prompts))
            scores = judges(drawn, prompts)
            show("  AUC", {judge: auc(scores[judge], right) for judge in scores})
    check_films()


def check_films():
    """Prints the checker's accuracy of each generator of clips, and how rough and unclean the clips are."""
    rows = make_video_models.heldout()
    prompts = [row["prompt"] for row in rows]
    pipe = HunyuanVideoPipeline.from_pretrained(MODELS / "hunyuan")
    pipe.set_progress_bar_config(disable=True)
    for name, part in (("hunyuan", "transformer"), ("skyreels", None)):
        for folder in filter(Path.exists, (CLEAN / name, MODELS / name)):
            pipe.transformer = HunyuanVideoTransformer3DModel.from_pretrained(folder, subfolder=part)
            drawn = make_video_models.sample(pipe, rows)
            show(f"{folder.relative_to(ROOT)}", {"right": clips.right(drawn, prompts).mean().item()})
            for measure in (clips.roughness, clips.uncleanness):
                print(f"  {measure.__name__} {measure(drawn, prompts).mean():.2f}")


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
        check_pictures()
        check_clips()
        check_models()
    for maker in {"video": ("hunyuan", "skyreels"), "all": MAKERS, "check": ()}.get(name, (name,)):
        MAKERS[maker]()


if __name__ == "__main__":
    main()
