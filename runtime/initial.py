"""--init: the weights that a run starts from, instead of those of --model."""

from collections.abc import Sequence
from pathlib import Path

from rewards import FILE_ERRORS, first_line

from .files import read_json
from .loading import empty_network, load_config, weight_files
from .lora import LORA_FILE, shapes_in
from .options import RunError, complete_checkpoints, require


def find_init(init: str) -> Path:
    """The weights that --init names: a network's folder or a LoRA file, itself or in a checkpoint or a pipeline.

    Raises RunError if there are none.
    """
    path = Path(init)
    require(path.exists(), f"--init: there is no {init}; give RUN/checkpoint-NNNNNN, a diffusers folder or a LoRA file")
    for place in (path / "transformer", path / "unet", path / LORA_FILE, path):
        if place.is_file() if place.suffix == ".safetensors" else "_class_name" in read_json(place / "config.json"):
            return place
    raise RunError(f"--init: {init} is no checkpoint, diffusers folder or LoRA file; give RUN/checkpoint-NNNNNN")


def check_init(config, network_class: type, component: str, lora_targets: Sequence[str], source: dict | None = None):
    """Raise RunError unless the weights that --init names are those of the trained network, or a LoRA of it that
    --lora-rank describes. Loads no weights. A run that continues from a checkpoint of its own needs them no more.

    component: the network's name in the pipeline; source: where it lies, if not there in --model.
    """
    if not config.init or (config.resume and complete_checkpoints(config.output_dir)):
        return
    from peft import get_peft_model_state_dict

    place, found = find_init(config.init), {}
    for file in [place] if place.is_file() else weight_files(place):
        try:
            found |= {name: shape for name, shape in shapes_in(file).items() if not name.endswith(".alpha")}
        except FILE_ERRORS as e:
            raise RunError(f"--init: cannot read {file} ({first_line(e)}); take another checkpoint") from e
    rank = max((shape[0] for name, shape in found.items() if ".lora_A." in name), default=0)
    source = source or {"path": config.model, "subfolder": component}
    lora = {"lora_rank": config.lora_rank, "lora_targets": lora_targets}
    network = empty_network(network_class, load_config(**source), **lora)
    weights = get_peft_model_state_dict(network) if config.lora_rank else network.state_dict()
    prefix = f"{component}." if config.lora_rank else ""
    expected = {prefix + name: list(weight.shape) for name, weight in weights.items()}
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    require(
        not wrong,
        f"--init {config.init} ({f'a LoRA of rank {rank}' if rank else 'all weights'}) does not fit "
        f"{source.get('option', '--model')} {source['path']} with --lora-rank {config.lora_rank}: {len(wrong)} weights "
        f"have other names or shapes, first: {(wrong or [''])[0]}; give a checkpoint of this model and its --lora-rank "
        "(docs/full-scale.md says how to translate a LoRA by others' names)",
    )
