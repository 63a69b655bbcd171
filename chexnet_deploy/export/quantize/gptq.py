"""Round a convolution's weights so that its outputs, not the weights, change least.

GPTQ (Frantar et al. 2023, arXiv 2210.17323): weights are rounded one after another, and what one rounding does to the
outputs is made up for by those not rounded yet, as far as their inputs move together on the calibration images. On this
network's first convolution, whose neighbouring pixels move together almost fully, the output's error falls by 20 dB; on
all others together by 10 to 17 dB.
"""

import numpy as np
from numpy.typing import NDArray

INT8_MAX = 127  # symmetric: -128 is left out, so that negation stays exact and TensorRT takes it
# AVX2 adds the products of two neighbouring channels in 16 bits, and saturates: 255 * 128 is the largest sum that fits.
PAIR_MAX = 128

# Of the mean input power; keeps rarely active inputs from being given what they can't undo. With the hundredth of the paper the
# first convolution, whose inputs move together almost fully, makes four times the noise.
_DAMPING = 1e-3
_BLOCK = 64  # columns whose corrections are applied to the rest in one matrix product


def round_weights(
    weights: NDArray[np.float64],
    scales: NDArray[np.float64],
    moments: NDArray[np.float64],
    *,
    fits_avx2: bool,
) -> NDArray[np.int8]:
    """Return integers q such that q * scales gives nearly the outputs of `weights`.

    Args:
        weights: [O, C, kernel height, kernel width].
        scales: [O] what one step of each output channel is worth.
        moments: [K, K] mean of p pT over the inputs p; K = C * kernel height * kernel width.
        fits_avx2: keep the magnitudes of channels 2i and 2i + 1 together so small that a CPU without VNNI, which adds their
            products with uint8 activations in 16 bits, does not saturate.

    Returns:
        int8 in the shape of `weights`.
    """
    return _round_rows(
        weights.reshape(len(weights), -1),
        scales,
        moments,
        _neighbours(weights.shape[1], weights[0, 0].size) if fits_avx2 else None,
    ).reshape(weights.shape)


def largest_pairs(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each output channel the largest sum of magnitudes of channels 2i and 2i + 1 at one kernel position.

    Args:
        weights: [O, C, kernel height, kernel width].
    """
    magnitudes = np.abs(weights)
    even, odd = magnitudes[:, ::2], magnitudes[:, 1::2]
    sums = even.copy()
    sums[:, : odd.shape[1]] += odd
    largest: NDArray[np.float64] = sums.reshape(len(weights), -1).max(axis=1)
    return largest


def _neighbours(n_channels: int, n_positions: int) -> NDArray[np.intp]:
    """Return for each of the K inputs the one that is added to it first; of an odd last channel itself."""
    channels = np.arange(n_channels)
    others = np.minimum(channels ^ 1, n_channels - 1)
    neighbours: NDArray[np.intp] = (others[:, None] * n_positions + np.arange(n_positions)).reshape(-1)
    return neighbours


def _round_rows(
    weights: NDArray[np.float64],
    scales: NDArray[np.float64],
    moments: NDArray[np.float64],
    neighbours: NDArray[np.intp] | None,
) -> NDArray[np.int8]:
    n_inputs = len(moments)
    # Where nothing is ever read any rounding is as good as another.
    power = float(np.mean(np.diag(moments))) or 1.0
    # Strongest inputs first: their errors are made up for by the many that follow.
    order = np.argsort(-np.diag(moments), kind="stable")
    damped = moments[np.ix_(order, order)] + np.eye(n_inputs) * (_DAMPING * power)
    inverse_root = np.linalg.cholesky(np.linalg.inv(damped)).T.copy()
    left, rounded = weights[:, order].copy(), np.zeros(weights.shape, np.int8)
    for start in range(0, n_inputs, _BLOCK):
        stop = min(start + _BLOCK, n_inputs)
        errors = np.empty((len(weights), stop - start))
        for k in range(start, stop):
            limit: NDArray[np.int64] | int = INT8_MAX
            if neighbours is not None:
                # Not rounded yet is 0, which leaves all to the first of the two; the second one's error is made up for.
                taken = np.abs(rounded[:, neighbours[order[k]]].astype(np.int64))
                limit = np.minimum(INT8_MAX, PAIR_MAX - taken)
            steps = np.clip(np.rint(left[:, k] / scales), -limit, limit)
            rounded[:, order[k]] = steps
            error = (left[:, k] - steps * scales) / inverse_root[k, k]
            errors[:, k - start] = error
            left[:, k + 1 : stop] -= np.outer(error, inverse_root[k, k + 1 : stop])
        left[:, stop:] -= errors @ inverse_root[start:stop, stop:]
    return rounded
