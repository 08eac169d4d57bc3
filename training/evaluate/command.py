"""`pairmill eval`: encode the chosen samples, score them, write eval.json, print one line a number."""

import base64
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simplejpeg
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cluster.errors import RequestError
from cluster.run import open_run
from training.config import EvalConfig
from training.data.dataset import Dataset
from training.data.loader import ImageReader
from training.evaluate.model import TrainedModel, load_model
from training.evaluate.pixels import nearest_label_accuracy, pixel_features
from training.evaluate.retrieval import Recall, distinct, image_to_text, text_to_image
from training.evaluate.zeroshot import ZeroShot, class_features, classify

EVAL_FILE, EXAMPLES_FILE = "eval.json", "examples.json"
NUM_EXAMPLES = 48


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The evaluated samples: pictures uint8 [N, S, S, 3], captions, class names ("" without a class column)."""

    images: Tensor
    captions: list[str]
    labels: list[str]
    uids: list[str]


@dataclass(kw_only=True)
class Scores:
    """Numbers by the name they are printed under, in order, with the number of queries behind each."""

    values: dict[str, float] = field(default_factory=dict)
    num_queries: dict[str, int] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float, *, queries: int = 0, chance: float | None = None) -> None:
        """Add one number; queries and chance are for the table, 0 and None when they say nothing."""
        self.values[name] = value
        if queries:
            self.num_queries[name] = queries
        if chance is not None:
            self.chance[name] = chance


def run_eval(config: EvalConfig) -> Scores:
    """Carry out an evaluation. Raises RequestError before any work; results are under the returned names."""
    model = load_model(config.checkpoint)
    model.encode_texts([""], 1)  # a method without text features says so here, before any work
    data_url = config.dataset or model.config.data.dataset
    caption_column = config.caption_column or model.config.data.caption_column
    dataset = open_samples(data_url, config.select, caption_column, config.class_column, "select")
    reference = None
    if config.reference_select:
        if not config.class_column:
            raise RequestError("reference_select: the pixel baseline compares classes; set class_column as well")
        reference = open_samples(
            data_url, config.reference_select, caption_column, config.class_column, "reference_select"
        )
    output = config.output or model.run.url_of(f"eval/{config.name}")
    run = open_run(output, "eval", config.model_copy(update={"dataset": dataset.url, "checkpoint": model.run.url}))
    scores = Scores()
    samples = read_samples(dataset, config.class_column, model.config.image_size)
    images_NE = model.encode_images(samples.images, config.batch_size)
    examples: list[dict[str, Any]] = []
    if config.class_column:
        result, classes = zero_shot(model, config, samples, images_NE)
        add_zero_shot(scores, result)
        examples = pick_examples(samples, classes, result)
    if reference is not None:
        gallery = read_samples(reference, config.class_column, model.config.image_size)
        scores.add("zeroshot.pixels", pixel_accuracy(samples, gallery), queries=len(samples.labels))
    add_retrieval(scores, model, config, samples, images_NE)
    record = {
        "checkpoint": model.run.url,
        "step": model.step,
        "method": model.config.method,
        "num_samples": len(samples.uids),
        "scores": scores.values,
        "chance": scores.chance,
        "num_queries": scores.num_queries,
        "config": config.model_dump(mode="json"),
    }
    run.store.write_bytes(EXAMPLES_FILE, json.dumps(examples).encode())
    run.store.write_bytes(EVAL_FILE, json.dumps(record, indent=1).encode())
    Console(file=sys.stderr).print(table(scores, f"{model.config.method}, step {model.step}: {run.store.url}"))
    for name, value in scores.values.items():
        print(f"{name}: {value:.6g}")
    print(f"eval: {run.store.url_of(EVAL_FILE)}")
    return scores


def open_samples(url: str, select: Sequence[str], caption_column: str, class_column: str, where: str) -> Dataset:
    """Open the samples that an evaluation reads. Raises RequestError when a column is missing or no sample passes."""
    dataset = Dataset(url, select=select, caption_column=caption_column, select_key=where)
    if class_column:
        dataset.require(class_column, f"class_column={class_column}")
    if not len(dataset):
        raise RequestError(f"{where}={list(select)}: no sample of {dataset.url} passes")
    return dataset


def read_samples(dataset: Dataset, class_column: str, side: int) -> Samples:
    """Read every selected sample. Samples whose class is null are left out."""
    labels = dataset.column(class_column) if class_column else [""] * len(dataset)
    rows = [row for row, label in enumerate(labels) if label is not None]
    if not rows:
        raise RequestError(f"class_column={class_column}: no selected sample has a value there")
    reader = ImageReader(dataset, side, cache_bytes=0)
    images = np.empty((len(rows), side, side, 3), dtype=np.uint8)
    samples = [reader.read(row, images[place])[0] for place, row in enumerate(rows)]
    dataset.close()
    return Samples(
        images=torch.from_numpy(images),
        captions=[sample.caption for sample in samples],
        labels=[str(labels[sample.row]) for sample in samples],
        uids=[sample.uid for sample in samples],
    )


def zero_shot(
    model: TrainedModel, config: EvalConfig, samples: Samples, images_NE: Tensor
) -> tuple[ZeroShot, list[str]]:
    """Classify the samples among the distinct values of the class column; returns those classes as well."""
    classes = sorted(set(samples.labels))
    index = {name: number for number, name in enumerate(classes)}
    features_CE = class_features(classes, config.templates, lambda texts: model.encode_texts(texts, config.batch_size))
    labels_N = torch.tensor([index[label] for label in samples.labels])
    return classify(images_NE, features_CE, labels_N), classes


def add_zero_shot(scores: Scores, result: ZeroShot) -> None:
    """Add the zero-shot numbers."""
    scores.add("zeroshot.top1", result.top1, queries=result.num_samples, chance=result.chance)
    scores.add("zeroshot.top5", result.top5, queries=result.num_samples, chance=result.chance5)
    scores.add("zeroshot.chance", result.chance)
    scores.add("zeroshot.num_classes", result.num_classes)


def add_retrieval(scores: Scores, model: TrainedModel, config: EvalConfig, samples: Samples, images_NE: Tensor) -> None:
    """Add Recall@K of both directions."""
    texts, owner_N = distinct(samples.captions)
    texts_TE = model.encode_texts(texts, config.batch_size)
    directions: dict[str, Recall] = {
        "image_to_text": image_to_text(images_NE, texts_TE, owner_N),
        "text_to_image": text_to_image(texts_TE, images_NE, owner_N),
    }
    for direction, recall in directions.items():
        for k, value in recall.at.items():
            scores.add(f"retrieval.{direction}.r{k}", value, queries=recall.num_queries, chance=recall.chance[k])


def pixel_accuracy(samples: Samples, gallery: Samples) -> float:
    """The nearest-neighbour baseline on the same queries."""
    return nearest_label_accuracy(
        pixel_features(samples.images), samples.labels, pixel_features(gallery.images), gallery.labels
    )


def pick_examples(samples: Samples, classes: list[str], result: ZeroShot) -> list[dict[str, Any]]:
    """Some right and some wrong answers, evenly spread over the samples, with small pictures."""
    right_N = [
        classes[best] == label for best, label in zip(result.predicted[:, 0].tolist(), samples.labels, strict=True)
    ]
    chosen: list[int] = []
    for wanted in (True, False):
        rows = [row for row, right in enumerate(right_N) if right == wanted]
        step = max(1, len(rows) // (NUM_EXAMPLES // 2))
        chosen += rows[::step][: NUM_EXAMPLES // 2]
    return [
        {
            "uid": samples.uids[row],
            "label": samples.labels[row],
            "predicted": [classes[best] for best in result.predicted[row].tolist()],
            "right": right_N[row],
            "jpeg": base64.b64encode(simplejpeg.encode_jpeg(samples.images[row].numpy(), quality=85)).decode(),
        }
        for row in chosen
    ]


def table(scores: Scores, title: str) -> Table:
    """The numbers for a person: shares with their standard error, beside chance."""
    shown = Table(title=title, title_justify="left")
    for column in ("measure", "value", "± s.e.", "chance", "queries"):
        shown.add_column(column, justify="left" if column == "measure" else "right")
    for name, value in scores.values.items():
        queries, chance = scores.num_queries.get(name, 0), scores.chance.get(name)
        error = f"{math.sqrt(value * (1 - value) / queries):.4f}" if queries else ""
        digits = 0 if name.endswith("num_classes") else 4
        shown.add_row(name, f"{value:.{digits}f}", error, "" if chance is None else f"{chance:.4f}", str(queries or ""))
    return shown
