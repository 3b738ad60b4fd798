"""Small networks and black boxes for the tests of models; `networks:NAME` is a factory."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 5


class Tiny(nn.Module):
    """Logits of a fixed, seeded network, well away from looking like probabilities."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 8, 3, 2, bias=False)
            self.head = nn.Linear(8, classes)
        with torch.no_grad():
            self.head.bias.copy_(torch.linspace(-2, 2, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images).relu().mean(dim=(2, 3)))


class Returns(nn.Module):
    """A network with some function of the images as its output."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor):
        return self.function(images)


class Tied(Tiny):
    """The same weights under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = self.head


def tied() -> Tied:
    return Tied()


def tiny(classes: int | str = CLASSES) -> Tiny:
    return Tiny(int(classes))


def given(
    count: int,
    scale=1,
    deep=False,
    name=None,
    tag: str = "",
    sizes: tuple[int, ...] = (),
    at: torch.device | None = None,
    **more,
):
    """A black box that says what it was built with."""
    network = means()
    network.given = {**locals(), **more}
    return network


class Wide(Tiny):
    def __init__(self, classes: int = 2, init: Literal["zeros", "normal"] = "normal") -> None:
        super().__init__(classes)


def soft() -> nn.Module:
    return nn.Sequential(Tiny(), nn.Softmax(dim=1))


def one() -> nn.Module:
    return Tiny(1)


def features() -> nn.Module:
    return Tiny().conv


def a_dict() -> nn.Module:
    return Returns(lambda images: {"scores": images.mean((2, 3))})


def in_place() -> nn.Module:
    def change(images: Tensor) -> Tensor:
        images *= 1e12  # a few times, and it is infinite
        return 10 * (images / 1e12).mean((2, 3)) - 3

    return Returns(change)


def half() -> nn.Module:
    return Tiny().half()


def nans() -> nn.Module:
    return Returns(lambda images: images.mean((2, 3)) / 0 * 0)


def raises() -> nn.Module:
    def fail(images: Tensor) -> Tensor:
        raise RuntimeError("first line\nsecond line")

    return Returns(fail)


def over_the_batch() -> nn.Module:
    return Returns(lambda images: images.mean((2, 3)) * 50 * len(images) - 40)


def in_training_mode() -> nn.Module:
    """It reaches its layers by a closure, and so is not told to leave that mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        head = nn.Linear(8, CLASSES)
    return Returns(lambda images: head(layers(images).mean((2, 3))))


def one_by_one() -> nn.Module:
    return Returns(lambda images: 9 * images.view(3, -1).mean(1)[None])


def fixed_size() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))


def means():
    """A black box without torch: scores in [0, 1]."""
    return lambda images: np.asarray(images.mean((2, 3)))


def logits_without_module():
    return Tiny().eval().forward


def own_classifier():
    import mcrise_ray as mr

    return mr.Classifier(Tiny(), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "sigmoid")


def classifier_of_a_function():
    import mcrise_ray as mr

    return mr.Classifier(Tiny().eval().forward, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "sigmoid")


def scripted() -> nn.Module:
    return torch.jit.script(Tiny())


def exported() -> nn.Module:
    batch = ({0: torch.export.Dim("batch")},)
    return torch.export.export(Tiny().eval(), (torch.zeros(2, 3, 16, 24),), dynamic_shapes=batch).module()


def frozen() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(Tiny().eval()))


def fails():
    raise ValueError("no such file")


def number():
    return 7
