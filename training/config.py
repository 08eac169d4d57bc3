"""Every setting of `pairmill train` and `pairmill eval`, and the checks of how they fit together."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import field_validator, model_validator

from cluster.config import REQUIRED, Config, StringList, key
from cluster.errors import RequestError
from cluster.session import RayConfig
from training.data.dataset import Dataset
from training.data.sources import Mixture, SourceConfig, check_labels, check_sources, classes_of, open_sources
from training.methods import (
    METHODS,
    ClipConfig,
    M3aeConfig,
    M3iConfig,
    MaeClipConfig,
    MaeConfig,
    MethodConfig,
    ModelConfig,
    MugConfig,
    RilsConfig,
    SiglipConfig,
    SlipConfig,
)

MAX_DEFAULT_WARMUP_STEPS = 2_000


class DataConfig(SourceConfig):
    """What is read, and how."""

    extra: list[SourceConfig] = key(
        [], "more datasets that share every batch: a list of groups of the keys above, such as [{dataset: other}]"
    )
    image_size: int | None = key(
        None, "side of the squares that pictures are decoded to; null: model.vision.image_size", unit="px", ge=8
    )
    workers: int | None = key(
        None, "threads per rank that read and decode; null: by the rank's cores", affects_result=False, ge=1
    )
    prefetch: int = key(2, "batches per rank held ready", affects_result=False, unit="batches", ge=1)
    cache_gib: float = key(
        2.0,
        "memory per rank for decoded pictures, used when all of them fit into it",
        affects_result=False,
        unit="GiB",
        ge=0,
    )

    @property
    def sources(self) -> list[SourceConfig]:
        """Everything that is read, the main dataset first."""
        return [self, *self.extra]


class LoopConfig(Config):
    """How much is trained, in which arithmetic, spread over how many processes."""

    batch_size: int = key(1024, "pairs of a step, over all ranks", unit="pairs", ge=2)
    num_epochs: float = key(30.0, "passes over the samples", unit="epochs", gt=0)
    num_steps: int | None = key(None, "steps instead of num_epochs", unit="steps", ge=1)
    precision: Literal["bf16", "fp32"] = key("bf16", "arithmetic; weights and optimizer are fp32 with both")
    accumulation: int = key(
        1,
        "parts of a rank's share of the batch, one in memory at a time; the gradient is that of the whole",
        affects_result=False,
        unit="parts",
        ge=1,
    )
    activation_checkpointing: bool = key(
        False,
        "compute the blocks' activations again in the backward pass instead of keeping them",
        affects_result=False,
    )
    zero_stage: Literal[0, 1, 2, 3] = key(2, "DeepSpeed ZeRO stage: what is split over the ranks")
    num_ranks: int | None = key(
        None, "training processes; null: one a GPU of the cluster, else 1", affects_result=False, ge=1
    )
    num_threads: int | None = key(
        None, "CPU threads of a rank; null: its share of the cores", affects_result=False, ge=1
    )
    max_restarts: int = key(3, "how often a group that lost a rank is started again", affects_result=False, ge=0)


class InitConfig(Config):
    """What the weights are before the first step, and which of them stay as they are."""

    checkpoint: str = key("", "train run, or one checkpoint of it, to take weights from; its method may be another")
    weights: str = key("", "file or folder of weights with the names of MAE, timm, open_clip or transformers")
    parts: StringList = key(
        [],
        "what is taken: image, text, image_projection, text_projection, log_scale, decoder, ..., parts of parts such "
        "as image.blocks, or image->teacher for another place; empty: every part that both have",
    )
    freeze: StringList = key([], "parts that are not trained; image with method=clip is LiT")

    @model_validator(mode="after")
    def _fits(self) -> "InitConfig":
        if self.checkpoint and self.weights:
            raise ValueError("checkpoint and weights are both given; take one")
        if self.parts and not (self.checkpoint or self.weights):
            raise ValueError(f"parts={', '.join(self.parts)}: taken from where? set init.checkpoint or init.weights")
        return self


class OptimConfig(Config):
    """AdamW; no decay on norms, biases, position embeddings and temperatures."""

    lr: float = key(5e-4, "peak learning rate", gt=0)
    min_lr: float = key(0.0, "learning rate at the end of the cosine", ge=0)
    warmup_steps: int | None = key(
        None, f"steps of linear warm-up; null: a tenth of the run, at most {MAX_DEFAULT_WARMUP_STEPS:,}", ge=0
    )
    warmup_epochs: float | None = key(None, "warm-up in epochs, instead of warmup_steps", unit="epochs", ge=0)
    weight_decay: float = key(0.2, "decoupled weight decay", ge=0)
    beta1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.98, "decay of the second moment", ge=0, lt=1)
    eps: float = key(1e-6, "added to the root of the second moment", gt=0)
    grad_clip: float = key(1.0, "largest norm of the whole gradient; 0: no limit", ge=0)


class CheckpointConfig(Config):
    """When the run's state is published."""

    every_steps: int = key(500, "steps between checkpoints; one is always made at the end", affects_result=False, ge=1)
    keep: int = key(2, "newest checkpoints that are kept", affects_result=False, ge=1)


