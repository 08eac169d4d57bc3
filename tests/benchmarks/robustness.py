"""How well duplicates are found that were re-encoded, resized, cropped, turned, written on or recoloured.

Every picture is planted once more per transformation (`transforms.py`). A method finds a pair of an original and a
variant if their distance is at most its threshold; of N originals and N variants N pairs are right. Compared in a run:

    phash_D        the hash that a build stores, of a picture or of its mirror image: D bits or less differ
    imagededup_D   imagededup's PHash, D bits or less
    semantic_S     cosine of at least S between embeddings by EfficientNet-lite0

phash and the embeddings are taken from what a build stores at its defaults (256 px JPEG), imagededup's from the file.
Precision is that of all N x N pairs; `false_per_million` is the share of the wrong ones that is found. Both depend on
how alike different pictures are, so they are of these pictures alone.

Pictures: the corpus's drawings, one a concept, or `--photos` with a folder of photographs (jpg, png, webp, and .rcc
files that hold webp, as Debian's gcompris-qt-data has them).
"""

import argparse
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from transforms import TRANSFORMS, encoded

from pipeline.config import ImageConfig
from pipeline.images import process
from training.models.timm_encoder import declare_missing_operators

MAX_SIDE = 1024
"""Larger pictures are shrunk to this first: time, nothing else."""
SAME_BITS = 8
"""Originals as near as this to another by either hash are left out: they are planted by nobody, but are duplicates."""
BITS = (0, 1, 2, 3, 4, 6, 8, 10, 12)
COSINES = (0.98, 0.95, 0.9, 0.85, 0.8)
TABLE = ("phash_3", "phash_8", "imagededup_3", "imagededup_10", "semantic_0.95", "semantic_0.9", "semantic_0.8")

Matrix = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the methods see of N pictures: hashes as [N, 64] bits, embeddings [N, D] of unit length."""

    phash: Matrix
    mirror: Matrix
    imagededup: Matrix
    embedding: Matrix

    def only(self, places: NDArray[np.int64]) -> "Seen":
        return Seen(**{name: values[places] for name, values in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Method:
    """distances: [N, N] between originals (rows) and variants. thresholds: name -> the largest distance of a pair."""

    name: str
    distances: Callable[[Seen, Seen], Matrix]
    thresholds: dict[str, float]


METHODS = (
    Method(
        name="phash",
        distances=lambda a, b: np.minimum(hamming(a.phash, b.phash), hamming(a.phash, b.mirror)),
        thresholds={f"phash_{bits}": bits for bits in BITS},
    ),
    Method(
        name="imagededup",
        distances=lambda a, b: hamming(a.imagededup, b.imagededup),
        thresholds={f"imagededup_{bits}": bits for bits in BITS},
    ),
    Method(
        name="semantic",
        distances=lambda a, b: 1 - a.embedding @ b.embedding.T,
        thresholds={f"semantic_{cosine}": 1 - cosine for cosine in COSINES},
    ),
)


def hamming(a: Matrix, b: Matrix) -> Matrix:
    """[N, M] how many bits differ of [N, 64] and [M, 64]."""
    return a @ (1 - b).T + (1 - a) @ b.T


class Eyes:
    """Looks at encoded pictures as the methods do."""

    def __init__(self) -> None:
        declare_missing_operators()
        from imagededup.methods import PHash
        from lite0 import Lite0

        self._embedder, self._hasher, self._config = Lite0(threads=1), PHash(verbose=False), ImageConfig()

    def see(self, bodies: Sequence[bytes]) -> Seen:
        stored = [process(body, self._config) for body in bodies]
        peer = [int(self._hasher.encode_image(image_array=np.asarray(_opened(body))), 16) for body in bodies]
        vectors = [self._embedder.embed([_pixels(picture.data)])[0] for picture in stored]
        embedding = np.stack(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
        return Seen(
            phash=_bits([picture.phash for picture in stored]),
            mirror=_bits([picture.phash_mirror for picture in stored]),
            imagededup=_bits(peer),
            embedding=embedding.astype(np.float32),
        )


def _opened(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body)).convert("RGB")


def _pixels(data: bytes) -> Any:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)


def _bits(hashes: Sequence[int]) -> Matrix:
    words = np.array(hashes, ">u8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(words, axis=1).astype(np.float32)


def drawings(count: int) -> list[Image.Image]:
    """Pictures of different concepts of the corpus, in all its styles, on white."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "corpus"))
    from corpus import read_images, read_pairs

    draw, pairs = np.random.default_rng(0), read_pairs()
    of_concept = {pairs[place].concept: pairs[place].path for place in draw.permutation(len(pairs))}
    images = read_images()
    found = []
    for path in list(of_concept.values())[:count]:
        picture = Image.open(io.BytesIO(images[path])).convert("RGBA")
        found.append(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))
    return found


