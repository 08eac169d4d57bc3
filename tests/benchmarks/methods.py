"""`make bench-methods`: what a step of every method costs, against CLIP = 1.0 and against MAE = 1.0.

    python tests/benchmarks/methods.py [--size S] [--image-size 96] [--batch 16] [--rounds 5] [--only mae clip]

The networks are the papers' with every width multiplied by (the ViT's width / 768); settings of a method are its
defaults. A step is crop, forward pass, backward pass and AdamW, in bf16 autocast; on a CPU one thread computes it and
its CPU seconds are told, so that other work on the machine counts little. All methods take turns in every round; ratios
are taken inside a round, told are medians over the rounds. Memory is the most that a process of its own takes for two
steps beyond its imports (on a GPU: the most that is allocated).
RILS's appendix A gives GPU hours relative to MAE on ViT-B/16 at 224 px: CLIP 1.5, SLIP 3.7, MAE+CLIP 1.8, RILS 1.8.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from training.data.tokenizer import Tokenizer
from training.methods import METHODS, Batch, Method, ModelConfig, build_method
from training.models.config import SIZES

WORDS = ("a", "the", "red", "small", "house", "of", "dog", "in", "two", "on", "cat", "with", "green", "old", "under")
PUBLISHED_VS_MAE = {"mae": 1.0, "clip": 1.5, "slip": 3.7, "rils": 1.8}
NUM_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured."""

    size: str
    image_size: int
    batch: int

    def settings(self, name: str) -> dict[str, Any]:
        """The method's defaults, with the widths of its own networks scaled as the encoder's."""
        scale = SIZES[self.size].width / 768
        decoder = {"width": int(512 * scale), "depth": 8, "heads": 16}
        scaled: dict[str, dict[str, Any]] = {
            "mae": {"decoder": decoder},
            "m3ae": {"decoder": decoder},
            "mae_clip": {"decoder": {**decoder, "depth": 12, "heads": 8}},
            "slip": {"ssl_hidden": int(4096 * scale)},
            "mug": {"decoder": decoder, "caption_decoder": {"width": int(512 * scale)}},
        }
        return scaled.get(name, {})

    def model(self) -> ModelConfig:
        """The encoders."""
        width = int(512 * SIZES[self.size].width / 768)
        return ModelConfig.model_validate(
            {
                "vision": {"size": self.size, "image_size": self.image_size},
                "text": {"width": width, "depth": 12, "heads": 8},
                "embed_dim": width,
            }
        )

    def data(self, device: torch.device) -> Batch:
        """Noise with captions of 4 to 20 words."""
        draw = torch.Generator().manual_seed(0)
        side = self.image_size * 8 // 7
        lengths = torch.randint(4, 21, (self.batch,), generator=draw).tolist()
        words = torch.randint(len(WORDS), (self.batch, 20), generator=draw).tolist()
        return Batch(
            images=torch.randint(0, 256, (self.batch, side, side, 3), generator=draw).to(torch.uint8).to(device),
            captions=[" ".join(WORDS[i] for i in row[:length]) for row, length in zip(words, lengths, strict=True)],
            sample_ids=torch.arange(self.batch, device=device),
            epoch=torch.zeros(self.batch, dtype=torch.int64, device=device),
            step=0,
            seed=0,
        )


class Trained:
    """A method with its optimizer."""

    def __init__(self, name: str, bench: Bench, device: torch.device) -> None:
        torch.manual_seed(0)
        config = METHODS[name].config_type.model_validate(bench.settings(name))
        self.method: Method = build_method(name, config, bench.model(), Tokenizer()).to(device)
        self.batch, self.device = bench.data(device), device
        trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        self.num_parameters = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, fused=True)

    def step(self) -> float:
        """Train one step; seconds of the GPU, or of the CPU."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        started = clock()
        self.method.before_step(0, NUM_STEPS)
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.method(self.batch)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert output.loss.isfinite()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - started


def measure_time(names: list[str], bench: Bench, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step of each method, in every round; a round before them is not counted."""
    methods = {name: Trained(name, bench, device) for name in names}
    for trained in methods.values():
        trained.step()
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds):
        # Every other round backwards: what drifts over a round weighs on all alike.
        for name in methods if number % 2 == 0 else reversed(methods):
            seconds[name].append(methods[name].step())
    return seconds


def measure_memory(name: str, bench: Bench, device: torch.device) -> int:
    """Bytes that two steps take at most, in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trained = Trained(name, bench, device)
    for _ in range(2):
        trained.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def memory_in_a_child(name: str) -> int:
    """The same in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout)


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--size", default="S", choices=list(SIZES))
    arguments.add_argument("--image-size", type=int, default=96)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--only", nargs="*", default=[], help="methods, clip and mae first; all by default")
    arguments.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    bench = Bench(size=given.size, image_size=given.image_size, batch=given.batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.memory_of:
        print(measure_memory(given.memory_of, bench, device))
        return
    names = ["clip", "mae", *(name for name in given.only or METHODS if name not in ("clip", "mae"))]
    memory = {name: memory_in_a_child(name) for name in names}
    seconds = measure_time(names, bench, given.rounds, device)
    report(names, seconds, memory)


def report(names: list[str], seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Print one line a figure."""
    for name in names:
        print(f"method.{name}.step_time: {1000 * statistics.median(seconds[name]):.0f} ms")
        print(f"method.{name}.time_ratio_vs_clip: {_ratio(seconds[name], seconds['clip']):.2f} ratio")
        published = f" (published: {PUBLISHED_VS_MAE[name]})" if name in PUBLISHED_VS_MAE else ""
        print(f"method.{name}.time_ratio_vs_mae: {_ratio(seconds[name], seconds['mae']):.2f} ratio{published}")
        print(f"method.{name}.memory: {memory[name] / 2**20:.0f} MiB")
        print(f"method.{name}.memory_ratio_vs_clip: {memory[name] / memory['clip']:.2f} ratio", flush=True)


def _ratio(mine: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, reference, strict=True))


if __name__ == "__main__":
    main()
