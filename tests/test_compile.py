"""--compile: whole graphs, and few of them. torch's inductor, which is slow on a CPU, compiles none of them here."""

from functools import partialmethod

import pytest
import torch
from diffusers import ModelMixin
from torch._dynamo.utils import counters

from runtime import output
from small import train


@pytest.mark.slow
@pytest.mark.parametrize("case, limit", [("flux", 9), ("t2v", 42)])
def test_blocks_compile_into_whole_graphs_which_later_iterations_use_again(case, limit, tmp_path, monkeypatch):
    compile_blocks, finish, graphs = ModelMixin.compile_repeated_blocks, output.Run.finish, []

    def finish_and_count(self, *args):
        finish(self, *args)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(output.Metrics, "draw", lambda self: None)
    monkeypatch.setattr(output.Run, "finish", finish_and_count)
    monkeypatch.setattr(ModelMixin, "compile_repeated_blocks", partialmethod(compile_blocks, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    train(case, tmp_path / "out", compile=True, sample_every=100, num_samples=1)
    assert not counters["graph_break"]
    assert counters["frames"]["ok"] == counters["frames"]["total"]  # none was left uncompiled
    assert len(graphs) == 3 and graphs[-1] <= limit
    assert case == "t2v" or graphs == [graphs[0]] * 3  # a video's prompts have several lengths, and masks or none
