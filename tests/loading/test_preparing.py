"""What suits the device that computes."""

import torch

from llm_barber import PruneConfig
from llm_barber.loading.preparing import sequences_together
from llm_barber.model.device import fitting_batch, needed_memory, stored_score_bytes
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from tests.conftest import make_config


def test_stored_scores_leave_room_for_fewer_sequences_on_a_gpu() -> None:
    config = make_config("gemma2")
    skeleton = Skeleton(config, find_architecture(config), torch.device("cpu"), torch.float32)
    settings = PruneConfig(model="model", output="out")
    one = needed_memory(skeleton.layers, 500, torch.float32, score_bytes=stored_score_bytes(config))
    assert fitting_batch(skeleton.layers, 500, one, torch.float32) > 1
    assert sequences_together(settings, skeleton, torch.device("cuda"), 100, 500, one) == 1
