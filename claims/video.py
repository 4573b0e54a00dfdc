"""Video: text to video, image to video, and text to image by the video model; shared noise there too."""

from .experiment import Compare, Experiment, Run, gain, heldout

VQ, MQ = "gain in VQ on held-out prompts (VideoAlign's deviations)", "gain in MQ on held-out prompts (same unit)"
RIGHT, SMOOTHER = "gain in checker accuracy, held-out", "roughness less than the base's, held-out (checker's unit)"


def smoother(run: Run) -> float:
    """By how much the checker's roughness of motion fell."""
    return -gain("roughness")(run)


def video(task: str, paper: str, says: str, measures: dict, compares: tuple, curve: tuple) -> Experiment:
    return Experiment(
        paper=paper,
        says=says,
        trainer="grpo_video",
        preset=f"tiny-{task}",
        arms={"DanceGRPO": {}},
        measures=measures,
        compares=compares,
        curves=(curve,),
        heldout={"preset": "tiny-video"},
    )


GAINS = (  # of text to video: what is measured, what must come out, and the curve
    {VQ: gain("vq"), MQ: gain("mq"), RIGHT: gain("right"), SMOOTHER: smoother},
    (Compare(VQ, "DanceGRPO"), Compare(MQ, "DanceGRPO"), Compare(RIGHT, "DanceGRPO", by=-0.05)),
    ("iteration", "sample_reward_vq", "VQ of sample videos (deviations)"),
)
CLAIMS = {
    "t2v": video(
        "t2v",
        "each trained alone: VQ 4.51 to 7.03, MQ 1.37 to 3.85",
        "Text to video gains visual and motion quality, and keeps showing what was asked (Fig. 2, Table 5)",
        *GAINS,
    ),
    "i2v": video(
        "i2v",
        "MQ +91 % (v1), +118 % (v4)",
        "Image to video gains motion quality, and the motion is smoother by an independent measure (Fig. 2)",
        {MQ: gain("mq"), RIGHT: gain("right"), SMOOTHER: smoother},
        (Compare(MQ, "DanceGRPO"), Compare(SMOOTHER, "DanceGRPO"), Compare(RIGHT, "DanceGRPO", by=-0.05)),
        ("iteration", "sample_reward_mq", "MQ of sample videos (deviations)"),
    ),
    "wan": video(
        "wan",
        "-",
        "Wan 2.1, text to video, gains visual and motion quality, and keeps showing what was asked",
        *GAINS,
    ),
    "t2i": Experiment(
        says="Text to image by HunyuanVideo gains HPS",
        paper="HPS 0.23 to 0.33",
        trainer="grpo_video",
        preset="tiny-t2i",
        arms={"DanceGRPO": {}},
        measures={"gain in HPS, held-out (cosine)": gain("hps"), RIGHT: gain("geneval")},
        compares=(Compare("gain in HPS, held-out (cosine)", "DanceGRPO"), Compare(RIGHT, "DanceGRPO", by=-0.05)),
        curves=(("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"),),
        heldout={"preset": "tiny", "prompts": "prompts/tiny_single_heldout.txt"},
    ),
    "shared-noise-video": Experiment(
        says="In video, a noise for each sample lets the policy hack the reward: fewer clips are right (Fig. 8)",
        trainer="grpo_video",
        preset="tiny-t2v",
        arms={"shared": {"shared_noise": True}, "own": {"shared_noise": False}},
        measures={"checker accuracy, held-out": heldout("right"), VQ: gain("vq"), MQ: gain("mq")},
        compares=(
            Compare("checker accuracy, held-out", "shared", "own", margin=0.05),
            Compare(VQ, "shared", "own", margin=0.5),
        ),
        curves=(("iteration", "sample_reward_vq", "VQ of sample videos (deviations)"),),
        heldout={"preset": "tiny-video", "images_per_prompt": 8},
    ),
}
