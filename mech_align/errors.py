"""What goes wrong for a user: what happened, why, and what to do next."""

from collections.abc import Sequence


class MechAlignError(ValueError):
    """A problem that the user can solve. The command line shows it as one panel and exits with 2."""

    def __init__(self, what: str, *, why: str = "", hint: str | Sequence[str] = ()) -> None:
        self.what = what
        self.why = why
        self.hints: tuple[str, ...] = (hint,) if isinstance(hint, str) else tuple(hint)
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"Why: {self.why}")
        lines.extend(f"What to do: {hint}" for hint in self.hints if hint)
        return "\n".join(lines)


class UnknownSite(MechAlignError):
    """A layer, head, neuron or part that the model does not have."""


class BadPrompts(MechAlignError):
    """A prompt file or list that cannot be used as it stands."""


class BadAnswer(MechAlignError):
    """An answer that is not one token in its context, or that the model would never write so."""


class UndefinedEffect(MechAlignError):
    """The metric does not tell clean and corrupt apart, so that there is no effect to measure."""


class ModelNotFound(MechAlignError):
    """No model under this name, folder or account."""


class AdapterUnchanged(MechAlignError):
    """An adapter that changed no weight: a comparison with the base model would compare it with itself."""


class UnsupportedModel(MechAlignError):
    """An architecture that a backend or a method does not cover."""


class PatchDidNotFire(MechAlignError):
    """An edit was asked for, and no forward pass reached it."""


class SelfCheckFailed(MechAlignError):
    """A sweep disagreed with the reference computation that it checks itself against."""


class OutOfMemory(MechAlignError):
    """Not even one prompt at a time fits into memory."""


class BadRun(MechAlignError):
    """A run folder that is missing, damaged, or belongs to another command."""
