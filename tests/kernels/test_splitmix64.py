from itertools import islice

import numpy as np

from isthmus.kernels.splitmix64 import MASK, mix, mix_array, outputs


def test_outputs_are_those_of_a_published_test_vector() -> None:
    assert list(islice(outputs(1234567), 3)) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_arrays_are_mixed_as_single_numbers() -> None:
    numbers = [0, 1, MASK, 1 << 63, 0x9E3779B97F4A7C15]
    assert mix_array(np.array(numbers, dtype=np.uint64)).tolist() == [mix(number) for number in numbers]
