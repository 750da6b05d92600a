"""Which parameters train.

A FreezePlan is an allow-list: what no pattern names is frozen. Patterns are shell globs over full
parameter names, e.g. `projectors.*` (a star also matches dots).
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from odvla.errors import UserError


@dataclass(frozen=True)
class FreezePlan:
    """Parameters that match `train` and not `but_not` are trained, all others are frozen."""

    train: tuple[str, ...] = ("*",)
    but_not: tuple[str, ...] = ()

    def trainable(self, model: nn.Module) -> set[str]:
        """Names of the parameters that train.

        Raises:
            UserError: a pattern matches no parameter, or nothing is left to train.
        """
        names = [name for name, _ in model.named_parameters()]
        for pattern in (*self.train, *self.but_not):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"freeze pattern {pattern!r} matches no parameter of the model "
                    f"(its parts are {', '.join(dict.fromkeys(n.split('.')[0] for n in names))})"
                )
        chosen = {name for name in names if _any(name, self.train) and not _any(name, self.but_not)}
        if not chosen:
            raise UserError(f"the freeze plan {self.train} without {self.but_not} trains nothing")
        return chosen

    def apply(self, model: nn.Module) -> set[str]:
        """Set requires_grad of every parameter, and put frozen modules in eval mode.

        Returns:
            Names of the parameters that train.
        """
        chosen = self.trainable(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        set_modes(model)
        return chosen


def frozen_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost modules that have parameters and train none of them."""
    found: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            found.append((name, module))
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found


def set_modes(model: nn.Module) -> None:
    """Training mode, except for frozen modules: their dropout is off and their statistics rest."""
    model.train()
    for _, module in frozen_modules(model):
        module.eval()


def frozen_tensors(model: nn.Module) -> list[str]:
    """Names (as in state_dict) of all frozen parameters and of the buffers of frozen modules."""
    stored = model.state_dict(keep_vars=True)
    frozen = {
        name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    prefixes = [f"{name}." if name else "" for name, _ in frozen_modules(model)]
    for name, _ in model.named_buffers(remove_duplicate=False):
        if any(name.startswith(prefix) for prefix in prefixes):
            frozen.add(name)
    return [name for name in stored if name in frozen]


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
