"""The file that MLflow runs to load a logged model (its "models from code")."""

from mlflow.models import set_model

from experiments.logged_model import LoggedModel

set_model(LoggedModel())
