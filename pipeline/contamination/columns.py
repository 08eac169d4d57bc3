"""What evaluation sets say of downloaded images, as columns that rules read."""

from collections.abc import Callable, Mapping, Sequence

from cluster.journal import Marker
from pipeline.contamination.match import REACH, HashMatchStage, LikenessStage
from pipeline.contamination.references import EMBEDDINGS_FILE, REFERENCES_FILE, GatherStage, ReadStage
from pipeline.contamination.sets import EvaluationSets
from pipeline.curation.context import Context
from pipeline.models.rules import DISTANCE, SIMILARITY
from pipeline.models.spec import Model
from pipeline.models.stages import Embedded, UnitImages, measured_column
from pipeline.rules.measured import Measured
from pipeline.workfile import WorkFile


def compare_with_sets(
    context: Context, inputs: Sequence[UnitImages], model: Model | None, embed: Callable[[], tuple[Embedded, ...]]
) -> list[Measured]:
    """Columns of distance and similarity, those that the configuration has thresholds for.

    model, embed: of the embeddings, where they are compared.
    """
    curate = context.config.curate
    if not curate.evaluation_sets:
        return []
    sets = EvaluationSets.of_config(curate)
    model = model if curate.evaluation_similarity is not None else None
    gathered = _gather(context, sets, model)
    references = WorkFile.of(gathered, REFERENCES_FILE)
    columns = []
    if curate.evaluation_distance is not None:
        reach = max(REACH, curate.evaluation_distance)
        named = sets.fingerprint if reach == REACH else f"{sets.fingerprint}-{reach}"  # it says what may be taken over
        hashes = HashMatchStage(
            store=context.store,
            references=references,
            reach=reach,
            inputs=tuple(inputs),
            name=context.name(f"score-evaluation-{named}"),
        )
        columns.append(measured_column(DISTANCE, context.run_stage(hashes)))
    if model:
        likeness = LikenessStage(
            store=context.store,
            references=references,
            vectors=WorkFile.of(gathered, EMBEDDINGS_FILE),
            inputs=embed(),
            name=context.name(f"score-likeness-{sets.fingerprint}-{model.fingerprint}"),
        )
        columns.append(measured_column(SIMILARITY, context.run_stage(likeness)))
    return columns


def _gather(context: Context, sets: EvaluationSets, model: Model | None) -> Marker:
    """The references of all sets, in one place."""
    identity = f"{sets.fingerprint}-{model.fingerprint}" if model else sets.fingerprint
    read = ReadStage(
        store=context.store,
        parts=sets.parts,
        image=context.config.image,
        model=model,
        config=context.config.models,
        name=context.name(f"evaluation-read-{identity}"),
    )
    done: Mapping[str, Marker] = context.run_stage(read)
    gather = GatherStage(
        store=context.store,
        set_names=tuple(sorted({part.set_name for part in sets.parts})),
        files=tuple(
            (WorkFile.of(marker, REFERENCES_FILE), WorkFile.of(marker, EMBEDDINGS_FILE)) for marker in done.values()
        ),
        by_hash=context.config.curate.evaluation_distance is not None,
        by_embedding=model is not None,
        name=context.name(f"evaluation-{identity}"),
    )
    (marker,) = context.run_stage(gather).values()
    return marker
