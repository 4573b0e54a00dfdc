"""Several processes compute what one computes, however they share the network, and hold only their part of it."""

import json
import math
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import distributed_cases
import launch
import small
from runtime import checkpoints, data, loading, processes
from runtime.checkpoints import Checkpoints, newest_whole_checkpoint
from runtime.options import RunError, latest_checkpoint


def distance(a: dict, b: dict) -> float:
    """Largest difference of two sets of weights, relative to the second's norm."""
    assert a.keys() == b.keys()
    difference = sum(((a[k] - b[k].to(a[k].dtype)).double() ** 2).sum() for k in a) ** 0.5
    return float(difference / sum((b[k].double() ** 2).sum() for k in b) ** 0.5)


@pytest.fixture(scope="module")
def one():
    world = processes.start_world()
    results = {name: distributed_cases.train(world, name) for name in distributed_cases.TRAININGS}
    return results | {"six iterations": distributed_cases.train(world, "full", iterations=6)}


def results_of(folder, processes):
    table = distributed_cases.Table()
    table.kept += 1  # a value that only the file has
    table.save_pretrained(folder / "table")
    launch.run("distributed_cases", "main", (str(folder),), processes, folder / "logs")
    return torch.load(folder / "results.pt") | {"table": table, "folder": folder}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return results_of(tmp_path_factory.mktemp("two"), 2)


def check_float32(one, several, shard_size):
    a, b = one["full"], several["full", shard_size]
    torch.testing.assert_close(b["predictions"], a["predictions"], rtol=1e-5, atol=1e-5)
    assert b["norms"] == pytest.approx(a["norms"], rel=1e-4)
    assert distance(b["weights"], a["weights"]) < 1e-5
    start = distributed_cases.NETWORKS["flux"]
    loaded = start[0].from_pretrained(start[1], subfolder="transformer").state_dict()
    assert distance(loaded, a["weights"]) > 1e-5  # and they were trained


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [1, 2])
def test_two_processes_train_as_one_does(one, two, shard_size):
    check_float32(one, two, shard_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora-bfloat16", "lora-bfloat16-wan", "lora-int8", "lora-nf4"])
@pytest.mark.parametrize("shard_size", [1, 2])
def test_lora_in_bfloat16_predicts_the_same_on_two_processes_to_the_bit(one, two, shard_size, name):
    a, b = one[name], two[name, shard_size]
    assert torch.equal(a["predictions"], b["predictions"])
    assert b["norms"][0] == pytest.approx(a["norms"][0], rel=1e-6)  # the sum of squares is split
    assert b["norms"] == pytest.approx(a["norms"], rel=1e-4)


@pytest.mark.slow
def test_full_fine_tuning_in_bfloat16_is_as_exact_on_two_processes_as_on_one(one, two):
    a, whole, sharded = one["full-bfloat16"], two["full-bfloat16", 1], two["full-bfloat16", 2]
    assert torch.equal(a["predictions"], whole["predictions"])  # each process has the network that one has
    assert whole["norms"][0] == pytest.approx(a["norms"][0], rel=1e-5)
    assert whole["norms"] == pytest.approx(a["norms"], rel=2**-8)  # later ones to bfloat16's rounding
    # FSDP rounds the weights of norms, which one process keeps in float32: no more than bfloat16 does elsewhere.
    world = processes.start_world()
    network_class, path = distributed_cases.NETWORKS["hunyuan"]
    network = loading.load_network(network_class, path, world, subfolder="transformer")
    with torch.no_grad():
        exact = distributed_cases.predict(network, world, range(distributed_cases.SAMPLES))
    error, error_sharded = (float((x["predictions"] - exact).norm() / exact.norm()) for x in (a, sharded))
    assert 0 < error_sharded < 1.2 * error
    assert sharded["norms"] == pytest.approx(a["norms"], rel=0.02)


@pytest.mark.slow
def test_gradients_and_weights_are_held_in_parts(two):
    whole, sharded = two["full", 1], two["full", 2]
    assert whole["gradient_elements"] == whole["elements"] == sharded["elements"]
    assert sharded["gradient_elements"] < 0.51 * sharded["elements"]


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [1, 2])
def test_every_process_gets_rank_0s_weights_and_buffers(two, shard_size):
    loaded, table = two["load", shard_size], two["table"]
    assert torch.equal(loaded["weight"], table.linear.weight)
    assert torch.equal(loaded["kept"], table.kept) and torch.equal(loaded["computed"], table.computed)


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [1, 2])
def test_a_checkpoint_holds_the_whole_network_and_continues_on_copies_of_another_size(one, two, shard_size):
    weights = two["saved", shard_size]["weights"]
    folder = two["folder"] / f"saved-{shard_size}" / "checkpoint-000003"
    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"  # what diffusers and eval.py look for
    assert saved.keys() == weights.keys() and all(torch.equal(saved[k], weights[k]) for k in saved)
    started = two["init", shard_size]  # what --init makes of it
    assert started.keys() == weights.keys() and all(torch.equal(started[k], weights[k]) for k in started)
    average = load_file(folder / "transformer_ema" / "diffusion_pytorch_model.safetensors")
    assert 0 < distance(average, weights) < 0.1
    assert distance(two["continued", shard_size]["weights"], one["six iterations"]["weights"]) < 1e-5


