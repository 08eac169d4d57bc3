"""DeepSpeed: the only place that builds an engine.

Weights, optimizer state and the reduction of gradients are fp32; with precision=bf16 the forward pass runs under
bf16 autocast. (A bf16 engine would keep the learnable temperature in bf16, and its logits with it.)
"""

import logging
import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import RunError
from training.accumulation import accumulate
from training.config import OptimConfig, TrainConfig
from training.methods import Batch, Method, Output, Shown

logger = logging.getLogger(__name__)

CONVERTIBLE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
"""In a checkpoint's state: DeepSpeed may convert it."""


class Engine:
    """A method with its optimizer, split over the ranks. Every call but the properties is collective."""

    def __init__(self, method: Method, config: TrainConfig, *, num_ranks: int, device: torch.device) -> None:
        """method: freshly built and equal on every rank. A torch process group has to be initialised."""
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saves a search, and a warning
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed's calls
        # Its shared-memory collectives for CPUs are compiled at first use, which takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed cannot broadcast tensors without dimensions; they live as [1] inside the engine.
        self._scalars = [name for name, parameter in method.named_parameters() if parameter.ndim == 0]
        for name in self._scalars:
            parameter = method.get_parameter(name)
            parameter.data = parameter.data.reshape(1)
        checkpoint_activations(method, config.train.activation_checkpointing)
        optimizer = adamw(method, config.optim, fused=device.type == "cuda")
        self.zero_stage = config.train.zero_stage
        self.accumulation = config.train.accumulation
        self.deepspeed: Any
        self.deepspeed, *_ = deepspeed.initialize(
            model=method.to(device), optimizer=optimizer, config=deepspeed_config(config, num_ranks)
        )

        if self.zero_stage == 3:
            _announce_shared_parameters(self.deepspeed.module)

    @property
    def steps(self) -> int:
        """Optimizer steps applied so far."""
        return int(self.deepspeed.global_steps)

    def gradients(self, batch: Batch, num_steps: int) -> Output:
        """Compute a step's losses and leave its gradient on the parameters, in `train.accumulation` parts.

        num_steps: of the whole run.
        """
        self.deepspeed.module.before_step(batch.step, num_steps)
        output = self._whole(batch) if self.accumulation == 1 else self._in_parts(batch)
        self.deepspeed.module.after_gradients()
        return output

    def _in_parts(self, batch: Batch) -> Output:
        if self.zero_stage == 3:
            # It overwrites gradients in a step's first backward pass and adds to them in the later ones: a parameter
            # that the first pass does not touch would keep the gradient of the step before.
            self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
        return accumulate(self.deepspeed.module, batch, self.accumulation, self.deepspeed, self._backward)

    def update(self, learning_rate: float) -> float:
        """Apply the gradient; returns its norm before clipping.

        Raises RunError, with the weights as they were, when the gradient is not finite on some rank.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._norm_without_zero() if self.zero_stage == 0 else math.nan
        if self.zero_stage == 0 and not math.isfinite(norm):
            raise RunError("the gradient is not finite")
        self.deepspeed.step()
        if self.zero_stage > 0:
            if self.deepspeed.optimizer.overflow:
                raise RunError("the gradient is not finite")
            norm = float(self.deepspeed.get_global_grad_norm())
        return norm

    def show(self, batch: Batch) -> Shown | None:
        """What the method has to look at of a small batch."""
        with torch.no_grad():
            shown: Shown | None = self.deepspeed(batch, self.deepspeed.module.show)
        return shown

    def _whole(self, batch: Batch) -> Output:
        output: Output | None = None

        def objective(batch: Batch) -> Tensor:  # a plain tensor, as ZeRO-3 finds no others to hang its hooks on
            nonlocal output
            output = self.deepspeed.module.step(batch)
            return output.loss

        self._backward(self.deepspeed(batch, objective), last=True)
        assert output is not None
        return output

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """DeepSpeed counts one micro-batch a step: parts and divisors are accumulation.py's business, not its own."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss)

    def full_weights(self) -> dict[str, Tensor]:
        """The method's state, whole and fp32, on the CPU: on rank 0, and empty elsewhere."""
        if self.zero_stage == 3:
            whole = self._gathered()
        else:
            whole = _on_cpu(self.deepspeed.module.state_dict()) if self.deepspeed.global_rank == 0 else {}
        return {name: value.reshape(()) if name in self._scalars else value for name, value in whole.items()}

    def _gathered(self) -> dict[str, Tensor]:
        import deepspeed

        module: nn.Module = self.deepspeed.module
        stored = module.state_dict().keys()  # without the buffers that are computed anew
        whole = _on_cpu({name: buffer for name, buffer in module.named_buffers() if name in stored})
        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.deepspeed.global_rank == 0:  # the other ranks of a machine would fill its memory for nothing
                    whole[name] = parameter.detach().cpu().clone()
        return whole if self.deepspeed.global_rank == 0 else {}

    def save(self, folder: str, tag: str, state: dict[str, Any]) -> None:
        """Write this rank's part of the training state below folder/tag."""
        os.makedirs(os.path.join(folder, tag), exist_ok=True)
        self.deepspeed.save_checkpoint(folder, tag=tag, client_state=state | CONVERTIBLE, save_latest=False)

    def load(self, folder: str, tag: str) -> dict[str, Any]:
        """Take over what `save` wrote with the same number of ranks; returns its `state`."""
        path, state = self.deepspeed.load_checkpoint(folder, tag=tag, load_lr_scheduler_states=False)
        if path is None:
            raise RunError(f"{folder}/{tag}: DeepSpeed cannot load this checkpoint")
        return dict(state)

    def load_converted(self, folder: str, tag: str, weights: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint that `training.elastic.convert` made of one of another number of ranks.

        weights: what `full_weights` gave when it was saved; the conversion leaves out frozen parameters and buffers.
        """
        import deepspeed

        optimizer = self.deepspeed.optimizer.optimizer
        settings = [{name: value for name, value in group.items() if name != "params"} for group in _groups(optimizer)]
        deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of tensor parallelism, which there is none of
        self.deepspeed._config.load_universal_checkpoint = True
        self.load(folder, tag)
        self.deepspeed._config.load_universal_checkpoint = False
        deepspeed.utils.logger.setLevel(logging.WARNING)
        # Under ZeRO-3 all groups get the settings of the first one and share its count of steps.
        for group, own in zip(_groups(optimizer), settings, strict=True):
            group.update(own)
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()
        self._load_constants(weights)

    def _load_constants(self, weights: Mapping[str, Tensor]) -> None:
        """Set buffers and frozen parameters."""
        import deepspeed

        module: nn.Module = self.deepspeed.module
        for name, buffer in module.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                partitioned = [parameter] if self.zero_stage == 3 else []
                with torch.no_grad(), deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
                    if parameter.numel():  # under ZeRO-3 it is whole on rank 0 alone
                        parameter.copy_(weights[name].view_as(parameter))

    def _norm_without_zero(self) -> float:
        gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return optimizer.param_groups


def deepspeed_config(config: TrainConfig, num_ranks: int) -> dict[str, Any]:
    """DeepSpeed's settings. What has a default there that matters here is written out: defaults changed before."""
    return {
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": config.train.batch_size // num_ranks,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.train.zero_stage,
            # Buckets overlap with the backward pass on GPUs; on gloo this only adds copies. Overlapping ZeRO-1 reduces
            # only what the last backward pass of a step touches, which is not everything when a step has several.
            "overlap_comm": torch.cuda.is_available()
            and not (config.train.zero_stage == 1 and config.train.accumulation > 1),
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
        },
        "torch_autocast": {
            "enabled": config.train.precision == "bf16",
            "dtype": "bfloat16",
            # DeepSpeed reduces the gradients of the modules named here in bf16: of none.
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def adamw(method: nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW with two groups: matrices and convolutions decay; vectors, scalars and tables of positions do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],  # one may be empty where parts are frozen
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
    )


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to norms, biases, temperatures, single tokens and tables of positions."""
    last = name.rpartition(".")[2]
    return parameter.ndim >= 2 and "position" not in last and last not in ("pos_embed", "cls_token")  # timm's names


def checkpoint_activations(method: nn.Module, enabled: bool) -> None:
    """Tell every stack of blocks whether to keep its activations or to compute them again in the backward pass."""
    for module in method.modules():
        if hasattr(module, "activation_checkpointing"):
            setattr(module, "activation_checkpointing", enabled)  # noqa: B010  # to mypy it may be a Tensor


def _announce_shared_parameters(method: nn.Module) -> None:
    """Tell ZeRO-3 which parameters the method's own forward pass uses: those of parts that have no forward pass.

    It finds out by itself, but only when a parameter is missing; then its recorded order of use is wrong, which ended
    runs some steps after they were resumed.
    """
    import deepspeed

    for module in method.modules():
        if type(module).forward is nn.Module.forward:
            for parameter in module.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(method, parameter)


def _on_cpu(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}
