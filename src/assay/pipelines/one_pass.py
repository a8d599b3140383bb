"""Fits that see every token once: statistics and PCA. They save themselves, are gone on with, and
are made in parts that are merged in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar

from torch import Tensor

from assay.io.checkpoints import Checkpoints
from assay.io.shards import Shards
from assay.parameters import PCAParameters, StandardizeParameters, result_values
from assay.pipelines.fitting import Estimator, Fit
from assay.pipelines.parts import Part, Work, cut, make_parts
from assay.pipelines.stream import pick_device, raw_tokens, standardized_tokens

PARAMETERS: dict[str, type[StandardizeParameters] | type[PCAParameters]] = {
    "statistics": StandardizeParameters,
    "pca": PCAParameters,
}
"""The section of a method."""


class Streaming(Estimator, Protocol):
    """An estimator that takes a stream of batches, and what another took."""

    def partial_fit(self, x: Tensor) -> Any:
        """Take a batch (batch, d)."""

    def merge(self, other: Self) -> Any:
        """Take what `other` took."""


class Watched(Estimator, Protocol):
    """How an estimator settles while it is fitted; saved with it."""

    def observe(self, step: int, last: bool = False) -> Mapping[str, float]:
        """Look after so many steps, where a look is due: what was seen."""


Fitted = TypeVar("Fitted", bound=Streaming)


@dataclass(frozen=True)
class OnePass:
    """The pass of a method over a layer's tokens, in order or over a random sample.

    Attributes:
        method: which.
        shards, layer: what it reads.
        parameters: of the method.
        checkpoints: where it saves itself.
        device: where it is worked on, by name.
        statistics: what tokens are standardized with, `mean` and `std` (d_model,); empty where they
            are taken as they are.
    """

    method: Literal["statistics", "pca"]
    shards: Shards
    layer: int
    parameters: StandardizeParameters | PCAParameters
    checkpoints: Checkpoints
    device: str
    statistics: dict[str, Tensor]

    def fit(self, estimator: Streaming, watched: Watched | None = None) -> None:
        """Fit the estimator to all tokens, as one part."""
        self._fit(self.parts[0], estimator, watched)

    def fit_in_parts(self, work: Work, new: Callable[[], Fitted]) -> Iterator[tuple[Part, Fitted]]:
        """Have all parts fitted by `work`, which calls `fit_part`, and give them in order, each
        with its estimator, a `new` one that is filled.

        Raises:
            ValueError: what a part left is not there any more.
        """
        make_parts(work, self.parts, self.request(), self.statistics)
        for part in self.parts:
            fitted = new()
            self._open(part, fitted).collect()
            yield part, fitted

    @property
    def parts(self) -> list[Part]:
        """The stretches of its order that it is made in, of whole batches, and where it is
        shuffled, of whole windows.
        """
        batch_size = self.parameters.batch_size
        layer = self.shards.layer(self.layer)
        multiple = layer.window(batch_size) if self._shuffle else batch_size
        return cut(self.n_tokens, self.parameters.parts, multiple)

    @property
    def n_tokens(self) -> int:
        """Tokens in all parts."""
        return min(self.shards.n_tokens, self.parameters.max_tokens or self.shards.n_tokens)

    def steps(self, part: Part) -> int:
        """The steps of the whole pass up to a part's end."""
        return -(-part.stop // self.parameters.batch_size)

    def tell(self, step: int, metrics: dict[str, float]) -> None:
        """Tell whoever watches of what was seen after so many steps."""
        for observer in self.checkpoints.observers:
            observer(self.layer, self.method, step, metrics)

    def _fit(self, part: Part, estimator: Streaming, watched: Watched | None) -> None:
        fit = self._open(part, watched or estimator)
        step = fit.resume()
        if fit.is_done:
            return
        with fit.in_progress():
            if watched is not None:
                watched.observe(step)  # where a checkpoint was taken first
            for x in fit.watch(self._tokens(part, step)):
                estimator.partial_fit(x)
                fit.step({}, None if watched is None else watched.observe)
            if watched is not None:
                watched.observe(fit.steps, last=True)

    def _open(self, part: Part, estimator: Estimator) -> Fit:
        return Fit(
            estimator,
            self.checkpoints,
            self.parameters.checkpoint_steps,
            self.parameters.checkpoint_minutes,
            method=self.method,
            shards=self.shards,
            layer=self.layer,
            statistics=self.statistics,
            parameters=result_values(self.parameters),
            part=part,
        )

    def _tokens(self, part: Part, step: int) -> Iterator[Tensor]:
        batch_size, max_tokens = self.parameters.batch_size, self.parameters.max_tokens
        doing = {"statistics": "statistics", "pca": "PCA"}[self.method]
        if part.of > 1:
            doing += f", part {part.number + 1} of {part.of}"
        read = (
            functools.partial(standardized_tokens, statistics=self.statistics)
            if self.statistics
            else raw_tokens
        )
        return read(
            shards=self.shards,
            layer=self.layer,
            batch_size=batch_size,
            device=pick_device(self.device),
            doing=doing,
            start=part.start + step * batch_size,
            stop=part.stop,
            shuffle=self._shuffle,
            max_tokens=max_tokens,
        )

    @property
    def _shuffle(self) -> bool:
        # The first examples of a data set are seldom like the rest.
        return self.parameters.max_tokens is not None

    def request(self) -> dict[str, Any]:
        """What `fit_part` makes it from, JSON."""
        return {
            "method": self.method,
            "shards": str(self.shards.path),
            "threads": self.shards.threads,
            "layer": self.layer,
            "parameters": self.parameters.model_dump(mode="json"),
            "checkpoints": str(self.checkpoints.folder),
            "device": self.device,
        }


def fit_part(
    part: Part, request: dict[str, Any], statistics: Mapping[str, Tensor], estimator: Streaming
) -> None:
    """Fit an estimator to a part, and leave it in its checkpoint: in whatever process, from what
    `OnePass` asks of it.
    """
    whole = OnePass(
        method=request["method"],
        shards=Shards(request["shards"], threads=request["threads"]),
        layer=request["layer"],
        parameters=PARAMETERS[request["method"]].model_validate(request["parameters"]),
        checkpoints=Checkpoints(request["checkpoints"]),
        device=request["device"],
        statistics=dict(statistics),
    )
    whole._fit(part, estimator, None)