@pytest.mark.slow
def test_what_lasts_longer_than_a_collective_may_is_waited_for(tmp_path):
    """A late start, slow reading, writing and hashing, each on one of two processes."""
    changes = {"output_dir": str(tmp_path / "run"), "iterations": 1, "num_samples": 2, "ema_decay": 0.5}
    launch.run("launch_cases", "train_in_places_slowly", ("flux", changes), 2, tmp_path / "logs")
    changes |= {"iterations": 2, "resume": True}
    launch.run("launch_cases", "train_in_places_slowly", ("flux", changes), 2, tmp_path / "logs")
    texts = [(tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    for name in ("load_prompts", "load_components", "write_data", "read_data", "file_digest"):
        assert f"{name} is slow" in texts[1]
    for name in ("load_weights", "save_torch_state_dict"):
        assert texts[0].count(f"{name} is slow") == 2  # the logs have both runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "told"), [("__call__", "did not answer within 5 seconds"), ("write_data", "has ended")]
)
def test_a_process_that_hangs_or_ends_is_named(where, told, tmp_path):
    changes = {"output_dir": str(tmp_path / "run"), "iterations": 1, "num_samples": 2}
    case = ("flux", changes, where)
    first, second = launch.start("launch_cases", "train_in_places_slowly", case, 2, tmp_path / "logs")
    first.join(300)
    second.kill()
    assert first.exitcode == 1
    last = (tmp_path / "logs" / "rank-0.log").read_text().splitlines()[-1]
    assert last == f"error: process 1 {told}; its own output says why; run the command again to continue " + (
        "(a training run: with --resume)"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "code"), [([2, 1], 1), ([2, 1, 1], 1), ([1, 1], 0)])
def test_nodes_of_unequal_numbers_of_processes_are_refused(sizes, code, tmp_path):
    started = launch.start("launch_cases", "meet", (sizes,), sum(sizes), tmp_path)
    started[0].join(300)
    text = (tmp_path / "rank-0.log").read_text()
    assert started[0].exitcode == code, text
    assert not code or text.startswith("error: the nodes have unequal numbers of processes; give torchrun the same")
    for process in started[1:]:
        process.terminate()  # torchrun would


@pytest.mark.slow
def test_a_folder_that_the_machines_do_not_share_is_refused_at_once(tmp_path):
    launch.run("launch_cases", "write_apart", (tmp_path,), 2, tmp_path / "logs")
    assert {path.name for path in tmp_path.rglob("[.]*")} <= {".lock"}  # no mark is left behind


@pytest.mark.slow
def test_at_most_one_process_of_a_node_loads_a_frozen_model_at_a_time(tmp_path):
    launch.run("launch_cases", "load_frozen_models", (tmp_path,), 4, tmp_path / "logs")
    expected = {
        "training": ["pipeline", "videoalign", "hps", "pipeline"],
        "evaluation": ["pipeline", "hps", "detector"],
    }
    for name, models in expected.items():
        notes = (tmp_path / f"{name}.txt").read_text().splitlines()
        begun = [note.removeprefix("begin ") for note in notes[::2]]
        assert notes == [f"{what} {model}" for model in begun for what in ("begin", "end")]  # no two at the same time
        count = {"training": 4, "evaluation": 3}[name]  # of processes that load: three prompts are evaluated
        assert sorted(begun) == sorted(models * count)


