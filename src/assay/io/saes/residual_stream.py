"""Which block's output an autoencoder was trained on, by the hook point that its file records.

Shards hold the residual stream after each block, and number them by the block.
"""

from __future__ import annotations

import re

from assay.io.saes.stored import Recorded

_BLOCK = re.compile(r"(?:[a-z_]+\.)*(?:blocks?|layers?|resblocks|h)[._](\d+)")
"""The module of a block: its output is the residual stream after it."""

_HOOK = re.compile(r"(?:blocks\.(\d+)\.)?(?:hook_)?resid_(pre|post)(?:_layer_(\d+))?")
"""TransformerLens' and Prisma's hook points, and what dictionary_learning's examples call a
module. The block is in it, or recorded beside it.
"""

_OTHER_STACKS = ("text", "decoder")
"""In the name of a module's parents: its blocks are not those of the vision model."""


def check_place(recorded: Recorded, layer: int) -> bool:
    """Check that an autoencoder was trained on the residual stream after a block, as far as its
    file says.

    Args:
        recorded: by the file.
        layer: the number that the shards give to the block.

    Returns:
        Whether there was something to compare: a negative ``layer`` counts from the end, and how
        many blocks there are is not known.

    Raises:
        ValueError: it was trained elsewhere, or what is recorded is not known to be a block's
            output.
    """
    block = find_block(recorded)
    if block is None:
        return True
    if layer < 0:
        return False
    if block != layer:
        raise ValueError(
            f"it was trained on {_shown(recorded)}, the residual stream"
            f" {f'after block {block}' if block >= 0 else 'before the first block'}, wanted layer"
            f" {layer}: name the autoencoder of this layer, or set `layers`"
        )
    return True


def find_block(recorded: Recorded) -> int | None:
    """The block whose output it was trained on, -1 for what enters the first; None: nothing is
    recorded.

    Raises:
        ValueError: it was trained on something else.
    """
    if recorded.predicts is not None:
        raise ValueError(
            f"it predicts {recorded.predicts}, wanted an autoencoder, which predicts its own input:"
            " a transcoder's codes are of other activations"
        )
    if recorded.hook is None:
        return recorded.layer
    whole = _BLOCK.fullmatch(recorded.hook)
    if whole and not any(word in recorded.hook for word in _OTHER_STACKS):
        return _agreed(recorded, int(whole[1]))
    hook = _HOOK.fullmatch(recorded.hook)
    if hook:
        numbers = [int(each) for each in (hook[1], hook[3]) if each]
        number = _agreed(recorded, numbers[0] if numbers else recorded.layer)
        if number is not None:
            return number if hook[2] == "post" else number - 1
    raise ValueError(
        f"it was trained on {_shown(recorded)}, wanted the residual stream after a block, as"
        " blocks.7.hook_resid_post: shards hold no other activations"
    )


def _agreed(recorded: Recorded, number: int | None) -> int | None:
    if recorded.layer not in (None, number):
        raise ValueError(
            f"it records layer {recorded.layer} and hook point {recorded.hook}, which is of block"
            f" {number}: correct the one that is wrong in a copy of its configuration"
        )
    return number


def _shown(recorded: Recorded) -> str:
    """What is recorded, in words."""
    layer = None if recorded.layer is None else f"layer {recorded.layer}"
    return " of ".join(filter(None, (recorded.hook, layer)))
