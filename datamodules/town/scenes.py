"""Names, splits and places of the town's scenes: nuScenes' own, so that official splits apply."""

from __future__ import annotations

from nuscenes.utils.splits import create_splits_scenes

from datamodules.town.roads import LOCATIONS
from odvla.errors import UserError

MINI_SCENES = 10
MAX_SCENES = 850
TRAIN_SCENES_FOR_ONE_VAL = 5  # 700 to 150 in the whole set, 5 to 1 in every part of it


def version_of(count: int) -> str:
    """The nuScenes version that a town of so many scenes is written as."""
    return "v1.0-mini" if count == MINI_SCENES else "v1.0-trainval"


def scene_names(count: int) -> list[tuple[str, str]]:
    """Scene names with the location of each.

    Ten scenes are v1.0-mini with its official names. Any other number takes names of v1.0-trainval,
    one val scene after every five train scenes.

    Raises:
        UserError: the number is not between 1 and 850.
    """
    if not 1 <= count <= MAX_SCENES:
        raise UserError(f"a town has 1 to {MAX_SCENES} scenes, not {count}")
    splits = create_splits_scenes()
    if count == MINI_SCENES:
        names = sorted(splits["mini_train"] + splits["mini_val"])
    else:
        train, val = iter(splits["train"]), iter(splits["val"])
        names = []
        while len(names) < count:
            turn = len(names) % (TRAIN_SCENES_FOR_ONE_VAL + 1)
            first, second = (val, train) if turn == 2 else (train, val)
            name = next(first, None) or next(second, None)
            if name is None:
                break
            names.append(name)
    return [(name, LOCATIONS[number % len(LOCATIONS)]) for number, name in enumerate(names)]
