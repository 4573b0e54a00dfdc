"""What the processes of launch.py have imported when they start."""

import importlib

import diffusers
import transformers

for module in (
    *("open_clip", "peft", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"),
    *("distributed_cases", "two_processes", "launch_cases"),
):
    importlib.import_module(module)
PIPELINES = ("FluxPipeline", "StableDiffusionPipeline", "HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline")
for name in (*PIPELINES, "WanPipeline"):
    getattr(diffusers, name)
for name in ("CLIPTextModel", "T5EncoderModel", "UMT5EncoderModel", "LlamaModel", "CLIPTokenizer", "T5TokenizerFast"):
    getattr(transformers, name)
