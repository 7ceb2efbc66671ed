"""What the server of processes loads once, so that each walk begins at once."""

import timm  # noqa: F401
import torch
import transformers

import pemn_surgery.adapters  # noqa: F401
from tests.zoo import timm_models, transformers_models, walk  # noqa: F401

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
