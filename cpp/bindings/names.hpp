// The names by which Python asks for a cell, an activation or an operation.
#pragma once

#include <string>
#include <tuple>
#include <utility>

#include "../core/contract.hpp"

namespace gatewise {

inline constexpr std::pair<const char*, Cell> cells[] = {{"lstm", Cell::lstm},
                                                         {"gru", Cell::gru},
                                                         {"gru_reset_before", Cell::gru_reset_before},
                                                         {"rnn_tanh", Cell::rnn_tanh},
                                                         {"rnn_relu", Cell::rnn_relu}};
Cell cell_of(const std::string& name);

// Name, alpha and beta.
using NamedFunction = std::tuple<std::string, double, double>;
Function function_of(const NamedFunction& function);

Operation operation_of(const std::string& name);

}  // namespace gatewise