class LogConfig(Config):
    """What is recorded on the way."""

    every_steps: int = key(10, "steps between points of the curves", affects_result=False, ge=1)


class TrainConfig(Config):
    """Settings of `pairmill train`."""

    data: DataConfig = key({}, "what is read")
    output: str = key(REQUIRED, "folder or URL of the run", affects_result=False)
    method: str = key("clip", f"what is trained: {', '.join(sorted(METHODS))}")
    seed: int = key(0, "of weights, order, crops and masks")
    model: ModelConfig = key(ModelConfig(), "the networks")
    clip: ClipConfig = key(ClipConfig(), "settings of method=clip")
    siglip: SiglipConfig = key(SiglipConfig(), "settings of method=siglip")
    rils: RilsConfig = key(RilsConfig(), "settings of method=rils")
    mae: MaeConfig = key(MaeConfig(), "settings of method=mae")
    m3ae: M3aeConfig = key(M3aeConfig(), "settings of method=m3ae")
    mae_clip: MaeClipConfig = key(MaeClipConfig(), "settings of method=mae_clip")
    slip: SlipConfig = key(SlipConfig(), "settings of method=slip")
    mug: MugConfig = key(MugConfig(), "settings of method=mug")
    m3i: M3iConfig = key(M3iConfig(), "settings of method=m3i")
    init: InitConfig = key(InitConfig(), "where weights come from")
    train: LoopConfig = key(LoopConfig(), "the loop")
    optim: OptimConfig = key(OptimConfig(), "the optimizer")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "checkpoints")
    log: LogConfig = key(LogConfig(), "records")
    ray: RayConfig = key(RayConfig(), "where it runs")

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(METHODS))}"
            raise ValueError(f"no such method; {hint}")
        return name

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        ranks, size = self.train.num_ranks, self.train.batch_size
        if ranks and size % ranks:
            raise ValueError(f"train.batch_size={size} is no multiple of train.num_ranks={ranks}")
        if self.optim.warmup_steps is not None and self.optim.warmup_epochs is not None:
            raise ValueError("optim.warmup_steps and optim.warmup_epochs are both given; take one")
        if self.optim.min_lr > self.optim.lr:
            raise ValueError(f"optim.min_lr={self.optim.min_lr} is above optim.lr={self.optim.lr}")
        return self

    @property
    def method_config(self) -> MethodConfig:
        """The settings of the chosen method."""
        chosen = getattr(self, self.method)
        assert isinstance(chosen, MethodConfig)
        return chosen

    @property
    def image_size(self) -> int:
        """Side in pixels of the squares in a batch."""
        return self.data.image_size or self.model.vision.image_size


class EvalConfig(Config):
    """Settings of `pairmill eval`."""

    checkpoint: str = key(REQUIRED, "output folder of a train run: its newest checkpoint; or RUN/checkpoints/step-...")
    dataset: str = key("", "folder or URL of a finished dataset; empty: the one that the run was trained on")
    select: StringList = key([], "conditions that the evaluated samples must meet, such as style=held-out")
    caption_column: str = key("", "column of the captions for retrieval; empty: the run's data.caption_column")
    class_column: str = key("", "column whose distinct values are the classes; empty: no zero-shot classification")
    templates: StringList = key(["{}"], "texts around a class name; the features of all of them are averaged")
    reference_select: StringList = key(
        [], "conditions for the gallery of the 16x16-pixel nearest-neighbour baseline; empty: no baseline"
    )
    batch_size: int = key(256, "pictures or texts of one pass", affects_result=False, unit="samples", ge=1)
    name: str = key("default", "name of this evaluation in the run's folder", pattern=r"^[\w.-]+$")
    output: str = key("", "folder or URL of the results; empty: RUN/eval/NAME", affects_result=False)

    @field_validator("templates")
    @classmethod
    def _templates_have_a_place(cls, templates: list[str]) -> list[str]:
        if not templates or any("{}" not in template for template in templates):
            raise ValueError("every template needs {} where the class name goes")
        return templates


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A configuration that was checked against its dataset, with what follows from both. Can be pickled."""

    config: TrainConfig
    num_samples: int
    num_steps: int
    warmup_steps: int
    classes: tuple[str, ...] = ()
    """Names of the classes that the samples' labels are numbers of."""

    @property
    def epochs(self) -> float:
        """Passes over the samples."""
        return self.num_steps * self.config.train.batch_size / self.num_samples


