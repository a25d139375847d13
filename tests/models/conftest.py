"""Every family's reference model and the checkpoint written from it, made once."""

import pytest
import torch

from tests.checkpoints import FAMILIES, reference_model, save_checkpoint
from tests.models.families import Family


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> dict[str, Family]:
    made = {}
    for name in FAMILIES:
        model = reference_model(name)
        folder = save_checkpoint(model, tmp_path_factory.mktemp("checkpoints") / name)
        made[name] = Family(name, folder, model)
    return made


@pytest.fixture(params=FAMILIES)
def family(request, families) -> Family:
    return families[request.param]


@pytest.fixture(scope="session")
def prompt() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(12, 500, (200,), generator=generator).tolist()
