"""The points of a sweep that Optuna chooses, each by the losses of those before it.

Its trials are kept in a journal in the sweep's folder, so that the same command goes on with them.
The sampler is seeded by the number of the trial: a search that was interrupted draws what it would
have drawn. Settings and ranges are part of a study's name; with others a new one begins.
"""

import hashlib
import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
)

from gatewise.launch.points import Combination, part_swept
from gatewise.parallel.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["Search", "Trial", "check_optuna"]


@dataclass(frozen=True, slots=True)
class Trial:
    """A point that Optuna chose."""

    number: int  # from 0
    combination: Combination
    is_told: bool  # whether its loss is known to Optuna


class Search:
    """The trials of one study; `open` comes first.

    Args:
        overrides: the command line, with ranges, lists and intervals.
        draw: seed of what is chosen.

    Raises:
        ConfigError: for a sweep that Optuna cannot search.
    """

    def __init__(self, overrides: Sequence[str], *, draw: int) -> None:
        self._kept, swept = part_swept(overrides)
        self._draw = draw
        self._spaces: dict[str, tuple[BaseDistribution, Sequence[str]]] = {}
        for override in swept:
            name = override.get_key_element()
            if name in self._spaces:
                raise ConfigError(f"{name} is swept twice; give it once")
            self._spaces[name] = _space(override)
        told = [text for text in self._kept if not text.startswith("run.dir=")]
        text = "\n".join([*sorted(told), *(str(override.input_line) for override in swept)])
        self._name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._study: Any = None  # of a package that need not be installed

    def ends(self) -> list[Combination]:
        """Return the first and the last value of each range, beside the others' first."""
        edges = {name: _edges(*space) for name, space in self._spaces.items()}
        first = {name: texts[0] for name, texts in edges.items()}
        found = [first, *({**first, name: texts[-1]} for name, texts in edges.items())]
        return [self._combination(values) for values in found]

    def open(self, file: Path) -> None:
        """Open the journal, which another start may have left."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name=self._name,
            load_if_exists=True,
        )

    def trials(self) -> list[Trial]:
        """Return all trials so far."""
        return [
            Trial(
                trial.number,
                self._combination(self._texts(trial.params)),
                trial.state.is_finished(),
            )
            for trial in self._study.get_trials(deepcopy=False)
            if trial.params.keys() == self._spaces.keys()  # not one that was never asked to its end
        ]

    def ask(self, at_once: int, *, most: int, without: Collection[int]) -> list[Trial]:
        """Return trials to run next: those that were begun, then new ones.

        Args:
            at_once: how many.
            most: trials of the whole search.
            without: numbers of trials that were tried already.
        """
        begun = [t for t in self.trials() if not t.is_told and t.number not in without]
        found = begun[:at_once]
        while len(found) < at_once and len(self.trials()) < most:
            found.append(self._new())
        return found

    def tell(self, trial: Trial, loss: float) -> None:
        """Let Optuna know what came out."""
        self._study.tell(trial.number, loss)

    def _new(self) -> Trial:
        from optuna.samplers import TPESampler

        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = TPESampler(seed=self._draw * 100_003 + number)
        spaces = {name: space for name, (space, _) in self._spaces.items()}
        trial = self._study.ask(spaces)
        return Trial(trial.number, self._combination(self._texts(trial.params)), is_told=False)

    def _texts(self, params: dict[str, Any]) -> dict[str, str]:
        """Return values as the command line has them, in its order."""
        return {name: _text(params[name], texts) for name, (_, texts) in self._spaces.items()}

    def _combination(self, values: dict[str, str]) -> Combination:
        return values, [*self._kept, *(f"{name}={value}" for name, value in values.items())]


def check_optuna() -> None:
    """Raise `ConfigError` where the package is missing."""
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "submit.trials is set but the package optuna is not installed; pip install -e "
            "'.[optuna]', or leave it out for the whole grid"
        )


def _space(override: Override) -> tuple["BaseDistribution", Sequence[str]]:
    """Return the values that an argument allows; of a list the texts, too."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    name, sweep = override.get_key_element(), override.value()
    try:
        if isinstance(sweep, IntervalSweep):
            is_log = "log" in sweep.tags
            low, high = sweep.start, sweep.end
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=is_log), ()
            assert low is not None
            assert high is not None
            return FloatDistribution(low, high, log=is_log), ()
        if isinstance(sweep, ChoiceSweep | RangeSweep):
            texts = tuple(override.sweep_string_iterator())
            if isinstance(sweep, ChoiceSweep) or len(texts) < 2:
                return CategoricalDistribution(texts), texts
            # of ordered values those between two good ones are likely to be good
            return IntDistribution(0, len(texts) - 1), texts
    except ValueError as error:
        raise ConfigError(f"{name} cannot be searched: {' '.join(str(error).split())}") from None
    raise ConfigError(
        f"{override.input_line!r} cannot be searched; use a list, range(...), interval(low,high) "
        "or tag(log,interval(low,high))"
    )


def _edges(space: Any, texts: Sequence[str]) -> Sequence[str]:  # Any: low and high, or texts
    return texts or (repr(space.low), repr(space.high))


def _text(value: Any, texts: Sequence[str]) -> str:
    """Return a value of a trial as the command line has it."""
    if isinstance(value, str):
        return value
    return texts[value] if texts else repr(value)
