"""Controllers of the KL coefficient, with state, on the pure ones."""

from __future__ import annotations

from suasion.functional.kl import adaptive_kl_coef, fixed_kl_coef


class AdaptiveKLController:
    """Moves the coefficient towards a target KL.

    Args:
        init_kl_coef: Coefficient at the beginning.
        target: KL to settle at, nats per response.
        horizon: Responses over which a full error changes the coefficient about e-fold.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """Take in the KL of the last `n_steps` responses."""
        self.value = adaptive_kl_coef(
            self.value, current, target=self.target, n=n_steps, horizon=self.horizon
        )


class FixedKLController:
    """Keeps the coefficient.

    Args:
        kl_coef: The coefficient.
    """

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Do nothing."""
        self.value = fixed_kl_coef(self.value, current)
