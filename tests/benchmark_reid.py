"""A gallery of 101,000, searched: `python tests/benchmark_reid.py CROPS MODEL [WEIGHTS] [--queries N]`.

1,000 real crops, made from a folder of them by augmentation, are embedded by the model, stored beside
100,000 synthetic embeddings of that length, loaded as a memory map and searched. Prints the time of each
step, the peak of memory, and whether the answer is that of brute force in numpy (float64, query by query).
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from mcrise_ray.embed import GalleryRow, chunks, embed
from mcrise_ray.embedders import embedder_facts, load_embedder
from mcrise_ray.gallery import GalleryStore
from mcrise_ray.identity import Identities, Protocol, retrieval
from mcrise_ray.images import ImageSource
from mcrise_ray.loading import ModelSpec
from mcrise_ray.matching import correct_ranks, find_matches

SYNTHETIC, REAL, CHUNK = 100_000, 1_000, 500
NORMALISED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def peak() -> float:
    """MiB of this process at most, memory maps included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def told(step: str) -> Iterator[None]:
    began, before = time.perf_counter(), peak()
    yield
    took = time.perf_counter() - began
    print(f"{step:58} {took:8.2f} s   peak {peak():7.0f} MiB (+{peak() - before:.0f})", flush=True)


def augment(crops: Path, into: Path) -> None:
    """Crops shifted, mirrored, and lit differently, under the name of their person, on cameras 2 to 6."""
    rng = np.random.default_rng(0)
    sources = sorted(crops.rglob("*.png"))
    for n in range(REAL):
        source = sources[n % len(sources)]
        image = Image.open(source).convert("RGB")
        width, height = image.size
        left, top = rng.uniform(0, 0.12, 2) * (width, height)
        right, bottom = (1 - rng.uniform(0, 0.12, 2)) * (width, height)
        image = image.crop((int(left), int(top), int(right), int(bottom)))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.3))
        image.save(into / f"{source.name[:4]}_c{2 + n % 5}s1_{n:06d}_00.png")


def exact(queries: np.ndarray, gallery: np.ndarray, protocol: Protocol) -> list[np.ndarray]:
    """All distances of each query in float64; infinite to what it may not match."""
    everyone = slice(0, len(gallery))
    found = []
    for number, query in enumerate(queries):
        far = np.empty(len(gallery))
        for at in range(0, len(gallery), 10_000):
            difference = gallery[at : at + 10_000].astype(np.float64) - query.astype(np.float64)
            far[at : at + 10_000] = np.sqrt(np.square(difference).sum(axis=1))
        far[~protocol.eligible(slice(number, number + 1), everyone)[0]] = np.inf
        found.append(far)
    return found


def main(crops: Path, spec: ModelSpec, many: int, root: Path) -> None:
    (root / "crops").mkdir()
    with told("1,000 crops by augmentation"):
        augment(crops, root / "crops")
    embedder = load_embedder(spec)
    store = GalleryStore(str(root / "gallery"))
    store.begin(embedder_facts(spec, embedder))
    names = []
    with told(f"embedding them with {spec.model}"):
        for chunk in chunks(ImageSource(str(root / "crops"))):
            rows, errors = embed(embedder, chunk.refs, 64)
            assert not errors
            store.write(chunk.name, rows)
            names.append(chunk.name)
    real = store.load(names).embeddings
    rng = np.random.default_rng(1)
    mean, spread = real.mean(axis=0), real.std(axis=0)
    with told(f"writing {SYNTHETIC:,} synthetic embeddings, {CHUNK} a file"):
        for start in range(0, SYNTHETIC, CHUNK):
            made = (mean + spread * rng.normal(size=(CHUNK, len(mean)))).astype(np.float32)
            rows = [
                GalleryRow(f"s{start + n:06d}", f"/s/{start + n}", 0, None, f) for n, f in enumerate(made)
            ]
            store.write(f"synthetic-{start}", rows)
            names.append(f"synthetic-{start}")
    with told("loading all of it as a memory map"):
        gallery = store.load(names, str(root / "gallery.npy"))
    places = np.flatnonzero(gallery.identities.pids > 0)[:: max(1, REAL // many)][:many]
    queries = np.array(gallery.embeddings[places])
    who = Identities(gallery.identities.pids[places], gallery.identities.camids[places])
    protocol = Protocol(who, gallery.identities, places)
    with told(f"top 5, best right and wrong of {len(queries)} queries"):
        matches = find_matches(queries, gallery.embeddings, protocol, ("top5", "correct", "wrong"))
    with told("ranks of all their right matches"):
        ranks = correct_ranks(queries, gallery.embeddings, protocol)
    with told("brute force in numpy"):
        distances = exact(queries, gallery.embeddings, protocol)
    same = True
    for number, (found, ranked, far) in enumerate(zip(matches, ranks, distances, strict=True)):
        assert not isinstance(found, Exception)
        order = np.argsort(far, kind="stable")
        right = (gallery.identities.pids == who.pids[number])[order]
        expected = dict.fromkeys([*order[:5], order[right][0], order[~right][0]])
        same &= [match.place for match in found] == [int(place) for place in expected]
        same &= all(match.distance == far[match.place] for match in found)
        same &= all(order[match.rank - 1] == match.place for match in found)
        mine = protocol.correct_places(number)
        same &= [int(order[rank - 1]) for rank in ranked] == mine.tolist()
    size = gallery.embeddings.nbytes / 2**20
    print(
        f"{len(gallery):,} embeddings of {gallery.embeddings.shape[1]} ({size:.0f} MiB); {retrieval(ranks)}"
    )
    print(f"places, distances and ranks as by brute force: {same}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("crops", type=Path)
    parser.add_argument("model")
    parser.add_argument("weights", nargs="?")
    parser.add_argument("--queries", type=int, default=200)
    given = parser.parse_args()
    plain = {} if given.model.startswith("torchreid:") else NORMALISED
    with tempfile.TemporaryDirectory() as folder:
        asked = ModelSpec(model=given.model, weights=given.weights, preprocessing=plain)
        main(given.crops, asked, given.queries, Path(folder))
