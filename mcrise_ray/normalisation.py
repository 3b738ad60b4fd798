"""Takes the normalisation out of an exported program, so that it is done once an image and not once a mask.

Blending is affine, and the coverages of a pixel sum to one: a masked image can be blended from an image and
fills that are normalised already. A program that normalises its input would do it again for every mask, which
takes a MobileNetV2 a fortieth of its time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mcrise_ray.preprocess import Triple

_ATEN: Final = torch.ops.aten
# Of values, as they are so far: scale and shift of each channel.
_Affine = tuple[Tensor, Tensor]
_IN_PLACE: Final = (_ATEN.sub_.Tensor, _ATEN.div_.Tensor)
_STEPS: Final[dict[Any, Callable[[Tensor, Tensor, Tensor], _Affine]]] = {
    _ATEN.add.Tensor: lambda scale, shift, by: (scale, shift + by),
    _ATEN.sub.Tensor: lambda scale, shift, by: (scale, shift - by),
    _ATEN.sub_.Tensor: lambda scale, shift, by: (scale, shift - by),
    _ATEN.mul.Tensor: lambda scale, shift, by: (scale * by, shift * by),
    _ATEN.div.Tensor: lambda scale, shift, by: (scale / by, shift / by),
    _ATEN.div_.Tensor: lambda scale, shift, by: (scale / by, shift / by),
}
_SHAPE_CHECK: Final = "_guards_fn"  # of the input; a module that export adds
_CONSTANT: Final = (_ATEN.lift_fresh_copy.default, _ATEN.view.default, _ATEN.unsqueeze.default)


def without_normalisation(program: GraphModule) -> tuple[Triple, Triple]:
    """Take out what a program of one input does to each channel of it by itself, as far as it is additions
    and products of numbers.

    Args:
        program: takes `(B, 3, H, W)`; it is changed, to one that takes normalised images.

    Returns:
        Mean and standard deviation that images are now to be normalised with; 0 and 1 where there is nothing
        to take out.
    """
    (images,) = (node for node in program.graph.nodes if node.op == "placeholder")
    scale, shift = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    steps = [images]
    while (step := _next_step(program, steps[-1])) is not None:
        node, by = step
        scale, shift = _STEPS[node.target](scale, shift, by)
        steps.append(node)
    mean, std = (-shift / scale).tolist(), (1 / scale).tolist()
    shared = any(_may_overwrite(node, steps[-1]) for node in steps[-1].users)
    if len(steps) == 1 or shared or not all(map(math.isfinite, (*mean, *std))):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    steps[-1].replace_all_uses_with(images)
    for node in reversed(steps[1:]):
        program.graph.erase_node(node)
    program.recompile()
    return _triple(mean), _triple(std)


def _next_step(program: GraphModule, before: Node) -> tuple[Node, Tensor] | None:
    """The node that alone reads the values of another, and its number for each channel; None where more do,
    or where it does something else.
    """
    readers = [node for node in before.users if node.target != _SHAPE_CHECK]
    if len(readers) != 1:
        return None
    (node,) = readers
    if node.target not in _STEPS or node.kwargs or node.args[0] is not before:
        return None
    if node.target in _IN_PLACE and before.op == "placeholder":  # whoever asked may notice
        return None
    by = _per_channel(_value(program, node.args[1]))
    return None if by is None else (node, by)


def _may_overwrite(node: Node, argument: Node) -> bool:
    """Whether a node writes to its argument, or returns a view of it that another may write to: in place of
    the program's own values that would be the batch of who asks.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op != "output"
    given = zip(node.args, node.target._schema.arguments, strict=False)
    return any(value is argument and expected.alias_info is not None for value, expected in given)


def _value(program: GraphModule, argument: Any) -> Any:
    """Of a number or a tensor that is part of the program; None of all that is computed from its input."""
    if not isinstance(argument, Node):
        return argument
    if argument.op == "get_attr":
        found: Any = program
        for name in str(argument.target).split("."):
            found = getattr(found, name)
        return found
    if argument.op != "call_function" or argument.target not in _CONSTANT:
        return None
    of, *how = argument.args
    value = _value(program, of)
    return None if value is None or argument.all_input_nodes != [of] else argument.target(value, *how)


def _per_channel(value: Any) -> Tensor | None:
    """A number, or one for each channel, as three."""
    if isinstance(value, Tensor) and value.is_floating_point():
        fits = value.ndim <= 4 and all(
            have in (1, want) for have, want in zip(reversed(value.shape), (1, 1, 3, 1), strict=False)
        )
        return value.detach().double().cpu().expand(1, 3, 1, 1).flatten() if fits else None
    if _is_number(value):
        return torch.full((3,), float(value), dtype=torch.float64)
    return None


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _triple(values: list[float]) -> Triple:
    return values[0], values[1], values[2]