def test_options_that_do_not_fit_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(RunError, match=r"LOCAL_WORLD_SIZE, .* is not set; start with torchrun"):  # as srun does
        processes.start_world()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(RunError, match="--shard-size must divide the 8 processes, got 3"):
        processes.start_world(shard_size=3)
    with pytest.raises(RunError, match="got -1"):
        processes.start_world(shard_size=-1)


@pytest.mark.parametrize("name", ["all_reduce", "init_process_group"])
def test_processes_that_cannot_reach_each_other_are_told_what_to_set(monkeypatch, name):
    def fail(*_, **__):
        raise RuntimeError(
            "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:152] timed out connecting: SO_ERROR: "
            "Connection refused, remote=[127.0.0.1]:25498$0"
        )

    names = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for variable, value in names.items():
        monkeypatch.setenv(variable, value)
    store = torch.distributed.HashStore()
    store.set("1 is here, of so many on its node", "1")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, name, fail)
    with pytest.raises(
        RunError, match=r"cannot connect: Gloo connectFullMesh .* refused.*set GLOO_SOCKET_IFNAME and NC"
    ):
        processes.start_world()


def test_a_copy_of_the_network_is_shared_by_the_processes_of_a_node_if_it_does_not_fit_whole():
    assert processes.choose_shard_size(0, size=16, local_size=8, fits_whole=False) == 8
    assert processes.choose_shard_size(0, size=16, local_size=8, fits_whole=True) == 1
    assert processes.choose_shard_size(4, size=16, local_size=8, fits_whole=True) == 4


def test_a_gpu_that_torch_cannot_use_is_not_passed_over_in_silence(monkeypatch, tmp_path):
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(processes, "DRIVERS", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(RunError, match=r"a GPU is here .*nvidiactl.* cannot use it; install a torch built for"):
        processes.start_world()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes.start_world().device.type == "cpu"


def test_the_compute_dtype_is_an_option(monkeypatch):
    assert processes.start_world().dtype == torch.float32
    assert processes.start_world("bfloat16").dtype == torch.bfloat16
    assert processes.compute_dtype("auto", "cuda") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: emulated)  # V100, T4
    assert processes.compute_dtype("auto", "cuda") == torch.float32


def small_checkpoints(world, **options):
    network = distributed_cases.Table()
    optimizer = torch.optim.AdamW(network.parameters())
    pipe = SimpleNamespace(network=network)
    return Checkpoints(pipe, "network", optimizer, processes.EMA(network, 0.5), world, **options)


def test_only_the_newest_checkpoints_keep_their_state(tmp_path, capsys):
    world = processes.start_world()
    checkpoints = small_checkpoints(world, keep_states=2)
    for iteration in (1, 2, 3, 4):
        checkpoints.save(tmp_path, iteration)
    with_state = [path.parent.name for path in tmp_path.glob("*/state")]
    assert sorted(with_state) == ["checkpoint-000003", "checkpoint-000004"]
    assert len(list(tmp_path.glob("*/network/*.safetensors"))) == 4 and not list(tmp_path.glob("**/*.part"))
    assert checkpoints.restore(newest_whole_checkpoint(tmp_path, world, {})) == 4
    (tmp_path / "checkpoint-000004").rename(tmp_path / "taken-away")
    assert checkpoints.restore(newest_whole_checkpoint(tmp_path, world, {})) == 3
    (tmp_path / "checkpoint-000003").rename(tmp_path / "also")
    capsys.readouterr()
    with pytest.raises(RunError, match=r"has no whole checkpoint"):
        newest_whole_checkpoint(tmp_path, world, {})
    assert "checkpoint-000002 is skipped: it keeps no state" in capsys.readouterr().err


