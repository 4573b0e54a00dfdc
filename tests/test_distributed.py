"""Several processes compute what one computes, however they share the network, and hold only their part of it."""

import subprocess
import sys

import pytest
import torch

import distributed_cases
from runtime import cli, distributed


def distance(a: dict, b: dict) -> float:
    """Largest difference of two sets of weights, relative to the second's norm."""
    assert a.keys() == b.keys()
    difference = sum(((a[k] - b[k].to(a[k].dtype)).double() ** 2).sum() for k in a) ** 0.5
    return float(difference / sum((b[k].double() ** 2).sum() for k in b) ** 0.5)


@pytest.fixture(scope="module")
def one():
    return {name: distributed_cases.train(distributed.start_world(), name) for name in distributed_cases.TRAININGS}


def launch(folder, processes):
    table = distributed_cases.Table()
    table.kept += 1  # a value that only the file has
    table.save_pretrained(folder / "table")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    done = subprocess.run(
        [*command, distributed_cases.__file__, str(folder)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt") | {"table": table}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two"), 2)


def check_float32(one, several, shard_size):
    a, b = one["full"], several["full", shard_size]
    torch.testing.assert_close(b["predictions"], a["predictions"], rtol=1e-5, atol=1e-5)
    assert b["norms"] == pytest.approx(a["norms"], rel=1e-4)
    assert distance(b["weights"], a["weights"]) < 1e-6
    start = distributed_cases.NETWORKS["flux"]
    loaded = start[0].from_pretrained(start[1], subfolder="transformer").state_dict()
    assert distance(loaded, a["weights"]) > 1e-5  # and they were trained


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [1, 2])
def test_two_processes_train_as_one_does(one, two, shard_size):
    check_float32(one, two, shard_size)


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [1, 2])
def test_lora_in_bfloat16_is_the_same_on_two_processes_to_the_bit(one, two, shard_size):
    a, b = one["lora-bfloat16"], two["lora-bfloat16", shard_size]
    assert torch.equal(a["predictions"], b["predictions"])
    assert a["norms"][0] == b["norms"][0]
    assert b["norms"] == pytest.approx(a["norms"], rel=1e-4)


@pytest.mark.slow
def test_full_fine_tuning_in_bfloat16_is_as_exact_on_two_processes_as_on_one(one, two):
    a, whole, sharded = one["full-bfloat16"], two["full-bfloat16", 1], two["full-bfloat16", 2]
    assert torch.equal(a["predictions"], whole["predictions"])  # each process has the network that one has
    assert whole["norms"] == pytest.approx(a["norms"], rel=1e-3)
    # FSDP rounds the weights of norms, which one process keeps in float32: no more than bfloat16 does elsewhere.
    world = distributed.start_world()
    network_class, path = distributed_cases.NETWORKS["hunyuan"]
    network = distributed.load_network(network_class, path, world, subfolder="transformer")
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
def test_four_processes_train_as_one_does(one, tmp_path):
    four = launch(tmp_path, 4)
    for shard_size in (1, 2, 4):
        check_float32(one, four, shard_size)


def test_options_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(cli.RunError, match="--dtype must be one of auto, bfloat16, float32, got 'half'"):
        distributed.start_world("half")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(cli.RunError, match="--shard-size must divide the 8 processes, got 3"):
        distributed.start_world(shard_size=3)
    with pytest.raises(cli.RunError, match="got -1"):
        distributed.start_world(shard_size=-1)


def test_a_copy_of_the_network_is_shared_by_the_processes_of_a_node_if_it_does_not_fit_whole():
    assert distributed.choose_shard_size(0, size=16, local_size=8, fits_whole=False) == 8
    assert distributed.choose_shard_size(0, size=16, local_size=8, fits_whole=True) == 1
    assert distributed.choose_shard_size(4, size=16, local_size=8, fits_whole=True) == 4


def test_the_compute_dtype_is_an_option(monkeypatch):
    assert distributed.start_world().dtype == torch.float32
    world = distributed.start_world("bfloat16")
    with world.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
