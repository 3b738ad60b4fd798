"""How much less noise the default estimator leaves than equation 9, on real images and trained models.

`python tests/benchmark_accuracy.py gtsrb|imagenet [--p-mask 0.5] [--masks 4000] [--seeds 4] [--images 20]`

Each seed is an explanation of its own by the default estimator, which asks about masks that it picks. Its
variance is the mean over pixels of the variance over seeds; with one seed, of its squared standard errors,
which tests show to be calibrated. Equation 9 and the control variates see N masks that nobody picked. The
variance of equation 9 has a closed form in second moments, which are taken from all masks that were scored
(see `to_the_letter`); that of the control variates is told by their standard errors.

`distance` tells whether they agree on the map: mean over pixels of the squared difference of equation 9's
map from the mean of the others, over its expectation, so about 1 where nothing is biased.

`--truth 200000` says it of the truth instead, which is the mean of the control variates' maps of as many
masks that nobody picked, N at a time: the default's variance is its squared distance from there, less what
the truth itself is off, and that of equation 9 is over those runs. Needs ../shared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import mcrise_ray as mr
from mcrise_ray.estimators import Scored, masks_of, residual_unit
from mcrise_ray.explainer import Subject, perform
from mcrise_ray.explanations import Explanation
from mcrise_ray.guide import Picked
from mcrise_ray.masks import draw
from mcrise_ray.memory import keep_freed
from mcrise_ray.plan import Unit, unit, unit_count
from mcrise_ray.reduction import Reduction, ScoreUnit
from mcrise_ray.saliency import Maps, UnitSums
from mcrise_ray.spec import ExplainSpec
from mcrise_ray.tuning import Settled, settle
from mcrise_ray.variates import Fit, fit_scores

SHARED = Path(__file__).parents[2] / "shared"
GTSRB = mr.ModelSpec(
    model="torchvision:resnet18",
    weights=str(SHARED / "models" / "gtsrb_resnet18.safetensors"),
    preprocessing={"size": (96, 96), "mean": (0.3417, 0.3126, 0.3217), "std": (0.2768, 0.2646, 0.2706)},
)
IMAGENET = mr.ModelSpec(model=str(SHARED / "models" / "imagenet_mobilenet_v2.onnx"))
SOURCES = {
    "gtsrb": (GTSRB, f"torchvision:GTSRB?root={SHARED}/data/gtsrb&split=test"),
    "imagenet": (IMAGENET, f"imagefolder:{SHARED}/data/imagenet"),
}
_TRUTH_SEED = 100_000
"""Of the first run that tells the truth: no seed whose error is asked for."""


def scored(subject: Subject, target: int, batch_size: int) -> np.ndarray:
    """The scores `(N, 1)` of all masks of the subject's spec."""
    works = [ScoreUnit(unit(subject.spec, index)) for index in range(unit_count(subject.spec))]
    return np.concatenate([scores for _, scores in perform(subject, works, [target], batch_size)])


def scored_once(
    settled: Settled, image: np.ndarray, target: int, kept: Path | None, spec: ExplainSpec
) -> np.ndarray:
    """The same, from a file where it is kept."""
    path = kept and kept.with_name(f"{kept.name}-{spec.hash}.npy")
    if path and path.exists():
        return np.load(path)
    scores = scored(Subject(settled.model, image, spec), target, settled.execution.batch_size)
    if path:
        np.save(path, scores)
    return scores


def summed(spec: ExplainSpec, size: tuple[int, int], scores: np.ndarray, fit: Fit | None) -> Maps:
    """The maps of scores that are known."""
    return residual_unit(spec, size, Unit(0, 0, len(scores)), scores, fit).finalize(spec)


def explained(
    settled: Settled, image: np.ndarray, target: int, spec: ExplainSpec
) -> tuple[Explanation, list[tuple[Unit, Scored]]]:
    """What the settled model's image comes to, and the scores on the way."""
    seen: list[tuple[Unit, Scored]] = []
    subject = Subject(settled.model, image, spec)
    reduction = Reduction(spec, [target], subject.scores()[[target]], subject.size)
    while reduction.explanation is None:
        for work, result in perform(subject, reduction.works(), [target], settled.execution.batch_size):
            reduction.take(work, result)
            if isinstance(work, ScoreUnit):
                seen.append((work.unit, result))
    return reduction.explanation, seen


class Truth(NamedTuple):
    """The map `(C, H, W)` of many runs of N masks, and variances, mean over pixels."""

    maps: np.ndarray
    variance: float
    by_paper: float
    """Of equation 9, one run of N masks."""


def truth_of(
    score: Callable[[ExplainSpec], np.ndarray], spec: ExplainSpec, size: tuple[int, int], runs: int
) -> Truth:
    """What the runs agree on: each has masks of its own, and a guide has a part in none."""
    by_paper, by_variates = [], []
    for run in range(runs):
        seeded = spec.model_copy(update={"seed": _TRUTH_SEED + run})
        plain = seeded.model_copy(update={"estimator": "paper"})
        scores = score(plain)
        fit = fit_scores(seeded, size, scores)
        by_paper.append(summed(plain, size, scores, None).maps[0].astype(float))
        by_variates.append(summed(seeded, size, scores, fit).maps[0].astype(float))
    variance = float(np.var(by_variates, axis=0, ddof=1).mean()) / runs
    return Truth(np.mean(by_variates, axis=0), variance, float(np.var(by_paper, axis=0, ddof=1).mean()))