def test_a_state_whose_deletion_was_interrupted_leaves_the_weights_listed(tmp_path, monkeypatch):
    """Killed after any step of the deletion; the next save completes it."""
    world, weights = processes.start_world(), "network/diffusion_pytorch_model.safetensors"
    for number, killer in enumerate((shutil, checkpoints)):
        saver, out = small_checkpoints(world, keep_states=1), tmp_path / str(number)
        saver.save(out, 1)
        with monkeypatch.context() as patch:
            name = {shutil: "rmtree", checkpoints: "write_sums"}[killer]
            whole = getattr(killer, name)

            def killed(first, *arguments, whole=whole, **options):
                if "checkpoint-000001" in str(first):
                    raise KeyboardInterrupt
                return whole(first, *arguments, **options)

            patch.setattr(killer, name, killed)
            with pytest.raises(KeyboardInterrupt):
                saver.save(out, 2)
        assert not checkpoints.find_fault(out / "checkpoint-000001", world, "network")
        saver.save(out, 3)
        for old in ("checkpoint-000001", "checkpoint-000002"):
            assert not (out / old / "state").exists()
            assert not checkpoints.find_fault(out / old, world) and weights in checkpoints.read_sums(out / old)


def test_too_little_room_for_a_run_is_said_and_for_a_checkpoint_refused(tmp_path, monkeypatch, capsys):
    saver = small_checkpoints(processes.start_world())  # 20 weights and their average: 160 bytes, and 320 of state
    config = {"output_dir": str(tmp_path), "iterations": 10, "save_every": 3, "keep_states": 2, "ema_decay": 0.5}
    config = SimpleNamespace(**config, lora_rank=0)

    def check(free, done=0):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        saver.check_room(config, done)
        return capsys.readouterr().err

    assert checkpoints.checkpoint_bytes(config, 20, 20, torch.float32) == (160, 320)
    assert check(4 * 160 + 3 * 320) == ""  # after 3, 6, 9 and 10 iterations
    warning = check(4 * 160 + 3 * 320 - 1)
    assert warning.startswith("warning: checkpoints of the run: 4, with state at most 3 of them, 1.49e-06 GiB; ")
    with pytest.raises(RunError, match=r"a checkpoint takes 4.47e-07 GiB, too much: .* has 4.46e-07 GiB of room; make"):
        check(479)
    assert check(479, done=10) == ""
    for iteration in (6, 9):
        (tmp_path / f"checkpoint-{iteration:06d}" / "state").mkdir(parents=True)
    assert check(480, done=9) == ""  # one more, with the third state
    config.lora_rank, config.ema_decay = 4, 0.0
    assert checkpoints.checkpoint_bytes(config, 1000, 20, torch.bfloat16) == (80, 240)


def test_a_damaged_checkpoint_does_not_count_among_the_newest(tmp_path):
    world = processes.start_world()
    checkpoints = small_checkpoints(world, keep_states=1)
    checkpoints.save(tmp_path, 9)
    (tmp_path / "checkpoint-000009" / "SHA256SUMS").unlink()
    checkpoints.save(tmp_path, 4)  # of a run that continued from an earlier checkpoint
    assert newest_whole_checkpoint(tmp_path, world, {}).name == "checkpoint-000004"


def test_a_checkpoint_that_a_process_cannot_read_is_not_kept(tmp_path, monkeypatch):
    """As where every machine has a disk of its own."""
    monkeypatch.setattr("runtime.checkpoints.sha256_of", lambda folder, names, world: dict.fromkeys(names, 64 * "0"))
    with pytest.raises(RunError, match=r"cannot read what another wrote; all machines must share the file system"):
        small_checkpoints(processes.start_world()).save(tmp_path, 3)
    assert not (tmp_path / "checkpoint-000003").exists()


@pytest.mark.slow
def test_processes_with_different_options_are_refused(tmp_path):
    case = ("flux", {"output_dir": str(tmp_path / "run"), "iterations": 1})
    started = launch.start("launch_cases", "train_with_own_rates", case, 2, tmp_path / "logs")
    for process in started:
        process.join(300)
    assert started[1].exitcode == 1
    assert "the processes have different options or prompts; start" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    checkpoints = small_checkpoints(processes.start_world())
    for tensor in (checkpoints.ema.average[-1], checkpoints.network.linear.weight):
        kept = tensor.detach().clone()
        tensor.data.view(-1)[-1] = math.inf
        with pytest.raises(RunError, match=r"infinite or NaN in iteration 3 .* lower --learning-rate"):
            checkpoints.save(tmp_path, 3)
        tensor.data.copy_(kept)
    assert not list(tmp_path.iterdir())


