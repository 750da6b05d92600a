"""A finished stage as an MLflow model: tokens of key-frames in, plans and answers out.

<model>/MLmodel                  signature, versions, what it was made from
<model>/artifacts/               the handoff: weights, tokenizer, card
<model>/code/                    the packages that the card's config names classes of

    model = mlflow.pyfunc.load_model("runs:/RUN/planning", model_config={"data_root": "nuscenes"})
    model.predict(pandas.DataFrame({"sample_token": [...]}))
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pandas
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PythonModel, PythonModelContext, save_model
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array
from packaging.requirements import Requirement

from experiments.evaluation import read_predictions
from experiments.handoff import CARD, TOKENIZER, WEIGHTS, read_card
from experiments.predict import Predictor
from experiments.prepare import prepare_data
from experiments.schema import ExperimentConfig
from experiments.stage_run import PREDICTIONS
from odvla.config import CLASS_KEY, from_tree

SAMPLE, QUESTION, TEXT, WAYPOINTS = "sample_token", "question", "text", "waypoints"
DATA_ROOT, DATA_VERSION = "data_root", "data_version"  # of model_config
HANDOFF = (CARD, WEIGHTS, TOKENIZER)  # artifacts; predictions, which lie beside them, are left
ENTRY = Path(__file__).with_name("logged_model_entry.py")
PACKAGES = ("callbacks", "datamodules", "experiments", "odvla", "stages")
# A question is optional: without one a plan is wanted. Waypoints are [6][2] metres, x to the right,
# y ahead of the car, every half second; an answer has none, nor has a plan that cannot be read.
SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(DataType.string, SAMPLE),
            ColSpec(DataType.string, QUESTION, required=False),
        ]
    ),
    outputs=Schema(
        [
            ColSpec(DataType.string, TEXT),
            ColSpec(Array(Array(DataType.double)), WAYPOINTS, required=False),
        ]
    ),
)


class LoggedModel(PythonModel):
    """What MLflow loads: the handoff's weights, on a data root that model_config names."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights, and the index of the data root.

        Raises:
            UserError: the data root does not exist, or a file of the model is damaged.
        """
        handoff = Path(context.artifacts[CARD]).parent
        config: ExperimentConfig = from_tree(read_card(handoff).config)
        settings = context.model_config
        root, data_version = settings[DATA_ROOT], settings[DATA_VERSION]
        data = replace(config.data, root=root, version=data_version)
        # A town is not made for a root that is missing: tokens of the wanted one are not in it.
        config = prepare_data(replace(config, data=data, town=None), progress=False)
        self.predictor = Predictor(config, handoff)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pandas.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pandas.DataFrame:
        """Plan, or answer, at each row's key-frame.

        Args:
            context: not used, everything is loaded.
            model_input: see SIGNATURE.
            params: there are none.

        Raises:
            UserError: the data root has no such key-frame.
        """
        rows = []
        for row in model_input.to_dict("records"):
            question = row.get(QUESTION)
            asked = question if isinstance(question, str) and question else None  # NaN: no question
            said = self.predictor.say(row[SAMPLE], asked)
            rows.append({TEXT: said.text, WAYPOINTS: said.waypoints})
        return pandas.DataFrame(rows, columns=[TEXT, WAYPOINTS])


def write_model(folder: Path, stage_folder: Path, model_id: str, run_id: str) -> None:
    """Write a finished stage in MLflow's format.

    Args:
        folder: the model's, which must not exist.
        stage_folder: of the stage, with its predictions.
        model_id: of the logged model that it becomes.
        run_id: of the run that made it.
    """
    card = read_card(stage_folder)
    data = card.config["data"]
    tokens = [record["sample_token"] for record in read_predictions(stage_folder / PREDICTIONS)]
    save_model(
        folder,
        python_model=str(ENTRY),
        artifacts={name: str(stage_folder / name) for name in HANDOFF},
        code_paths=[str(path) for path in _code(card.config)],
        signature=SIGNATURE,
        input_example=pandas.DataFrame({SAMPLE: tokens[:1]}) if tokens else None,
        pip_requirements=list(_requirements()),
        model_config={
            DATA_ROOT: str(Path(data["root"]).absolute()),
            DATA_VERSION: data["version"],
        },
        mlflow_model=Model(model_id=model_id, run_id=run_id),
        metadata={"stage": card.stage, "weights_sha256": card.weights_sha256},
    )


def _code(tree: Any) -> list[Path]:
    """The packages that make a model of a config: the toolkit's, and those of plugged-in parts."""
    names = {*PACKAGES, *(name.partition(".")[0] for name in _classes(tree))}
    places = []
    for name in sorted(names):
        module = importlib.import_module(name)
        file = Path(str(module.__file__))
        places.append(file.parent if file.name == "__init__.py" else file)
    return places


def _classes(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        if CLASS_KEY in tree:
            yield tree[CLASS_KEY]
        for value in tree.values():
            yield from _classes(value)
    elif isinstance(tree, list):
        for item in tree:
            yield from _classes(item)


def _requirements() -> Iterator[str]:
    """What the toolkit needs without extras, in the versions that are installed here."""
    for line in requires("odvla") or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            # A local version (2.13.0+cpu) is nothing that an index has.
            yield f"{needed.name}=={version(needed.name).partition('+')[0]}"
