"""Values that change over a run, as pure functions of the number of optimizer steps applied so far."""

import math

from cluster.config import Config, key


class Schedule(Config):
    """A weight that is `initial` until `start_step`, then moves to `value` in a straight line over `ramp_steps`.

    Constant: the defaults. Step: `start_step` alone. Ramp: `ramp_steps`, with or without `start_step`.
    """

    value: float = key(1.0, "final value")
    initial: float = key(0.0, "value before start_step")
    start_step: int = key(0, "step at which the value begins to change", unit="steps", ge=0)
    ramp_steps: int = key(0, "how long the change takes; 0 is at once", unit="steps", ge=0)

    @property
    def is_always_zero(self) -> bool:
        """Whether it is 0 at every step, so that nothing needs to be built for what it weighs."""
        moves = self.start_step > 0 or self.ramp_steps > 0
        return self.value == 0 and (self.initial == 0 or not moves)

    def at(self, step: int) -> float:
        """Return the value in force at `step` (0 is the first optimizer step of the run)."""
        if step < self.start_step:
            return self.initial
        if step >= self.start_step + self.ramp_steps:
            return self.value
        done = (step - self.start_step) / self.ramp_steps
        return self.initial + done * (self.value - self.initial)


def cosine_with_warmup(step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of `step`: linear from peak/warmup_steps to peak, then half a cosine to minimum.

    The first step is not wasted at zero and step `total_steps` would be exactly at `minimum`; later steps stay there.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * done))
