"""What a plug-in model is: a class that is built with its parameters and looks at batches of images.

    class Sharp:
        def __init__(self, *, threads: int, power: float = 1.0) -> None: ...
        def score(self, images: Sequence[Image], captions: Sequence[str]) -> Scores: ...

`curate.nsfw_model={use: my.package:Sharp, power: 2}` names it. It is built once in a worker process, with the
parameters of the configuration and `threads`, the cores that it may use. A model whose outputs depend on more than
its parameters and its module's source (a file of weights) also has

    @classmethod
    def identity(cls, **parameters) -> str

which returns a text that is another one whenever the outputs would be, and raises RequestError where the parameters
are of no use; it is asked before any work and does not load the model. `has_texts(**parameters) -> bool` may say in the
same way that a model with `embed_texts` has no texts with these parameters.

Legend: N images of a batch, D dimension of an embedding.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""[height, width, 3], red green blue. Images of a batch differ in size."""

Scores = NDArray[Any]
"""[N] a number each; not a number for an image that cannot be scored."""

Embeddings = NDArray[Any]
"""[N, D] a row each, of any length (they are normalised); not a number for an image that cannot be embedded."""


class Scorer(Protocol):
    """Gives every image, or image with its caption, a number."""

    def score(self, images: Sequence[Image], captions: Sequence[str]) -> Scores: ...


class Embedder(Protocol):
    """Gives every image a point; the cosine of two says how alike they are."""

    dimension: int

    def embed(self, images: Sequence[Image]) -> Embeddings: ...


class TextEmbedder(Embedder, Protocol):
    """An embedder that puts texts into the same space; where it has no `score`, the cosine is the score of a pair."""

    def embed_texts(self, captions: Sequence[str]) -> Embeddings: ...
