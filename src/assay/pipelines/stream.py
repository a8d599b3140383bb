"""The one loop over tokens: a layer's batches, on the device, with a progress bar; and the nodes'
small common ground.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from assay.io.shards import OrderOptions, Shards
from assay.numerics.memory import free_bytes
from assay.numerics.moments import standardize
from assay.numerics.plausibility import check_statistics
from assay.pipelines.signs_of_life import Bar

SAMPLE = 2048
"""Tokens of the sample that shows whether statistics can belong to them."""


def pick_device(device: str) -> torch.device:
    """The device of a name; ``auto`` is cuda where there is one.

    Raises:
        ValueError: cuda is wanted and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no GPU: use device=cpu or device=auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def raw_tokens(
    shards: Shards,
    layer: int,
    batch_size: int,
    device: torch.device,
    *,
    doing: str,
    start: int = 0,
    stop: int | None = None,
    held: Tensor | None = None,
    **order: Unpack[OrderOptions],
) -> Iterator[Tensor]:
    """Yield one layer's content tokens, float32 (batch, d_model), on the device, under a progress
    bar that says ``doing``.

    ``order`` says which, as `OrderOptions`; with ``start`` and ``stop``, only those from that place
    in the order on, and before that one, in the batches of a whole pass. Where the layer is
    ``held`` they are taken from there.
    """
    open_pass = functools.partial(
        shards.batches,
        layer=layer,
        batch_size=batch_size,
        device=device,
        held=held,
        stop=stop,
        **order,
    )
    before, cut = divmod(start, batch_size)
    batches = (
        open_pass() if before == 0 else open_pass(cursor={**open_pass().state(), "batch": before})
    )
    with (
        batches,
        Bar(
            desc=f"layer {layer}: {doing}", total=batches.n_tokens, unit=" tokens", initial=start
        ) as bar,
    ):
        for batch in batches:
            if cut < len(batch):
                yield batch[cut:]
                bar.update(len(batch) - cut)
            cut = 0


def hold_layer(
    shards: Shards,
    layer: int,
    batch_size: int,
    device: torch.device,
    *,
    passes: int,
    max_tokens: int | None,
) -> Tensor | None:
    """The layer on a GPU, where half of its free memory takes it and so many passes would read more
    than that; else None.

    Float32 (n_tokens, d_model), as it was recorded, so that batches taken from it are those that
    would be read.
    """
    wanted = passes * min(shards.n_tokens, max_tokens or shards.n_tokens)
    if device.type != "cuda" or wanted <= shards.n_tokens:
        return None
    if 2 * 4 * shards.n_tokens * shards.d_model > free_bytes(device):
        return None
    tokens = raw_tokens(shards, layer, batch_size, device, doing="onto the GPU")
    return shards.layer(layer).hold(tokens, device)


def standardized_tokens(
    shards: Shards,
    layer: int,
    statistics: dict[str, Tensor],
    batch_size: int,
    device: torch.device,
    *,
    doing: str,
    start: int = 0,
    stop: int | None = None,
    held: Tensor | None = None,
    **order: Unpack[OrderOptions],
) -> Generator[Tensor]:
    """As :func:`raw_tokens`, standardized: x~ = (x - mu) / sigma.

    Raises:
        ValueError: the statistics are of another width.
    """
    mean, std = statistics["mean"].to(device), statistics["std"].to(device)
    if len(mean) != shards.d_model:
        raise ValueError(
            f"the statistics have {len(mean)} dimensions, {shards.path} has {shards.d_model}: fit"
            " them again"
        )
    for batch in raw_tokens(
        shards, layer, batch_size, device, doing=doing, start=start, stop=stop, held=held, **order
    ):
        yield standardize(batch, mean, std)


def judged_tokens(
    shards: Shards,
    layer: int,
    statistics: dict[str, Tensor],
    batch_size: int,
    device: torch.device,
    *,
    doing: str,
    start: int = 0,
) -> Generator[Tensor]:
    """As :func:`standardized_tokens`, in order, of a split that the statistics were not fitted to.

    A random sample of it is compared with them first, since all that follows would be meaningless.

    Raises:
        ValueError: the statistics plainly are of another layer or model than the tokens.
    """
    with shards.batches(layer=layer, batch_size=SAMPLE, shuffle=True, max_tokens=SAMPLE) as batches:
        sample = next(batches)
    try:
        check_statistics(sample, statistics["mean"], statistics["std"], same_data=False)
    except ValueError as error:
        raise ValueError(
            f"{shards.path}, layer {layer}, does not go with the statistics of shards.fit: {error}"
            " Name shards of one model"
        ) from None
    yield from standardized_tokens(
        shards, layer, statistics, batch_size, device, doing=doing, start=start
    )


def bind(function: Callable[..., Any], **values: Any) -> Callable[..., Any]:
    """``function`` with some arguments settled, under its own name and signature, so that Kedro
    still sees its types.
    """
    return functools.update_wrapper(functools.partial(function, **values), function)