def photographs(folder: Path, count: int) -> list[Image.Image]:
    """`count` of the pictures of a folder, of any side above 200 px, drawn at random but always the same."""
    bodies = [body for path in sorted(folder.rglob("*")) if path.is_file() for body in _bodies(path)]
    found: list[Image.Image] = []
    for place in np.random.default_rng(0).permutation(len(bodies)):
        try:
            picture = Image.open(io.BytesIO(bodies[place]))
            if picture.mode != "RGB" or min(picture.size) < 200:
                continue
            picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        except (UnidentifiedImageError, OSError):
            continue
        found.append(picture)
        if len(found) == count:
            break
    return found


def _bodies(path: Path) -> Iterator[bytes]:
    if path.suffix in (".jpg", ".jpeg", ".png", ".webp"):
        yield path.read_bytes()
    elif path.suffix == ".rcc":
        data = path.read_bytes()
        for match in re.finditer(rb"RIFF(.{4})WEBP", data, re.DOTALL):
            yield data[match.start() : match.start() + 8 + int.from_bytes(match[1], "little")]


def different(seen: Seen) -> NDArray[np.int64]:
    """The places of pictures that are no duplicates of an earlier one."""
    near = hamming(seen.imagededup, seen.imagededup) <= SAME_BITS
    near |= np.minimum(hamming(seen.phash, seen.phash), hamming(seen.phash, seen.mirror)) <= SAME_BITS
    return np.flatnonzero(~np.tril(near, -1).any(axis=1))


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one method does at one threshold."""

    recall: float
    precision: float
    false_share: float


def score(distances: Matrix, threshold: float) -> Score:
    """Row i and column i are one pair, everything else is wrong."""
    found = distances <= threshold + 1e-6
    right, count = int(np.diag(found).sum()), len(found)
    wrong = int(found.sum()) - right
    precision = right / (right + wrong) if right + wrong else float("nan")
    return Score(recall=right / count, precision=precision, false_share=wrong / (count * (count - 1)))


def effective_bits(distances: Sequence[Matrix]) -> float:
    """How many independent fair bits would scatter the distances of different pictures as much."""
    wrong = np.concatenate([matrix[~np.eye(len(matrix), dtype=bool)] for matrix in distances])
    share = wrong.mean() / 64
    return float(64**2 * share * (1 - share) / wrong.var())


def measure(pictures: Sequence[Image.Image]) -> tuple[dict[str, dict[str, Score]], dict[str, float]]:
    """({transform or "all": {method_threshold: score}}, {figure: value})."""
    eyes = Eyes()
    originals = eyes.see([encoded(picture, quality=95) for picture in pictures])
    places = different(originals)
    originals = originals.only(places)
    matrices: dict[str, dict[str, Matrix]] = {}
    for name, transform in TRANSFORMS.items():
        draw = np.random.default_rng(0)
        variants = eyes.see([transform(pictures[place], draw) for place in places])
        matrices[name] = {method.name: method.distances(originals, variants) for method in METHODS}
    scores: dict[str, dict[str, Score]] = {name: {} for name in TRANSFORMS}
    for method in METHODS:
        for label, threshold in method.thresholds.items():
            for name in TRANSFORMS:
                scores[name][label] = score(matrices[name][method.name], threshold)
    scores["all"] = {label: _pooled([scores[name][label] for name in TRANSFORMS]) for label in scores["mirror"]}
    upright = [hamming(originals.phash, originals.phash)]
    figures = {
        "pictures": float(len(places)),
        "duplicates_left_out": float(len(pictures) - len(places)),
        "phash.effective_bits": effective_bits(upright),
        "imagededup.effective_bits": effective_bits([hamming(originals.imagededup, originals.imagededup)]),
    }
    return scores, figures


def _pooled(parts: Sequence[Score]) -> Score:
    """Of all transformations together, each having as many pairs."""
    recall = float(np.mean([part.recall for part in parts]))
    false_share = float(np.mean([part.false_share for part in parts]))
    right = sum(part.recall for part in parts)
    found = sum(part.recall / part.precision if part.precision else 0 for part in parts if part.recall)
    return Score(recall=recall, precision=right / found if found else float("nan"), false_share=false_share)


def table(scores: dict[str, dict[str, Score]]) -> str:
    """Recall (precision, where it is below 1) in Markdown."""
    lines = ["| | " + " | ".join(f"`{label}`" for label in TABLE) + " |", "|---" * (len(TABLE) + 1) + "|"]
    for name, of_method in scores.items():
        cells = []
        for label in TABLE:
            one = of_method[label]
            precise = one.precision != one.precision or one.precision >= 0.9995
            cells.append(f"{one.recall:.2f}" + ("" if precise else f" ({one.precision:.3f})"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(scores: dict[str, dict[str, Score]], path: Path, title: str) -> None:
    """Recall of every transformation (rows) at every threshold (columns), as colours with their numbers."""
    from matplotlib.figure import Figure

    labels, names = list(scores["all"]), list(scores)
    values = np.array([[scores[name][label].recall for label in labels] for name in names])
    figure = Figure(figsize=(11.5, 9.0), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if value > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=ink)
    false = [f"{scores['all'][label].false_share * 1e6:.3g}" for label in labels]
    shown = [label.partition("_")[2] for label in labels]
    axes.set_xticks(range(len(labels)), [f"{text}\n{wrong}" for text, wrong in zip(shown, false, strict=True)])
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.tick_params(length=0, labelsize=8)
    axes.axhline(len(names) - 1.5, color="white", linewidth=3)
    place = 0
    for method in METHODS:
        width = len(method.thresholds)
        unit = "cosine at least" if method.name == "semantic" else "bits at most"
        axes.text(place + width / 2 - 0.5, -0.8, f"{method.name}, {unit}", ha="center", fontweight="bold", fontsize=9)
        place += width
        if place < len(labels):
            axes.axvline(place - 0.5, color="white", linewidth=3)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, pad=28)
    axes.set_xlabel("threshold; below it: wrong pairs found of a million", fontsize=8.5)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photographs in the place of the corpus's drawings")
    parser.add_argument("--pictures", type=int, default=150)
    parser.add_argument("--plot", type=Path, help="where a PNG goes")
    parser.add_argument("--table", action="store_true", help="print a table in Markdown too")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    given = arguments.photos
    pictures = photographs(given, arguments.pictures) if given else drawings(arguments.pictures)
    scores, figures = measure(pictures)
    for name, of_method in scores.items():
        for label, one in of_method.items():
            print(f"robustness.{name}.{label}.recall: {one.recall:.4f}")
            print(f"robustness.{name}.{label}.precision: {one.precision:.4f}")
    for label, one in scores["all"].items():
        print(f"robustness.all.{label}.false_per_million: {one.false_share * 1e6:.3f}")
    for name, value in figures.items():
        print(f"robustness.{name}: {value:.1f}")
    if arguments.table:
        print(table(scores))
    if arguments.plot:
        kind = "photographs" if given else "drawings of the corpus"
        plot(scores, arguments.plot, f"Recall of planted duplicates, {figures['pictures']:.0f} {kind}")


if __name__ == "__main__":
    main()