def plan_training(config: TrainConfig) -> tuple[TrainPlan, Dataset | Mixture]:
    """Check a configuration against its data. Raises RequestError; nothing is written."""
    sources = config.data.sources
    samples = open_sources(sources)
    batch_size, num_samples = config.train.batch_size, len(samples)
    check_sources(sources, samples, batch_size)
    if num_samples < batch_size:
        raise RequestError(f"train.batch_size={batch_size}: {_few(samples, config)}; make it smaller or select more")
    classes = classes_of(sources)
    check_labels(sources, classes)
    check_captions(config)
    num_steps = config.train.num_steps or max(1, math.floor(config.train.num_epochs * num_samples / batch_size))
    warmup_steps = config.optim.warmup_steps
    if warmup_steps is None and config.optim.warmup_epochs is not None:
        warmup_steps = round(config.optim.warmup_epochs * num_samples / batch_size)
    if warmup_steps is None:
        warmup_steps = min(MAX_DEFAULT_WARMUP_STEPS, num_steps // 10)
    check_parts(config, config.train.num_ranks or 1, classes)
    if warmup_steps > num_steps:
        raise RequestError(f"optim.warmup_steps={warmup_steps}: the run has {num_steps} steps")
    plan = TrainPlan(
        config=config.model_copy(update={"data": _with_absolute_places(config.data, samples)}),
        num_samples=num_samples,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        classes=classes,
    )
    return plan, samples


def _few(samples: Dataset | Mixture, config: TrainConfig) -> str:
    if isinstance(samples, Mixture):
        return f"only {len(samples):,} samples in {samples.url}"
    selected = f" pass data.select={config.data.select}" if config.data.select else ""
    return f"only {len(samples):,} of {samples.manifest.num_samples:,} samples in {samples.url}{selected}"


def _with_absolute_places(data: DataConfig, samples: Dataset | Mixture) -> DataConfig:
    """The same with the datasets' whole URLs, so that the run can be resumed from another working directory."""
    first, *others = samples.datasets if isinstance(samples, Mixture) else (samples,)
    extra = [source.model_copy(update={"dataset": other.url}) for source, other in zip(data.extra, others, strict=True)]
    return data.model_copy(update={"dataset": first.url, "extra": extra})


def check_parts(config: TrainConfig, num_ranks: int, classes: Sequence[str] = ()) -> None:
    """Raise RequestError unless the batch can be split over ranks and parts, and the method can work on a part."""
    loop = config.train
    if loop.batch_size % num_ranks:
        raise RequestError(f"train.batch_size={loop.batch_size} is no multiple of the {num_ranks} ranks")
    part_size, rest = divmod(loop.batch_size // num_ranks, loop.accumulation)
    if rest:
        raise RequestError(
            f"train.accumulation={loop.accumulation}: a rank's {loop.batch_size // num_ranks} samples of a step cannot "
            "be cut into that many equal parts"
        )
    check_backbone(config)
    METHODS[config.method].check(config.method_config, config.model, part_size=part_size, has_labels=bool(classes))


def check_captions(config: TrainConfig) -> None:
    """Raise RequestError, naming the key, when the method needs captions of a source that has none."""
    method, sources = METHODS[config.method], config.data.sources
    without = [number for number, source in enumerate(sources) if not source.caption_column]
    allowed = {"all": 0, "some": len(sources) - 1, "none": len(sources)}[method.needs_captions(config.method_config)]
    if len(without) > allowed:
        where = f"data.extra[{without[0] - 1}]" if without[0] else "data"
        instead = f", or set {method.without_captions}" if method.without_captions else ""
        raise RequestError(
            f"{where}.caption_column: method={config.method} needs captions; name the column they are in{instead}"
        )


def check_backbone(config: TrainConfig) -> None:
    """Raise RequestError when the method leaves patches out and the image encoder cannot, or has only one."""
    vision = config.model.vision
    if not METHODS[config.method].drops_patches:
        return
    if not vision.drops_patches:
        able = ", ".join(sorted(name for name, method in METHODS.items() if not method.drops_patches))
        raise RequestError(
            f"method={config.method}: leaves patches out, and {vision.timm or vision.size} sees whole pictures only; "
            f"use a vision transformer, or one of the methods {able}"
        )
    if vision.num_patches == 1:
        raise RequestError(
            f"model.vision.patch_size={vision.patch_size}: method={config.method} hides patches, and a picture of "
            f"{vision.image_size} px is a single one"
        )