def test_public_weights_have_the_compute_dtype_and_the_state_the_master_weights(tmp_path):
    checkpoints = small_checkpoints(processes.start_world("bfloat16"))
    master = checkpoints.network.linear.weight.detach().clone()
    checkpoints.save(tmp_path, 1)
    saved = load_file(tmp_path / "checkpoint-000001" / "network" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["linear.weight"], master.bfloat16())
    with torch.no_grad():
        checkpoints.network.linear.weight.zero_()
    checkpoints.restore(tmp_path / "checkpoint-000001")
    assert torch.equal(checkpoints.network.linear.weight, master)


def test_frozen_models_are_on_the_device_when_used_and_the_network_may_make_room():
    class Weights:  # stands for a tensor: a device that is not the host may not be there
        def __init__(self, where):
            self.where = where

        def to(self, device):
            return Weights(str(device))

    def module(where):
        tensor = SimpleNamespace(data=Weights(where))
        return tensor, SimpleNamespace(parameters=lambda: [tensor], buffers=lambda: [])

    for offload in (True, False):
        world = processes.World(0, 1, torch.device("cuda"), torch.float32, offload=offload)
        (frozen, model), (trained, network) = module("host"), module("cuda")
        kept = frozen.data
        with pytest.raises(ValueError), world.on_device(model, instead_of=network):
            assert frozen.data.where == ("cuda" if offload else "host")
            assert trained.data.where == ("cpu" if offload else "cuda")
            raise ValueError  # a reward that fails, say
        assert frozen.data is kept  # not copied back: nothing changed it
        assert trained.data.where == "cuda"


def test_frozen_models_are_not_trained():
    model = torch.nn.Linear(2, 2)
    processes.World(0, 1, torch.device("meta"), torch.float32).freeze(model)
    assert not model.weight.requires_grad and not model.training and model.weight.device.type == "meta"
    model = torch.nn.Linear(2, 2)
    processes.World(0, 1, torch.device("meta"), torch.float32, offload=True).freeze(model)
    assert not model.weight.requires_grad and model.weight.device.type == "cpu"


def _fetch(start, results):
    start.wait()
    results.put(data.load_prompts("hpdv2"))


def test_eight_processes_fetch_an_absent_prompt_set_at_the_same_moment(tmp_path, monkeypatch):
    import huggingface_hub

    prompts = [f"prompt {i} " + "word " * (i % 50) for i in range(20_000)]
    source = tmp_path / "train.json"
    source.write_text(json.dumps([{"prompt": prompt} for prompt in prompts]))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(source))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(8), fork.Queue()
    processes = [fork.Process(target=_fetch, args=(start, results)) for _ in range(8)]
    for process in processes:
        process.start()
    fetched = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(prompts_of_one == [prompt.strip() for prompt in prompts] for prompts_of_one in fetched)
    assert [path.name for path in (tmp_path / "cache" / "dancegrpo").glob("*[!k]")] == ["hpdv2.txt"]


# ------------------------------------------------------------------------------------------------------- preemption


def command(output_dir, **options):
    options = small.options("flux") | {"output_dir": output_dir} | options
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "grpo_flux.py", *words]


def lines(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_gets_sigterm_saves_and_ends_well(tmp_path):
    out = tmp_path / "run"
    run = subprocess.Popen(command(out, iterations=1000, save_every=1000))
    while not (out / "metrics.jsonl").exists() or not lines(out):
        assert run.poll() is None
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == 0
    done = lines(out)[-1]["iteration"]
    assert done < 1000 and latest_checkpoint(out).name == f"checkpoint-{done:06d}"
    again = command(out, iterations=done + 1, save_every=1000)
    subprocess.run([*again, "--resume"], check=True, timeout=600)
    assert lines(out)[-1]["iteration"] == done + 1
