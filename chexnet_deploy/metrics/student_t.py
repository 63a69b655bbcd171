"""Student's t distribution without SciPy, which a scanner does not carry; tested against it."""

import math
from statistics import NormalDist

_NORMAL = NormalDist()


def student_t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Return the quantile of Student's t distribution; degrees of freedom need not be whole.

    Args:
        probability: within (0, 1).
        degrees_of_freedom: positive.
    """
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees_of_freedom)
    # Newton's method from below: the tail is convex beyond 0, so no step overshoots.
    t = max(_NORMAL.inv_cdf(probability), 0.0)
    log_scale = math.lgamma((degrees_of_freedom + 1) / 2) - math.lgamma(degrees_of_freedom / 2)
    scale = math.exp(log_scale) / math.sqrt(math.pi * degrees_of_freedom)
    for _ in range(200):
        density = scale * (1 + t * t / degrees_of_freedom) ** (-(degrees_of_freedom + 1) / 2)
        step = (student_t_tail(t, degrees_of_freedom) - (1 - probability)) / density
        t += step
        if abs(step) <= 1e-13 * max(t, 1.0):
            break
    return t


def student_t_tail(t: float, degrees_of_freedom: float) -> float:
    """Return the chance that Student's t exceeds `t`."""
    squared = t * t
    if squared == 0:
        return 0.5
    x, y = degrees_of_freedom / (degrees_of_freedom + squared), squared / (degrees_of_freedom + squared)
    tail = 0.5 * _incomplete_beta(degrees_of_freedom / 2, 0.5, x, y)
    return tail if t > 0 else 1 - tail


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), y = 1 - x, by Lentz's continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, y, x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for k in range(1, 10_000):
        even = k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k))
        odd = -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1))
        before = value
        for step in (even, odd):
            d = 1 / (1 + step * d)
            c = 1 + step / c
            value *= c * d
        if abs(value - before) <= 1e-15 * abs(value):
            break
    return front * value
