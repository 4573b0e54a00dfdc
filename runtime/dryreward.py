"""The rewards in a dry run: their models, without weights, on fake tensors."""

import json
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

import rewards

# The default models: open_clip's names, the ViT-H-14 of transformers, Qwen2-VL-2B with VideoAlign's three tokens.
OPEN_CLIP = {"hps": "ViT-H-14", "clip": "ViT-H-14-378-quickgelu"}
GELU = dict(hidden_act="gelu", num_attention_heads=16)
PICKSCORE = dict(
    text_config=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24) | GELU,
    vision_config=dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14) | GELU,
    projection_dim=1024,
)
VIDEOALIGN = dict(
    text_config=dict(
        vocab_size=151_660, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
    ),
    vision_config=dict(embed_dim=1280, hidden_size=1536, depth=32, num_heads=16),
)  # fmt: skip
QUESTION = 1200  # tokens that VideoAlign reads beside the video; its template alone has about 900 (an estimate)


def measure(spec: str, paths: dict[str, str], visual: Tensor, fps: float | None, counter) -> tuple[list[int], int]:
    """→ bytes of the model of each built-in reward in `spec`, and the most that scoring one sample takes beside them.

    visual: one image (1, 3, H, W) or video (1, F, 3, H, W). In FakeTensorMode, under a `dryrun.Counter`.
    """
    sizes, most, is_video = [], 0, visual.dim() == 5
    models = dict.fromkeys(term.model for term in rewards.parse_spec(spec))
    for name in [model for model in models if issubclass(rewards.LOADERS.get(model, object), rewards.Scorer)]:
        rewards.require(is_video or name != "videoalign", "videoalign judges video; take hps, clip or pickscore")
        # Fake tensors of indices keep their values, for what depends on these: how a video is cut into patches.
        with mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", 10**6), mock.patch.object(rewards, "check_visuals"):
            scorer = scorer_of(name, paths.get(name, ""))
            sizes.append(sum(parameter.nbytes for parameter in scorer.model.parameters()))
            held = counter.tensors + counter.buffers
            counter.reset_peak()
            if name == "videoalign":
                scorer(visual, [""], fps)
            else:
                rewards.mean_over_frames(scorer, visual, [""]) if is_video else scorer(visual, [""])
        most = max(most, counter.peak - held)
    return sizes, most


def scorer_of(name: str, path: str) -> rewards.CosineReward | rewards.VideoAlignReward:
    """A built-in reward as on a GPU, without weights and tokenizer; of the default model unless `path` is a folder."""
    import open_clip
    from transformers import BatchEncoding, CLIPConfig, CLIPModel, Qwen2VLConfig, Qwen2VLModel

    def config_of(kind: type, known: dict):
        return kind.from_pretrained(path) if Path(path or "-").is_dir() else kind(**known)

    def encoded(texts: Sequence[str], ids: list[int]) -> BatchEncoding:
        batch = torch.tensor([ids] * len(texts))
        return BatchEncoding({"input_ids": batch, "attention_mask": torch.ones_like(batch)})

    scorer = object.__new__(rewards.LOADERS[name])
    scorer.device = "cpu"
    with rewards.reading(name, path, "its config"):
        if name == "videoalign":
            config = config_of(Qwen2VLConfig, VIDEOALIGN)
            torch.set_default_dtype(torch.bfloat16)  # as on a GPU
            scorer.model = Qwen2VLModel(config)
            torch.set_default_dtype(torch.float32)
            scorer.template, scorer.head = "", torch.empty(config.text_config.hidden_size)
            scorer.reward_ids, pad = torch.zeros(3, dtype=torch.long), config.video_token_id
            scorer.tokenizer = lambda texts, **_: encoded(
                texts, [0] * QUESTION + [pad] * texts[0].count("<|video_pad|>")
            )
        elif name == "pickscore":
            config = config_of(CLIPConfig, PICKSCORE)
            scorer.model, scorer.size = CLIPModel(config), config.vision_config.image_size
            scorer.tokenizer = lambda texts, **_: encoded(texts, [0] * config.text_config.max_position_embeddings)
        else:
            config = open_clip.get_model_config(OPEN_CLIP[name])
            for file in Path(path or "-").glob("*.json" if name == "hps" else "open_clip_config.json"):
                config = json.loads(file.read_text(encoding="utf-8"))
            config = config.get("model_cfg", config)
            known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"} & config.keys()
            scorer.model = open_clip.CLIP(**{key: config[key] for key in known})
            scorer.mode = {"hps": "longest", "clip": "squash"}[name]
            scorer.size = config["vision_cfg"]["image_size"]
            scorer.tokenizer = lambda texts: torch.zeros(len(texts), scorer.model.context_length, dtype=torch.long)
    scorer.model.eval().requires_grad_(False)
    return scorer
