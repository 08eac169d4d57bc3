"""The models that a build asks for: found and checked before any work, and the same to its end."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import RequestError
from cluster.store import Store
from pipeline.models.spec import Model

if TYPE_CHECKING:  # the configuration is made of parts of this package
    from pipeline.config import BuildConfig

PINNED = "work/models.json"


@dataclass(frozen=True, kw_only=True)
class Models:
    """None for what is not asked for."""

    nsfw: Model | None = None
    image_text: Model | None = None
    embedding: Model | None = None

    @staticmethod
    def of(config: "BuildConfig") -> "Models":
        """The models of a configuration. RequestError when one cannot be used; nothing is loaded."""
        curate, dedup = config.curate, config.dedup
        nsfw = image_text = embedding = None
        if curate.max_nsfw_score is not None and curate.nsfw_model is not None:
            nsfw = Model.of("curate.nsfw_model", curate.nsfw_model, "score")
        if curate.min_image_text_score is not None and curate.image_text_model is not None:
            image_text = Model.of("curate.image_text_model", curate.image_text_model, "score_pairs")
        if dedup.semantic_model is not None:
            embedding = Model.of("dedup.semantic_model", dedup.semantic_model, "embed")
        return Models(nsfw=nsfw, image_text=image_text, embedding=embedding)

    def pin(self, store: Store) -> None:
        """Let these be the models of a run. RequestError when it began with another file of one of them."""
        mine = {model.key: model.fingerprint for model in (self.nsfw, self.image_text, self.embedding) if model}
        if not mine or store.create(PINNED, json.dumps(mine).encode()):
            return
        pinned = json.loads(store.read_bytes(PINNED))
        for key, fingerprint in mine.items():
            if pinned.get(key, fingerprint) != fingerprint:
                raise RequestError(
                    f"{key}: its file or code is not what {store.url} was begun with; put that back, or build into a "
                    "new output"
                )
