"""Blend rules: what an alpha between 0 and 1 means. A rule is one class, registered in `BLEND_RULES`.

Rules are named here, below the arithmetic of a merge, because recipes and mergekit configs name them too.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import acos, sin, sqrt
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

SUMS = {
    "pre_squared": lambda pre, post: pre.dot(pre),  # noqa: ARG005 (each takes both)
    "post_squared": lambda pre, post: post.dot(post),  # noqa: ARG005
    "product": lambda pre, post: pre.dot(post),
}
"""Sums over a whole tensor that a rule may need, of the two sides' elements as float64 vectors."""


class BlendRule(ABC):
    """How two tensors are blended, element by element, given sums over the whole tensors where it needs them."""

    name: ClassVar[str]
    """The value of `blend` in a recipe."""

    sums: ClassVar[tuple[str, ...]] = ()
    """The keys of `SUMS` that `blend` needs: with any, both tensors are read twice."""

    is_mean: ClassVar[bool] = False
    """Whether it is the weighted mean, which `torch.lerp` computes in one pass."""

    mergekit_method: ClassVar[str]
    """mergekit's name for it."""

    mergekit_parameter: ClassVar[str | None] = None
    """The mergekit parameter that is alpha itself; None for a method with a weight for each model."""

    @property
    def passes(self) -> int:
        """How often the tensors are read."""
        return 2 if self.sums else 1

    @abstractmethod
    def blend(
        self, pre: "torch.Tensor", post: "torch.Tensor", alpha: float, sums: Mapping[str, float]
    ) -> "torch.Tensor":
        """The blend of two float32 or float64 vectors of the same length; may overwrite both."""

    @abstractmethod
    def describe(self, alpha: float) -> str:
        """The blend in words, for plans and model cards."""


class Linear(BlendRule):
    """The weighted mean: the paper's soup (section 4.1)."""

    name = "linear"
    is_mean = True
    mergekit_method = "linear"

    def blend(
        self, pre: "torch.Tensor", post: "torch.Tensor", alpha: float, sums: Mapping[str, float]
    ) -> "torch.Tensor":
        del sums
        return weighted_sum(pre, alpha, post, 1 - alpha)

    def describe(self, alpha: float) -> str:
        return f"{alpha:g} × pre + {1 - alpha:g} × post"


class Slerp(BlendRule):
    """On the great circle from the post-trained tensor to the pre-trained one (Shoemake, "Animating rotation with
    quaternion curves", 1985); the mean where they are parallel to 0.9995, as in mergekit.
    """

    name = "slerp"
    sums = ("pre_squared", "post_squared", "product")
    mergekit_method = "slerp"
    mergekit_parameter = "t"

    def blend(
        self, pre: "torch.Tensor", post: "torch.Tensor", alpha: float, sums: Mapping[str, float]
    ) -> "torch.Tensor":
        return weighted_sum(pre, self.weight(alpha, sums), post, self.weight(1 - alpha, sums))

    def weight(self, share: float, sums: Mapping[str, float]) -> float:
        """The factor of the side that is `share` of the way."""
        pre, post = (sqrt(sums[key]) if sums[key] > 1e-16 else 1.0 for key in ("pre_squared", "post_squared"))
        cosine = max(-1.0, min(1.0, sums["product"] / (pre * post)))
        if abs(cosine) > 0.9995:
            return share
        angle = acos(cosine)
        return sin(share * angle) / sin(angle)

    def describe(self, alpha: float) -> str:
        return f"slerp, {alpha:g} of the way from post to pre"


def weighted_sum(pre: "torch.Tensor", pre_weight: float, post: "torch.Tensor", post_weight: float) -> "torch.Tensor":
    """Two multiplications and one addition, not fused: neither vector width nor thread count changes the result."""
    return pre.mul_(pre_weight).add_(post.mul_(post_weight))


BLEND_RULES: dict[str, BlendRule] = {rule.name: rule for rule in (Linear(), Slerp())}
"""The rules by the names that recipes give them."""
