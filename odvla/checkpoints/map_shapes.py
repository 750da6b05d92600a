"""Names and shapes of UniAD's map head (PansegformerHead), by its sizes.

Shape legend: C channels, A heads, Q thing queries, S stuff queries (one a stuff class), K things.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

Shape = tuple[int, ...]
AT = "queries.map."
BOX = 4
HEADS = 8


class SizeReader(Protocol):
    """What is needed of odvla.checkpoints.sizes.Shapes."""

    def size(self, name: str, axis: int = 0) -> int:
        """One side of a tensor."""

    def count(self, prefix: str) -> int:
        """Number of items in a list."""


def map_head_shapes(shapes: SizeReader) -> dict[str, Shape]:
    """Every name and shape of a map head whose main sizes are those of some of its tensors."""
    return {AT + name: shape for name, shape in _head(shapes)}


def _head(shapes: SizeReader) -> Iterator[tuple[str, Shape]]:
    dim = shapes.size(f"{AT}query_embedding.weight", 1) // 2
    stuff = shapes.size(f"{AT}stuff_query.weight")
    things = shapes.size(f"{AT}thing_branches.0.weight")
    yield "level_embeds", (shapes.size(f"{AT}level_embeds"), dim)
    yield from _linear("reference_points", dim, 2)
    yield "query_embedding.weight", (shapes.size(f"{AT}query_embedding.weight"), 2 * dim)
    yield "stuff_query.weight", (stuff, 2 * dim)
    hidden = shapes.size(f"{AT}encoder.0.ffn.fc1.weight")
    samples = shapes.size(f"{AT}encoder.0.attention.attention_weights.weight")
    for number in range(shapes.count(f"{AT}encoder.")):
        yield from _deformable(f"encoder.{number}.attention", dim, samples)
        yield from _feed(f"encoder.{number}", dim, hidden, norms=2)
    layers = shapes.count(f"{AT}decoder.")
    for number in range(layers):
        yield from _attention(f"decoder.{number}.self_attention", dim)
        yield from _deformable(f"decoder.{number}.cross_attention", dim, samples)
        yield from _feed(f"decoder.{number}", dim, hidden, norms=3)
    for number in range(layers):
        yield from _linear(f"cls_branches.{number}", dim, things)
        yield from _box_branch(f"reg_branches.{number}", dim)
    blocks = {kind: shapes.count(f"{AT}{kind}_masks.blocks.") for kind in ("thing", "stuff")}
    for number in range(blocks["thing"]):
        yield from _linear(f"thing_branches.{number}", dim, things)
        yield from _box_branch(f"mask_reg_branches.{number}", dim)
    for number in range(blocks["stuff"]):
        yield from _linear(f"stuff_branches.{number}", dim, 1)
    for kind, count in blocks.items():
        wide = shapes.size(f"{AT}{kind}_masks.blocks.0.mlp.fc1.weight")
        for number in range(count):
            at = f"{kind}_masks.blocks.{number}"
            yield from _mask_block(at, dim, wide, attends_itself=kind == "stuff")
        yield from _mask_attention(f"{kind}_masks.attnen", dim)


def _linear(name: str, dim: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, dim)
    yield f"{name}.bias", (out,)


def _norm(name: str, dim: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (dim,)
    yield f"{name}.bias", (dim,)


def _deformable(name: str, dim: int, samples: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.sampling_offsets", dim, 2 * samples)
    yield from _linear(f"{name}.attention_weights", dim, samples)
    yield from _linear(f"{name}.value_proj", dim, dim)
    yield from _linear(f"{name}.output_proj", dim, dim)


def _attention(name: str, dim: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.in_proj_weight", (3 * dim, dim)
    yield f"{name}.in_proj_bias", (3 * dim,)
    yield from _linear(f"{name}.out_proj", dim, dim)


def _feed(name: str, dim: int, hidden: int, *, norms: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.ffn.fc1", dim, hidden)
    yield from _linear(f"{name}.ffn.fc2", hidden, dim)
    for number in range(norms):
        yield from _norm(f"{name}.norms.{number}", dim)


def _box_branch(name: str, dim: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.0", dim, dim)
    yield from _linear(f"{name}.2", dim, dim)
    yield from _linear(f"{name}.4", dim, BOX)


def _mask_block(
    name: str, dim: int, wide: int, *, attends_itself: bool
) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.head_norm1", dim)
    yield from _mask_attention(f"{name}.attn", dim)
    yield from _linear(f"{name}.attn.v", dim, dim)
    yield from _linear(f"{name}.attn.proj", dim, dim)
    yield from _norm(f"{name}.head_norm2", dim)
    yield from _linear(f"{name}.mlp.fc1", dim, wide)
    yield from _linear(f"{name}.mlp.fc2", wide, dim)
    if attends_itself:
        yield from _linear(f"{name}.self_attention.qkv", dim, 3 * dim)
        yield from _linear(f"{name}.self_attention.proj", dim, dim)
        yield from _norm(f"{name}.norm3", dim)


def _mask_attention(name: str, dim: int) -> Iterator[tuple[str, Shape]]:
    """Queries against cells; the A similarities of a pair are mixed, then summed up to one."""
    yield from _linear(f"{name}.q", dim, dim)
    yield from _linear(f"{name}.k", dim, dim)
    yield from _linear(f"{name}.linear_l1.0", HEADS, HEADS)
    yield from _linear(f"{name}.linear.0", HEADS, 1)
