"""What a ReID job does beside explaining: gallery and queries are embedded, and each query gets its matches.

OUT/gallery   the gallery's embeddings, or wherever the job says
OUT/queries   those of the queries, stored alike
OUT/matched.json   which listing of the gallery they were matched with

Axes: Q queries; N gallery images; D dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jaxtyping import Int64

from mcrise_ray import files
from mcrise_ray.dispatch import Ledger
from mcrise_ray.embed import Chunk, GalleryRow, chunks, read_pairs
from mcrise_ray.embedding import Commit, EmbeddingLedger
from mcrise_ray.errors import ImageError, StoreError, TargetError
from mcrise_ray.gallery import Gallery, GalleryStore
from mcrise_ray.identity import UNKNOWN, Identities, Protocol, Retrieval, retrieval
from mcrise_ray.images import ImageRef, ImageSource
from mcrise_ray.jobspec import JobSpec
from mcrise_ray.matching import Match, correct_ranks, find_matches
from mcrise_ray.models import ModelFacts
from mcrise_ray.progress import GALLERY
from mcrise_ray.reidspec import ReidSpec
from mcrise_ray.rows import ErrorRow
from mcrise_ray.shards import absolute
from mcrise_ray.store import Committed, Store
from mcrise_ray.tasks import GalleryMatch, Query, Saved

_MATCHED = "matched.json"
_QUERIES = 256  # that are matched in one pass over the gallery


@dataclass
class _Side:
    """Gallery or queries: where its images come from, where their embeddings go, and its chunks."""

    source: ImageSource
    store: GalleryStore
    chunks: dict[str, int] = field(default_factory=dict)  # and how many images each has
    mended: int = 0  # images that could not be embedded by an earlier run

    def missing(self, retry_errors: bool) -> Iterator[tuple[Chunk, Commit]]:
        """List all chunks, and give those that are not committed; of those that are, perhaps the images that
        could not be embedded.
        """
        present = self.store.present()
        errors_of = self.store.errors_by_chunk() if retry_errors else lambda chunk: []
        for chunk in chunks(self.source):
            self.chunks[chunk.name] = len(chunk.refs)
            if chunk.name not in present:
                yield chunk, partial(self.store.write, chunk.name)
                continue
            names = {error.image_id for error in errors_of(chunk.name)}
            if refs := tuple(ref for ref in chunk.refs if ref.image_id in names):
                yield replace(chunk, refs=refs), partial(self._mend, chunk.name)

    def _mend(self, chunk: str, rows: list[GalleryRow], errors: list[ErrorRow]) -> None:
        self.store.mend(chunk, rows, errors)
        self.mended += len(rows)


def tell_changes(job: JobSpec, listed: Mapping[str, int] | None, note: Callable[[str], None]) -> None:
    """Say so where queries were matched with another listing of the gallery than the one there is now.

    Args:
        job: of kind `reid`, with results.
        listed: the chunks of the gallery, where they are known, and how many images each has.
        note: told about it.

    Raises:
        ImageError: a source of the gallery cannot be read.
    """
    assert job.reid is not None
    if listed is None:
        listed = {chunk.name: len(chunk.refs) for chunk in chunks(ImageSource(job.reid.gallery))}
    now, before = _listing(listed), Store(job.output).read_json(_MATCHED)
    if before not in (None, now):
        note(
            f"the gallery lists other images than before ({now['images']:,} now, {before['images']:,} then): "
            "queries done before keep the matches that they had; --overwrite explains all anew"
        )


def _listing(listed: Mapping[str, int]) -> dict[str, Any]:
    digest = blake2b("".join(listed).encode(), digest_size=12)
    return {"images": sum(listed.values()), "listing": digest.hexdigest()}


class ReidJob:
    """One run of a ReID job.

    Args:
        job: of kind `reid`.
        committed: what earlier runs have finished.
        note: told how far the embedding is.
        retry_errors: embed again what could not be embedded by an earlier run.

    Raises:
        ImageError: a source, or the list of pairs, cannot be read; the gallery has no images.
    """

    def __init__(
        self, job: JobSpec, committed: Committed, note: Callable[[str], None], retry_errors: bool
    ) -> None:
        assert job.reid is not None
        self._retry_errors = retry_errors
        self._job, self._reid = job, job.reid
        self._committed = committed
        self._note = note
        self._pairs = {} if job.reid.pairs is None else read_pairs(job.reid.pairs)
        own = files.join(job.output, "gallery")
        place = job.reid.gallery_store or own
        self._is_elsewhere = files.absolute(place) != files.absolute(own)
        self._gallery = _Side(ImageSource(job.reid.gallery), GalleryStore(place))
        if next(iter(self._gallery.source), None) is None:
            raise ImageError(f"expected gallery images, found none in {self._shown()}; check --gallery")
        self._queries = _Side(ImageSource(job.images), GalleryStore(files.join(job.output, "queries")))
        self._matcher = ThreadPoolExecutor(1, "matcher")
        self._ranks: list[Int64[np.ndarray, " n"]] = []
        self._ledger: EmbeddingLedger | None = None

    def ledger(self, saved: Callable[[str], Saved | None]) -> EmbeddingLedger:
        """Of all that is to be done; see `Ledger` for what is saved."""
        sides = self._queries, self._gallery
        missing = chain.from_iterable(side.missing(self._retry_errors) for side in sides)
        self._ledger = EmbeddingLedger(missing, lambda size: self._explain(size, saved), self._note)
        return self._ledger

    def check(self, facts: ModelFacts) -> None:
        """The model is built, and nothing of the output is changed yet.

        Raises:
            StoreError: embeddings elsewhere, which the output is not cleared of, come from another one.
        """
        if self._is_elsewhere:
            self._gallery.store.check(facts)

    def begin(self, facts: ModelFacts) -> None:
        """The output is ready to be written to.

        Raises:
            StoreError: embeddings that are there come from another one.
        """
        for side in (self._queries, self._gallery):
            side.store.begin(facts)

    @property
    def retrieval(self) -> Retrieval | None:
        """How well the queries so far were matched; None where nobody is known."""
        return retrieval(self._ranks)

    def close(self) -> None:
        """Leave nothing behind that works."""
        if self._ledger is not None:
            self._ledger.close()
        self._matcher.shutdown(cancel_futures=True)

    def _explain(self, batch_size: int, saved: Callable[[str], Saved | None]) -> Ledger:
        return Ledger(self._images(), self._job.explain, batch_size, saved)

    def _images(self) -> Iterator[ImageRef]:
        """Whatever is to end in a row: images that could not be embedded, then the queries."""
        yield from (ref for ref in self._unembedded() if ref.image_id not in self._committed)
        # Files that are mapped need no name: nothing is left of them however this process ends.
        with TemporaryDirectory(prefix="mcrise-", ignore_cleanup_errors=True) as folder:
            queries, gallery = (
                side.store.load(side.chunks, str(Path(folder) / name))
                for name, side in (("queries", self._queries), ("gallery", self._gallery))
            )
        if not len(gallery):
            raise StoreError(f"expected gallery images that can be embedded, found none: {self._shown()}")
        if not len(queries):
            return
        if self._gallery.mended and self._committed.explained:
            self._note(
                f"{self._gallery.mended} gallery images that could not be embedded can be matched now; "
                "queries done before keep the matches that they had"
            )
        if self._committed.explained:
            tell_changes(self._job, self._gallery.chunks, self._note)
        Store(self._job.output).write_json(_MATCHED, _listing(self._gallery.chunks))
        matcher = _Matcher(self._reid, self._committed, self._pairs, queries, gallery)
        starts = range(0, len(queries), _QUERIES)
        # The next block is matched while this one is explained.
        ahead = self._matcher.submit(matcher.block, starts[0])
        for following in (*starts[1:], None):
            images, ranks = ahead.result()
            if following is not None:
                ahead = self._matcher.submit(matcher.block, following)
            self._ranks += ranks
            yield from images

    def _shown(self) -> str:
        return ", ".join(map(files.shown, self._reid.gallery))

    def _unembedded(self) -> Iterator[ImageRef]:
        for error in self._queries.store.errors(self._queries.chunks):
            yield ImageRef(error.image_id, error.uri, problem=error.error, stage=error.stage)
        for error in self._gallery.store.errors(self._gallery.chunks):
            yield ImageRef(f"{GALLERY}:{error.image_id}", error.uri, problem=error.error, stage=GALLERY)


class _Matcher:
    """Finds the matches of queries, block by block."""

    def __init__(
        self,
        reid: ReidSpec,
        committed: Committed,
        pairs: dict[str, list[str]],
        queries: Gallery,
        gallery: Gallery,
    ) -> None:
        self._reid, self._committed = reid, committed
        self._pairs: dict[str, list[str]] = {}  # by image_id, and by absolute URI
        for name, matches in pairs.items():
            for query in {name, absolute(name)}:
                self._pairs.setdefault(query, []).extend(matches)
        self._queries, self._gallery = queries, gallery

    def block(self, start: int) -> tuple[list[ImageRef], list[Int64[np.ndarray, " n"]]]:
        """Some queries that are not committed with their matches; and the ranks of right ones for all."""
        block = slice(start, start + _QUERIES)
        embeddings, who = self._queries.embeddings[block], self._queries.identities
        refs = [
            ImageRef(image_id, uri, pid=_known(pid), camid=_known(camid))
            for image_id, uri, pid, camid in zip(
                self._queries.image_ids[block].to_pylist(),
                self._queries.uris[block].to_pylist(),
                who.pids[block],
                who.camids[block],
                strict=True,
            )
        ]
        own = self._gallery.own([ref.uri for ref in refs])
        identities = Identities(who.pids[block], who.camids[block])
        protocol = Protocol(identities, self._gallery.identities, own)
        kind, everyone = self._reid.distance, self._gallery.embeddings
        ranks: list[Int64[np.ndarray, " n"]] = []
        if any(map(protocol.is_known, range(len(refs)))):
            ranks = correct_ranks(embeddings, everyone, protocol, kind)
        images: list[ImageRef] = []
        if any(ref.image_id not in self._committed for ref in refs):
            named = [self._named(ref) for ref in refs]
            places = [[] if isinstance(found, TargetError) else found for found in named]
            matched = find_matches(embeddings, everyone, protocol, self._reid.matches, places, kind)
            for ref, names, matches in zip(refs, named, matched, strict=True):
                if ref.image_id not in self._committed:
                    images.append(self._query(ref, names if isinstance(names, TargetError) else matches))
        return images, ranks

    def _named(self, ref: ImageRef) -> list[int] | TargetError:
        """The places of the matches that the list of pairs names for a query."""
        names = [*self._pairs.get(ref.image_id, ()), *self._pairs.get(ref.uri, ())]
        if not names:
            return []
        places: list[int] = self._gallery.find(names).tolist()
        if -1 in places:
            missing = names[places.index(-1)]
            return TargetError(f"expected an image of --gallery, found {missing!r}; check --pairs")
        return places

    def _query(self, ref: ImageRef, matches: Sequence[Match] | TargetError) -> ImageRef:
        if isinstance(matches, TargetError):
            return replace(ref, problem=f"{ref.uri}: {matches}", stage="match")
        gallery = self._gallery
        found = tuple(
            GalleryMatch(
                image_id=gallery.image_ids[match.place].as_py(),
                uri=gallery.uris[match.place].as_py(),
                pid=_known(gallery.identities.pids[match.place]),
                camid=_known(gallery.identities.camids[match.place]),
                role=match.role,
                rank=match.rank,
                embedding=np.array(gallery.embeddings[match.place]),
            )
            for match in matches
        )
        return Query(ref.image_id, ref.uri, pid=ref.pid, camid=ref.camid, matches=found)


def _known(identity: np.integer) -> int | None:
    return None if identity == UNKNOWN else int(identity)
