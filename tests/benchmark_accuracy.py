"""How much less noise the default estimator leaves than equation 9, on real images and trained models.

`python tests/benchmark_accuracy.py gtsrb|imagenet [--p-mask 0.5] [--masks 4000] [--seeds 50] [--images 20]`

Each seed is an explanation of its own: equation 9 and the control variates see the same scores, the default
asks about as many masks that it picks. The truth is the mean over all seeds of the default estimator's maps,
so it has the masks of all of them; a variance is the mean over pixels of the variance over seeds. With one
seed, it is the mean of the squared standard errors, which tests show to be calibrated; that of equation 9 is
taken from all masks that were scored (see `to_the_letter`). Needs ../shared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

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
ESTIMATORS = ("paper", "control-variate", "default")


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


def to_the_letter(
    spec: ExplainSpec,
    size: tuple[int, int],
    scores: np.ndarray,
    seen: list[tuple[Unit, Scored]],
    maps: np.ndarray,
) -> float:
    """The variance of equation 9, mean over pixels, from all scores there are.

    Where a class is rare, its own N masks may have met none of the few that make most of its variance. Picked
    masks have met more of them: each stands for as many as its odds say.
    """
    sums, weight = UnitSums(spec, 1, size), 0
    sums.square(draw(spec, 0, len(scores)), scores)
    weight += len(scores)
    for one, scored in seen:
        if isinstance(scored, Picked):
            sums.add_squares(masks_of(spec, one, scored), scored.scores[:, :1] ** 2 / scored.odds[:, None])
            weight += len(scored.bend)
    moments = sums.partial(weight)._second_moments(spec)
    return float((moments - maps**2).mean()) / spec.masks


def estimates(
    spec: ExplainSpec, size: tuple[int, int], scores: np.ndarray, default: Explanation
) -> dict[str, Maps | Explanation]:
    """The maps by each estimator."""
    fit = fit_scores(spec, size, scores)
    paper = spec.model_copy(update={"estimator": "paper"})
    return {
        "paper": summed(paper, size, scores, None),
        "control-variate": summed(spec, size, scores, fit),
        "default": default,
    }


def compare(
    score: Callable[[ExplainSpec], np.ndarray],
    explain: Callable[[ExplainSpec], tuple[Explanation, list[tuple[Unit, Scored]]]],
    spec: ExplainSpec,
    size: tuple[int, int],
    seeds: int,
) -> dict[str, float]:
    """Variances over seeds, and what there is to say of the truth."""
    maps: dict[str, list[np.ndarray]] = {name: [] for name in ESTIMATORS}
    claimed: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    letter: list[float] = []
    for seed in range(seeds):
        seeded = spec.model_copy(update={"seed": seed})
        plain = seeded.model_copy(update={"estimator": "paper"})
        default, seen = explain(seeded)
        known = score(plain)
        found = estimates(seeded, size, known, default)
        letter.append(to_the_letter(seeded, size, known, seen, default.maps.astype(float)))
        for name in ESTIMATORS:
            maps[name].append(found[name].maps[0])
            claimed[name].append(float((found[name].standard_error[0].astype(float) ** 2).mean()))
    claimed["paper"] = letter
    truth = np.mean(maps["default"], axis=0)
    scale = float((truth**2).mean())
    told = {name: float(np.mean(claimed[name])) for name in ESTIMATORS}
    variance = told
    if seeds > 1:
        variance = {n: float(np.var(maps[n], axis=0, ddof=1).mean()) for n in ESTIMATORS}
    return {
        "paper": variance["paper"] / variance["default"],
        "control-variate": variance["control-variate"] / variance["default"],
        "error": (variance["default"] / scale) ** 0.5,
        "paper_error": (variance["paper"] / scale) ** 0.5,
        "claimed": (told["default"] / scale) ** 0.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", choices=sorted(SOURCES))
    parser.add_argument("--p-mask", type=float, default=0.5)
    parser.add_argument("--masks", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--images", type=int, default=20)
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
        found = compare(score, explain, spec, prepared.shape[:2], asked.seeds)
        ratios.append((found["paper"], found["control-variate"]))
        print(
            f"{ref.image_id:>24} class {target:4} score {everything[target]:.3f}: paper / default "
            f"{found['paper']:6.2f}, control-variate / default {found['control-variate']:5.2f}; error "
            f"{found['paper_error']:.3f} -> {found['error']:.3f} (its own standard error says "
            f"{found['claimed']:.3f})",
            flush=True,
        )
    print(f"p_mask {asked.p_mask}, N = {asked.masks}, {asked.seeds} seeds, {len(refs)} images: variance of")
    for name, column in zip(("paper", "control-variate"), np.array(ratios).T, strict=True):
        mean, worst = np.exp(np.log(column).mean()), column.min()
        print(f"  {name} over default: geometric mean {mean:.2f}, worst {worst:.3f}")


if __name__ == "__main__":
    main()
