"""What models and evaluation sets have to say of downloaded images, before the rules decide."""

from collections.abc import Mapping

from cluster.journal import Marker
from pipeline.config import BuildConfig
from pipeline.contamination.columns import compare_with_sets
from pipeline.contamination.sets import EvaluationSets
from pipeline.curation.context import Context
from pipeline.models.chosen import Models
from pipeline.models.rules import IMAGE_TEXT, NSFW
from pipeline.models.spec import Ability, Model
from pipeline.models.stages import Embedded, EmbedStage, ScoreStage, UnitImages, measured_column
from pipeline.rules.measured import Measured


def require_usable(config: BuildConfig) -> None:
    """RequestError when a model or an evaluation set that is asked for cannot be used. Nothing is loaded."""
    Models.of(config)
    EvaluationSets.of_config(config.curate)


def measure(context: Context, fetched: Mapping[str, Marker]) -> tuple[Measured, ...]:
    """The columns that the configuration's rules read beside those of the fetch stage."""
    models = Models.of(context.config)
    models.pin(context.store)
    inputs = tuple(UnitImages.of(marker) for marker in fetched.values())
    asked: tuple[tuple[str, Model | None, Ability], ...] = (
        (NSFW, models.nsfw, "score"),
        (IMAGE_TEXT, models.image_text, "score_pairs"),
    )
    measured = []
    for column, model, ability in asked:
        if model:
            stage = ScoreStage(
                store=context.store,
                model=model,
                ability=ability,
                config=context.config.models,
                inputs=inputs,
                name=context.name(f"score-{model.fingerprint}"),
            )
            measured.append(measured_column(column, context.run_stage(stage)))
    measured += compare_with_sets(context, inputs, models.embedding, lambda: embed(context, inputs, models.embedding))
    return tuple(measured)


def embed(context: Context, inputs: tuple[UnitImages, ...], model: Model | None) -> tuple[Embedded, ...]:
    """The embeddings of every fetch unit, in their order."""
    assert model is not None, "the configuration is checked"
    return _embed(context, inputs, model, context.name(f"embed-{model.fingerprint}"))


def embed_known(context: Context, model: Model) -> tuple[Embedded, ...]:
    """The embeddings of every known shard, in their order."""
    inputs = tuple(UnitImages.of_shard(shard) for shard in context.known)
    return _embed(context, inputs, model, context.name(f"known-embed-{model.fingerprint}"))


def _embed(context: Context, inputs: tuple[UnitImages, ...], model: Model, name: str) -> tuple[Embedded, ...]:
    config = context.config.models
    stage = EmbedStage(store=context.store, model=model, ability="embed", config=config, inputs=inputs, name=name)
    return tuple(Embedded.of(marker) for marker in context.run_stage(stage).values())
