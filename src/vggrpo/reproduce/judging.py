"""What videos of a reproduction are measured with. The embedded judge, classifier and teacher know 64 pixels of the
embedded world; of any other pipeline's videos they say nothing, so what needs them is left out there."""

from __future__ import annotations

from vggrpo.config import EMBEDDED
from vggrpo.errors import UserError
from vggrpo.evaluation import EvaluationModels, Metric
from vggrpo.evaluation.metrics import insisted, select
from vggrpo.reproduce.settings import Settings


def is_embedded(settings: Settings) -> bool:
    """Whether the videos are of the embedded world."""
    return settings.recipe().model.path == EMBEDDED


def chosen_metrics(settings: Settings) -> list[str]:
    """Names of the metrics that can be measured on this pipeline's videos.

    Raises:
        UserError: for an unknown name, or when none is left.
    """
    strangers = _strangers(settings)
    kept = [metric.name for metric in select(settings.metrics) if metric not in strangers]
    if not kept:
        raise UserError(f"{_why(settings, strangers)}, and no metric is left; name others with --metrics")
    return kept


def left_out(settings: Settings) -> str | None:
    """One line that says which metrics are not measured, and why; None: all that were asked for are."""
    strangers = _strangers(settings)
    return _why(settings, strangers) if strangers else None


def judges(settings: Settings) -> EvaluationModels:
    """The networks that measure, loaded when they are first needed."""
    return EvaluationModels(settings.judge, device=settings.device)


def check_judges(settings: Settings) -> None:
    """Fail before any work.

    Raises:
        UserError: something is missing that the metrics need.
    """
    kept = set(chosen_metrics(settings))
    needed = [metric for metric in insisted(settings.metrics) if metric.name in kept]
    judges(settings).check(need for metric in needed for need in metric.needs)


def _strangers(settings: Settings) -> list[Metric]:
    """Chosen metrics that would ask an embedded network about another pipeline's videos."""
    if is_embedded(settings):
        return []
    shipped = {"attributes", "teacher"} | ({"judge"} if settings.judge is None else set())
    return [metric for metric in select(settings.metrics) if not shipped.isdisjoint(metric.needs)]


def _why(settings: Settings, strangers: list[Metric]) -> str:
    names = ", ".join(metric.name for metric in strangers)
    remedy = "; name a geometry network for those of the judge with --judge" if settings.judge is None else ""
    return (
        f"not measured: {names}: the embedded judge and classifier know the embedded world, not videos of "
        f"{settings.recipe().model.path}{remedy}"
    )