def to_the_letter(
    spec: ExplainSpec,
    size: tuple[int, int],
    plain: np.ndarray,
    seen: list[tuple[ExplainSpec, Unit, Scored]],
    maps: np.ndarray,
) -> float:
    """The variance of equation 9, mean over pixels, from all scores there are.

    Where a class is rare, N masks may have met none of the few that make most of its variance. Picked masks
    have met more of them: each stands for as many as its odds say.
    """
    sums, weight = UnitSums(spec, 1, size), len(plain)
    sums.square(draw(spec, 0, len(plain)), plain)
    for seeded, one, scored in seen:
        if isinstance(scored, Picked):
            sums.square(masks_of(seeded, one, scored), scored.scores[:, :1] / scored.odds[:, None] ** 0.5)
            weight += len(scored.bend)
    moments = sums.partial(weight)._second_moments(spec, None).numpy()
    return float((moments - maps**2).mean()) / spec.masks


def compare(
    score: Callable[[ExplainSpec], np.ndarray],
    explain: Callable[[ExplainSpec], tuple[Explanation, list[tuple[Unit, Scored]]]],
    spec: ExplainSpec,
    size: tuple[int, int],
    seeds: int,
    runs: int = 0,
) -> dict[str, float]:
    """Variances over the default's, of the truth where runs tell it."""
    found, seen = [], []
    for seed in range(seeds):
        seeded = spec.model_copy(update={"seed": seed})
        default, scored = explain(seeded)
        found.append(default)
        seen += [(seeded, *one) for one in scored]
    maps = np.stack([one.maps[0].astype(float) for one in found])
    told = float(np.mean([one.standard_error[0].astype(float) ** 2 for one in found]))

    plain = spec.model_copy(update={"estimator": "paper"})
    known = score(plain)
    by_paper = summed(plain, size, known, None)
    by_variates = summed(spec, size, known, fit_scores(spec, size, known))
    if runs:
        truth, unsure, paper = truth_of(score, spec, size, runs)
        variance = float(((maps - truth) ** 2).mean()) - unsure
    else:
        truth = maps.mean(axis=0)
        variance = float(np.var(maps, axis=0, ddof=1).mean()) if seeds > 1 else told
        paper, unsure = to_the_letter(spec, size, known, seen, truth), variance / seeds
    scale = float((truth**2).mean()) ** 0.5
    apart = float(((by_paper.maps[0] - truth) ** 2).mean())
    return {
        "paper": paper / variance,
        "control-variate": float((by_variates.standard_error[0] ** 2).mean()) / variance,
        "error": variance**0.5 / scale,
        "paper_error": paper**0.5 / scale,
        "claimed": told**0.5 / scale,
        "distance": apart / (paper + unsure),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", choices=sorted(SOURCES))
    parser.add_argument("--p-mask", type=float, default=0.5)
    parser.add_argument("--masks", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--truth", type=int, default=0, help="masks that tell the true map")
    parser.add_argument("--scores", type=Path, help="folder that keeps the scores for the next time")
    asked = parser.parse_args()
    model_spec, source = SOURCES[asked.source]
    keep_freed()
    spec = ExplainSpec(masks=asked.masks, p_mask=asked.p_mask)
    refs = list(mr.ImageSource(source))
    refs = [refs[place] for place in np.linspace(0, len(refs) - 1, asked.images).astype(int)]
    images = [mr.read_image(ref.uri) for ref in refs]
    settled = settle(mr.load_model(model_spec), spec, images[0])
    print(settled.execution, f"on {torch.get_num_threads()} threads", flush=True)
    ratios = []
    for ref, image in zip(refs, images, strict=True):
        prepared = settled.model.prepare(image)
        everything = Subject(settled.model, prepared, spec).scores()
        target = int(everything.argmax())

        kept = asked.scores and asked.scores / ref.image_id.replace("/", "_")
        score = partial(scored_once, settled, prepared, target, kept)
        explain = partial(explained, settled, prepared, target)
        runs = asked.truth // asked.masks
        found = compare(score, explain, spec, prepared.shape[:2], asked.seeds, runs)
        ratios.append((found["paper"], found["control-variate"]))
        print(
            f"{ref.image_id:>24} class {target:4} score {everything[target]:.3f}: paper / default "
            f"{found['paper']:6.2f}, control-variate / default {found['control-variate']:5.2f}; error "
            f"{found['paper_error']:.3f} -> {found['error']:.3f} (its own standard error says "
            f"{found['claimed']:.3f}); distance {found['distance']:.2f}",
            flush=True,
        )
    told = f"the truth of {asked.truth} masks" if asked.truth else "no truth"
    print(f"p_mask {asked.p_mask}, N = {asked.masks}, {asked.seeds} seeds, {len(refs)} images, {told}:")
    for name, column in zip(("paper", "control-variate"), np.array(ratios).T, strict=True):
        mean, worst = np.exp(np.log(column).mean()), column.min()
        print(f"  variance of {name} over default: geometric mean {mean:.2f}, worst {worst:.3f}")


if __name__ == "__main__":
    main()
