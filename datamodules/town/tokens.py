"""Tokens of the town's records: computed from what they name, so that every writer agrees."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenIndex:
    """Tokens of one town, and which actors are annotated at which key-frame.

    Attributes:
        seed: of the town; towns of different seeds share no token.
        annotated: (scene name, key-frame) -> ids of the annotated actors, ascending.
    """

    seed: int
    annotated: dict[tuple[str, int], tuple[int, ...]]

    def scene(self, name: str) -> str:
        """Token of a scene."""
        return make_token(self.seed, "scene", name)

    def sample(self, scene_name: str, keyframe: int) -> str:
        """Token of a key-frame."""
        return make_token(self.seed, "sample", scene_name, keyframe)

    def annotation(self, scene_name: str, keyframe: int, actor: int) -> str:
        """Token of an actor's box at a key-frame."""
        return make_token(self.seed, "sample_annotation", scene_name, keyframe, actor)

    def instance(self, scene_name: str, actor: int) -> str:
        """Token of an actor."""
        return make_token(self.seed, "instance", scene_name, actor)


def make_token(seed: int, *parts: str | int) -> str:
    """32 hexadecimal digits, as in nuScenes."""
    text = "/".join(map(str, (seed, *parts)))
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
