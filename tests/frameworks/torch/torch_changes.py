"""Changes of a module's weights, in all the ways that programs make them."""

import numpy as np
from torch_modules import CELLS, NN, assert_equal_results, members, step_state, torch, twins, weight_of


def assert_change_is_seen(kind, change, rows, prepare=lambda module: module):
    """After a change of its weights a module gives another output, the same as torch.nn's with these weights."""
    theirs, ours = twins(kind, 5, 9)
    prepare(ours.eval())
    is_cell = kind in CELLS
    x = torch.randn(*(() if is_cell else (rows,)), rows if is_cell else 1, 5, dtype=torch.float64)
    state = step_state(ours, rows) if is_cell else None
    with torch.no_grad():
        for _ in range(2):
            before = members(ours(x, state))[0]
    change(ours)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        after, expected = members(ours(x, state))[0], members(theirs(x, state))[0]
    assert not torch.equal(before, after)
    assert_equal_results([after], [expected])


def by_optimizer(module):
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    members(module(torch.ones(3, 5, dtype=weight_of(module).dtype)))[0].sum().backward()
    optimizer.step()


def in_place(module):
    with torch.no_grad():
        weight_of(module).mul_(2)


def by_state_dict(module):
    module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()})


def by_another_parameter(module):
    name = "weight_ih" if hasattr(module, "weight_ih") else "weight_ih_l0"
    setattr(module, name, NN.Parameter(2 * weight_of(module).detach()))


def by_data(module):
    weight_of(module).data = 2 * weight_of(module).data


def through_numpy(module):
    weight_of(module).detach().numpy()[...] *= 2


def through_data(module):
    weight_of(module).data.mul_(2)


def by_fused_optimizer(module):
    optimizer = torch.optim.Adam(module.parameters(), 0.1, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def through_a_vector(module):
    """All parameters are views of one vector, which is changed."""
    vector = NN.utils.parameters_to_vector(module.parameters()).detach()
    NN.utils.vector_to_parameters(vector, module.parameters())
    with torch.no_grad():
        module(torch.ones(*(1,) * isinstance(module, NN.RNNBase), 1, 5, dtype=vector.dtype))
    vector.mul_(2)


def through_the_storage(module):
    storage = weight_of(module).untyped_storage()
    doubled = 2 * torch.empty(0, dtype=weight_of(module).dtype).set_(storage.clone())
    storage.copy_(doubled.untyped_storage())


def through_dlpack(module):
    torch.from_dlpack(weight_of(module).detach()).data.mul_(2)


COUNTED = [by_optimizer, in_place, by_state_dict, by_another_parameter, by_data]  # by PyTorch
WHOLE = [
    *COUNTED,
    by_fused_optimizer,
    through_numpy,
    through_data,
    through_a_vector,
    through_the_storage,
    through_dlpack,
]


def matrices(module):
    """The memory of the weights and biases: PyTorch does not count what is written to it."""
    return [parameter.detach().numpy() for parameter in module.parameters()]


def one_number(module):
    matrices(module)[0][1, 2] *= 2


def the_last_number(module):
    matrices(module)[1].flat[-1] += 1


def one_bias(module):
    matrices(module)[-1][3] += 0.5


def one_sign(module):
    matrices(module)[0][4, 0] *= -1


def all_signs(module):
    for matrix in matrices(module):
        matrix *= -1


def one_row(module):
    matrices(module)[1][5] = 1


def one_column(module):
    matrices(module)[0][:, 3] = 0


def two_numbers_exchanged(module):
    matrix = matrices(module)[0]
    matrix[0, 1], matrix[1, 1] = matrix[1, 1], matrix[0, 1].copy()


def rows_reversed(module):
    matrix = matrices(module)[1]
    matrix[...] = matrix[::-1].copy()


def columns_rolled(module):
    matrix = matrices(module)[1]
    matrix[...] = np.roll(matrix, 1, axis=1)


def more_and_less(module):
    """One number grows by as much as another shrinks, so that sums stay the same."""
    matrix = matrices(module)[1]
    matrix[2, 3] += 0.25
    matrix[3, 3] -= 0.25


def clamped(module):
    for matrix in matrices(module):
        np.clip(matrix, -0.33, 0.33, out=matrix)


PARTIAL = [
    one_number,
    the_last_number,
    one_bias,
    one_sign,
    all_signs,
    one_row,
    one_column,
    two_numbers_exchanged,
    rows_reversed,
    columns_rolled,
    more_and_less,
    clamped,
]
