"""A step of Adam and of the average of the weights, on the CPU in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from numba import carray, njit
from torch import Tensor

from atlas.models.base import Model
from atlas.models.threads import at_once, heavy_threads
from atlas.training.averaging import WeightAverage
from loaders.addresses import floats_at

Array = npt.NDArray[Any]

# Columns of the table of parameters: addresses, and the number of elements.
_GRADIENT, _WEIGHT, _MEAN, _SQUARE, _AVERAGE, _N = range(6)

_A_THREAD: Final = 2**17
"""Elements for which a thread more pays."""
_SHARED: Final = 2**14
"""Elements from which on a parameter is shared out to the threads."""
_LINE: Final = 16
"""Elements of a line of the cache: where the part of a thread ends."""
_BLOCK: Final = 2048
"""Elements that are gone through while they are in the nearest cache."""


class Stepper:
    """Steps of an optimiser and of the average of the weights.

    Where all parameters are float32 on the CPU they are made here, by Kingma and Ba 2015, Algorithm
    1: torch's Adam has several operations for every parameter, and copies the gradients of weights
    that lie by columns. Elsewhere they are torch's. The state is kept in the optimiser either way.

    Parameters
    ----------
    optimizer
        Adam without AMSGrad.
    average
        Of the model's weights; None for none.
    model
        Whose parameters the optimiser has.
    """

    def __init__(
        self, optimizer: torch.optim.Adam, average: WeightAverage | None, model: Model
    ) -> None:
        self._optimizer, self._average, self._model = optimizer, average, model
        (self._group,) = optimizer.param_groups
        parameters: list[Tensor] = self._group["params"]
        self._compiled = all(
            parameter.device.type == "cpu" and parameter.dtype == torch.float32
            for parameter in parameters
        )
        self._averages: dict[Tensor, Tensor] = {}
        self._others: list[str] = []
        if average is not None:
            named = dict(model.named_parameters())
            self._averages = {own: average.weights[name] for name, own in named.items()}
            self._others = [name for name in average.weights if name not in named]
        self._places: dict[Tensor, tuple[list[int], Array]] = {}

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Make a step with the gradients at hand.

        Parameters
        ----------
        number
            Steps that the average has taken in before.
        """
        if not self._compiled:
            self._optimizer.step()
            if self._average is not None:
                self._average.update(self._model, number)
            return
        beta1, beta2 = self._group["betas"]
        held, table, rates = [], [], []
        for parameter in self._group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)
                held.append(gradient)
            if parameter not in self._places:
                self._places[parameter] = self._place(parameter)
            places, steps = self._places[parameter]
            steps += 1
            table.append([gradient.data_ptr(), *places])
            done = float(steps)
            rates.append([self._group["lr"] / (1 - beta1**done), (1 - beta2**done) ** -0.5])
        share = 0.0 if self._average is None else self._average.share(number)
        scalars = (
            (beta1, 1 - beta1, beta2, 1 - beta2),
            (self._group["weight_decay"], self._group["eps"], share),
        )
        given = np.array(table, np.int64), np.array(rates, np.float32), *map(_float32, scalars)
        n_threads = max(1, min(heavy_threads(), sum(row[_N] for row in table) // _A_THREAD))
        at_once([partial(_pass, *given, part, n_threads) for part in range(n_threads)])
        if self._average is not None and self._others:
            self._average.update(self._model, number, self._others)

    def _place(self, parameter: Tensor) -> tuple[list[int], Array]:
        """Where a parameter, its moments and its average lie, its elements, and its steps."""
        state = self._optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        average = self._averages.get(parameter)
        tensors = [parameter, state["exp_avg"], state["exp_avg_sq"]]
        tensors += [] if average is None else [average]
        assert all(tensor.stride() == parameter.stride() for tensor in tensors)
        addresses = [tensor.data_ptr() for tensor in tensors]
        return [*addresses, *[0] * (4 - len(addresses)), parameter.numel()], state["step"].numpy()


def _float32(values: Sequence[float]) -> Array:
    return np.array(values, np.float32)


@njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _pass(table: Array, rates: Array, betas: Array, others: Array, part: int, n_parts: int) -> None:
    """One thread's share of all parameters.

    Parameters
    ----------
    table
        See the names of its columns: int64, (n_parameters, 6).
    rates
        Learning rate by the correction of the mean's bias, and one over the root of that of the
        square's: float32, (n_parameters, 2).
    betas
        β₁, 1 - β₁, β₂, 1 - β₂: float32.
    others
        Weight decay, ε, and the share that the average moves by: float32.
    part, n_parts
        Which share of how many.
    """
    decay, eps, share = others[0], others[1], others[2]
    for i in range(len(table)):
        n = table[i, _N]
        begin, stop = 0, n
        if n >= _SHARED:
            begin = n // _LINE * part // n_parts * _LINE
            stop = n // _LINE * (part + 1) // n_parts * _LINE if part + 1 < n_parts else n
        elif part > 0:
            continue
        gradient = carray(floats_at(table[i, _GRADIENT]), (n,))
        weight = carray(floats_at(table[i, _WEIGHT]), (n,))
        mean = carray(floats_at(table[i, _MEAN]), (n,))
        square = carray(floats_at(table[i, _SQUARE]), (n,))
        for a in range(begin, stop, _BLOCK):
            b = min(a + _BLOCK, stop)
            if decay != 0:
                _decay(gradient[a:b], weight[a:b], decay)
            _moments(gradient[a:b], mean[a:b], square[a:b], betas)
            _move(weight[a:b], mean[a:b], square[a:b], rates[i, 0], rates[i, 1], eps)
            if table[i, _AVERAGE]:
                average = carray(floats_at(table[i, _AVERAGE]), (n,))
                _follow(average[a:b], weight[a:b], share)


# A loop for each, because LLVM gives up on one of many arrays that might overlap.


@njit(fastmath={"contract"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _decay(gradient: Array, weight: Array, decay: float) -> None:
    for j in range(len(gradient)):
        gradient[j] += decay * weight[j]


@njit(fastmath={"contract"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _moments(gradient: Array, mean: Array, square: Array, betas: Array) -> None:
    beta1, rest1, beta2, rest2 = betas[0], betas[1], betas[2], betas[3]
    for j in range(len(gradient)):
        g = gradient[j]
        mean[j] = beta1 * mean[j] + rest1 * g
        square[j] = beta2 * square[j] + rest2 * g * g


@njit(fastmath={"contract"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _move(weight: Array, mean: Array, square: Array, rate: float, scale: float, eps: float) -> None:
    for j in range(len(weight)):
        weight[j] -= rate * mean[j] / (np.sqrt(square[j]) * scale + eps)


@njit(fastmath={"contract"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _follow(average: Array, weight: Array, share: float) -> None:
    for j in range(len(average)):
        average[j] += share * (weight[j] - average[j])
