"""The full-fidelity vision tower at a small size, trained from nothing on a generated town."""

from __future__ import annotations

import os
from dataclasses import replace

from datamodules.nuscenes import NuScenesDataConfig
from experiments.schema import (
    DataConfig,
    ExperimentConfig,
    InitConfig,
    StagesConfig,
    TokenizerConfig,
    TownSettings,
    TrainerConfig,
)
from odvla.augmentation import AugmentationConfig
from odvla.encoders.bevformer import BEVFormerConfig
from odvla.encoders.resnet import ResNetConfig
from odvla.freezing import FreezePlan
from odvla.language.causal_lm import LanguageConfig
from odvla.language.prompts import Dialect
from odvla.losses.clip import ClipLossConfig
from odvla.losses.panoptic_map import PanopticMapLossConfig
from odvla.queries.agent import AgentQueriesConfig
from odvla.queries.map import MapQueriesConfig
from odvla.queries.panoptic_map import PanopticMapConfig
from odvla.queries.scene import SceneSamplerConfig
from odvla.queries.track_learning import TrackLearning
from odvla.queries.track_life import TrackRules
from odvla.queries.trackformer import TrackFormerConfig
from odvla.vla import VLAConfig
from stages.optimisation import LearningRates, OptimiserConfig
from stages.perception import TRAINS, PerceptionStageConfig

# From nothing the backbone needs the same rate as the rest; UniAD starts from trained weights.
FROM_NOTHING = OptimiserConfig(
    lr=LearningRates(backbone=4e-4, encoder=4e-4, queries=4e-4),
    warmup=0.05,
    weight_decay=0.01,
    muon=12.0,
    muon_components=("backbone", "encoder", "queries"),
)


def uniad_town() -> ExperimentConfig:
    """Stage 0 of the full-fidelity tower (ResNet, BEVFormer, tracks, map), small, on a town.

    Queries alone, on the encoder that `fit bevformer_town` leaves (with --runs, name its stage 0 in
    init.weights): UniAD starts from a BEVFormer that detects, too. Forty processor minutes; what
    comes of it stands in docs/stages.md.
    """
    size = (160, 90)
    runs = os.environ.get("ODVLA_RUNS", "runs")
    return ExperimentConfig(
        name="uniad_town",
        init=InitConfig(f"{runs}/bevformer_town/perception", ("encoder",)),
        model=VLAConfig(
            encoder=BEVFormerConfig(
                backbone=ResNetConfig(depth=50, base_channels=16, deformable_stages=(3,)),
                dim=64,
                rows=50,
                columns=50,
                layers=2,
                heads=4,
                hidden=128,
            ),
            queries=(
                SceneSamplerConfig(),
                TrackFormerConfig(
                    # Four metres apart on the ground, so that an agent is near one of them.
                    queries=600,
                    layers=3,
                    heads=4,
                    hidden=128,
                    dropout=0.0,
                    # Scores stay lower than UniAD's, whose tracks are born at 0.4 and missed below
                    # 0.35; chosen on val.
                    rules=TrackRules(birth=0.3, keep=0.25),
                    # Hardly a track overlaps its agent by half here: those that touch it are
                    # carried on, and as many that are none, or no track would learn to end.
                    learning=TrackLearning(carry_iou=0.0, false_tracks=1.0),
                ),
                PanopticMapConfig(
                    queries=60,
                    encoder_layers=2,
                    decoder_layers=3,
                    heads=4,
                    hidden=128,
                    thing_mask_layers=2,
                    stuff_mask_layers=2,
                    mask_heads=4,
                    max_candidates=40,
                ),
            ),
            language=LanguageConfig(hidden=128, layers=3, heads=4, kv_heads=2, intermediate=320),
            ego_token=True,
        ),
        data=DataConfig(
            version="v1.0-trainval",
            image_size=size,
            cache_images=True,
            perception=NuScenesDataConfig(
                # Two frames carry a track on once; in four, it lives through its own renewals.
                targets=("agents", "map"),
                clip_length=4,
                batch_size=2,
                eval_batch_size=8,
            ),
        ),
        tokenizer=TokenizerConfig(vocab_size=768),
        dialect=Dialect("compact"),
        stages=StagesConfig(
            perception=PerceptionStageConfig(
                freeze=FreezePlan(("queries.*",)),
                optimiser=OptimiserConfig(
                    lr=LearningRates(queries=5e-4),
                    warmup=0.05,
                    weight_decay=0.01,
                    muon=25.0,
                    muon_components=("queries",),
                    # What comes out of these is a place, at up to 25 m for each 1.
                    muon_but_not=("*.reference_points.*", "*_branches.*"),
                ),
                steps=750,
                losses=ClipLossConfig(past_trajectory=0.1, map=PanopticMapLossConfig()),
            ),
        ),
        run=("perception",),
        town=TownSettings(scenes=75, image_size=size),
        trainer=TrainerConfig(accelerator="cpu"),
    )


def bevformer_town() -> ExperimentConfig:
    """The encoder of `uniad_town` from nothing, by query modules that teach it within an hour."""
    base = uniad_town()
    return replace(
        base,
        name="bevformer_town",
        init=InitConfig(),
        model=replace(
            base.model, queries=(SceneSamplerConfig(), AgentQueriesConfig(), MapQueriesConfig())
        ),
        data=replace(
            base.data, perception=replace(base.data.perception, clip_length=2, batch_size=4)
        ),
        stages=replace(
            base.stages,
            perception=PerceptionStageConfig(
                optimiser=FROM_NOTHING,
                steps=400,
                gradient_clip=5.0,
            ),
        ),
    )


def uniad_town_smoke() -> ExperimentConfig:
    """Every part of `uniad_town` for three steps, the encoder learning, too: does it run at all?"""
    base = uniad_town()
    encoder = replace(
        base.model.encoder,
        backbone=replace(base.model.encoder.backbone, base_channels=4),
        dim=16,
        rows=16,
        columns=16,
        layers=1,
        heads=2,
        hidden=32,
    )
    scene, tracks, elements = base.model.queries
    tracks = replace(tracks, queries=20, layers=2, heads=2, hidden=32)
    elements = replace(
        elements, queries=10, encoder_layers=1, decoder_layers=2, hidden=32, max_candidates=8
    )
    perception = base.stages.perception
    assert perception is not None
    return replace(
        base,
        name="uniad_town_smoke",
        init=InitConfig(),
        model=replace(base.model, encoder=encoder, queries=(scene, tracks, elements)),
        data=replace(base.data, version="v1.0-mini"),
        stages=replace(
            base.stages,
            perception=replace(
                perception,
                freeze=TRAINS,
                optimiser=FROM_NOTHING,
                augmentation=AugmentationConfig(),
                steps=3,
            ),
        ),
        town=TownSettings(scenes=10, image_size=base.data.image_size),
        pictures=1,
    )
