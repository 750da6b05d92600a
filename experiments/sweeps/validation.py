"""Every point is tried before the first is trained: no hours' run may end at a typing error."""

from __future__ import annotations

from dataclasses import replace

import torch

from experiments.prepare import check_kept_tokens, data_module, prepare_data
from experiments.sweeps.graph import SweepPlan
from odvla.config import config_hash
from odvla.errors import UserError
from odvla.language.tokenizer import ChatTokenizer


def validate(plan: SweepPlan) -> None:
    """Build the model (without memory), the data modules and the freeze plans of every point.

    Raises:
        UserError: naming the point and what does not fit.
    """
    tried: set[str] = set()
    for point in plan.points:
        config = prepare_data(replace(point.config, seed=0), progress=False)
        key = config_hash(replace(config, name="x"))
        if key in tried:  # only the seed differs
            continue
        tried.add(key)
        try:
            tokenizer = ChatTokenizer.load(plan.vocabularies[point.id])
            with torch.device("meta"):
                vla = config.model.build(tokenizer)
            check_kept_tokens(config, config.run, vla)
            for stage in config.run:
                settings = config.stages.of(stage)
                settings.freeze.trainable(vla)
                settings.build(vla)
                data_module(config, stage, tokenizer)
        except (UserError, ValueError) as error:
            raise UserError(f"point {point.title!r}: {error}") from error
