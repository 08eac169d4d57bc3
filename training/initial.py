"""Training from weights that exist: parts of another run's checkpoint or of another library's file, some frozen.

What a run starts from is read once, when the run is registered, and kept in its folder: resuming it needs neither the
other run nor the file. Parts go by the names that every method has (image, text, image_projection, text_projection,
log_scale, decoder, ...), or by a name inside of one (image.blocks).
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from cluster.errors import RequestError
from cluster.scratch import scratch_folder
from cluster.store import Store
from training.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE, local_copy
from training.config import InitConfig, TrainPlan
from training.data.tokenizer import FULL_VOCABULARY_SIZE, Tokenizer
from training.evaluate.model import find_checkpoint
from training.methods import Method, build_method
from training.weights.convert import Weights, fit_vocabulary, full_vocabulary
from training.weights.read import check_fit, nearest, read_weights

INITIAL_FILE = "initial.safetensors"
TOWERS, TOKENS, ARROW = "towers.", "text.tokens.weight", "->"
FOLLOWERS = {"target": "image"}
"""A momentum copy starts as what it follows."""


def read_initial(plan: TrainPlan, tokenizer: Tokenizer) -> Weights:
    """Return the weights that `init.*` names, under this run's names. Raises RequestError when they do not fit.

    Also refuses parts to freeze that the method has not. Nothing is written, and no network is built in memory.
    """
    config, init = plan.config, plan.config.init
    with torch.device("meta"):
        method = build_method(config.method, config.method_config, config.model, tokenizer, plan.classes)
    check_freeze(method, init.freeze)
    if not (init.checkpoint or init.weights):
        check_borrowed(method, {})
        return {}
    wanted = by_part(method.state_dict())
    source = _of_run(init.checkpoint, tokenizer) if init.checkpoint else read_weights(init.weights, config.model)
    if TOKENS in source and TOKENS in wanted:
        source[TOKENS] = _fit_tokens(source[TOKENS], tokenizer, config.seed)
    where = f"init.checkpoint={init.checkpoint}" if init.checkpoint else f"init.weights={init.weights}"
    taken = take_parts(source, wanted, init.parts, where)
    check_borrowed(method, taken)
    names = {part_name(name): name for name in method.state_dict()}
    return {names[name]: value for name, value in taken.items()}


def write_initial(store: Store, weights: Weights) -> None:
    """Keep the weights in the run's folder."""
    from safetensors.torch import save_file

    with scratch_folder() as folder:
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / INITIAL_FILE)
        store.put_file(folder / INITIAL_FILE, INITIAL_FILE)


def initialise(method: Method, store: Store, init: InitConfig) -> None:
    """Give a freshly built method the weights that its run's folder keeps, if any, and freeze what is to be frozen."""
    if store.exists(INITIAL_FILE):
        from safetensors.torch import load_file

        with local_copy(store, INITIAL_FILE) as path:
            method.load_state_dict(load_file(path), strict=False)
    for name, parameter in method.named_parameters():
        if any(is_within(part_name(name), frozen) for frozen in init.freeze):
            parameter.requires_grad_(False)
    for name, module in method.named_modules():
        if any(is_within(part_name(name), frozen) for frozen in init.freeze):
            module.eval()  # a timm model's batch normalisation would go on counting


def take_parts(source: Mapping[str, Tensor], wanted: Mapping[str, Tensor], parts: Sequence[str], where: str) -> Weights:
    """Return the wanted tensors that lie in `parts`, from the source; RequestError when some do not fit."""
    taken: Weights = {}
    for part in parts or common_parts(source, wanted, where):
        first, arrow, last = part.partition(ARROW)
        first, last = first.strip(), last.strip() if arrow else first.strip()
        here = {name: value for name, value in wanted.items() if is_within(name, last)}
        there = {last + name[len(first) :]: value for name, value in source.items() if is_within(name, first)}
        if not there:
            raise RequestError(f"{where}: has no part {first}; {nearest(first, parts_of(source))}")
        if not here:
            raise RequestError(f"init.parts={part}: the method has no part {last}; {nearest(last, parts_of(wanted))}")
        check_fit(there, here, f"{where}, part {first}")
        taken |= there
    for follower, followed in FOLLOWERS.items():
        for name in (name for name in wanted if is_within(name, follower) and name not in taken):
            if (same := followed + name[len(follower) :]) in taken:
                taken[name] = taken[same].clone()
    return taken


def common_parts(source: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> list[str]:
    """Return the parts that both have; RequestError when there is none."""
    common = [part for part in parts_of(wanted) if part in parts_of(source)]
    if not common:
        has, wants = ", ".join(parts_of(source)), ", ".join(parts_of(wanted))
        raise RequestError(f"{where}: has {has}, of which the method needs nothing (it has {wants}); set init.parts")
    return common


def check_freeze(method: Method, frozen: Sequence[str]) -> None:
    """Raise RequestError unless every name is a part of the method, and something is left to train."""
    names = [part_name(name) for name, parameter in method.named_parameters() if parameter.requires_grad]
    for part in frozen:
        if not any(is_within(name, part) for name in names):
            raise RequestError(f"init.freeze={part}: the method has no such part; {nearest(part, parts_of(names))}")
    if all(any(is_within(name, part) for part in frozen) for name in names):
        raise RequestError(f"init.freeze={', '.join(frozen)}: nothing is left to train")


def check_borrowed(method: Method, taken: Collection[str]) -> None:
    """Raise RequestError when a part that a method does not train itself has been given no weights."""
    for part in method.borrowed_parts():
        if not any(is_within(name, part) for name in taken):
            raise RequestError(
                f"method={method.name}: with these settings its part {part} has to come from another run; set "
                f'init.checkpoint=RUN init.parts="image->{part}"'
            )


def by_part(state: Mapping[str, Tensor]) -> Weights:
    """Return a method's state under the names of parts: image.*, not towers.image.*."""
    return {part_name(name): value for name, value in state.items()}


def part_name(name: str) -> str:
    """A weight's name as seen from its part."""
    return name.removeprefix(TOWERS)


def parts_of(names: Collection[str]) -> list[str]:
    """The parts that names belong to, in their order."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def is_within(name: str, part: str) -> bool:
    """Whether a weight lies in a part."""
    return name == part or name.startswith(part + ".")


def _of_run(checkpoint: str, tokenizer: Tokenizer) -> Weights:
    """A run's weights by part; its words' vectors by CLIP's ids, as the runs may know different ones."""
    store, info = find_checkpoint(checkpoint)
    with local_copy(store, f"{info.folder}/{WEIGHTS_FILE}") as path:
        source = by_part(torch.load(path, map_location="cpu", weights_only=True))
    theirs = store.read_bytes(f"{info.folder}/{TOKENIZER_FILE}").decode()
    if TOKENS in source and theirs != tokenizer.to_json():
        source[TOKENS] = full_vocabulary(source[TOKENS], Tokenizer.from_json(theirs))
    return source


def _fit_tokens(rows_VD: Tensor, tokenizer: Tokenizer, seed: int) -> Tensor:
    if len(rows_VD) != FULL_VOCABULARY_SIZE or len(rows_VD) == tokenizer.vocabulary_size:
        return rows_VD
    generator = torch.Generator().manual_seed(seed)
    fresh_VD = torch.randn(tokenizer.vocabulary_size, rows_VD.shape[1], generator=generator) * 0.02
    return fit_vocabulary(rows_VD, tokenizer, fresh_VD)
